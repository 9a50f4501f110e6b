"""CKD against the published code and a plain loop."""

from math import exp, log

import pytest
import torch

from mdistill.distillers.ckd import ckd_loss

from . import examples, golden_more

CASES = golden_more.cases("ckd")


def test_reference_cases_are_all_there():
    assert len(CASES) == 6


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case):
    given = case.tensors("student")
    golden_more.check(case, ckd_loss(*case.logits(given), **case.arguments), given)


def test_equals_a_loop():
    student, teacher = examples.logits(0, 5, 4), examples.logits(1, 5, 4)
    expected = 0.0
    for i in range(5):
        cosines = [torch.cosine_similarity(teacher[i], student[j], dim=0).item() / 0.5 for j in range(5)]
        expected -= log(exp(cosines[i]) / sum(exp(each) for each in cosines)) / 5
    assert ckd_loss(student, teacher, temperature=0.5).item() == pytest.approx(expected, rel=1e-9)


def test_one_sample_leaves_nothing_to_tell_apart():
    student = examples.logits(0, 1, 4).requires_grad_()
    loss = ckd_loss(student, examples.logits(1, 1, 4), temperature=1.0)
    loss.backward()
    assert loss == 0
    assert student.grad.abs().max() == 0


def test_a_student_of_zeros_has_a_finite_gradient():
    student = torch.zeros(4, 3, requires_grad=True)
    ckd_loss(student, examples.logits(1, 4, 3).float(), temperature=1.0).backward()
    assert student.grad.isfinite().all()


def test_its_one_term_is_weighted():
    batch = examples.batch()
    one, ten = (examples.build("ckd", ckd_weight=weight)(batch, examples.epoch()).terms for weight in (1.0, 10.0))
    torch.testing.assert_close(ten["ckd"], 10 * one["ckd"])
    assert list(examples.build("ckd", ckd_weight=0.0)(batch, examples.epoch()).terms) == ["ce"]
