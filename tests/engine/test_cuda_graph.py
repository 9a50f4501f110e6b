"""How steps are launched: replayed, compiled or as Python calls, a run stays the same to the last bit."""

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import uniform
from mdistill.engine import active_trial, cuda_graph
from mdistill.engine.active_trial import ActiveTrial
from mdistill.engine.cuda_graph import WARM_UP, CapturedStep, Engine, capture_graph, choose_engine, compile_network
from mdistill.engine.trainer import train_step
from mdistill.errors import UserError
from mdistill.models import MODELS
from mdistill.optim import solvers

from .. import runs
from ..conftest import TinyNet
from ..replay import Recorder, emulated
from ..same import assert_same

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@DISTILLERS.register("drawing_method")
class Drawing(Distiller):
    """A method that draws within a step and reads the epoch."""

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        noise = uniform(signals.seed, signals.epoch, signals.index, signals.teacher_logits.shape[1])
        return {"noise": signals.epoch * (noise * (signals.student_logits - signals.teacher_logits)).square().mean()}


@DISTILLERS.register("pooled_method")
class Pooled(Distiller):
    """A method that reads features of both networks."""

    needs = Needs(teacher="features")

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        assert signals.student_features is not None
        assert signals.teacher_features is not None
        return {"pooled": (signals.student_features.pooled - signals.teacher_features.pooled).square().mean()}


def config_of(folder: Path, method: str, student: str = "tiny_net") -> Path:
    queue = {"queue_size": 70}  # wraps around within an epoch, in other places each time
    return runs.write_config(folder, method, student=student, distiller=queue if method == "mcld" else None)


@pytest.fixture
def rate_in_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA."""
    monkeypatch.setattr(solvers, "rate_tensor", lambda device, value=0.0: torch.tensor(value, dtype=torch.float64))


# --- the emulator of a graph ---


def test_the_emulator_follows_values_that_are_written_in_place() -> None:
    x, total = torch.zeros(3), torch.zeros(3)
    replay = Recorder()(lambda: total.add_((x * 2).view(3, 1).squeeze(1)))
    replay()  # has been done by the recording
    assert torch.equal(total, torch.zeros(3))
    for value in (1.0, 5.0):
        x.fill_(value)
        replay()
    assert torch.equal(total, torch.full((3,), 12.0))


def test_the_emulator_does_not_follow_a_python_counter() -> None:
    """What shows that it freezes: as Python counts to 3, the graph adds 1 each time."""
    count, total = [0], torch.zeros(())

    def function() -> None:
        count[0] += 1
        total.add_(count[0])

    replay = Recorder()(function)
    for _ in range(3):
        replay()
    assert count == [1]
    assert total == 3.0


def test_the_emulator_does_not_follow_a_rebound_attribute() -> None:
    module, holder = nn.Linear(2, 1, bias=False), SimpleNamespace(scale=torch.ones(()))
    out = torch.zeros(1, 1)

    def function() -> None:
        with torch.no_grad():
            out.copy_(module(torch.ones(1, 2)) * holder.scale)

    replay = Recorder()(function)
    replay()
    before = out.clone()
    holder.scale = torch.tensor(10.0)
    module.weight.data = torch.full((1, 2), 7.0)
    replay()
    assert torch.equal(out, before)
    function()
    assert torch.equal(out, torch.full((1, 1), 140.0))


def test_the_emulator_holds_what_was_newly_allocated_in_one_place() -> None:
    x, held = torch.zeros(()), []
    replay = Recorder()(lambda: held.append(x + 1))
    replay()
    for value in (1.0, 2.0):
        x.fill_(value)
        replay()
    assert held == [torch.tensor(3.0)]


def test_the_emulator_trains_as_python_does() -> None:
    """Forward, backward, BatchNorm's hidden writes and the fused optimiser, whose arguments are lists."""
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 4) for _ in range(6)]
    networks = []
    for replayed in (False, True):
        torch.manual_seed(0)
        network = TinyNet(4, 8).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
        image, target = torch.zeros(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64)

        def function(size: int, network=network, optimizer=optimizer, image=image, target=target) -> None:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(network(image), target).backward()
            optimizer.step()

        with emulated():
            step = CapturedStep(function, 6, capture=replayed, name="step")
            for each in batches:
                image.copy_(each[0])
                target.copy_(each[1])
                step(6)
        assert (step.replay is not None) == replayed
        networks.append(network)
    assert networks[0].bn.num_batches_tracked == 6
    assert_same(dict(networks[0].state_dict()), dict(networks[1].state_dict()))


