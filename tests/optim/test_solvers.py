"""DOT against the update written out, and what it shares with AlignedSGD; SGD on its own is in test_parts."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdistill.distillers import StepOutput
from mdistill.engine import cuda_graph
from mdistill.engine.cuda_graph import WARM_UP, CapturedStep
from mdistill.errors import UserError
from mdistill.optim import solvers as module
from mdistill.optim.dot import DOT
from mdistill.optim.solvers import SGD, SOLVERS, Solver

from ..conftest import TinyNet
from ..distillers import golden_more as golden
from ..host_reads import NoHostReads
from ..replay import Recorder
from ..same import assert_same

STEPS = 20
BOTH, SLOW, TASK, DISTILLATION, NEITHER = range(5)  # what reaches a weight; SLOW is reached by both at a tenth the rate
Settings = dict[str, float]
SETTINGS: Settings = {"momentum": 0.9, "delta": 0.075, "weight_decay": 5e-4}
OF_TWO_GRADIENTS: dict[str, Settings] = {"dot": SETTINGS, "aligned_sgd": {"momentum": 0.9, "weight_decay": 5e-4}}


def rate(step: int) -> float:
    """Drops after half of the steps."""
    return 0.05 if step < STEPS // 2 else 0.005


def make_weights(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4,), (2, 3), (5,), (2,)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def make_groups(weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    slow = {"params": [weights[SLOW]], "lr_scale": 0.1}
    return [{"params": [weight for number, weight in enumerate(weights) if number != SLOW]}, slow]


def output(task: dict[str, Tensor], distillation: dict[str, Tensor]) -> StepOutput:
    """Solvers read the terms alone."""
    return StepOutput(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), task, distillation, signals=None)


def losses(weights: list[Tensor]) -> StepOutput:
    """Two terms of each kind; some weights' gradients depend on other weights."""
    both, slow, task, distillation, _ = weights
    mixed = (both * slow).tanh()
    return output(
        task={"a": mixed.square().sum() + both.t().sin().sum(), "b": 0.3 * task.sum() + task.square().sum()},
        distillation={
            "c": (mixed.sum(1) - 0.5).square().sum() + 0.1 * both.sum(),
            "d": (distillation - 1).square().mean() * slow.square().sum(),
        },
    )


def train(solver: Solver, weights: list[nn.Parameter], first: int = 0, last: int = STEPS) -> None:
    for step in range(first, last):
        solver.set_lr(rate(step))
        solver.step(losses(list(weights)))


def by_hand(*, momentum: float, delta: float, weight_decay: float) -> list[Tensor]:
    """The weights after all steps: the equations for one weight after the other."""
    weights = [weight.detach() for weight in make_weights()]
    velocities = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]
    for step in range(STEPS):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        found = losses(leaves)
        of_task = torch.autograd.grad(sum(found.task.values()), leaves, retain_graph=True, allow_unused=True)
        of_distillation = torch.autograd.grad(sum(found.distillation.values()), leaves, allow_unused=True)
        for number, weight in enumerate(weights):
            g_task, g_distill = of_task[number], of_distillation[number]
            v_task, v_distill = velocities[number]
            lr = rate(step) * (0.1 if number == SLOW else 1.0)
            if g_task is not None and g_distill is not None:
                v_task = (momentum - delta) * v_task + g_task + weight_decay * weight
                v_distill = (momentum + delta) * v_distill + g_distill
            elif g_task is not None:
                v_task = momentum * v_task + g_task + weight_decay * weight
            elif g_distill is not None:
                v_distill = momentum * v_distill + g_distill + weight_decay * weight
            velocities[number] = v_task, v_distill
            weights[number] = weight - lr * (v_task + v_distill)
    return weights


def assert_close(found: list[nn.Parameter], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        {**SETTINGS, "weight_decay": 0.0},
        {"momentum": 0.4, "delta": 0.4, "weight_decay": 0.01},  # the task is left without momentum
        {"momentum": 0.0, "delta": 0.0, "weight_decay": 5e-4},
    ],
)
def test_dot_equals_the_update_written_out(settings: Settings) -> None:
    weights = make_weights()
    train(DOT(make_groups(weights), **settings), weights)
    expected = by_hand(**settings)
    assert_close(weights, expected)
    moved = [not torch.equal(one, other) for one, other in zip(make_weights(), weights, strict=True)]
    assert moved == [True, True, True, True, False]


