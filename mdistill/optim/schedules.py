"""The learning rate as a pure function of the epoch."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["step", "cosine"]


def learning_rate(
    epoch: int,
    *,
    schedule: Schedule,
    lr: float,
    milestones: Sequence[int],
    gamma: float,
    epochs: int,
    warmup_epochs: int = 0,
    progress: float = 1.0,
) -> float:
    """The rate of a step of ``epoch``, counted from 1.

    ``step``: ``lr * gamma**k``, k the number of milestones strictly below ``epoch``. With milestones (150, 180, 210)
    the first reduced epoch is 151, as in the published recipes.

    ``cosine``: ``lr (1 + cos(pi (epoch - 1) / epochs)) / 2``, Loshchilov, Hutter, arXiv:1608.03983, Eq. (5) without
    restarts, once an epoch: from ``lr`` in the first to nearly 0 in the last of all ``epochs``.

    In the first ``warmup_epochs`` the schedule is multiplied by n / N, where step n, from 1, is one of the N steps of
    these epochs (Goyal et al., arXiv:1706.02677, Section 2.2, from 0): it rises with every step, and the last of them
    has the rate of the schedule, which does not wait for the warm-up.

    Args:
        progress: n over the steps in an epoch, of the steps of this epoch: 1 for its last one.
    """
    if schedule == "cosine":
        rate = lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
    else:
        rate = float(lr * gamma ** bisect_left(milestones, epoch))
    return rate * (epoch - 1 + progress) / warmup_epochs if epoch <= warmup_epochs else rate
