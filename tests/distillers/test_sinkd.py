"""SinKD against the released code's values, cases worked by hand, plain loops, the best of all assignments."""

from itertools import permutations
from math import exp, log

import pytest
import torch

from mdistill.distillers import Signals
from mdistill.distillers.functional import soft_target_loss
from mdistill.distillers.kd import kd_loss
from mdistill.distillers.sinkd import annealed, sinkhorn_loss, transport_plan
from mdistill.errors import UserError

from . import examples
from .golden_more import Case, cases, check

NUMBERS = {"temperature": 2.0, "regularization": 0.1, "iterations": 20}


@pytest.mark.parametrize("case", cases("sinkd", "sinkd_term"))
def test_the_distance_equals_the_released_code(case: Case):
    given, settings = case.tensors("student"), dict(case.arguments)
    factor = settings.pop("factor") * len(given["student"])
    check(case, factor * sinkhorn_loss(given["student"], given["teacher"], **settings), given)


@pytest.mark.parametrize("case", cases("sinkd", "sinkd_kd", "sinkd_kd_anneal"))
def test_kd_equals_the_released_code(case: Case):
    given, settings = case.tensors("student"), case.arguments
    temperature = settings["temperature"]
    if case.method == "sinkd_kd_anneal":
        temperature = annealed(temperature, torch.tensor(settings["epoch"]).double(), settings["epochs"])
    check(case, soft_target_loss(given["student"], given["teacher"], temperature=temperature), given)


@pytest.mark.parametrize("case", cases("sinkd", "sinkd_total"))
def test_the_method_equals_the_released_code(case: Case):
    given, settings = case.tensors("student"), dict(case.arguments)
    alpha, beta, factor = (settings.pop(name) for name in ("alpha", "beta", "factor"))
    assert factor == 0.001
    weights = {"ce_weight": 1 - alpha, "kd_weight": alpha, "sinkhorn_weight": beta}
    distiller = examples.build("sinkd", kd_anneal_epochs=None, **weights, **settings)
    logits = given["student"], given["teacher"]
    signals = Signals(*logits, *logits, given["target"], torch.arange(len(given["target"])), torch.tensor(1))
    terms = {**distiller.task(signals), **distiller.distillation(signals)}
    check(case, torch.stack(list(terms.values())).sum(), given)


def test_soft_targets_by_hand():
    """Teacher (3/4, 1/4) at T = 2, student (1/2, 1/2): ln 2, whatever the teacher."""
    loss = soft_target_loss(torch.zeros(1, 2), torch.tensor([[2 * log(3), 0.0]]), temperature=2.0)
    assert loss.item() == pytest.approx(log(2), rel=1e-6)


@pytest.mark.parametrize(("epoch", "expected"), [(1, 4.0), (2, 3.25), (5, 1.0), (9, 1.0)])
def test_the_temperature_falls_straight_to_1_in_the_last_epoch(epoch, expected):
    assert annealed(4.0, torch.tensor(epoch), 5).item() == pytest.approx(expected)
    annealing, constant = (
        examples.build("sinkd", kd_temperature=temperature, kd_anneal_epochs=epochs).eval()
        for temperature, epochs in ((4.0, 5), (expected, None))
    )
    found, same = (each(examples.batch(), examples.epoch(epoch)).terms for each in (annealing, constant))
    torch.testing.assert_close(found, same)


def test_one_sample_by_hand():
    """There is one plan. Teacher (3/4, 1/4) at temperature 2, student (1/2, 1/2): 1/4 + 1/4."""
    loss = sinkhorn_loss(torch.zeros(1, 2), torch.tensor([[2 * log(3), 0.0]]), **NUMBERS)
    assert loss.item() == pytest.approx(0.5, rel=1e-6)