def test_the_emulator_takes_optional_and_listed_arguments() -> None:
    x, rows, out = torch.zeros(4, 3), torch.tensor([2, 0]), torch.zeros(2, 7)

    def function() -> None:
        picked = x[rows, :]  # a list with a None in it
        normed = nn.functional.layer_norm(picked, (3,))  # no weight, no bias
        out.copy_(torch.cat([picked, normed, picked.sum(1, keepdim=True)], dim=1))

    replay = Recorder()(function)
    replay()
    x.copy_(torch.arange(12.0).view(4, 3))
    rows.copy_(torch.tensor([1, 3]))
    replay()
    replayed = out.clone()
    function()
    assert torch.equal(replayed, out)
    assert replayed[1, 0] == 9.0


@pytest.mark.parametrize("read", [lambda x: x.add_(float(x)), lambda x: x.add_(x.tolist()), lambda x: x[x > 0].sum()])
def test_the_emulator_refuses_what_no_graph_can_hold(read: Callable[[Tensor], Any]) -> None:
    recorder = Recorder()
    with pytest.raises(AssertionError):
        recorder(lambda: read(torch.ones(())))
    assert recorder.replays == []


# --- replayed runs ---

RECIPES = {
    "mixup": ("kd", "data.mixing={name: mixup, alpha: 0.8}"),
    "cutmix": ("dist", "data.mixing={name: cutmix, alpha: 1.0, probability: 0.5}"),
    "cutmix_pick": ("kd", "data.mixing={name: cutmix_pick, alpha: 1.0, candidates: 2}"),
    "cutmix_pick beside": (
        "dist",
        "data.mixing={name: cutmix_pick, alpha: 1.0, candidates: 2, pick: student, mode: beside, partner: batch}",
        "solver.average_from=2",
        "solver.average_statistics=first",
    ),
    "ensemble": ("dkd", "teacher.ensemble=[{name: tiny_net, checkpoint: teacher.pt}]"),
    "averages": ("mcld", "solver.ema_decay=0.9", "solver.average_from=2"),
    "cosine": ("vanilla", "solver.schedule=cosine"),
    "drops of the rate": ("vanilla", "solver.milestones=[1,2]"),
    "dot": ("dkd", "solver.name=dot", "solver.delta=0.075"),
    "two gradients aligned": ("dhkd", "solver.name=aligned_sgd"),
    "dot with a module of the method": ("ctkd", "solver.name=dot", "solver.delta=0.075"),
    "dot with two views": ("mlkd", "solver.name=dot", "solver.delta=0.075"),
    "convolutions": ("nd",),
}
KINDS = ("kd", "mcld", "crd", "ctkd", "ft", "tekap", "mlkd", "rkd", "wkd_l", "drawing_method", "pooled_method")
"""One method of each kind of state: none, a queue, memories, a module, phases, draws, views. Steps of all are captured
on the pretended device, and every restored method continues bit for bit in the tests of the contract."""


@pytest.mark.usefixtures("rate_in_a_tensor")
@pytest.mark.parametrize("recipe", [*KINDS, *RECIPES])
@pytest.mark.slow
def test_a_replayed_and_resumed_run_equals_an_eager_one(recipe: str, tmp_path: Path) -> None:
    """Bit for bit, stopped in the middle of the second epoch: weights, averages, buffers, momentum, queues, metrics."""
    method, *overrides = RECIPES.get(recipe, (recipe,))
    cfg = config_of(tmp_path, method, "resnet8" if recipe == "convolutions" else "tiny_net")
    runs.train(cfg, tmp_path / "eager", *overrides)
    for options in ({"stop_at": 7}, {"mode": "resume"}):
        with emulated() as recorder:
            runs.train(cfg, tmp_path / "graph", *overrides, **options)
        steps = 12 if "mode" in options and DISTILLERS.get(method).phases else 6  # full ones of a phase, at most
        assert max(replay.calls for replay in recorder.replays) == steps - WARM_UP
    runs.assert_same_runs(tmp_path / "eager", tmp_path / "graph")


