"""Schedule, metrics, solver and evaluation, each against plain arithmetic."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from mdistill.data import DATASETS
from mdistill.distillers import StepOutput
from mdistill.engine.evaluate import evaluate
from mdistill.engine.metrics import RunningMetrics
from mdistill.errors import RunFailed
from mdistill.optim.schedules import learning_rate
from mdistill.optim.solvers import SGD

CPU = torch.device("cpu")


def test_the_rate_drops_after_its_milestones() -> None:
    """The published recipe: 0.05 up to and with epoch 150, a tenth of it from 151 on."""
    published = {"schedule": "step", "lr": 0.05, "milestones": (150, 180, 210), "gamma": 0.1, "epochs": 240}
    at = {epoch: learning_rate(epoch, **published) for epoch in (1, 150, 151, 180, 181, 210, 211, 240)}
    expected = {1: 0.05, 150: 0.05, 151: 0.005, 180: 0.005, 181: 5e-4, 210: 5e-4, 211: 5e-5, 240: 5e-5}
    assert at == pytest.approx(expected)
    assert learning_rate(7, schedule="step", lr=0.3, milestones=(), gamma=0.1, epochs=9) == 0.3


def test_the_cosine_goes_from_the_rate_to_nearly_0() -> None:
    """Over 4 epochs cos(0), cos(45), cos(90) and cos(135 degrees): 1, 0.854, 1/2 and 0.146 of the rate."""
    cosine = {"schedule": "cosine", "lr": 0.2, "milestones": (), "gamma": 0.1, "epochs": 4}
    half = math.sqrt(0.5)
    assert [learning_rate(epoch, **cosine) for epoch in (1, 2, 3, 4)] == pytest.approx(
        [0.2, 0.1 * (1 + half), 0.1, 0.1 * (1 - half)]
    )


def step_output(
    logits: torch.Tensor, target: torch.Tensor, *, distillation: dict[str, torch.Tensor] | None = None, **task: Any
) -> StepOutput:
    """Metrics and solvers do not read the signals."""
    return StepOutput(logits, target, task, distillation or {}, signals=None)


def output(logits: torch.Tensor, classes: list[int], *, ce: float, kd: float | None = None) -> StepOutput:
    distillation = {} if kd is None else {"kd": torch.tensor(kd)}
    return step_output(logits, torch.tensor(classes), ce=torch.tensor(ce), distillation=distillation)


def test_running_metrics_weigh_steps_by_their_images() -> None:
    """Steps of 4 and 2 images: ce (4*1 + 2*4)/6 = 2, kd (4*0.5 + 2*2)/6 = 1, 3 of 6 right."""
    metrics = RunningMetrics(CPU)
    metrics.update(output(torch.eye(4), [0, 1, 0, 0], ce=1.0, kd=0.5))
    metrics.update(output(torch.eye(2), [0, 0], ce=4.0, kd=2.0))
    result = metrics.read(epoch=1)
    assert result.terms == pytest.approx({"ce": 2.0, "kd": 1.0})
    assert result.loss == pytest.approx(3.0)
    assert result.top1 == pytest.approx(50.0)
    assert result.images == 6


def test_a_mixed_image_counts_as_of_its_larger_share() -> None:
    metrics = RunningMetrics(CPU)
    shares = torch.tensor([[0.6, 0.4, 0.0], [0.7, 0.3, 0.0], [0.0, 0.1, 0.9]])
    metrics.update(step_output(torch.eye(3), shares, ce=torch.tensor(1.0)))
    assert metrics.read(epoch=1).top1 == pytest.approx(200 / 3)


def test_running_metrics_go_on_from_their_state() -> None:
    whole, half = RunningMetrics(CPU), RunningMetrics(CPU)
    for step in range(4):
        if step == 2:
            state, half = half.state_dict(), RunningMetrics(CPU)
            half.load_state_dict(state)
        for metrics in (whole, half):
            metrics.update(output(torch.eye(3), [0, 1, step % 3], ce=0.1 * step))
    assert whole.read(1) == half.read(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_non_finite_term_and_step_are_named(bad: float) -> None:
    metrics = RunningMetrics(CPU)
    for ce, kd in ((1.0, 1.0), (1.0, bad), (bad, 1.0), (1.0, 1.0)):
        metrics.update(output(torch.eye(2), [0, 1], ce=ce, kd=kd))
    with pytest.raises(RunFailed, match="loss term 'kd' is not finite from step 2 of epoch 7 on"):
        metrics.read(epoch=7)


def test_sgd_equals_the_textbook_update_over_20_steps() -> None:
    """v = m v + (g + wd w); w = w - lr v, written out, in float64, with a rate that changes."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    solver = SGD([{"params": [weight]}], momentum=0.9, weight_decay=5e-4)
    by_hand, velocity = weight.detach().clone(), torch.zeros(3, dtype=torch.float64)
    target = torch.tensor([0.5, 0.5, -1.0], dtype=torch.float64)
    for step in range(20):
        lr = 0.1 if step < 10 else 0.01
        solver.set_lr(lr)
        solver.step(
            step_output(
                weight[None],
                torch.tensor([0]),
                a=0.3 * (weight - target).square().sum(),
                distillation={"b": (weight * target).sum()},
            )
        )
        gradient = 0.6 * (by_hand - target) + target + 5e-4 * by_hand
        velocity = 0.9 * velocity + gradient
        by_hand = by_hand - lr * velocity
    torch.testing.assert_close(weight.detach(), by_hand, rtol=1e-12, atol=1e-12)


