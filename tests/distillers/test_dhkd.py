"""DHKD against the released code's values, plain loops, cases worked by hand, and its properties."""

from math import cosh, exp, log

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mdistill.distillers.dhkd import HiddenHead, binary_kl_norm_loss
from mdistill.distillers.functional import dropout_factors, standardize
from mdistill.errors import UserError
from mdistill.optim.aligned_sgd import AlignedSGD
from mdistill.optim.two_gradients import two_gradients

from ..optim.test_solvers import output
from . import examples
from .golden_more import Case, cases, check, close


@pytest.mark.parametrize("case", cases("dhkd", "dhkd_term", "dhkd_term_on_logits"))
def test_the_term_equals_the_released_code(case: Case):
    given = case.tensors(*(("student",) if "logits" in case.method else ("pooled", "aux_weight", "aux_bias")))
    logits = given["student"]
    if case.method == "dhkd_term":
        logits = F.linear(given["pooled"], given["aux_weight"], given["aux_bias"])
    check(case, binary_kl_norm_loss(logits, given["teacher"], **case.arguments), given)


@pytest.mark.parametrize("case", cases("dhkd", "dhkd_aligned"))
def test_the_aligned_gradient_equals_the_released_code(case: Case):
    """Of a network of one hidden layer and two heads, the auxiliary one a copy of the main one."""
    given, settings = case.tensors(), case.arguments
    start = given | {"aux_weight": given["main_weight"], "aux_bias": given["main_bias"]}
    names = [f"{layer}_{kind}" for layer in ("backbone", "main", "aux") for kind in ("weight", "bias")]
    weights = {name: nn.Parameter(start[name].clone()) for name in names}

    def layer(name, x):
        return F.linear(x, weights[f"{name}_weight"], weights[f"{name}_bias"])

    def losses():
        pooled = layer("backbone", given["input"]).relu()
        teacher, temperature = given[settings["of"]], settings["temperature"]
        return (
            F.cross_entropy(layer("main", pooled), given["target"]),
            binary_kl_norm_loss(layer("aux", pooled), teacher, temperature=temperature),
        )

    ce, kd = losses()
    of_both = zip(*two_gradients(output({"ce": ce}, {"kd": kd}), list(weights.values())), strict=True)
    inner = sum((t * d).sum().item() for t, d in of_both if t is not None and d is not None)
    assert {"ce": ce.item(), "kd": kd.item(), "inner_product": inner} == pytest.approx(case.numbers, rel=1e-9)
    ce, kd = losses()
    terms = output({"ce": settings["ce_weight"] * ce}, {"kd": settings["kd_weight"] * kd})
    assert terms.total.item() == pytest.approx(case.loss, rel=1e-9)
    AlignedSGD([{"params": list(weights.values())}], momentum=0.9, weight_decay=5e-4).step(terms)
    results = case.results()
    for name, weight in weights.items():
        close(weight.grad, results[f"grad_{name}"], name)


def by_loop(logits, teacher, temperature):
    """KL between two binary distributions, (1/2, 1/2) and (q, 1 - q), class by class."""
    total = 0.0
    for row, teacher_row in zip(logits.tolist(), teacher.tolist(), strict=True):
        for z, t in zip(row, teacher_row, strict=True):
            q = 1 / (1 + exp(-(z - t) / temperature))
            total += 0.5 * log(0.5 / q) + 0.5 * log(0.5 / (1 - q))
    return temperature**2 * total / len(logits)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_loss_equals_a_loop(temperature):
    logits, teacher = examples.logits(0, 7, 5, 1.0), examples.logits(1, 7, 5, 1.0)
    loss = binary_kl_norm_loss(logits, teacher, temperature=temperature)
    assert loss.item() == pytest.approx(by_loop(logits, teacher, temperature), rel=1e-10)


def test_loss_by_hand():
    """tau = 2, gaps of 2 ln 3 and 0: q = 3/4 gives 1/2 ln 2/3 + 1/2 ln 2 = 1/2 ln 4/3, q = 1/2 gives 0. Times 4."""
    teacher = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    logits = teacher + torch.tensor([[2 * log(3), 0.0]])
    assert binary_kl_norm_loss(logits, teacher, temperature=2.0).item() == pytest.approx(2 * log(4 / 3), rel=1e-6)


