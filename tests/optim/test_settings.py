"""Settings that solvers share: clipping, warm-up and cosine of the rate, weight decay of norms and biases."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdistill.config import load
from mdistill.errors import UserError
from mdistill.optim.adamw import AdamW
from mdistill.optim.aligned_sgd import AlignedSGD
from mdistill.optim.dot import DOT
from mdistill.optim.schedules import learning_rate
from mdistill.optim.solvers import SGD, Solver, clip_factor, without_decay_of_norms

from .. import runs
from ..conftest import TinyNet
from ..host_reads import NoHostReads
from .test_solvers import SLOW, STEPS, assert_close, losses, make_groups, make_weights, output, rate, train

SGD_SETTINGS = {"momentum": 0.9, "weight_decay": 5e-4}

# ---- clipping ------------------------------------------------------------------------------------------------------


def test_a_gradient_of_length_5_is_cut_to_1() -> None:
    """3, 4 in two weights; decay of 0.5 joins afterwards. w = 2 - 0.1 (0.6 + 1) and -2 - 0.1 (0.8 - 1)."""
    one, other = (nn.Parameter(torch.full((1,), value, dtype=torch.float64)) for value in (2.0, -2.0))
    solver = SGD([{"params": [one]}, {"params": [other]}], momentum=0.0, weight_decay=0.5, clip_grad_norm=1.0)
    solver.set_lr(0.1)
    solver.step(output({"t": (3 * one + 4 * other).sum()}, {}))
    assert [float(one.detach()), float(other.detach())] == pytest.approx([1.84, -1.98], rel=1e-6)


@pytest.mark.parametrize("longest", [0.3, 2.0, 1e9])
def test_sgd_equals_the_clipped_update_written_out(longest: float) -> None:
    weights = make_weights()
    train(SGD(make_groups(weights), **SGD_SETTINGS, clip_grad_norm=longest), weights)
    expected = [weight.detach() for weight in make_weights()]
    momenta = [torch.zeros_like(weight) for weight in expected]
    cut = 0
    for step in range(STEPS):
        leaves = [weight.clone().requires_grad_() for weight in expected]
        gradients = torch.autograd.grad(losses(leaves).total, leaves, allow_unused=True)
        length = math.sqrt(sum(float(each.square().sum()) for each in gradients if each is not None))
        cut += length > longest
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                gradient = gradient * min(1.0, longest / (length + 1e-6)) + 5e-4 * expected[number]
                momenta[number] = 0.9 * momenta[number] + gradient
                lr = rate(step) * (0.1 if number == SLOW else 1.0)
                expected[number] = expected[number] - lr * momenta[number]
    assert cut == {0.3: STEPS, 1e9: 0}.get(longest, cut)
    for one, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-10, atol=1e-13)


def test_dot_clips_the_sum_of_its_gradients() -> None:
    """So without Delta it is SGD; task 3 and distillation 1 make 4, which is cut to 2: v = 0.25 * 1.5 + 0.75 * 0.5."""
    ours, theirs = make_weights(), make_weights()
    train(DOT(make_groups(ours), delta=0.0, **SGD_SETTINGS, clip_grad_norm=0.5), ours)
    train(SGD(make_groups(theirs), **SGD_SETTINGS, clip_grad_norm=0.5), theirs)
    assert_close(ours, list(theirs))
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    solver = DOT([{"params": [weight]}], momentum=0.5, delta=0.25, weight_decay=0.0, clip_grad_norm=2.0)
    solver.set_lr(1.0)
    for _ in range(2):
        solver.step(output({"t": 3 * weight}, {"d": weight + 0}))
    assert float(weight.detach()) == pytest.approx(-(2 + 2 + 0.25 * 1.5 + 0.75 * 0.5), rel=1e-6)


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    for bad in (torch.inf, torch.nan):
        gradients = [torch.tensor([1.0, bad]), torch.ones(2)]
        clipped = gradients[0] * clip_factor(gradients, 1.0)
        assert not clipped.isfinite().all()


@pytest.mark.parametrize("solver", [SGD, DOT, AdamW])
def test_clipping_reads_nothing_on_the_host(solver: Any) -> None:
    weights = make_weights(torch.float32)
    more: dict[type[Solver], dict[str, float]] = {SGD: {"momentum": 0.9}, DOT: {"momentum": 0.9, "delta": 0.05}}
    built = solver(make_groups(weights), weight_decay=0.1, clip_grad_norm=0.1, **more.get(solver, {}))
    for _ in range(2):
        with NoHostReads():
            built.step(losses(list(weights)))


# ---- the rate ------------------------------------------------------------------------------------------------------


def test_cosine_is_the_formula() -> None:
    def cosine(epoch: int) -> float:
        return learning_rate(epoch, schedule="cosine", lr=0.4, milestones=(), gamma=0.1, epochs=4)

    root = math.sqrt(2)
    assert [cosine(epoch) for epoch in range(1, 5)] == pytest.approx([0.4, 0.1 * (2 + root), 0.2, 0.1 * (2 - root)])


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_warm_up_is_a_ramp_over_the_steps_and_then_the_schedule(schedule: Any) -> None:
    def at(epoch: int, progress: float, warmup: int) -> float:
        return learning_rate(
            epoch,
            schedule=schedule,
            lr=0.4,
            milestones=(3,) if schedule == "step" else (),
            gamma=0.1,
            epochs=5,
            warmup_epochs=warmup,
            progress=progress,
        )

    for epoch in range(1, 6):
        for step in range(1, 5):
            factor = min(1.0, ((epoch - 1) * 4 + step) / 8)
            assert at(epoch, step / 4, 2) == pytest.approx(factor * at(epoch, 1.0, 0), rel=1e-14)
            assert at(epoch, step / 4, 0) == at(epoch, 1.0, 0)


@pytest.mark.slow
def test_each_step_of_a_run_has_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 warm-up epochs of 5 steps: 0.01, 0.02 ... 0.1, then 0.1; also from the middle of an epoch on."""
    seen: list[float] = []
    step = SGD.step

    def noted(solver: SGD, given: Any) -> None:
        seen.append(solver.optimizer.param_groups[0]["lr"])
        step(solver, given)

    monkeypatch.setattr(SGD, "step", noted)
    cfg = runs.write_config(tmp_path, solver={"lr_warmup_epochs": 2, "lr": 0.1})
    metrics = runs.train(cfg, tmp_path / "whole", cache=False)
    expected = [0.01 * (number + 1) for number in range(10)] + [0.1] * 5
    assert seen == pytest.approx(expected, rel=1e-12)
    assert [line["lr"] for line in metrics[0]] == pytest.approx([0.05, 0.1, 0.1])
    seen.clear()
    runs.train(cfg, tmp_path / "parts", stop_at=7, cache=False)
    runs.train(cfg, tmp_path / "parts", mode="resume", cache=False)
    assert seen == pytest.approx(expected, rel=1e-12)
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_run_too_short_for_its_warm_up_is_told(kd_cfg: Path) -> None:
    assert load(kd_cfg, ["solver.lr_warmup_epochs=3"]).warnings() == []
    assert load(kd_cfg, ["solver.lr_warmup_epochs=4"]).warnings() == [
        "solver.lr_warmup_epochs: 4 is more than all epochs (3), so solver.lr is never reached"
    ]
    with pytest.raises(UserError, match=r"solver.lr_warmup_epochs: .*found -1$"):
        load(kd_cfg, ["solver.lr_warmup_epochs=-1"])


