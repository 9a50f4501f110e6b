"""KD against the published code, a case worked by hand, and its properties."""

from math import log

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.kd import kd_loss
from mdistill.errors import UserError

from . import examples, golden

CASES = golden.cases("kd")


def test_reference_cases_are_all_there():
    assert len(CASES) == 6


@pytest.mark.parametrize("row", CASES)
def test_equals_the_published_code(row):
    golden.check(row, lambda student, teacher, target, **arguments: kd_loss(student, teacher, **arguments))


def test_by_hand():
    """T = 2, teacher logits (2 ln 3, 0), student logits (0, 0).

    Softened: teacher (3/4, 1/4), student (1/2, 1/2). KL = 3/4 ln 3/2 + 1/4 ln 1/2; times T^2 = 4.
    """
    loss = kd_loss(torch.zeros(1, 2), torch.tensor([[2 * log(3), 0.0]]), temperature=2.0)
    assert loss.item() == pytest.approx(4 * (0.75 * log(1.5) + 0.25 * log(0.5)), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_is_least_where_student_equals_teacher(temperature):
    teacher = examples.logits(0, 6, 9)
    student = (teacher + 5.0).requires_grad_()  # equal up to a shift
    loss = kd_loss(student, teacher, temperature=temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12
    assert kd_loss(teacher + examples.logits(1, 6, 9), teacher, temperature=temperature) > 0.1


def test_has_the_gradient_of_cross_entropy_with_soft_targets():
    """Hinton et al. write the cross-entropy; with the factor T^2 its gradient is the same."""
    teacher, student = examples.logits(0, 6, 9), examples.logits(1, 6, 9).requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, temperature=3.0), student)
    paper = 9.0 * F.cross_entropy(student / 3.0, (teacher / 3.0).softmax(dim=1))
    torch.testing.assert_close(gradient, torch.autograd.grad(paper, student)[0], rtol=1e-12, atol=1e-14)


def test_weighs_its_term():
    batch = examples.batch()
    terms = [examples.build("kd", kd_weight=weight).eval()(batch, examples.epoch()).terms for weight in (1.0, 0.25)]
    assert list(terms[0]) == ["ce", "kd"]
    torch.testing.assert_close(0.25 * terms[0]["kd"], terms[1]["kd"])


def test_weight_0_leaves_the_term_out():
    assert list(examples.build("kd", kd_weight=0.0)(examples.batch(), examples.epoch()).terms) == ["ce"]
    with pytest.raises(UserError, match=r"^distiller: KD has nothing to train on: ce_weight, kd_weight all 0"):
        examples.build("kd", kd_weight=0.0, ce_weight=0.0)


def test_refuses_a_temperature_of_0():
    with pytest.raises(UserError, match=r"temperature: .*greater than 0, found 0"):
        examples.build("kd", temperature=0.0)


def test_holds_no_state():
    assert all(key.startswith(("student.", "teacher.")) for key in examples.build("kd").state_dict())
