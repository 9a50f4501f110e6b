"""SLD against the published code, and when its second teacher begins."""

import pytest
import torch

from mdistill.distillers.la import swap
from mdistill.distillers.mlkd import instance_loss
from mdistill.distillers.sld import swapped_student_loss, swapped_teacher_loss
from mdistill.errors import UserError

from . import examples, golden_more, two_views

CASES = golden_more.cases("sld")
SIX = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_reference_cases_are_all_there():
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case):
    given, settings = case.tensors("student", "student_strong"), dict(case.arguments)
    epoch = settings.pop("epoch")
    terms = two_views.terms("sld", {**settings, "temperatures": SIX, "student_after": 150}, given, epoch=epoch)
    found = {
        "loss_ce": two_views.total(terms, "ce", "ce_strong"),
        "loss_kd": two_views.total(terms, "teacher", "student"),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(case.numbers, rel=1e-9)
    assert (terms["student"] != 0) == (epoch > 150)
    golden_more.check(case, two_views.total(terms), given)


def test_a_student_that_is_right_has_nothing_to_swap():
    student = examples.logits(0, 6, 5).requires_grad_()
    loss = swapped_student_loss(student, student.argmax(dim=1), temperatures=SIX)
    loss.backward()
    assert loss == 0
    assert student.grad.abs().max() == 0


def test_the_closed_form_is_the_divergence_from_the_swapped_student():
    """Value and gradient, which reaches both of the divergence's sides."""
    student, target = examples.logits(0, 6, 5).requires_grad_(), examples.targets(1, 6, 5)
    losses = (
        swapped_student_loss(student, target, temperatures=(1.0, 4.0)),
        instance_loss(student, swap(student, target), temperatures=(1.0, 4.0)),
    )
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in losses))


def test_gradients_of_a_batch_equal_finite_differences():
    student, teacher, target = examples.logits(0, 4, 3).requires_grad_(), examples.logits(1, 4, 3), torch.arange(4) % 3
    assert torch.autograd.gradcheck(
        lambda z: swapped_teacher_loss(z, teacher, target, temperatures=(4.0, 1.0)), student
    )
    assert torch.autograd.gradcheck(lambda z: swapped_student_loss(z, target, temperatures=(4.0, 1.0)), student)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match=r"^distiller: SLD has nothing to train on: ce_weight, kd_weight all 0"):
        examples.build("sld", ce_weight=0.0, kd_weight=0.0)
    with pytest.raises(UserError, match="temperatures: List should have at least 1 item"):
        examples.build("sld", temperatures=[])
