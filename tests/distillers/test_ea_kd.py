"""EA-KD, EA-DKD and EA-MLD against the published code, and the weights by hand."""

from math import log

import pytest
import torch

from mdistill.distillers.dkd import dkd_loss
from mdistill.distillers.ea_kd import LEAST, entropy, entropy_weights
from mdistill.distillers.kd import kd_loss

from . import examples, golden_more, two_views

KD, DKD, MLD = (golden_more.cases("ea", method) for method in ("ea_kd", "ea_dkd", "ea_mld_total"))


def test_reference_cases_are_all_there():
    assert (len(KD), len(DKD), len(MLD)) == (9, 6, 6)


def weights_of(case, logits, offset):
    arguments = case.arguments
    return entropy_weights(
        *logits, temperature=arguments["entropy_temperature"], bound=arguments["bound"], offset=offset
    )


@pytest.mark.parametrize("case", KD)
def test_kd_equals_the_published_code(case):
    given = case.tensors("student")
    logits = case.logits(given)
    weights = weights_of(case, logits, LEAST)
    golden_more.check(case, kd_loss(*logits, temperature=case.arguments["temperature"], weights=weights), given)


@pytest.mark.parametrize("case", DKD)
def test_dkd_equals_the_published_code(case):
    given = case.tensors("student")
    logits = case.logits(given)
    settings = {key: case.arguments[key] for key in ("alpha", "beta", "temperature")}
    loss = dkd_loss(*logits, given["target"], **settings, weights=weights_of(case, logits, 0.0))
    golden_more.check(case, loss, given)


@pytest.mark.parametrize("case", MLD)
def test_mld_equals_the_published_code(case):
    given = case.tensors("student", "student_strong")
    terms = two_views.terms("ea_mld", {**case.arguments, "standardize_logits": case.standardized}, given)
    found = {
        "loss_ce": two_views.total(terms, "ce", "ce_strong"),
        "loss_kd": two_views.total(terms, "instance", "strong"),
        "loss_cc": terms["class"],
        "loss_bc": terms["batch"],
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(case.numbers, rel=1e-9)
    golden_more.check(case, two_views.total(terms), given)


def test_the_weights_by_hand():
    """A uniform teacher over 4 classes, H = ln 4; a certain student, H = 0, and a uniform one."""
    teacher, student = torch.zeros(2, 4).double(), torch.tensor([[100.0, 0, 0, 0], [0, 0, 0, 0]]).double()
    weights = entropy_weights(student, teacher, temperature=1.0, bound=log(4))
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.0]).double() * log(4))
    assert entropy_weights(teacher, student, temperature=1.0, bound=log(4))[0] == pytest.approx(0, abs=1e-12)


def test_the_weights_have_no_gradient_and_are_finite_where_a_network_is_certain():
    logits = (1e4 * examples.logits(seed, 6, 5).float().requires_grad_() for seed in (0, 1))
    weights = entropy_weights(*logits, temperature=3.0, bound=100.0)
    assert not weights.requires_grad
    assert weights.isfinite().all()
    assert (entropy(1e4 * examples.logits(0, 6, 5).float(), temperature=1.0, offset=LEAST) >= 0).all()


@pytest.mark.parametrize(("method", "base"), [("ea_kd", "kd"), ("ea_dkd", "dkd"), ("ea_mld", "mlkd")])
def test_where_both_networks_are_uniform_in_their_entropies_it_is_the_base_method(method, base):
    """At an endless temperature every weight is ln C (1 + ln C / bound) / 2, which the bound can make 1."""
    full = log(examples.CLASSES)
    bound = full / (2 / full - 1)  # ln 7 is below 2
    settings = {"entropy_temperature": 1e9, "bound": bound, "warmup_epochs": 0}
    batch, epoch = examples.batch(), examples.epoch()
    found = examples.build(method, **settings).eval()(batch, epoch).terms
    torch.testing.assert_close(found, examples.build(base, warmup_epochs=0).eval()(batch, epoch).terms)


def test_a_bound_of_null_is_the_largest_entropy():
    batch = examples.batch()
    found, expected = (
        examples.build("ea_kd", bound=bound).eval()(batch, examples.epoch()).terms["kd"]
        for bound in (None, log(examples.CLASSES))
    )
    assert found == expected
