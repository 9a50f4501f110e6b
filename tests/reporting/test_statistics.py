"""Statistics of comparisons, against hand-worked cases, closed forms, printed tables and plain loops."""

import math
from random import Random
from statistics import NormalDist

import pytest

from mdistill.reporting.statistics import (
    holm,
    mean_std,
    mean_std_text,
    paired,
    stratified,
    t_quantile,
    t_two_sided,
)


def test_mean_and_sample_deviation_by_hand() -> None:
    """70, 71 and 72: mean 71, squares 1 + 0 + 1 over n - 1 = 2."""
    assert mean_std([70.0, 71.0, 72.0]) == (71.0, 1.0)
    assert mean_std([70.5]) == (70.5, None)
    assert mean_std_text([70.0, 71.0, 72.0]) == "71.00 ± 1.00"
    assert mean_std_text([70.126]) == "70.13"
    with pytest.raises(ValueError, match="no value"):
        mean_std([])


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [  # as printed in tables of Student's t
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 5, 2.571),
        (0.95, 10, 1.812),
        (0.995, 20, 2.845),
        (0.975, 30, 2.042),
        (0.975, 120, 1.980),
    ],
)
def test_quantiles_as_in_printed_tables(probability: float, freedom: int, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 20.0, 1e4])
def test_tails_of_one_and_two_degrees_of_freedom_in_closed_form(t: float) -> None:
    assert t_two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9, abs=1e-12)
    assert t_two_sided(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-7, abs=1e-12)


def density(t: float, freedom: int) -> float:
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    return scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2)


@pytest.mark.parametrize("freedom", [3, 7, 14, 60])
def test_tails_are_the_integral_of_the_density(freedom: int) -> None:
    """Simpson's rule from 0 to t."""
    for t in (0.5, 2.0, 4.0):
        steps = 2000
        width = t / steps
        weights = [1 if k in (0, steps) else 4 if k % 2 else 2 for k in range(steps + 1)]
        inside = width / 3 * math.fsum(w * density(k * width, freedom) for k, w in enumerate(weights))
        assert t_two_sided(t, freedom) == pytest.approx(1 - 2 * inside, rel=1e-8)


def test_with_many_degrees_of_freedom_it_is_the_normal_distribution() -> None:
    assert t_quantile(0.975, 10**6) == pytest.approx(NormalDist().inv_cdf(0.975), rel=1e-5)
    assert t_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match=r"\[0.5, 1\)"):
        t_quantile(1.0, 3)


def test_a_paired_comparison_by_hand() -> None:
    """1, 3 and 2: mean 2, deviation 1, error 1 / sqrt(3); t = 2 sqrt(3) with 2 degrees of freedom."""
    result = paired([1.0, 3.0, 2.0])
    assert result is not None
    half = 4.302653 / math.sqrt(3)
    assert (result.difference, result.count, result.freedom) == (2.0, 3, 2)
    assert (result.low, result.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)
    t = 2 * math.sqrt(3)
    assert result.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert paired([1.0]) is None
    assert paired([]) is None


@pytest.mark.parametrize("differences", [[0.5, 0.5], [0.0, 0.0], [71.0 - 70.0, 71.1 - 70.1, 70.3 - 69.3]])
def test_equal_differences_tell_nothing_of_how_they_vary(differences: list[float]) -> None:
    """So there is neither an interval nor a p; what arithmetic adds to equal ones is no variance."""
    for result in (paired(differences), stratified([differences, [2.0, 2.0]])):
        assert result is not None
        assert (result.low, result.high, result.p) == (None, None, None)
    result = paired([*differences, differences[0] + 0.01])
    assert result is not None
    assert result.p is not None
    assert stratified([differences, [2.0, 2.01]]) != stratified([differences, [2.0, 2.0]])


def test_two_pairs_by_hand() -> None:
    """Pair 1: 1, 3 (mean 2, squares 2). Pair 2: 4, 5, 6 (mean 5, squares 2). Estimate 3.5, with 3 degrees of freedom.

    s^2 = 4 / 3, variance s^2 / 4 (1 / 2 + 1 / 3) = 5 / 18.
    """
    result = stratified([[1.0, 3.0], [4.0, 5.0, 6.0], []])
    assert result is not None
    assert (result.difference, result.freedom, result.count) == (3.5, 3, 5)
    assert result.high - 3.5 == pytest.approx(3.182446 * math.sqrt(5 / 18), abs=1e-5)
    assert stratified([[1.0], [2.0]]) is None


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of 600 experiments with three pairs of unlike means and three seeds: 95 in 100, within three deviations."""
    draw, covered, trials = Random(3), 0, 600
    true = (0.5, -1.0, 2.0)
    for _ in range(trials):
        result = stratified([[draw.gauss(mean, 0.3) for _ in range(3)] for mean in true])
        assert result is not None
        covered += result.low <= 0.5 <= result.high
    assert abs(covered / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)


def test_holm_by_hand() -> None:
    """0.01, 0.02 and 0.03 sorted: 3 x 0.01, 2 x 0.02, and 0.03 raised to 0.04, what is before it."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_rejects_what_the_stepwise_procedure_rejects() -> None:
    draw = Random(5)
    for _ in range(50):
        p_values = [draw.random() ** 3 for _ in range(6)]
        rejected = set()
        for rank, index in enumerate(sorted(range(6), key=p_values.__getitem__)):  # from the smallest on
            if p_values[index] > 0.05 / (6 - rank):
                break
            rejected.add(index)
        assert {index for index, p in enumerate(holm(p_values)) if p <= 0.05} == rejected
