"""Means, and paired comparisons of two methods: pure functions of numbers.

A comparison is paired: both methods were trained with the same seed on the same pair of teacher and student, so that
what a seed or a pair changes for both alike cancels in the difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

EQUAL = (
    1e-6  # points that differences computed from equal ones are apart at most; accuracies have steps of 1e-3 or more
)
_TERMS = 200  # of the continued fraction; about sqrt(a + b) of them are enough


@dataclass(frozen=True)
class Comparison:
    """How far one method is above another."""

    difference: float  # mean
    low: float | None  # of the 95 % interval; None where no difference varies, so that there is none
    high: float | None
    p: float | None  # two-sided, of no difference; None as above
    freedom: int  # degrees of freedom
    count: int  # differences that it is made of


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divisor n - 1); None of a single value.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("there is no value")
    mean = fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def mean_std_text(values: Sequence[float]) -> str:
    """``"70.93 ± 0.21"``; of a single value without the deviation."""
    mean, std = mean_std(values)
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def paired(differences: Sequence[float]) -> Comparison | None:
    """Student's paired t test: the mean of ``differences`` and its 95 % interval; None of fewer than two.

    Where all differences are equal there is neither an interval nor a p: accuracies are counts of images, so that two
    differences are equal by chance in one or two of a hundred comparisons.
    """
    return stratified([differences])


def stratified(groups: Sequence[Sequence[float]]) -> Comparison | None:
    """The mean over ``groups`` of their mean differences, each group weighing the same, and its 95 % interval.

    A group is a pair of teacher and student, its differences are those of the seeds. The variance is that of the
    differences about the means of their groups, pooled over all groups and taken to be the same in each:
    s^2 = sum (d - mean of its group)^2 / (N - G), variance of the estimate = s^2 / G^2 * sum 1 / n_g, with N - G
    degrees of freedom. So it says what further seeds on these same pairs would show, nothing of other pairs.

    Args:
        groups: percent; empty groups are left out.

    Returns:
        the comparison; None where no group has two differences.
    """
    groups = [group for group in groups if group]
    count = sum(len(group) for group in groups)
    freedom = count - len(groups)
    if freedom < 1:
        return None
    means = [fmean(group) for group in groups]
    if all(abs(each - mean) < EQUAL for group, mean in zip(groups, means, strict=True) for each in group):
        return Comparison(fmean(means), None, None, None, freedom, count)
    squares = math.fsum((each - mean) ** 2 for group, mean in zip(groups, means, strict=True) for each in group)
    variance = squares / freedom / len(groups) ** 2 * math.fsum(1 / len(group) for group in groups)
    difference, error = fmean(means), math.sqrt(variance)
    half = t_quantile(0.975, freedom) * error
    p = t_two_sided(difference / error, freedom)
    return Comparison(difference, difference - half, difference + half, p, freedom, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979), in the order given: none is smaller than it was, the family's error is kept.

    The i-th smallest of m (from 0) becomes the largest of (m - j) p_(j) over j up to i, at most 1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def t_two_sided(t: float, freedom: float) -> float:
    """The probability that Student's t is as far from 0 as ``t``.

    It is I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t^2).
    """
    return _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


@cache
def t_quantile(probability: float, freedom: float) -> float:
    """The value that Student's t stays below with ``probability``, which lies in [0.5, 1): by bisection of its tail.

    Raises:
        ValueError: another probability.
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"should lie in [0.5, 1), found {probability}")
    tails = 2 * (1 - probability)
    low, high = 0.0, 1.0
    while t_two_sided(high, freedom) > tails:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_two_sided(middle, freedom) > tails else (low, middle)
    return middle


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction of the other side converges fast
        return 1 - _incomplete_beta(1 - x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction = 1.0
    for step in range(_TERMS, 0, -1):
        half = step // 2
        if step % 2:
            term = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            term = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        fraction = 1 + term / fraction
    return math.exp(logarithm) / (a * fraction)
