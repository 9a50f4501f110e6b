"""The learning rate as a pure function of the epoch."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["step", "cosine"]


def learning_rate(
    epoch: int, *, schedule: Schedule, lr: float, milestones: Sequence[int], gamma: float, epochs: int
) -> float:
    """The rate of ``epoch``, counted from 1.

    ``step``: ``lr * gamma**k``, k the number of milestones strictly below ``epoch``. With milestones (150, 180, 210)
    the first reduced epoch is 151, as in the published recipes.

    ``cosine``: ``lr (1 + cos(pi (epoch - 1) / epochs)) / 2``, Loshchilov, Hutter, arXiv:1608.03983, Eq. (5) without
    restarts, once an epoch: from ``lr`` in the first to nearly 0 in the last of all ``epochs``.
    """
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
    return float(lr * gamma ** bisect_left(milestones, epoch))
