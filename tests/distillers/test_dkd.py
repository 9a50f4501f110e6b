"""DKD against the published code, a case worked by hand, KD itself, and its properties."""

from math import log

import pytest
import torch

from mdistill.distillers.dkd import dkd_loss, nckd_loss, tckd_loss
from mdistill.distillers.kd import kd_loss
from mdistill.errors import UserError

from . import examples, golden

CASES = golden.cases("dkd")


def test_reference_cases_are_all_there():
    assert len(CASES) == 6


@pytest.mark.parametrize("row", CASES)
def test_equals_the_published_code(row):
    golden.check(row, dkd_loss)


def test_by_hand():
    """T = 1, true class 0, teacher (3, 2, 1) / 6, student uniform.

    Binary: teacher (1/2, 1/2), student (1/3, 2/3): TCKD = 1/2 ln 3/2 + 1/2 ln 3/4.
    Others: teacher (2/3, 1/3), student (1/2, 1/2): NCKD = 2/3 ln 4/3 + 1/3 ln 2/3.
    """
    student, teacher = torch.zeros(1, 3), torch.tensor([[3.0, 2.0, 1.0]]).log()
    target = torch.tensor([0])
    tckd = 0.5 * log(3 / 2) + 0.5 * log(3 / 4)
    nckd = 2 / 3 * log(4 / 3) + 1 / 3 * log(2 / 3)
    assert tckd_loss(student, teacher, target, temperature=1.0).item() == pytest.approx(tckd, rel=1e-5)
    assert nckd_loss(student, teacher, target, temperature=1.0).item() == pytest.approx(nckd, rel=1e-5)
    total = dkd_loss(student, teacher, target, alpha=2.0, beta=8.0, temperature=1.0)
    assert total.item() == pytest.approx(2 * tckd + 8 * nckd, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_tckd_plus_nckd_weighted_by_doubt(temperature):
    """Eq. (6) of the paper, row by row: KD = TCKD + (1 - p_t^T) NCKD."""
    student, teacher, target = examples.logits(0, 6, 9), examples.logits(1, 6, 9), examples.targets(2, 6, 9)
    for row in range(6):
        part = slice(row, row + 1)
        certain = (teacher[row] / temperature).softmax(dim=0)[target[row]]
        tckd, nckd = (
            loss(student[part], teacher[part], target[part], temperature=temperature) for loss in (tckd_loss, nckd_loss)
        )
        kd = kd_loss(student[part], teacher[part], temperature=temperature)
        torch.testing.assert_close(tckd + (1 - certain) * nckd, kd, rtol=1e-12, atol=0)


def test_two_classes_leave_no_others_to_rank():
    student, teacher = examples.logits(0, 6, 2).requires_grad_(), examples.logits(1, 6, 2)
    target = examples.targets(2, 6, 2)
    nckd = nckd_loss(student, teacher, target, temperature=2.0)
    nckd.backward()
    assert nckd.item() == 0
    assert student.grad.abs().max() == 0
    kd = kd_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(tckd_loss(student, teacher, target, temperature=2.0), kd, rtol=1e-12, atol=0)


def test_logs_its_terms_apart():
    batch = examples.batch()
    terms = examples.build("dkd", warmup_epochs=0)(batch, examples.epoch()).terms
    assert list(terms) == ["ce", "tckd", "nckd"]
    assert list(examples.build("dkd", alpha=0.0)(batch, examples.epoch()).distillation) == ["nckd"]
    assert list(examples.build("dkd", beta=0.0)(batch, examples.epoch()).distillation) == ["tckd"]


def test_refuses_to_train_on_nothing():
    with pytest.raises(UserError, match=r"^distiller: DKD has nothing to train on: ce_weight, alpha, beta all 0"):
        examples.build("dkd", ce_weight=0.0, alpha=0.0, beta=0.0)
