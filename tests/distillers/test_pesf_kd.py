"""PESF-KD against the released code's values, plain loops, cases worked by hand, and its properties."""

from math import exp, log

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.kd import kd_loss
from mdistill.distillers.pesf_kd import Adapter, swapped_loss
from mdistill.errors import UserError
from mdistill.optim.solvers import SGD

from . import examples
from .golden_more import Case, cases, check

OWN = ("l1.0.weight", "l1.0.bias", "adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias")
NAMES = dict(zip(("read.weight", "read.bias", "down.weight", "down.bias", "up.weight", "up.bias"), OWN, strict=True))


@pytest.mark.parametrize("case", cases("pesf_kd"))
def test_equals_the_released_code(case: Case):
    given, arguments = case.tensors("student", *OWN), case.arguments
    student, teacher, target, pooled = (given[name] for name in ("student", "teacher", "target", "teacher_pooled"))
    adapter = Adapter(pooled.shape[1], student.shape[1], len(given["adapter.0.bias"]))
    weights = {name: given[theirs] for name, theirs in NAMES.items()}
    adapted = teacher - torch.func.functional_call(adapter, weights, (pooled,))
    loss = swapped_loss(student, teacher, adapted, target, temperature=arguments["temperature"])
    if case.method == "pesf_kd_total":
        ce = arguments["ce_weight"] * F.cross_entropy(student, target)
        adapter_ce = arguments["adapter_ce_weight"] * F.cross_entropy(adapted, target)
        loss = ce + arguments["kd_weight"] * loss + adapter_ce
    check(case, loss, given)


def adapter_by_loop(adapter, pooled):
    """W2 relu(W1 l(f) + b1) + b2 with Python floats."""

    def linear(layer, values):
        rows, biases = layer.weight.tolist(), layer.bias.tolist()
        return [b + sum(w * x for w, x in zip(row, values, strict=True)) for row, b in zip(rows, biases, strict=True)]

    return [
        linear(adapter.up, [max(0.0, h) for h in linear(adapter.down, linear(adapter.read, f))])
        for f in pooled.tolist()
    ]


def test_the_adapter_equals_a_loop():
    adapter, pooled = Adapter(4, 6, 3).double(), examples.logits(0, 5, 4)
    expected = torch.tensor(adapter_by_loop(adapter, pooled), dtype=torch.float64)
    torch.testing.assert_close(adapter(pooled), expected, rtol=1e-10, atol=1e-12)


def test_the_adapter_by_hand():
    """Feature 3, read as (2, -1), one hidden unit 2 + (-1) + 1 = 2, which gives (2, -2) + (0, 1/2)."""
    adapter = Adapter(1, 2, 1)
    with torch.no_grad():
        for parameter, values in (
            (adapter.read.weight, [[1.0], [0.0]]),
            (adapter.read.bias, [-1.0, -1.0]),
            (adapter.down.weight, [[1.0, 1.0]]),
            (adapter.down.bias, [1.0]),
            (adapter.up.weight, [[1.0], [-1.0]]),
            (adapter.up.bias, [0.0, 0.5]),
        ):
            parameter.copy_(torch.tensor(values))
        assert adapter(torch.tensor([[3.0]])).tolist() == [[2.0, -1.5]]


def test_the_swapped_term_by_hand():
    """True class 0, teacher (0, ln 3) swapped to (3/4, 1/4), student (0, 0) and its swap (1/2, 1/2); T = 1.

    An adapted teacher of (1/4, 3/4): KL(3/4, 1/4 || 1/2, 1/2) twice, each 3/4 ln 3/2 + 1/4 ln 1/2.
    """
    teacher = torch.tensor([[0.0, log(3)]], dtype=torch.float64)
    loss = swapped_loss(torch.zeros(1, 2).double(), teacher, teacher, torch.tensor([0]), temperature=1.0)
    assert loss.item() == pytest.approx(2 * (0.75 * log(1.5) + 0.25 * log(0.5)), rel=1e-12)


def test_each_side_of_the_swapped_term_has_its_own_gradient():
    """The student's does not depend on the adapted teacher, the adapter's not on the teacher."""
    target = examples.targets(9, 3, 4)
    logits = [examples.logits(seed, 3, 4).requires_grad_() for seed in range(3)]
    student, teacher, adapted = torch.autograd.grad(
        swapped_loss(*logits, target, temperature=2.0), logits, allow_unused=True
    )
    assert teacher is None
    moved = [logits[0], logits[1], (logits[2] + examples.logits(5, 3, 4)).detach()]
    (same,) = torch.autograd.grad(swapped_loss(*moved, target, temperature=2.0), logits[0])
    assert same.equal(student)
    moved = [logits[0], (logits[1] + examples.logits(5, 3, 4)).detach(), logits[2]]
    (same,) = torch.autograd.grad(swapped_loss(*moved, target, temperature=2.0), logits[2])
    assert same.equal(adapted)


