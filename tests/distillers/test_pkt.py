"""PKT against published values, a plain loop and finite differences; features of nothing."""

from math import log, sqrt

import pytest
import torch

from mdistill.distillers.pkt import pkt_loss

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("pkt"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    golden_features.check(row, pkt_loss(given["student_pooled"], given["teacher_pooled"]), given)


def by_loop(rows):
    lengths = [sqrt(sum(a**2 for a in v)) + 1e-7 for v in rows]
    found = []
    for v, own in zip(rows, lengths, strict=True):
        cosines = [
            sum(a * b for a, b in zip(v, w, strict=True)) / own / other for w, other in zip(rows, lengths, strict=True)
        ]
        kernel = [(cosine + 1) / 2 for cosine in cosines]
        found += [value / sum(kernel) for value in kernel]
    return found


def test_equals_a_loop():
    student, teacher = examples.logits(0, 5, 3), examples.logits(1, 5, 4)
    pairs = zip(by_loop(student.tolist()), by_loop(teacher.tolist()), strict=True)
    expected = sum(t * log((t + 1e-7) / (s + 1e-7)) for s, t in pairs) / 25
    assert pkt_loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)


def test_gradient_equals_finite_differences():
    student, teacher = examples.logits(0, 4, 3).requires_grad_(), examples.logits(1, 4, 3)
    assert torch.autograd.gradcheck(lambda s: pkt_loss(s, teacher), (student,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_value_and_gradient_are_finite(scale, dtype):
    student, teacher = (scale * examples.logits(0, 4, 3)).to(dtype), examples.logits(1, 4, 3).to(dtype)
    student[0] = 0
    for size in (4, 1):
        features = student[:size].clone().requires_grad_()
        value = pkt_loss(features, teacher[:size])
        value.backward()
        assert value.isfinite()
        assert value > -1e-6
        assert features.grad.isfinite().all()


def test_is_0_where_the_student_has_the_teacher_s_directions():
    teacher = examples.logits(1, 5, 3)
    torch.testing.assert_close(pkt_loss(7 * teacher, teacher), torch.tensor(0.0).double(), rtol=0, atol=1e-9)