def test_two_samples_by_hand():
    """Student (15, 5) / 20 and reversed, teacher (12, 8) / 20 and reversed: costs 0.3 to the own row, 0.7 to the other.

    With lambda = 0.4 / ln 3 the kernel is as 3 to 1, and rows and columns balance at once: 3/4 0.3 + 1/4 0.7 = 0.4.
    """
    student, teacher = torch.tensor([[15.0, 5.0], [5.0, 15.0]]).log(), torch.tensor([[12.0, 8.0], [8.0, 12.0]]).log()
    loss = sinkhorn_loss(student, teacher, temperature=1.0, regularization=0.4 / log(3), iterations=3)
    assert loss.item() == pytest.approx(0.4, rel=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("regularization", [0.1, 1.0])
def test_equals_a_loop_over_kernel_rows_and_columns(regularization, iterations):
    """The kernel itself, scaled row by row and column by column."""
    logits, size = (examples.logits(0, 5, 4), examples.logits(1, 5, 4)), range(5)
    student, teacher = (
        [[exp(z / 2) / sum(exp(other / 2) for other in row) for z in row] for row in each.tolist()] for each in logits
    )
    cost = [[sum(abs(a - b) for a, b in zip(p, q, strict=True)) for q in teacher] for p in student]
    plan = [[exp(-value / regularization) for value in row] for row in cost]
    for _ in range(iterations):
        plan = [[value / sum(row) for value in row] for row in plan]
        sums = [sum(column) for column in zip(*plan, strict=True)]
        plan = [[value / total for value, total in zip(row, sums, strict=True)] for row in plan]
    expected = sum(plan[i][j] * cost[i][j] for i in size for j in size) / 5
    loss = sinkhorn_loss(*logits, temperature=2.0, regularization=regularization, iterations=iterations)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_the_plan_has_uniform_marginals():
    cost = examples.logits(0, 6, 6).abs()
    plan = transport_plan(cost, regularization=1.0, iterations=200)
    torch.testing.assert_close(plan.sum(dim=0), torch.full((6,), 1 / 6, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((6,), 1 / 6, dtype=torch.float64), rtol=1e-9, atol=0)
    assert (plan > 0).all()


def test_a_small_regularization_finds_the_best_assignment():
    """The least mean cost over all 120 ways to pair 5 student samples with 5 teacher samples."""
    student, teacher = examples.logits(0, 5, 4), examples.logits(1, 5, 4)
    cost = (student.softmax(dim=1)[:, None] - teacher.softmax(dim=1)).abs().sum(dim=2)
    best = min(sum(cost[i, j].item() for i, j in enumerate(order)) / 5 for order in permutations(range(5)))
    loss = sinkhorn_loss(student, teacher, temperature=1.0, regularization=0.002, iterations=500)
    assert loss.item() == pytest.approx(best, rel=1e-4)


def test_a_large_regularization_takes_every_pair_alike():
    student, teacher = examples.logits(0, 5, 4), examples.logits(1, 5, 4)
    cost = (student.softmax(dim=1)[:, None] - teacher.softmax(dim=1)).abs().sum(dim=2)
    loss = sinkhorn_loss(student, teacher, temperature=1.0, regularization=1e9, iterations=2)
    assert loss.item() == pytest.approx(cost.mean().item(), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_that_would_underflow_is_no_trouble(dtype):
    """exp(-2 / 1e-4) is 0 in any format."""
    student = examples.logits(0, 8, 5, 10.0).to(dtype).requires_grad_()
    loss = sinkhorn_loss(student, examples.logits(1, 8, 5, 10.0).to(dtype), **{**NUMBERS, "regularization": 1e-4})
    loss.backward()
    assert 0 < loss < 2
    assert student.grad.isfinite().all()


def test_batches_are_compared_as_sets():
    """Which teacher row belongs to which student row plays no part."""
    student, teacher = examples.logits(0, 6, 5), examples.logits(1, 6, 5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = sinkhorn_loss(student, teacher[order], **NUMBERS)
    torch.testing.assert_close(shuffled, sinkhorn_loss(student, teacher, **NUMBERS), rtol=1e-12, atol=1e-14)


def test_is_nearly_0_where_student_equals_teacher():
    """The entropy of the plan keeps a little of the cost between different samples."""
    teacher = 3 * torch.eye(4).double()
    assert sinkhorn_loss(teacher, teacher, temperature=1.0, regularization=0.1, iterations=20) < 1e-3
    assert sinkhorn_loss(-teacher, teacher, temperature=1.0, regularization=0.1, iterations=20) > 0.5


@pytest.mark.parametrize(
    ("settings", "terms"),
    [({}, ["kd", "sinkhorn"]), ({"kd_weight": 0.0}, ["sinkhorn"]), ({"sinkhorn_weight": 0.0}, ["kd"])],
)
def test_terms_can_be_switched_off(settings, terms):
    output = examples.build("sinkd", **settings)(examples.batch(), examples.epoch())
    assert list(output.distillation) == terms
    assert list(output.task) == ["ce"]


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_weighs_its_terms(variant):
    weights = {"kd_weight": 0.5, "sinkhorn_weight": 3.0}
    distiller = examples.build("sinkd", **weights, kd_anneal_epochs=None, variant=variant).eval()
    batch = examples.batch()
    terms = distiller(batch, examples.epoch()).terms
    logits = distiller.student(batch.image), distiller.teacher(batch.image)
    kd, factor = (soft_target_loss, 0.001 * 8) if variant == "released" else (kd_loss, 1.0)
    torch.testing.assert_close(terms["kd"], 0.5 * kd(*logits, temperature=3.0))
    torch.testing.assert_close(terms["sinkhorn"], 3.0 * factor * sinkhorn_loss(*logits, **NUMBERS))


def test_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match=r"^distiller: SinKD has nothing to train on: ce_weight, kd_weight, sinkhorn_w"):
        examples.build("sinkd", ce_weight=0.0, kd_weight=0.0, sinkhorn_weight=0.0)
    with pytest.raises(UserError, match=r"iterations: .*greater than 0, found 0"):
        examples.build("sinkd", iterations=0)
    with pytest.raises(UserError, match=r"regularization: .*greater than 0, found 0"):
        examples.build("sinkd", regularization=0.0)
    with pytest.raises(UserError, match=r"^distiller.kd_anneal_epochs: .*, found 10 with 'paper'; set it to null$"):
        examples.build("sinkd", variant="paper")