# ---- weight decay of norms and biases --------------------------------------------------------------------------------


def test_norms_and_biases_are_groups_of_their_own() -> None:
    network = TinyNet(4, 8)
    head = {"params": list(network.classifier.parameters()), "lr_scale": 0.1}
    rest = [each for name, each in network.named_parameters() if not name.startswith("classifier")]
    groups = without_decay_of_norms([{"params": rest}, head])
    decayed = [parameter for group in groups if "weight_decay" not in group for parameter in group["params"]]
    undecayed = [parameter for group in groups if group.get("weight_decay") == 0 for parameter in group["params"]]
    assert len(decayed) + len(undecayed) == len(list(network.parameters()))
    names = {parameter: name for name, parameter in network.named_parameters()}
    norms = {name for name in names.values() if name.endswith(".bias") or name.startswith("bn")}
    assert {names[parameter] for parameter in undecayed} == norms
    assert [group["lr_scale"] for group in groups if group["params"][0] is network.classifier.weight] == [0.1]


@pytest.mark.parametrize("name", ["sgd", "aligned_sgd", "dot", "adamw"])
def test_only_weights_of_two_dimensions_decay(name: str) -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = without_decay_of_norms([{"params": [matrix, vector]}])
    solvers: dict[str, Solver] = {
        "sgd": SGD(groups, momentum=0.0, weight_decay=0.5),
        "aligned_sgd": AlignedSGD(groups, momentum=0.0, weight_decay=0.5),
        "dot": DOT(groups, momentum=0.0, delta=0.0, weight_decay=0.5),
        "adamw": AdamW(groups, weight_decay=0.5),
    }
    solvers[name].set_lr(0.1)

    def nothing() -> Tensor:
        return 0 * (matrix.sum() + vector.sum())

    solvers[name].step(output({"t": nothing()}, {"d": nothing()}))
    assert torch.equal(vector.detach(), torch.ones(2))
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))


# ---- all of them in runs ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        {"name": "sgd"},
        {"name": "aligned_sgd"},
        {"name": "dot", "delta": 0.05},
        {"name": "adamw", "lr": 0.001},
    ],
    ids=lambda solver: str(solver["name"]),
)
def test_a_resumed_run_is_the_same(tmp_path: Path, solver: dict[str, Any]) -> None:
    settings = {"lr_warmup_epochs": 2, "clip_grad_norm": 0.5, "decay_norms": False, "schedule": "cosine", **solver}
    cfg = runs.write_config(tmp_path, "dkd", solver=settings, distiller={"label_smoothing": 0.1})
    runs.train(cfg, tmp_path / "whole", cache=False)
    runs.train(cfg, tmp_path / "parts", stop_at=7, cache=False)
    runs.train(cfg, tmp_path / "parts", mode="resume", cache=False)
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")
