"""Matrices over classes, each against a plain loop."""

import math

import pytest
import torch
from torch import Tensor

from mdistill.reporting.class_logits import (
    class_difference,
    class_means,
    logit_correlation,
    matrix_difference,
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
