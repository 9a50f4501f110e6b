"""NST against published values, a plain loop and finite differences; dead channels."""

from math import sqrt

import pytest
import torch

from mdistill.distillers.nst import nst_loss

from . import examples, golden_features
from .test_at import maps


@pytest.mark.parametrize("row", golden_features.cases("nst"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    golden_features.check(
        row, nst_loss(*(golden_features.stages(given, side) for side in ("student", "teacher"))), given
    )


def kernel_by_loop(first, second):
    total, count = 0.0, 0
    for channels, others in zip(first, second, strict=True):
        for a in channels:
            for b in others:
                lengths = sqrt(sum(x**2 for x in a)) * sqrt(sum(x**2 for x in b))
                total += (sum(x * y for x, y in zip(a, b, strict=True)) / lengths) ** 2
                count += 1
    return total / count


def test_equals_a_loop():
    student, teacher = [maps(0, 3), maps(1, 2, 3)], [maps(2, 5), maps(3, 4, 3)]
    expected = 0.0
    for pair in zip(student, teacher, strict=True):
        s, t = (stage.flatten(2).tolist() for stage in pair)
        expected += kernel_by_loop(t, t) + kernel_by_loop(s, s) - 2 * kernel_by_loop(s, t)
    assert nst_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_equals_finite_differences():
    student, teacher = maps(0, 3, 4).requires_grad_(), maps(1, 2)
    assert torch.autograd.gradcheck(lambda s: nst_loss([s], [teacher]), (student,))


def test_order_scale_and_sign_of_channels_do_not_count():
    teacher = maps(1, 3)
    factors = torch.tensor([-1.0, 3.0, 0.2]).double()[:, None, None]
    torch.testing.assert_close(nst_loss([factors * teacher.flip(1)], [teacher]), torch.tensor(0.0).double())


@pytest.mark.parametrize("dead", [slice(0, 1), slice(None)], ids=["one channel", "all channels"])
def test_dead_channels_have_no_gradient(dead):
    student = maps(0, 3)
    student[:, dead] = 0
    student.requires_grad_()
    nst_loss([student], [maps(1, 3)]).backward()
    assert student.grad.isfinite().all()
    assert student.grad[:, dead].abs().max() == 0


def test_the_stem_is_left_out():
    distiller = examples.build("nst").eval()
    signals = distiller(examples.batch(), examples.epoch()).signals
    student, teacher = signals.student_features.stages[1:], signals.teacher_features.stages[1:]
    torch.testing.assert_close(distiller.distillation(signals)["nst"], 50 * nst_loss(student, teacher))
