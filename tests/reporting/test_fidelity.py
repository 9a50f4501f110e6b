"""Agreement, divergence, calibration and matrices over classes, each against a plain loop."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mdistill.reporting.fidelity import (
    agreement,
    calibration,
    class_difference,
    class_means,
    logit_correlation,
    matrix_difference,
    mean_kl,
    nearest_classes,
)

IMAGES, CLASSES = 40, 5


@pytest.fixture
def both() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a student and of a teacher, and the classes."""
    generator = torch.Generator().manual_seed(3)
    target = torch.arange(IMAGES) % CLASSES
    teacher = 2 * torch.randn(IMAGES, CLASSES, generator=generator)
    return teacher + torch.randn(IMAGES, CLASSES, generator=generator), teacher, target


def probabilities(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def test_agreement_counts_equal_predictions(both: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = (each.tolist() for each in both)
    same = [a.index(max(a)) == b.index(max(b)) for a, b in zip(student, teacher, strict=True)]
    assert 0 < sum(same) < IMAGES
    assert agreement(*both[:2]) == pytest.approx(100 * sum(same) / IMAGES)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_is_from_the_teacher(both: tuple[Tensor, Tensor, Tensor], temperature: float) -> None:
    total = 0.0
    for student, teacher in zip(both[0].tolist(), both[1].tolist(), strict=True):
        q, p = probabilities(student, temperature), probabilities(teacher, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert mean_kl(both[0], both[1], temperature) == pytest.approx(total / IMAGES, rel=1e-6)
    assert mean_kl(both[1], both[1]) == 0


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_bins_of_confidence(both: tuple[Tensor, Tensor, Tensor], bins: int) -> None:
    logits, _, target = both
    rows = [(probabilities(row), label) for row, label in zip(logits.double().tolist(), target.tolist(), strict=True)]
    sure = [(max(row), row.index(max(row)) == label) for row, label in rows]
    found, gap = calibration(logits, target, bins), 0.0
    for number, (low, high) in enumerate(pairwise(k / bins for k in range(bins + 1))):
        inside = [(p, right) for p, right in sure if low < p <= high]
        assert found.images[number] == len(inside)
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            assert found.confidence[number] == pytest.approx(confidence)
            assert found.accuracy[number] == pytest.approx(accuracy)
            gap += len(inside) / IMAGES * abs(confidence - accuracy)
    assert found.ece == pytest.approx(gap)


def test_calibration_at_the_ends() -> None:
    """Wholly sure and right: the last bin, no error. Logits of 1e4 stay finite."""
    logits = torch.eye(3) * 1e4
    found = calibration(logits, torch.arange(3), 10)
    assert (found.images[-1], found.ece) == (3, 0.0)
    assert calibration(logits, torch.tensor([1, 2, 0]), 10).ece == 1.0


def test_correlations_of_logits(both: tuple[Tensor, Tensor, Tensor]) -> None:
    columns = both[0].double().T.tolist()
    found = logit_correlation(both[0])
    for i in range(CLASSES):
        for j in range(CLASSES):
            a, b = ([value - sum(column) / IMAGES for value in column] for column in (columns[i], columns[j]))
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            length = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
            assert float(found[i, j]) == pytest.approx(dot / length)
    assert bool(logit_correlation(torch.ones(4, 3)).eq(0).all())


def test_means_of_classes_and_what_differs(both: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, target = both
    means = class_means(student, target)
    for label in range(CLASSES):
        rows = [row for row, own in zip(student.double().tolist(), target.tolist(), strict=True) if own == label]
        assert means[label].tolist() == pytest.approx([sum(column) / len(rows) for column in zip(*rows, strict=True)])
    assert class_means(student[:1], target[:1])[1].tolist() == [0.0] * CLASSES
    difference = matrix_difference(means, class_means(teacher, target))
    assert difference.diagonal().tolist() == [0.0] * CLASSES
    assert float(difference[0, 1]) == pytest.approx(abs(float(means[0, 1] - class_means(teacher, target)[0, 1])))
    gaps = [
        [abs(a - b) for a, b in zip(*rows, strict=True)]
        for rows in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    expected = [sum(column) / IMAGES for column in zip(*gaps, strict=True)]
    assert class_difference(student, teacher).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_nearest_classes_have_the_highest_mean_logits(both: tuple[Tensor, Tensor, Tensor]) -> None:
    row = class_means(both[0], both[2])[2].tolist()
    best = sorted(range(CLASSES), key=lambda number: -row[number])[:3]
    assert nearest_classes(both[0], both[2], 2, 3) == [(number, pytest.approx(row[number])) for number in best]
    assert len(nearest_classes(both[0], both[2], 0, 99)) == CLASSES