def test_terms_equal_a_loop():
    settings = {"ce_weight": 0.5, "kd_weight": 2.0, "adapter_ce_weight": 0.25, "temperature": 3.0}
    distiller = examples.build("pesf_kd", variant="paper", **settings).double().eval()
    batch = examples.batch(dtype=torch.float64)
    student = distiller.student(batch.image).tolist()
    features = distiller.teacher.forward_features(batch.image)
    corrections = adapter_by_loop(distiller.adapter, features.pooled)
    teacher = [
        [z - c for z, c in zip(*pair, strict=True)] for pair in zip(features.logits.tolist(), corrections, strict=True)
    ]

    def softmax(row, temperature=1.0):
        powers = [exp(z / temperature) for z in row]
        return [power / sum(powers) for power in powers]

    ce = kd = adapter_ce = 0.0
    for s, t, y in zip(student, teacher, batch.target.tolist(), strict=True):
        ce -= log(softmax(s)[y]) / 8
        adapter_ce -= log(softmax(t)[y]) / 8
        kd += 9 * sum(p * log(p / q) for p, q in zip(softmax(t, 3.0), softmax(s, 3.0), strict=True)) / 8
    terms = distiller(batch, examples.epoch()).terms
    values = {name: term.item() for name, term in terms.items()}
    assert values == pytest.approx({"ce": 0.5 * ce, "kd": 2.0 * kd, "adapter_ce": 0.25 * adapter_ce}, rel=1e-10)


def test_the_kd_term_has_the_gradient_of_finite_differences_on_both_sides():
    student, teacher = examples.logits(0, 3, 4).requires_grad_(), examples.logits(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: kd_loss(s, t, temperature=2.0), (student, teacher))


def test_an_adapter_that_adds_nothing_leaves_plain_kd():
    distiller, batch = (
        examples.build("pesf_kd", temperature=4.0, kd_weight=0.9, variant="paper").eval(),
        examples.batch(),
    )
    with torch.no_grad():
        for parameter in distiller.adapter.up.parameters():
            parameter.zero_()
    terms = distiller(batch, examples.epoch()).terms
    assert terms["kd"] == examples.build("kd").eval()(batch, examples.epoch()).terms["kd"]
    torch.testing.assert_close(terms["adapter_ce"], F.cross_entropy(distiller.teacher(batch.image), batch.target))


@pytest.mark.parametrize(
    ("settings", "student", "adapter"),
    [
        ({"adapter_ce_weight": 0.0, "ce_weight": 0.0}, True, True),
        ({"kd_weight": 0.0, "ce_weight": 1.0}, True, True),
        ({"kd_weight": 0.0, "adapter_ce_weight": 0.0}, True, False),
    ],
)
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_who_learns_from_what(variant, settings, student, adapter):
    """The KD term trains both; the teacher never learns."""
    distiller = examples.build("pesf_kd", variant=variant, **settings).train()
    distiller(examples.batch(), examples.epoch()).total.backward()
    assert any(value.grad is not None for value in distiller.student.parameters()) == student
    assert any(value.grad is not None for value in distiller.adapter.parameters()) == adapter
    assert all(value.grad is None for value in distiller.teacher.parameters())


def test_training_the_adapter_brings_the_teacher_to_the_student():
    """With the student held still the KD term falls: the sharpness gap closes from the teacher's side."""
    distiller = examples.build("pesf_kd", ce_weight=0.0, adapter_ce_weight=0.0, variant="paper").eval()
    batch, losses = examples.batch(), []
    for _ in range(20):
        distiller.zero_grad()
        loss = distiller(batch, examples.epoch()).total
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in distiller.adapter.parameters():
                parameter -= 0.1 * parameter.grad
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_the_adapter_has_a_rate_of_its_own():
    distiller = examples.build("pesf_kd", adapter_lr_scale=0.25)
    solver = SGD(distiller.param_groups(), momentum=0.0, nesterov=False, weight_decay=0.0)
    solver.set_lr(0.4)
    before = {key: value.detach().clone() for key, value in distiller.named_parameters()}
    solver.step(distiller.train()(examples.batch(), examples.epoch()))
    for key, value in distiller.named_parameters():
        if not key.startswith("teacher."):
            rate = 0.1 if key.startswith("adapter.") else 0.4
            torch.testing.assert_close(value.detach(), before[key] - rate * value.grad)


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_stays_finite_for_a_certain_teacher(scale, variant):
    """Its logits of 1e4 and one sign a class."""
    distiller, batch = examples.build("pesf_kd", variant=variant).train(), examples.batch()
    with torch.no_grad():
        distiller.teacher.classifier.weight.zero_()
        distiller.teacher.classifier.bias.copy_(scale * torch.tensor([1.0, -1, 1, -1, 1, -1, 1]))
    distiller(batch, examples.epoch()).total.backward()
    for value in (*distiller.student.parameters(), *distiller.adapter.parameters()):
        assert value.grad.isfinite().all()


def test_the_adapter_is_saved_and_not_exported():
    distiller = examples.build("pesf_kd")
    assert sum(key.startswith("adapter.") for key in distiller.state_dict()) == 6
    assert distiller.students() == {"student": distiller.student}


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"adapter_lr_scale: .*greater than 0, found 0"):
        examples.build("pesf_kd", adapter_lr_scale=0.0)
    with pytest.raises(UserError, match=r"^distiller: PESFKD has nothing to train on: ce_weight, kd_weight all 0"):
        examples.build("pesf_kd", ce_weight=0.0, kd_weight=0.0)
