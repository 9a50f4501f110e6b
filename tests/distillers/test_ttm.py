"""TTM against the published code, a case worked by hand, the paper's gradient and decomposition, and a plain loop."""

from math import exp, log

import pytest
import torch

from mdistill.distillers.kd import kd_loss
from mdistill.distillers.ttm import ttm_loss
from mdistill.errors import UserError

from . import examples, golden

CASES = golden.cases("ttm")


def test_reference_cases_are_all_there():
    assert len(CASES) == 2


@pytest.mark.parametrize("row", CASES)
def test_equals_the_published_code(row):
    golden.check(row, lambda student, teacher, target, **arguments: ttm_loss(student, teacher, **arguments))


def test_by_hand():
    """gamma = 1/2, teacher (9, 1) / 10: its roots are as 3 to 1, so (3/4, 1/4); the student is (1/2, 1/2).

    KL = 3/4 ln 3/2 + 1/4 ln 1/2, without a factor.
    """
    loss = ttm_loss(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]).log(), power=0.5)
    assert loss.item() == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5), rel=1e-6)


@pytest.mark.parametrize("power", [0.1, 0.5, 1.0, 2.0])
def test_equals_a_loop_over_powers_of_probabilities(power):
    """Eq. (7) and the divergence, number by number."""
    student, teacher = examples.logits(0, 5, 6), examples.logits(1, 5, 6)
    expected = 0.0
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        powers = [(exp(z) / sum(map(exp, z_t))) ** power for z in z_t]
        for p, z in zip((value / sum(powers) for value in powers), z_s, strict=True):
            expected += p * log(p / (exp(z) / sum(map(exp, z_s)))) / 5
    assert ttm_loss(student, teacher, power=power).item() == pytest.approx(expected, rel=1e-10)


def test_gradient_is_the_student_minus_the_transformed_teacher():
    """Eq. (20), for each row of the mean."""
    student, teacher = examples.logits(0, 4, 6).requires_grad_(), examples.logits(1, 4, 6)
    (gradient,) = torch.autograd.grad(ttm_loss(student, teacher, power=0.3), student)
    expected = (student.softmax(dim=1) - (0.3 * teacher).softmax(dim=1)) / 4
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [2.0, 5.0])
def test_is_kd_with_a_renyi_entropy(temperature):
    """Eq. (15): D(p_T || q) = T D(p_T || q_T) - (T - 1) H_1/T(q) + (T - 1) H(p_T)."""
    student, teacher = examples.logits(0, 6, 8), examples.logits(1, 6, 8)
    order = 1 / temperature
    renyi = (student.softmax(dim=1) ** order).sum(dim=1).log().mean() / (1 - order)
    softened = (teacher / temperature).softmax(dim=1)
    shannon = -(softened * softened.log()).sum(dim=1).mean()
    divergence = kd_loss(student, teacher, temperature=temperature) / temperature**2
    expected = temperature * divergence + (temperature - 1) * (shannon - renyi)
    torch.testing.assert_close(ttm_loss(student, teacher, power=order), expected, rtol=1e-12, atol=1e-14)


def test_with_power_1_is_kd_at_temperature_1():
    student, teacher = examples.logits(0, 6, 8), examples.logits(1, 6, 8)
    torch.testing.assert_close(ttm_loss(student, teacher, power=1.0), kd_loss(student, teacher, temperature=1.0))


def test_is_least_where_the_student_is_the_transformed_teacher():
    teacher = examples.logits(0, 6, 9)
    student = (0.2 * teacher + 5.0).requires_grad_()  # equal up to a shift
    loss = ttm_loss(student, teacher, power=0.2)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12
    assert ttm_loss(teacher, teacher, power=0.2) > 0.1


def test_weighs_its_term():
    batch = examples.batch()
    terms = [examples.build("ttm", ttm_weight=weight).eval()(batch, examples.epoch()).terms for weight in (1.0, 0.25)]
    assert list(terms[0]) == ["ce", "ttm"]
    torch.testing.assert_close(0.25 * terms[0]["ttm"], terms[1]["ttm"])


def test_weight_0_leaves_the_term_out():
    assert list(examples.build("ttm", ttm_weight=0.0)(examples.batch(), examples.epoch()).terms) == ["ce"]
    with pytest.raises(UserError, match=r"^distiller: TTM has nothing to train on: ce_weight, ttm_weight all 0"):
        examples.build("ttm", ttm_weight=0.0, ce_weight=0.0)


def test_refuses_a_power_of_0():
    with pytest.raises(UserError, match=r"power: .*greater than 0, found 0"):
        examples.build("ttm", power=0.0)