@pytest.mark.parametrize("stop_at", [8, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 10))])
def test_a_replayed_run_resumes_wherever_it_was_stopped(stop_at: int, tmp_path: Path) -> None:
    """Before anything is captured, after it, and between epochs."""
    cfg = config_of(tmp_path, "mcld")
    runs.train(cfg, tmp_path / "eager")
    with emulated():
        runs.train(cfg, tmp_path / "graph", stop_at=stop_at)
    assert runs.place(tmp_path / "graph") == (stop_at // 5 + 1, stop_at % 5)
    with emulated():
        runs.train(cfg, tmp_path / "graph", mode="resume")
    runs.assert_same_runs(tmp_path / "eager", tmp_path / "graph")


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.slow
def test_captured_teacher_batches_give_the_same_logits(cache: bool, tmp_path: Path) -> None:
    """What a replayed run caches, an eager run reads; without a cache both compute them all."""
    cfg = config_of(tmp_path, "mcld")
    runs.train(cfg, tmp_path / "eager", cache=cache)
    with emulated() as recorder:
        runs.train(cfg, tmp_path / "graph", cache=cache)
    assert sorted(replay.calls for replay in recorder.replays) == [6 - WARM_UP, 12 - WARM_UP]
    runs.assert_same_runs(tmp_path / "eager", tmp_path / "graph")
    if cache:
        runs.train(cfg, tmp_path / "graph", mode="overwrite")
        runs.assert_same_runs(tmp_path / "eager", tmp_path / "graph")


@pytest.mark.parametrize(
    ("method", "overrides", "captures"),
    [
        ("mcld", ("solver.ema_decay=0.9",), 4),  # a step and a teacher batch of each
        ("dist", ("data.mixing={name: cutmix, alpha: 1.0}", "solver.name=dot", "solver.delta=0.05"), 2),
    ],
)
@pytest.mark.slow
def test_replayed_trials_equal_eager_ones(
    method: str, overrides: tuple[str, ...], captures: int, tmp_path: Path
) -> None:
    """Two seeds, each with captures of its own, on one data set and one teacher."""
    cfg = config_of(tmp_path, method)
    for seed in (0, 1):
        runs.train(cfg, tmp_path / "eager", *overrides, seeds=(seed,))
    with emulated() as recorder:
        runs.train(cfg, tmp_path / "graph", *overrides, seeds=(0, 1))
    assert len(recorder.replays) == captures
    for seed in (0, 1):
        runs.assert_same_runs(tmp_path / "eager", tmp_path / "graph", seed=seed)


# --- CapturedStep and capture_graph ---


class Tape:
    """A step, and captures of it that fail with ``errors`` first; notes what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        self.calls: list[str] = []
        self.errors = list(errors)
        monkeypatch.setattr(cuda_graph, "capture_graph", self.capture)

    def function(self, size: int) -> None:
        self.calls.append(f"run {size}")

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self.calls.append("capture")
        if self.errors:
            raise self.errors.pop(0)
        return partial(self.calls.append, "replay")


def test_a_step_is_captured_once_after_three_calls_at_the_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last, smaller batch of an epoch runs eagerly, before and after."""
    tape = Tape(monkeypatch)
    step = CapturedStep(tape.function, 8, capture=True, name="step")
    for size in (8, 8, 5, 8, 8, 5, 8):
        step(size)
    assert tape.calls == ["run 8", "run 8", "run 5", "run 8", "capture", "replay", "run 5", "replay"]


def test_a_step_that_is_not_to_be_captured_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tape = Tape(monkeypatch)
    step = CapturedStep(tape.function, 8, capture=False, name="step")
    for _ in range(6):
        step(8)
    assert tape.calls == ["run 8"] * 6


def test_a_capture_that_fails_once_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tape = Tape(monkeypatch, RuntimeError("a graph of an earlier run was freed"))
    step = CapturedStep(tape.function, 8, capture=True, name="step")
    for _ in range(5):
        step(8)
    assert tape.calls == ["run 8"] * 3 + ["capture", "capture", "replay", "replay"]
    assert capsys.readouterr().out == ""


def chained() -> Exception:
    """What a capture raises on its way out of an error within."""
    first, last = RuntimeError("operation not permitted\nwhen stream is capturing"), RuntimeError("capture invalidated")
    last.__context__ = ValueError("on the way out")
    last.__context__.__cause__ = first
    return last


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("no kernel\nand much more"), "RuntimeError: no kernel"),
        (NotImplementedError(), "NotImplementedError"),
        (AssertionError("\n"), "AssertionError"),
        (chained(), "RuntimeError: operation not permitted"),
    ],
)
def test_a_capture_that_fails_twice_is_told_in_one_line_with_its_deepest_cause(
    error: Exception, cause: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last attempt's; no call is lost, and it is not tried again."""
    tape = Tape(monkeypatch, RuntimeError("a graph of an earlier run was freed"), error)
    step = CapturedStep(tape.function, 8, capture=True, name="teacher batch")
    for _ in range(6):
        step(8)
    assert tape.calls == ["run 8"] * 3 + ["capture", "capture"] + ["run 8"] * 3
    assert capsys.readouterr().out == (
        f"engine: teacher batch could not be captured ({cause}); continuing eagerly, with the same results\n"
    )


def test_an_error_of_the_step_itself_is_no_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    tape = Tape(monkeypatch)

    def broken(size: int) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CapturedStep(broken, 8, capture=True, name="step")(8)
    assert tape.calls == []


def test_a_run_whose_captures_fail_goes_on_eagerly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for the step and one for the teacher's batches, however many follow; results as of an eager run."""
    cfg = config_of(tmp_path, "kd")
    runs.train(cfg, tmp_path / "eager")
    capsys.readouterr()

    def refuse(function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "capture_graph", refuse)
        patch.setattr(active_trial, "choose_engine", lambda *_: Engine("graph", "for the test", captures=True))
        runs.train(cfg, tmp_path / "graph")
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not be captured" in line]
    assert len(lines) == 2
    assert all("(RuntimeError: operation not permitted when stream is capturing)" in line for line in lines)
    runs.assert_same_runs(tmp_path / "eager", tmp_path / "graph")


class Cycle:
    """Garbage that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.slow
@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_garbage_is_collected_before_a_capture_and_never_within(
    fails: bool, collects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freeing the graph of an earlier run would invalidate it; afterwards the collector is as before."""
    options: list[dict[str, Any]] = []

    @contextmanager
    def graph(graph: Any, **given: Any) -> Iterator[None]:
        options.append({"graph": graph, **given})
        yield

    captured = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: captured)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "side stream")
    garbage = weakref.ref(Cycle())

    def function() -> None:
        assert garbage() is None
        assert not gc.isenabled()
        if fails:
            raise RuntimeError("no kernel")

    was_enabled = gc.isenabled()
    try:
        gc.enable() if collects else gc.disable()
        if fails:
            with pytest.raises(RuntimeError, match="no kernel"):
                capture_graph(function)
        else:
            assert capture_graph(function) is captured.replay
        assert gc.isenabled() == collects
    finally:
        gc.enable() if was_enabled else gc.disable()
    assert options == [{"graph": captured, "stream": "side stream", "capture_error_mode": "thread_local"}]


