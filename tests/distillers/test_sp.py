"""SP against published values, a plain loop and finite differences; images without activation."""

from math import sqrt

import pytest
import torch

from mdistill.distillers.sp import sp_loss

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("sp"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    maps = (golden_features.stages(given, side)[-1].flatten(1) for side in ("student", "teacher"))
    golden_features.check(row, sp_loss(*maps), given)


def by_loop(rows):
    found = []
    for v in rows:
        products = [sum(a * b for a, b in zip(v, w, strict=True)) for w in rows]
        length = sqrt(sum(product**2 for product in products))
        found += [product / length for product in products]
    return found


def test_equals_a_loop():
    student, teacher = examples.logits(0, 5, 3), examples.logits(1, 5, 4)
    pairs = zip(by_loop(student.tolist()), by_loop(teacher.tolist()), strict=True)
    assert sp_loss(student, teacher).item() == pytest.approx(sum((s - t) ** 2 for s, t in pairs) / 25, rel=1e-12)


def test_gradient_equals_finite_differences():
    student, teacher = examples.logits(0, 4, 3).requires_grad_(), examples.logits(1, 4, 3)
    assert torch.autograd.gradcheck(lambda s: sp_loss(s, teacher), (student,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_value_and_gradient_are_finite_and_moderate(scale, dtype):
    student, teacher = (scale * examples.logits(0, 4, 3)).to(dtype), examples.logits(1, 4, 3).to(dtype)
    student[0] = 0
    student.requires_grad_()
    value = sp_loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.abs().max() < 10


def test_reads_the_last_stage_unpooled():
    distiller = examples.build("sp").eval()
    signals = distiller(examples.batch(), examples.epoch()).signals
    student, teacher = signals.student_features.stages[-1], signals.teacher_features.stages[-1]
    expected = 3000 * sp_loss(student.flatten(1), teacher.flatten(1))
    torch.testing.assert_close(distiller.distillation(signals)["sp"], expected)