@pytest.mark.parametrize("case", golden.cases("dot", "dot"))
def test_dot_equals_the_released_code(case: golden.Case) -> None:
    """Weights of three kinds, whose gradients are given; that code does not decay the last kind in its first step."""
    given, settings, kinds = case.tensors(), dict(case.arguments), ("shared", "task_only", "distillation_only")
    rates = settings.pop("lr"), settings.pop("lr_from_step_11")
    weights = {kind: nn.Parameter(given[f"start_{kind}"].clone()) for kind in kinds}
    undecayed = settings["weight_decay"] * given["start_distillation_only"]
    solver, paths = DOT([{"params": list(weights.values())}], **settings), {kind: [] for kind in kinds}
    for step in range(STEPS):
        solver.set_lr(rates[step // 10])
        slopes = {name: value[step] for name, value in given.items() if "gradient" in name}
        if step == 0:
            slopes["distillation_gradient_distillation_only"] = (
                slopes["distillation_gradient_distillation_only"] - undecayed
            )
        terms = {
            of: sum((slopes[f"{of}_gradient_{kind}"] * weights[kind]).sum() for kind in ("shared", f"{of}_only"))
            for of in ("task", "distillation")
        }
        solver.step(output({"t": terms["task"]}, {"d": terms["distillation"]}))
        for kind, weight in weights.items():
            paths[kind].append(weight.detach().clone())
    for kind, path in paths.items():
        golden.close(torch.stack(path), case.results()[kind], kind)


@pytest.mark.parametrize("case", golden.cases("dot", "dot_quadratic"))
def test_dot_on_a_quadratic_equals_the_released_code(case: golden.Case) -> None:
    given, settings = case.tensors(), dict(case.arguments)
    rate, weight = settings.pop("lr"), nn.Parameter(given["start_shared"].clone())
    solver, path = DOT([{"params": [weight]}], **settings), []
    for _ in range(STEPS):
        solver.set_lr(rate)
        task, apart = (weight - given["a"]).square().sum() / 2, weight - given["b"]
        solver.step(output({"t": task}, {"d": apart @ given["H"] @ apart / 2}))
        path.append(weight.detach().clone())
    golden.close(torch.stack(path), case.results()["shared"])


def test_two_steps_worked_by_hand() -> None:
    """mu 0.5, Delta 0.25, decay 0.5, rate 0.1; task w^2 / 2, distillation 2 w, from w = 1.

    Step 1: v_task = 1 + 0.5 = 1.5, v_distill = 2, w = 1 - 0.35 = 0.65.
    Step 2: v_task = 0.25 * 1.5 + 0.65 + 0.325 = 1.35, v_distill = 0.75 * 2 + 2 = 3.5, w = 0.65 - 0.485 = 0.165.
    """
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    solver = DOT([{"params": [weight]}], momentum=0.5, delta=0.25, weight_decay=0.5)
    solver.set_lr(0.1)
    for expected in (0.65, 0.165):
        solver.step(output({"t": weight.square() / 2}, {"d": 2 * weight}))
        assert float(weight.detach()) == pytest.approx(expected, rel=1e-14)


def test_gradients_may_come_in_any_layout() -> None:
    """Of a sum: one number, expanded; of a transposed weight: transposed."""
    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    solver = DOT([{"params": [weight]}], momentum=0.5, delta=0.25, weight_decay=0.0)
    solver.set_lr(1.0)
    factors = torch.arange(6, dtype=torch.float64).view(3, 2)
    for _ in range(2):
        solver.step(output({"t": weight.sum()}, {"d": (weight.t() * factors).sum()}))
    torch.testing.assert_close(weight.detach(), -(2.25 + 2.75 * factors.t()), rtol=1e-14, atol=0)


def test_without_delta_dot_is_sgd() -> None:
    ours, theirs, torchs = make_weights(), make_weights(), make_weights()
    shared = {"momentum": 0.9, "weight_decay": 5e-4}
    train(DOT(make_groups(ours), delta=0.0, **shared), ours)
    train(SGD(make_groups(theirs), **shared), theirs)
    assert_close(ours, list(theirs))
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in torchs], **shared)
    for step in range(STEPS):
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = rate(step) * (0.1 if number == SLOW else 1.0)
        optimizer.zero_grad()
        losses(list(torchs)).total.backward()
        optimizer.step()
    assert_close(ours, list(torchs))


