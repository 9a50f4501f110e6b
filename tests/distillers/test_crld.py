"""CRLD against the published code, and which samples its masks let count."""

import pytest
import torch

from mdistill.distillers.crld import confident, view_loss
from mdistill.distillers.kd import kd_loss
from mdistill.errors import UserError

from . import examples, golden_more, two_views

CASES = golden_more.cases("crld")
KEYS = {
    "wv_weight": "within_weight",
    "cv_weight": "cross_weight",
    "tau_w": "weak_threshold",
    "tau_s": "strong_threshold",
}
SAME = {"ce_weight": "ce_weight", "temperature": "temperature"}


def test_reference_cases_are_all_there():
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case):
    settings = {{**KEYS, **SAME}[key]: value for key, value in case.arguments.items()}
    given = case.tensors("student", "student_strong")
    terms = two_views.terms("crld", settings, given)
    assert list(terms) == ["ce", "ce_strong", "within", "cross"]
    ce = terms["ce"] + terms["ce_strong"]
    found = {"loss_ce": ce, "loss_kd_wv": terms["within"], "loss_kd_cv": terms["cross"]}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(case.numbers, rel=1e-9)
    golden_more.check(case, two_views.total(terms), given)


def test_a_sample_at_the_threshold_is_confident():
    logits = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64).log()
    assert confident(logits, threshold=0.7).tolist() == [0, 0, 1]
    assert confident(logits, threshold=0.5).tolist() == [1, 1, 1]
    assert confident(logits, threshold=0.55).tolist() == [1, 0, 1]


def test_samples_that_do_not_count_are_in_the_mean():
    student, teacher = examples.logits(0, 4, 5), examples.logits(1, 4, 5)
    weights = torch.tensor([1.0, 0, 1, 0]).double()
    loss = view_loss(student, teacher, student, teacher, weights, temperature=4.0)
    torch.testing.assert_close(loss, kd_loss(student[::2], teacher[::2], temperature=4.0))  # 2 pairs, half the samples


def test_confidence_is_that_of_the_raw_logits():
    """Standardised, none of these teachers has a probability of 0.9."""
    given = {name: examples.logits(number, 6, 5) for number, name in enumerate(("student", "student_strong"))}
    given |= {name: 30 * torch.eye(6, 5).double() for name in ("teacher", "teacher_strong")}
    given |= {"target": examples.targets(2, 6, 5)}
    settings = {"standardize_logits": True, "weak_threshold": 0.9, "strong_threshold": 0.9}
    terms = two_views.terms("crld", settings, given)
    assert terms["within"] > 0
    assert terms["cross"] > 0


def test_terms_without_a_weight_are_left_out():
    assert "cross" not in examples.build("crld", cross_weight=0.0)(examples.batch(), examples.epoch()).terms
    with pytest.raises(UserError, match=r"^distiller: CRLD has nothing to train on: ce_weight, within_weight, cross_w"):
        examples.build("crld", ce_weight=0.0, within_weight=0.0, cross_weight=0.0)
