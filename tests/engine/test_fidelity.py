"""Calibration, classes, agreement and divergence against plain loops."""

import math

import pytest
import torch
from torch import Tensor

from mdistill.engine import fidelity
from mdistill.engine.fidelity import BINS, Observer
from mdistill.errors import RunFailed

IMAGES, CLASSES = 200, 7


def batch(seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two networks, and labels that the first one often gets right."""
    generator = torch.Generator().manual_seed(seed)
    logits, other = (scale * torch.randn(IMAGES, CLASSES, generator=generator) for _ in range(2))
    target = torch.randint(CLASSES, (IMAGES,), generator=generator)
    easy = torch.arange(IMAGES) % 2 == 0
    return logits, other, torch.where(easy, logits.argmax(dim=1), target)


def probabilities(row: Tensor) -> list[float]:
    """Of the classes, by Python's own arithmetic."""
    values = [float(value) for value in row]
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def test_the_calibration_error_is_that_of_a_plain_loop() -> None:
    logits, _, target = batch()
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for row, label in zip(logits, target.tolist(), strict=True):
        shares = probabilities(row)
        confidence = max(shares)
        number = next(k for k in range(BINS) if k / BINS < confidence <= (k + 1) / BINS)
        bins[number].append((confidence, shares.index(confidence) == label))
    expected = 0.0
    for held in bins:
        if held:
            accuracy = sum(right for _, right in held) / len(held)
            confidence = sum(each for each, _ in held) / len(held)
            expected += len(held) / IMAGES * abs(accuracy - confidence)
    sums = fidelity.calibration_sums(logits, target)
    assert sums[0].tolist() == [len(held) for held in bins]
    assert sums[2].tolist() == [sum(right for _, right in held) for held in bins]
    assert fidelity.calibration_error(sums) == pytest.approx(expected, rel=1e-12)
    assert 0.05 < expected < 0.6


def test_a_sure_network_is_as_wrong_as_it_is_inaccurate() -> None:
    """Confidence 1 in all predictions, three of four right; equal logits have confidence 1 / C and count as wrong."""
    logits = 1e4 * torch.eye(4)[torch.tensor([0, 1, 2, 3])]
    sums = fidelity.calibration_sums(logits, torch.tensor([0, 1, 2, 0]))
    assert sums[:, -1].tolist() == [4.0, 4.0, 3.0]
    assert fidelity.calibration_error(sums) == 0.25
    even = fidelity.calibration_sums(torch.zeros(2, 4), torch.tensor([0, 1]), bins=4)
    assert even[:, 0].tolist() == [2.0, 0.5, 0.0]


def test_classes_are_counted_as_in_a_plain_loop() -> None:
    logits, _, target = batch()
    logits[:10] = 0  # ties count against the network
    images, right = [0] * CLASSES, [0] * CLASSES
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        images[label] += 1
        right[label] += all(value < row[label] for number, value in enumerate(row) if number != label)
    assert fidelity.class_counts(logits, target).tolist() == [images, right]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_agreement_and_divergence_are_those_of_a_plain_loop(temperature: float) -> None:
    student, teacher, _ = batch()
    same, divergences = [], []
    for one, other in zip(student, teacher, strict=True):
        p, q = (probabilities(each.double() / temperature) for each in (other, one))
        same.append(p.index(max(p)) == q.index(max(q)))
        divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert fidelity.agreement(student, teacher).tolist() == same
    assert fidelity.divergence(student, teacher, temperature).tolist() == pytest.approx(divergences, rel=1e-6)
    assert fidelity.divergence(student, student).abs().max() < 1e-12


def test_extreme_logits_have_finite_figures() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    assert fidelity.divergence(logits, logits.flip(0)).isfinite().all()
    assert fidelity.calibration_sums(logits, torch.tensor([1, 2])).isfinite().all()


def test_batches_add_up() -> None:
    logits, teacher_logits, target = batch()
    images = torch.arange(IMAGES, dtype=torch.float32)[:, None, None, None]

    def teacher(image: Tensor) -> Tensor:
        return teacher_logits[image[:, 0, 0, 0].long()]

    observer = Observer(CLASSES, torch.device("cpu"), teacher=teacher, keep=True)
    for rows in torch.arange(IMAGES).split(64):
        observer(images[rows], logits[rows], target[rows])
    assert torch.allclose(observer.calibration, fidelity.calibration_sums(logits, target), rtol=1e-12)
    assert torch.equal(observer.classes, fidelity.class_counts(logits, target))
    against = observer.against_teacher()
    assert against is not None
    assert against.agreement == pytest.approx(100 * float(fidelity.agreement(logits, teacher_logits).double().mean()))
    assert against.divergence == pytest.approx(float(fidelity.divergence(logits, teacher_logits).mean()))
    assert against.top1 == pytest.approx(100 * float(fidelity.is_top1(teacher_logits, target).double().mean()))
    arrays = observer.arrays()
    assert arrays.keys() == {"logits", "labels", "teacher_logits"}
    assert torch.equal(torch.from_numpy(arrays["logits"]), logits)
    assert arrays["labels"].tolist() == target.tolist()
    teacher_logits[3, 0] = math.nan
    observer(images, logits, target)
    with pytest.raises(RunFailed, match="the teacher's logits are not finite"):
        observer.against_teacher()


def test_nothing_is_kept_or_compared_unless_it_is_asked_for() -> None:
    logits, _, target = batch()
    observer = Observer(CLASSES, torch.device("cpu"), teacher=None, keep=False)
    observer(torch.zeros(IMAGES, 3, 1, 1), logits, target)
    assert observer.arrays() == {}
    assert observer.against_teacher() is None