def test_delta_matters() -> None:
    one, other = make_weights(), make_weights()
    train(DOT(make_groups(one), **SETTINGS), one)
    train(DOT(make_groups(other), **{**SETTINGS, "delta": 0.0}), other)
    differs = [not torch.equal(a, b) for a, b in zip(one, other, strict=True)]
    assert differs == [True, True, False, True, False]  # what the distillation alone reaches looks at another weight


@pytest.mark.parametrize("rate_in_tensor", [False, True])
@pytest.mark.parametrize("stop", [0, 7])
def test_a_saved_state_goes_on_exactly(stop: int, rate_in_tensor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a file; the first step after it at the loaded rate."""
    if rate_in_tensor:
        monkeypatch.setattr(module, "rate_tensor", lambda device, value=0.0: torch.tensor(value, dtype=torch.float64))
    whole, parts = make_weights(torch.float32), make_weights(torch.float32)
    train(DOT(make_groups(whole), **SETTINGS), whole)
    first = DOT(make_groups(parts), **SETTINGS)
    train(first, parts, last=stop)
    file = io.BytesIO()
    first.set_lr(rate(stop))
    torch.save(first.state_dict(), file)
    file.seek(0)
    fresh = DOT(make_groups(parts), **SETTINGS)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same(fresh.state_dict(), first.state_dict())
    fresh.step(losses(list(parts)))
    train(fresh, parts, first=stop + 1)
    assert_same(whole, parts)


def test_every_buffer_is_in_the_state_by_name() -> None:
    """In maps, as the search for what is not finite wants them, numbered as the weights are in their groups."""
    weights = make_weights()
    solver = DOT(make_groups(weights), **SETTINGS)
    train(solver, weights, last=1)
    state = solver.state_dict()
    assert list(state) == ["task", "distillation", "alone"]
    numbers = {BOTH: 0, TASK: 1, DISTILLATION: 2, NEITHER: 3, SLOW: 4}
    expected = [{BOTH, SLOW}, {BOTH, SLOW}, {TASK, DISTILLATION}]
    for part, members in zip(state.values(), expected, strict=True):
        assert set(part["state"]) == {numbers[member] for member in members}
        for member in members:
            assert part["state"][numbers[member]]["momentum_buffer"].shape == weights[member].shape


def test_loaded_buffers_lie_where_the_weights_do() -> None:
    weights = make_weights()
    solver = DOT(make_groups(weights), **SETTINGS)
    train(solver, weights, last=1)
    elsewhere = [nn.Parameter(weight.detach().to("meta")) for weight in weights]
    there = DOT(make_groups(elsewhere), **SETTINGS)
    there.load_state_dict(solver.state_dict())
    buffers = [entry["momentum_buffer"] for part in there.state_dict().values() for entry in part["state"].values()]
    assert [buffer.device.type for buffer in buffers] == ["meta"] * 6


def test_dot_keeps_its_buffers_where_they_are() -> None:
    weights = make_weights()
    solver = DOT(make_groups(weights), **SETTINGS)

    def places() -> list[int]:
        parts = solver.state_dict().values()
        buffers = [entry["momentum_buffer"] for part in parts for entry in part["state"].values()]
        return [tensor.data_ptr() for tensor in (*buffers, *weights)]

    train(solver, weights, last=1)
    before = places()
    train(solver, weights, first=1)
    assert places() == before
    assert len(before) == 6 + 5


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "task",
            " needs a task and a distillation term, this method has no task term;"
            " set distiller.ce_weight above 0 or choose another solver.name",
        ),
        (
            "distillation",
            " needs a task and a distillation term, this method has no distillation term;"
            " choose a method with one or choose another solver.name",
        ),
    ],
)
@pytest.mark.parametrize("name", OF_TWO_GRADIENTS)
def test_a_method_without_one_of_the_terms_is_refused(name: str, missing: str, message: str) -> None:
    weights = make_weights()
    terms = {"task": {"a": weights[BOTH].sum()}, "distillation": {"b": weights[BOTH].square().sum()}}
    solver = SOLVERS.build(name, make_groups(weights), **OF_TWO_GRADIENTS[name])
    solver.check(output(**terms))
    lacking = output(**{**terms, missing: {}})
    for call in (solver.check, solver.step):
        with pytest.raises(UserError) as caught:
            call(lacking)
        assert str(caught.value) == f"solver.name: {name}{message}"
    assert_same(weights, make_weights())
    SGD(make_groups(weights), momentum=0.9, weight_decay=0.0).check(lacking)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 0.05}, r"solver\.delta: should be at most solver\.momentum, 0\.05, found 0\.075"),
        ({"momentum": 0.95}, r"solver\.delta: should with solver\.momentum, 0\.95, sum to below 1, found 0\.075"),
        ({"momentum": 0.5, "delta": 0.5}, r"sum to below 1, found 0\.5"),
        ({"momentum": 1.0, "delta": 0.0}, r"sum to below 1, found 0\.0"),
        ({"delta": -0.1}, r"delta: should be greater than or equal to 0, found -0\.1"),
        ({"nesterov": True}, r"nesterov: unknown key"),
    ],
)
def test_dot_refuses_settings(settings: Settings, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        SOLVERS.build("dot", make_groups(make_weights()), where="solver", **{**SETTINGS, **settings})
    assert "\n" not in str(caught.value)


def test_the_limits_themselves_are_allowed() -> None:
    for settings in ({"momentum": 0.4, "delta": 0.4}, {"momentum": 0.9, "delta": 0.0}, {"momentum": 0.0, "delta": 0.0}):
        SOLVERS.build("dot", make_groups(make_weights()), weight_decay=0.0, **settings)


def network_step(
    network: TinyNet, solver: Solver, image: Tensor, target: Tensor, teacher: Tensor
) -> Callable[[], None]:
    def step() -> None:
        logits = network(image)
        divergence = nn.functional.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")
        ce = nn.functional.cross_entropy(logits, target)
        solver.step(output({"ce": ce}, {"kd": divergence}))

    return step


@pytest.mark.parametrize("name", OF_TWO_GRADIENTS)
def test_a_step_reads_nothing_on_the_host(name: str) -> None:
    network = TinyNet(4, 8).train()
    solver = SOLVERS.build(name, [{"params": list(network.parameters())}], **OF_TWO_GRADIENTS[name])
    solver.set_lr(0.1)
    step = network_step(network, solver, torch.randn(6, 3, 8, 8), torch.arange(6) % 4, torch.randn(6, 4))
    for _ in range(2):
        with NoHostReads():
            step()


@pytest.mark.parametrize("name", OF_TWO_GRADIENTS)
def test_a_replayed_step_equals_an_eager_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rate in a tensor, as on CUDA, which drops after the capture; two groups."""
    monkeypatch.setattr(module, "rate_tensor", lambda device, value=0.0: torch.tensor(value, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 4, torch.randn(6, 4, generator=generator))
        for _ in range(10)
    ]
    results = []
    for recorder in (None, Recorder()):
        torch.manual_seed(0)
        network = TinyNet(4, 8).train()
        inner = [*network.bn.parameters(), *network.hidden.parameters()]
        last = {"params": list(network.classifier.parameters()), "lr_scale": 0.1}
        solver = SOLVERS.build(name, [{"params": inner}, last], **OF_TWO_GRADIENTS[name])
        static = tuple(torch.zeros_like(part) for part in batches[0])
        if recorder is not None:
            monkeypatch.setattr(cuda_graph, "capture_graph", recorder)
        step = network_step(network, solver, *static)
        launch = CapturedStep(lambda size, step=step: step(), 6, capture=recorder is not None, name="step")
        for number, batch in enumerate(batches):
            solver.set_lr(0.1 if number < 6 else 0.01)
            for place, part in zip(static, batch, strict=True):
                place.copy_(part)
            launch(6)
        if recorder is not None:
            assert [replay.calls for replay in recorder.replays] == [10 - WARM_UP]
        results.append({"model": dict(network.state_dict()), "solver": solver.state_dict()})
    assert_same(*results)