def test_loss_is_a_log_cosh_and_0_only_where_logits_are_equal():
    teacher = examples.logits(0, 1, 3)
    assert abs(binary_kl_norm_loss(teacher, teacher, temperature=2.0)) < 1e-15
    shifted = binary_kl_norm_loss(teacher + 3.0, teacher, temperature=2.0)  # which no probability would show
    assert shifted.item() == pytest.approx(3 * 4 * log(cosh(3 / 4)), rel=1e-10)


def test_gradient_is_bounded_by_half_a_temperature():
    logits = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float64, requires_grad=True)
    binary_kl_norm_loss(logits, torch.zeros(1, 3).double(), temperature=2.0).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0, 0.0]]).double())


def test_the_hidden_head_equals_its_layers_one_by_one():
    head, pooled = HiddenHead(3, 4).double().train(), examples.logits(0, 6, 3)
    factors = dropout_factors(0, torch.tensor(1), torch.arange(6), 200, probability=0.1).double()
    hidden = (pooled @ head.down.weight.T + head.down.bias) * factors
    normalised = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + 1e-5).sqrt()
    expected = normalised.clamp(min=0) @ head.up.weight.T + head.up.bias
    torch.testing.assert_close(head(pooled, factors), expected)


@pytest.mark.parametrize("head", ["linear", "hidden"])
def test_the_term_is_that_of_the_auxiliary_head(head):
    batch = examples.batch()
    distiller = examples.build("dhkd", kd_weight=0.5, temperature=3.0, head=head).eval()
    logits = distiller.head(distiller.student.forward_features(batch.image).pooled)
    expected = 0.5 * binary_kl_norm_loss(logits, distiller.teacher(batch.image), temperature=3.0)
    terms = distiller(batch, examples.epoch()).terms
    assert list(terms) == ["ce", "kd"]
    torch.testing.assert_close(terms["kd"], expected)


def test_a_tenth_of_the_hidden_units_is_dropped_anew_in_each_epoch():
    distiller, seen = examples.build("dhkd"), []
    distiller.head.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    for number in (1, 1, 2):
        distiller.train()(examples.batch(), examples.epoch(number))
    distiller.eval()(examples.batch(), examples.epoch())
    first, again, other, evaluated = seen
    assert again.equal(first)
    assert not other.equal(first)
    assert 0.07 < (first == 0).double().mean() < 0.13
    assert (evaluated != 0).all()


def test_standardised_logits_meet_standardised_ones():
    distiller, batch = examples.build("dhkd", standardize_logits=True).eval(), examples.batch()
    logits = distiller.head(distiller.student.forward_features(batch.image).pooled), distiller.teacher(batch.image)
    expected = binary_kl_norm_loss(*map(standardize, logits), temperature=2.0)
    torch.testing.assert_close(distiller(batch, examples.epoch()).terms["kd"], expected)


def test_each_head_learns_from_its_own_loss():
    distiller, batch = examples.build("dhkd", head="linear").eval(), examples.batch()
    reached = {}
    for term in ("ce", "kd"):
        distiller.zero_grad()
        distiller(batch, examples.epoch()).terms[term].backward()
        reached[term] = {key for key, value in distiller.named_parameters() if value.grad is not None}
    assert not [key for key in reached["ce"] if key.startswith("head.")]
    assert not [key for key in reached["kd"] if key.startswith("student.4.")]
    assert "student.1.weight" in reached["ce"] & reached["kd"]


def test_the_head_is_saved_and_not_exported():
    distiller = examples.build("dhkd", head="linear")
    assert distiller.head.weight.shape == (examples.CLASSES, 5)
    assert {"head.weight", "head.bias"} <= set(distiller.state_dict())
    assert distiller.students() == {"student": distiller.student}


def test_weight_0_leaves_the_term_out():
    assert list(examples.build("dhkd", kd_weight=0.0)(examples.batch(), examples.epoch()).terms) == ["ce"]


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"^distiller: DHKD has nothing to train on: ce_weight, kd_weight all 0"):
        examples.build("dhkd", ce_weight=0.0, kd_weight=0.0)
    assert list(examples.build("dhkd", ce_weight=0.0)(examples.batch(), examples.epoch()).terms) == ["kd"]