# --- choose_engine ---


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [
        ("auto", CPU, Engine("eager", "CPU")),
        ("eager", CPU, Engine("eager", "as asked")),
        ("compile", CPU, Engine("compile", "as asked")),
        ("auto", CUDA, Engine("graph", "one launch per step", captures=True)),
        ("eager", CUDA, Engine("eager", "as asked")),
        ("graph", torch.device("cuda:1"), Engine("graph", "as asked", captures=True)),
        ("compile", CUDA, Engine("compile", "as asked", captures=True)),
    ],
)
def test_every_engine_and_device(
    asked: Any, device: torch.device, expected: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert choose_engine(asked, device) == expected


def test_there_are_no_graphs_on_the_cpu() -> None:
    line = "run.engine: graph needs a CUDA device, this run is on cpu; use auto, eager or compile"
    with pytest.raises(UserError, match=f"^{line}$"):
        choose_engine("graph", CPU)


@pytest.mark.parametrize("compiler", ["g++", "clang++", None])
def test_compiling_on_the_cpu_needs_a_compiler(compiler: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == compiler else None)
    assert choose_engine("compile", CUDA).name == "compile"
    if compiler is None:
        with pytest.raises(UserError, match=r"^run.engine: compile needs a C\+\+ compiler on the CPU .*; use eager$"):
            choose_engine("compile", CPU)
    else:
        assert choose_engine("compile", CPU).name == "compile"


@pytest.mark.parametrize("engine", ["graph", "compile"])
@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--seeds", "0,1"]])
def test_an_engine_that_cannot_be_had_is_refused_before_anything_is_written(
    engine: str,
    flags: list[str],
    train: Callable[..., int],
    student_cfg: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    before = sorted(tmp_path.rglob("*"))
    assert train(student_cfg, f"run.engine={engine}", *flags) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: run.engine: {engine} needs a ")
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


# --- compiled networks ---


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Grows by one with each graph that is compiled; graphs run as they were traced, which takes no C++ compiler."""
    graphs: list[Any] = []
    original = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend=backend, **options))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    yield graphs
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_a_compiled_run_is_close_to_an_eager_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The compiler that users get; what the run writes has the same names and shapes."""
    cfg = config_of(tmp_path, "kd")
    runs.train(cfg, tmp_path / "eager", "run.engine=eager", "solver.epochs=2")
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        runs.train(cfg, tmp_path / "compile", "run.engine=compile", "solver.epochs=2")
    torch._dynamo.reset()
    out = capsys.readouterr().out
    assert "engine: compile (as asked)" in out
    assert "failed" not in out
    eager, compiled = (runs.state(tmp_path / name)["model"] for name in ("eager", "compile"))
    assert eager.keys() == compiled.keys()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5, msg=key)
    exported = torch.load(tmp_path / "compile/seed0/student.pt")["model"]
    assert exported.keys() == TinyNet(10, 16).state_dict().keys()


@pytest.mark.parametrize("method", ["kd", "vanilla", "pooled_method"])
@pytest.mark.slow
def test_only_full_training_batches_are_compiled(method: str, tmp_path: Path, compilations: list[Any]) -> None:
    """One graph per run: not evaluation, not the last batch, no second epoch, not the teacher."""
    cfg = config_of(tmp_path, method)
    runs.train(cfg, tmp_path / "eager", "run.engine=eager")
    assert compilations == []
    runs.train(cfg, tmp_path / "compile", "run.engine=compile", "data.eval_batch_size=24")
    assert len(compilations) == 1
    assert_same(runs.state(tmp_path / "eager"), runs.state(tmp_path / "compile"), ignore={"config"})


@pytest.mark.slow
def test_trials_share_a_compilation(tmp_path: Path, compilations: list[Any]) -> None:
    cfg = config_of(tmp_path, "kd")
    runs.train(cfg, tmp_path / "eager", "run.engine=eager", seeds=(0, 1, 2))
    runs.train(cfg, tmp_path / "compile", "run.engine=compile", seeds=(0, 1, 2))
    assert len(compilations) == 1
    for seed in range(3):
        runs.assert_same_runs(tmp_path / "eager", tmp_path / "compile", seed=seed)


@pytest.mark.usefixtures("compilations")
@pytest.mark.parametrize("stop_at", [1, 7, 10])
@pytest.mark.slow
def test_a_compiled_run_is_stopped_and_resumed(stop_at: int, tmp_path: Path) -> None:
    cfg = config_of(tmp_path, "mcld")
    runs.train(cfg, tmp_path / "whole", "run.engine=compile")
    runs.train(cfg, tmp_path / "parts", "run.engine=compile", stop_at=stop_at)
    assert runs.place(tmp_path / "parts") == (stop_at // 5 + 1, stop_at % 5)
    runs.train(cfg, tmp_path / "parts", "run.engine=compile", mode="resume")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.slow
def test_compiling_leaves_the_state_as_it_is(features: bool, compilations: list[Any]) -> None:
    """It is tried forward and backward on images of its own; other sizes and eager calls compile nothing anew."""
    network = MODELS.build("resnet8", 10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    compile_network(network, torch.zeros(4, 3, 32, 32), None, features=features)
    assert len(compilations) == 1
    assert_same(before, dict(network.state_dict()))
    assert all(parameter.grad is None for parameter in network.parameters())
    call = network.forward_features if features else network
    call(torch.ones(4, 3, 32, 32))
    with cuda_graph.uncompiled():
        call(torch.ones(3, 3, 32, 32))
    assert len(compilations) == 1
    call(torch.ones(3, 3, 32, 32))
    assert len(compilations) == 2


class _Refused(torch.autograd.Function):
    """Passes through; its backward pass fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nand much more")


@pytest.fixture(params=["before", "after", "backward"])
def broken_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` returns what fails: before, after or in the backward pass of its first call."""

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if request.param == "before":
                raise RuntimeError("no kernel\nand much more")
            result = function(*args, **kwargs)
            if request.param == "after":
                raise RuntimeError("no kernel\nand much more")
            return _Refused.apply(result)

        return call

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch, "compile", compile)


@pytest.mark.usefixtures("broken_compiler")
@pytest.mark.parametrize("method", ["mcld", "pooled_method"])
@pytest.mark.slow
def test_a_compilation_that_fails_is_told_once_and_changes_nothing(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after a stop in the middle of an epoch, with momentum and sums there already."""
    cfg = config_of(tmp_path, method)
    runs.train(cfg, tmp_path / "eager", "run.engine=eager")
    for options in ({"stop_at": 7}, {"mode": "resume"}):
        capsys.readouterr()
        runs.train(cfg, tmp_path / "compile", "run.engine=compile", **options)
        failed = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
        assert len(failed) == 1
        assert failed[0].startswith("engine: compile failed (")
        assert failed[0].endswith("); continuing eagerly, with the same results")
    runs.assert_same_runs(tmp_path / "eager", tmp_path / "compile")


# --- the static memory of a step ---


@pytest.mark.usefixtures("rate_in_a_tensor")
def test_what_a_step_reads_and_writes_stays_where_it_is(tmp_path: Path) -> None:
    """Addresses over epochs: plan, position, epoch, rate, the teacher's logits, metrics and state."""
    experiment = runs.experiment(config_of(tmp_path, "mcld"), "solver.ema_decay=0.9")
    trial = ActiveTrial(experiment, experiment.trials[0])
    holders = {"trial": trial, "loader": trial.loader, "teacher": trial.loader._teacher, "metrics": trial.metrics}
    addresses: list[dict[str, int]] = []
    for epoch in (1, 2, 3):
        trial.begin_epoch(epoch)
        for number in range(trial.loader.steps):
            trial.run(train_step, trial.loader.fetch(number))
        trial.loader.finish()
        assert int(trial.epoch) == epoch
        assert trial.metrics.read(epoch).images == runs.IMAGES
        trial.metrics.reset()
        assert not trial.metrics.totals.any()
        tensors = {
            f"{name}.{key}": value
            for name, holder in holders.items()
            for key, value in vars(holder).items()
            if isinstance(value, Tensor) and value.numel()
        }
        tensors |= trial.distiller.state_dict() | trial.averages["ema"].state_dict(prefix="ema.")
        optimizer = trial.solver.state_dict()
        tensors |= {f"momentum {key}": value["momentum_buffer"] for key, value in optimizer["state"].items()}
        tensors |= {f"rate {key}": group["lr"] for key, group in enumerate(optimizer["param_groups"])}
        addresses.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
    assert len(addresses[0]) > 30
    assert 0 not in addresses[0].values()
    assert addresses[0] == addresses[1] == addresses[2]