def test_solver_state_goes_on_exactly() -> None:
    def steps(solver: SGD, weight: nn.Parameter, count: int) -> None:
        for _ in range(count):
            solver.set_lr(0.1)
            solver.step(step_output(weight[None], torch.tensor([0]), a=weight.square().sum()))

    weights = [nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2)]
    solvers = [SGD([{"params": [w]}], momentum=0.9, weight_decay=0.0) for w in weights]
    steps(solvers[0], weights[0], 6)
    steps(solvers[1], weights[1], 3)
    fresh = SGD([{"params": [weights[1]]}], momentum=0.9, weight_decay=0.0)
    fresh.load_state_dict(solvers[1].state_dict())
    steps(fresh, weights[1], 3)
    assert torch.equal(weights[0], weights[1])


class Scores(nn.Module):
    """Logits by rule, in the order of the data: a table (N, C) read batch by batch."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.at = table, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.at += len(x)
        return self.table[self.at - len(x) : self.at]


def test_evaluation_counts_ranks_and_the_uneven_last_batch() -> None:
    data = DATASETS.build("tiny", None, False)
    targets = torch.cat([target for _, target in data.eval_batches("test", 25)])
    table = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))
    result = evaluate(Scores(table), data, "test", batch_size=25)
    order = table.argsort(dim=1, descending=True)
    top1 = sum(order[i, 0] == targets[i] for i in range(60)) / 60
    top5 = sum(targets[i] in order[i, :5] for i in range(60)) / 60
    loss = sum(-table[i].log_softmax(0)[targets[i]] for i in range(60)) / 60
    assert result.top1 == pytest.approx(100 * float(top1))
    assert result.top5 == pytest.approx(100 * float(top5))
    assert result.loss == pytest.approx(float(loss), rel=1e-6)
    assert result.images == 60


def test_a_network_that_says_nothing_scores_nothing() -> None:
    """All classes equal: no hit by accident."""
    data = DATASETS.build("tiny", None, False)
    result = evaluate(Scores(torch.zeros(60, 10)), data, "test", batch_size=60)
    assert (result.top1, result.top5) == (0.0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_result(value: float) -> None:
    data = DATASETS.build("tiny", None, False)
    scores = torch.zeros(60, 10)
    scores[17] = value
    with pytest.raises(RunFailed, match="the cross-entropy on test is nan: Scores has logits that are not finite"):
        evaluate(Scores(scores), data, "test", batch_size=60)


def test_evaluation_restores_the_mode_and_changes_nothing() -> None:
    data = DATASETS.build("tiny", None, False)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10)).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    evaluate(network, data, "test", batch_size=60)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
