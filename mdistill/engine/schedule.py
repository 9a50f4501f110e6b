"""The learning rate as a pure function of the epoch."""

from bisect import bisect_left
from collections.abc import Sequence


def learning_rate(epoch: int, *, lr: float, milestones: Sequence[int], gamma: float) -> float:
    """``lr * gamma**k``, k the number of milestones strictly below ``epoch`` (counted from 1).

    With milestones (150, 180, 210) the first reduced epoch is 151, as in the published recipes.
    """
    return float(lr * gamma ** bisect_left(milestones, epoch))
