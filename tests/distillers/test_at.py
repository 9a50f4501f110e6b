"""AT against published values, a plain loop and finite differences; maps of nothing."""

from math import sqrt

import pytest
import torch

from mdistill.distillers.at import at_loss

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("at"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    pair = (golden_features.stages(given, side) for side in ("student", "teacher"))
    golden_features.check(row, at_loss(*pair, power=int(golden_features.arguments(row)["p"])), given)


def maps(seed, channels, size=2, batch=3):
    return examples.logits(seed, batch * channels, size * size).view(batch, channels, size, size)


def by_loop(student, teacher):
    """Of two lists of samples of channels of positions."""
    total, count = 0.0, 0
    for pair in zip(student, teacher, strict=True):
        attention = []
        for sample in pair:
            values = [sum(channel[p] ** 2 for channel in sample) / len(sample) for p in range(len(sample[0]))]
            length = sqrt(sum(value**2 for value in values))
            attention.append([value / length for value in values])
        total += sum((s - t) ** 2 for s, t in zip(*attention, strict=True))
        count += len(attention[0])
    return total / count


def test_equals_a_loop():
    student, teacher = [maps(0, 3), maps(1, 2, 3)], [maps(2, 5), maps(3, 4, 3)]
    expected = sum(by_loop(s.flatten(2).tolist(), t.flatten(2).tolist()) for s, t in zip(student, teacher, strict=True))
    assert at_loss(student, teacher, power=2).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_equals_finite_differences():
    student, teacher = maps(0, 3, 4).requires_grad_(), maps(1, 2)
    assert torch.autograd.gradcheck(lambda s: at_loss([s], [teacher], power=2), (student,))


def test_surplus_stages_are_left_out():
    student, teacher = [maps(0, 3), maps(1, 2)], [maps(2, 5)]
    assert at_loss(student, teacher, power=2) == at_loss(student[:1], teacher, power=2)


def test_only_the_shape_of_attention_counts():
    student, teacher = maps(0, 3), maps(1, 3)
    torch.testing.assert_close(at_loss([7 * student], [teacher], power=2), at_loss([student], [teacher], power=2))
    torch.testing.assert_close(at_loss([-7 * teacher], [teacher], power=2), torch.tensor(0.0).double())


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_value_and_gradient_are_finite_and_moderate(scale):
    student, teacher = (scale * maps(0, 3)).float().requires_grad_(), maps(1, 3).float()
    at_loss([student], [teacher], power=2).backward()
    assert student.grad.abs().max() < 1e5


def test_the_stem_is_left_out():
    distiller = examples.build("at").eval()
    signals = distiller(examples.batch(), examples.epoch()).signals
    student, teacher = signals.student_features.stages[1:], signals.teacher_features.stages[1:]
    torch.testing.assert_close(distiller.distillation(signals)["at"], 1000 * at_loss(student, teacher, power=2))
