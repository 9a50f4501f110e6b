"""AdamW against the update written out; its state on the way through a file."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdistill.errors import UserError
from mdistill.optim import solvers as module
from mdistill.optim.adamw import AdamW
from mdistill.optim.solvers import SOLVERS

from ..host_reads import NoHostReads
from ..same import assert_same
from .test_solvers import SLOW, STEPS, losses, make_groups, make_weights, output, rate, train

SETTINGS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def by_hand(*, betas: tuple[float, float], eps: float, weight_decay: float) -> list[Tensor]:
    """The weights after all steps: arXiv:1711.05101, Algorithm 2, for one weight after the other."""
    weights = [weight.detach() for weight in make_weights()]
    averages = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]
    for step in range(STEPS):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        gradients = torch.autograd.grad(losses(leaves).total, leaves, allow_unused=True)
        for number, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            if gradient is None:
                continue
            m, v = averages[number]
            m = betas[0] * m + (1 - betas[0]) * gradient
            v = betas[1] * v + (1 - betas[1]) * gradient**2
            averages[number] = m, v
            m, v = m / (1 - betas[0] ** (step + 1)), v / (1 - betas[1] ** (step + 1))
            lr = rate(step) * (0.1 if number == SLOW else 1.0)
            weights[number] = weight - lr * (m / (v.sqrt() + eps) + weight_decay * weight)
    return weights


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.0}, {"betas": (0.0, 0.999), "eps": 1e-8}])
def test_equals_the_update_written_out(changes: dict[str, Any]) -> None:
    weights = make_weights()
    train(AdamW(make_groups(weights), **{**SETTINGS, **changes}), weights)
    for one, other in zip(weights, by_hand(**{**SETTINGS, **changes}), strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-10, atol=1e-13)


def test_the_first_step_worked_by_hand() -> None:
    """g = 3 throughout: m / sqrt(v) = 1, so w = 2 - 0.1 (1 + 0.5 * 2) = 1.8, then 1.8 - 0.1 (1 + 0.9) = 1.61."""
    weight = nn.Parameter(torch.full((), 2.0, dtype=torch.float64))
    solver = AdamW([{"params": [weight]}], eps=1e-15, weight_decay=0.5)
    solver.set_lr(0.1)
    for expected in (1.8, 1.61):
        solver.step(output({"t": 3 * weight}, {}))
        assert float(weight.detach()) == pytest.approx(expected, rel=1e-12)


def test_a_late_weight_counts_its_own_steps() -> None:
    """A weight that is first reached in step 4 moves in it as one that is reached in step 1 does there."""
    early, late = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    solver = AdamW([{"params": [early, late]}], **SETTINGS)
    solver.set_lr(0.1)
    moved = []
    for step in range(4):
        before = early.detach().clone()
        solver.step(output({"t": early.square().sum() if step < 3 else late.square().sum() + 0 * early.sum()}, {}))
        moved.append(early.detach() - before)
    torch.testing.assert_close(late.detach() - 1, moved[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rate_in_tensor", [False, True])
@pytest.mark.parametrize("stop", [0, 7])
def test_a_saved_state_goes_on_exactly(stop: int, rate_in_tensor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if rate_in_tensor:
        monkeypatch.setattr(module, "rate_tensor", lambda device, value=0.0: torch.tensor(value))
    whole, parts = make_weights(torch.float32), make_weights(torch.float32)
    settings = {**SETTINGS, "clip_grad_norm": 0.5}
    train(AdamW(make_groups(whole), **settings), whole)
    first = AdamW(make_groups(parts), **settings)
    train(first, parts, last=stop)
    file = io.BytesIO()
    first.set_lr(rate(stop))
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = AdamW(make_groups(parts), **settings)
    assert fresh.misfit(state, stepped=stop > 0) is None
    fresh.load_state_dict(state)
    assert_same(fresh.state_dict(), first.state_dict())
    train(fresh, parts, first=stop)
    assert_same(whole, parts)


def test_loaded_averages_lie_in_memory_as_the_weights_do() -> None:
    def solver(weight: nn.Parameter) -> AdamW:
        return AdamW([{"params": [weight]}], weight_decay=0.0)

    weight = nn.Parameter(torch.randn(2, 3, 4, 4))
    first = solver(weight)
    first.step(output({"t": weight.square().sum()}, {}))
    other = nn.Parameter(weight.detach().to(memory_format=torch.channels_last))
    second = solver(other)
    second.load_state_dict(first.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        assert second.optimizer.state[other][name].stride() == other.stride()


def state_after_steps() -> tuple[AdamW, dict[str, Any]]:
    weights = make_weights(torch.float32)
    solver = AdamW(make_groups(weights), **SETTINGS)
    train(solver, weights, last=3)
    return solver, copy.deepcopy(solver.state_dict())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("state", 0, "exp_avg"), torch.zeros(2), "solver.state.0.exp_avg is (2,) in torch.float32, not (3, 4) in"),
        (("state", 0, "exp_avg_sq"), torch.full((3, 4), -1.0), "solver.state.0.exp_avg_sq holds negative numbers"),
        (("state", 0, "step"), 3, "solver.state.0.step is 3, not a tensor"),
        (("state", 0, "step"), torch.tensor(0.5), "solver.state.0.step is 0.5, not a number of steps"),
        (("state", 0, "step"), torch.tensor(-1.0), "solver.state.0.step is -1.0, not a number of steps"),
        (("state", 0), {"momentum_buffer": None}, "solver.state.0 should hold exp_avg, exp_avg_sq, step alone"),
        (("param_groups", 0, "betas"), (0.9, 0.9), "solver.param_groups.0.betas is (0.9, 0.9), not (0.8, 0.95)"),
        (("param_groups", 1, "lr"), "fast", "solver.param_groups.1.lr is 'fast', not a rate"),
        (("param_groups", 1), {"params": []}, "solver.param_groups.1 should hold betas, eps, lr, lr_scale, params, we"),
        (("state",), {}, "solver.state holds no averages"),
    ],
)
def test_a_state_that_does_not_fit_is_told(place: tuple[Any, ...], value: Any, message: str) -> None:
    solver, state = state_after_steps()
    part: Any = state
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = value
    problem = solver.misfit(state, stepped=True)
    assert problem is not None
    assert problem.startswith(message)


def test_a_state_of_sgd_is_told() -> None:
    solver, _ = state_after_steps()
    weights = make_weights(torch.float32)
    sgd = module.SGD(make_groups(weights), momentum=0.9, weight_decay=0.0)
    assert "param_groups.0 should hold betas, eps" in str(solver.misfit(sgd.state_dict(), stepped=False))


def test_a_step_reads_nothing_on_the_host() -> None:
    weights = make_weights(torch.float32)
    solver = AdamW(make_groups(weights), **SETTINGS, clip_grad_norm=0.1)
    for _ in range(2):
        with NoHostReads():
            solver.step(losses(list(weights)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": [0.9]}, r"solver: betas"),
        ({"betas": [0.9, 1.0]}, r"solver: betas\.1: should be less than 1, found 1\.0"),
        ({"eps": 0}, r"solver: eps: should be greater than 0, found 0"),
        ({"clip_grad_norm": 0}, r"solver: clip_grad_norm: should be greater than 0, found 0"),
        ({"momentum": 0.9}, r"solver: momentum: unknown key"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SOLVERS.build("adamw", make_groups(make_weights()), where="solver", **{"weight_decay": 0.1, **settings})
