"""How steps are launched: replayed, compiled or as they are, a run stays the same."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from mdistill import config
from mdistill.data import DataInfo
from mdistill.data.sampling import epoch_plan
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.engine import build, cuda_graph, stepper, trainer
from mdistill.engine.cuda_graph import WARM_UP, Engine, Launcher, choose_engine, compile_network, undo_compile
from mdistill.engine.metrics import EpochSums
from mdistill.engine.run_folder import RunFolder
from mdistill.errors import UserError
from mdistill.models import MODELS
from mdistill.optim import solvers

from .. import same
from ..conftest import TinyNet
from ..distillers.examples import METHODS, SETTINGS
from ..replay import Recorder

assert_same = partial(same.assert_same, ignore={"config"})  # which names the engine
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMAGES, BATCH = 100, 24  # four full batches and one of four images
Train = Callable[..., int]


@DISTILLERS.register("drawing_method")
class Drawing(Distiller):
    """A method that draws within a step and reads the epoch."""

    needs = Needs(teacher="logits")

    def __init__(self, student: Any, teacher: Any, data: DataInfo, **shared: Any) -> None:
        super().__init__(student, teacher, data, **shared)
        self.generators["noise"] = torch.Generator().manual_seed(3)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        noise = torch.rand(signals.teacher_logits.shape, generator=self.generators["noise"])
        return {"noise": signals.epoch * (noise * (signals.student_logits - signals.teacher_logits)).square().mean()}


@DISTILLERS.register("pooled_method")
class Pooled(Distiller):
    """A method that reads features."""

    needs = Needs(teacher="features")

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        assert signals.student_features is not None
        assert signals.teacher_features is not None
        return {"pooled": (signals.student_features.pooled - signals.teacher_features.pooled).square().mean()}


METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    **SETTINGS,
    "mcld": {**SETTINGS["mcld"], "queue_size": 70},  # wraps around within an epoch, in other places each time
    "drawing_method": {"ce_weight": 1.0, "warmup_epochs": 3},
    "pooled_method": {"ce_weight": 1.0},
}


def configuration(folder: Path, method: str, *, student: str = "resnet8", **data: Any) -> Path:
    """Three epochs of five steps with small networks under ``method``; the rate is constant."""
    teacher = student
    torch.manual_seed(5)
    torch.save({"model": MODELS.build(teacher, 10).state_dict()}, folder / f"{teacher}.pt")
    settings: dict[str, Any] = {
        "data": {"name": "tiny", "images": IMAGES, "batch_size": BATCH, "eval_batch_size": 60, **data},
        "student": {"name": student},
        "distiller": {"name": method, **METHOD_SETTINGS[method]},
        "solver": {"name": "sgd", "epochs": 3, "lr": 0.05, "milestones": [], "gamma": 0.1}
        | {"momentum": 0.9, "weight_decay": 5e-4},
    }
    if DISTILLERS.get(method).needs.teacher != "none":
        settings["teacher"] = {"name": teacher, "checkpoint": f"{teacher}.pt"}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(
    cfg: Path,
    output: Path,
    *overrides: str,
    mode: str = "new",
    seeds: tuple[int, ...] = (0,),
    cache: bool = True,
    stop_after: int | None = None,
) -> build.Experiment:
    """A run of ``cfg`` in ``output``; ``stop_after`` sends this process SIGTERM in that step of the first trial."""
    settings = [config.load(cfg, overrides, seed=seed) for seed in seeds]
    for each in settings:
        object.__setattr__(each, "variant", "")  # the same folder whatever the overrides
    folders = [RunFolder(output / each.run_folder(), mode) for each in settings]
    made = build.build(
        settings,
        CPU,
        data_root=cfg.parent,
        checkpoint_root=cfg.parent,
        output_root=output,
        cache_root=output / "cache" if cache else None,
    )
    if stop_after is None:
        trainer.fit(made, folders)
        return made
    step, count = trainer.train_step, [0]

    def counted(distiller: Distiller, *rest: Any) -> None:
        count[0] += 1
        if count[0] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        step(distiller, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", counted)
        with pytest.raises(trainer.Stopped):
            trainer.fit(made, folders)
    return made


def state_of(output: Path) -> dict[str, Any]:
    (path,) = output.rglob("last.pt")
    return dict(torch.load(path, weights_only=True))


def assert_same_runs(left: Path, right: Path) -> None:
    """Training state, metrics and exported network of the only run below each folder."""
    assert_same(state_of(left), state_of(right))
    (one,), (other,) = (list(output.rglob("metrics.jsonl")) for output in (left, right))
    lines = [[yaml.safe_load(line) for line in path.read_text().splitlines()] for path in (one, other)]
    assert_same(*lines)
    assert_same(*(torch.load(path.with_name("student.pt"), weights_only=True) for path in (one, other)))


# --- the emulator of a graph ---


def test_the_emulator_follows_values_that_are_written_in_place() -> None:
    x, total = torch.zeros(3), torch.zeros(3)

    def function() -> None:
        doubled = x * 2
        total.add_(doubled.view(3, 1).squeeze(1))

    replay = Recorder()(function)
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
    module = nn.Linear(2, 1, bias=False)
    holder = SimpleNamespace(scale=torch.ones(()))
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


def test_the_emulator_keeps_what_was_newly_allocated_in_one_place() -> None:
    x, kept = torch.zeros(()), []

    def function() -> None:
        kept.append(x + 1)

    replay = Recorder()(function)
    replay()
    for value in (1.0, 2.0):
        x.fill_(value)
        replay()
    assert kept == [torch.tensor(3.0)]


def test_the_emulator_trains_as_python_does() -> None:
    """Forward, backward, BatchNorm's hidden writes and the fused solver, whose arguments are lists."""
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(TinyNet(4, 8).train())
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 4) for _ in range(6)]
    for network, replayed in zip(networks, (False, True), strict=True):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
        image, target = torch.zeros(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64)

        def function(
            network: nn.Module = network,
            optimizer: torch.optim.SGD = optimizer,
            image: Tensor = image,
            target: Tensor = target,
        ) -> None:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(network(image), target).backward()
            optimizer.step()

        launch = Launcher(function, record=Recorder() if replayed else None)
        for each in batches:
            image.copy_(each[0])
            target.copy_(each[1])
            launch()
    assert networks[0].bn.num_batches_tracked == 6
    assert_same(dict(networks[0].state_dict()), dict(networks[1].state_dict()))


def test_the_emulator_goes_on_drawing() -> None:
    generator, out, found = torch.Generator().manual_seed(2), torch.zeros(2), []

    def function() -> None:
        out.copy_(torch.rand(2, generator=generator))

    replay = Recorder()(function)
    for _ in range(3):
        replay()
        found.append(out.clone())
    expected = torch.rand(6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.cat(found), expected)


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
    found = out.clone()
    function()
    assert torch.equal(found, out)
    assert found[1, 0] == 9.0


@pytest.mark.parametrize("read", [lambda x: x.add_(float(x)), lambda x: x.add_(x.tolist()), lambda x: x[x > 0].sum()])
def test_the_emulator_refuses_what_no_graph_can_hold(read: Callable[[Tensor], Any]) -> None:
    recorder = Recorder()
    with pytest.raises(AssertionError):
        recorder(lambda: read(torch.ones(())))
    assert recorder.replays == []


# --- replayed runs ---


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Recorder]]:
    """From the call on, steps and teacher batches are captured by the recorder that the call returns."""
    said: list[str] = []

    def start() -> Recorder:
        recorder = Recorder()
        monkeypatch.setattr(stepper, "cuda_graph", lambda generators=(): recorder)
        monkeypatch.setattr(trainer, "cuda_graph", lambda generators=(): recorder)
        monkeypatch.setattr(trainer, "choose_engine", lambda *_: Engine("graph", "emulated on the CPU", captures=True))
        monkeypatch.setattr(trainer, "say", said.append)
        return recorder

    yield start
    assert not [line for line in said if "failed" in line]


def tables(made: build.Experiment, output: Path) -> tuple[list[bool], Tensor]:
    """Which rows of the run's table are there, and these."""
    again = build.open_table(made, output / "cache")
    ids = torch.arange(again.rows).numpy()
    missing = again.missing(ids)
    rows = again.read(ids[~missing])
    again.close()
    return missing.tolist(), rows


@pytest.mark.parametrize("method", [*METHODS, "drawing_method", "pooled_method"])
def test_a_replayed_run_equals_an_eager_one(method: str, tmp_path: Path, emulated: Callable[[], Recorder]) -> None:
    """Bit for bit: weights, momentum, queue, BatchNorm buffers, generators, sums, metrics and the teacher's table."""
    cfg = configuration(tmp_path, method)
    eager = run(cfg, tmp_path / "eager")
    recorder = emulated()
    replayed = run(cfg, tmp_path / "graph")
    assert_same_runs(tmp_path / "eager", tmp_path / "graph")
    asked = eager.teacher is not None
    assert sorted(replay.calls for replay in recorder.replays) == [6 - WARM_UP] * asked + [12 - WARM_UP]
    if asked:
        assert_same(tables(eager, tmp_path / "eager"), tables(replayed, tmp_path / "graph"))


RECIPES = {
    "mixup": ("kd", "data.mixing={name: mixup, alpha: 0.8}"),
    "cutmix": ("dist", "data.mixing={name: cutmix, alpha: 1.0, probability: 0.5}"),
    "cutmix_pick": ("kd", "data.mixing={name: cutmix_pick, alpha: 1.0, candidates: 2}"),
    "ensemble": ("dkd", "teacher.ensemble=[{name: resnet8, checkpoint: resnet8.pt}]"),
    "averages": ("mcld", "distiller.ema_decay=0.9", "distiller.average_from=2"),
    "cosine": ("vanilla", "solver.schedule=cosine"),
    "dot": ("dkd", "solver.name=dot", "solver.delta=0.075"),
    "dot with a module of the method": ("ctkd", "solver.name=dot", "solver.delta=0.075"),
    "dot with two views": ("mlkd", "solver.name=dot", "solver.delta=0.075"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_replayed_recipe_equals_an_eager_one(
    recipe: str, tmp_path: Path, emulated: Callable[[], Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, stopped in the middle of the second epoch and resumed too; the rate in a tensor, as on CUDA."""
    monkeypatch.setattr(solvers, "_rate", lambda device, value=0.0: torch.tensor(value, dtype=torch.float64))
    method, *words = RECIPES[recipe]
    cfg = configuration(tmp_path, method)
    run(cfg, tmp_path / "eager", *words)
    run(cfg, tmp_path / "parts", *words, stop_after=7)
    run(cfg, tmp_path / "parts", *words, mode="resume")
    assert_same_runs(tmp_path / "eager", tmp_path / "parts")
    recorder = emulated()
    run(cfg, tmp_path / "graph", *words)
    assert_same_runs(tmp_path / "eager", tmp_path / "graph")
    assert max(replay.calls for replay in recorder.replays) == 12 - WARM_UP


def test_a_replayed_run_with_a_live_teacher_equals_an_eager_one(
    tmp_path: Path, emulated: Callable[[], Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a table; the rows of the last epoch are compared too."""
    cfg, made = configuration(tmp_path, "mcld"), []
    make = trainer.make_stepper
    monkeypatch.setattr(trainer, "make_stepper", lambda *args: made.append(make(*args)) or made[-1])
    run(cfg, tmp_path / "eager", cache=False)
    recorder = emulated()
    run(cfg, tmp_path / "graph", cache=False)
    assert len(recorder.replays) == 2
    assert_same_runs(tmp_path / "eager", tmp_path / "graph")
    one, other = (each._rows for each in made)
    assert one is not None
    assert other is not None
    assert one.logits[:-1].abs().sum(dim=1).min() > 0
    assert torch.equal(one.logits[:-1], other.logits[:-1])
    assert torch.equal(one.changed[:-1], other.changed[:-1])


@pytest.mark.parametrize("stop_after", [2, 8, 10])
def test_a_replayed_run_resumes_in_the_middle_of_an_epoch(
    stop_after: int, tmp_path: Path, emulated: Callable[[], Recorder]
) -> None:
    """Stopped before anything is captured, after it, and between epochs; the rest is captured anew."""
    cfg = configuration(tmp_path, "mcld")
    run(cfg, tmp_path / "eager")
    emulated()
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:  # a replayed step runs no Python, so the stop comes from the launch
        original = stepper.Stepper.step

        def counted(self: stepper.Stepper, number: int) -> None:
            original(self, number)
            seen.append(number)
            if len(seen) == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(stepper.Stepper, "step", counted)
        with pytest.raises(trainer.Stopped):
            run(cfg, tmp_path / "graph")
    stopped = state_of(tmp_path / "graph")["progress"]
    assert (stopped["epoch"], stopped["step"]) == (stop_after // 5 + 1, stop_after % 5)
    recorder = emulated()
    run(cfg, tmp_path / "graph", mode="resume")
    assert recorder.replays[-1].calls > 0
    assert_same_runs(tmp_path / "eager", tmp_path / "graph")


@pytest.mark.parametrize(
    ("method", "words", "captures"),
    [
        ("kd", (), 4),  # a step and a teacher batch of each
        ("mlkd", ("distiller.ema_decay=0.9",), 4),
        ("dist", ("data.mixing={name: cutmix, alpha: 1.0}", "solver.name=dot", "solver.delta=0.05"), 2),
    ],
)
def test_replayed_trials_equal_eager_ones(
    method: str, words: tuple[str, ...], captures: int, tmp_path: Path, emulated: Callable[[], Recorder]
) -> None:
    """Two seeds in turn, each with captures of its own, on one data set and one teacher."""
    cfg = configuration(tmp_path, method)
    for seed in (0, 1):
        run(cfg, tmp_path / f"eager{seed}", *words, seeds=(seed,))
    recorder = emulated()
    run(cfg, tmp_path / "graph", *words, seeds=(0, 1))
    assert len(recorder.replays) == captures
    (tmp_path / "graph" / f"tiny/{method}/resnet8_resnet8/seed1").rename(tmp_path / "graph1")
    for seed, output in ((0, tmp_path / "graph"), (1, tmp_path / "graph1")):
        assert_same_runs(tmp_path / f"eager{seed}", output)


def test_a_replayed_step_reads_the_rate_that_was_set(
    tmp_path: Path, emulated: Callable[[], Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rate in a tensor, as on CUDA: drops of it come through a capture that was made before them."""
    monkeypatch.setattr(solvers, "_rate", lambda device, value=0.0: torch.tensor(value, dtype=torch.float64))
    cfg = configuration(tmp_path, "vanilla")
    rates = ("solver.milestones=[2,3]", "solver.epochs=4")
    run(cfg, tmp_path / "eager", *rates)
    recorder = emulated()
    run(cfg, tmp_path / "graph", *rates)
    assert [replay.calls for replay in recorder.replays] == [16 - WARM_UP]
    assert_same_runs(tmp_path / "eager", tmp_path / "graph")
    (group,) = state_of(tmp_path / "graph")["solver"]["param_groups"]
    assert float(group["lr"]) == pytest.approx(0.05 * 0.1**2)


# --- Launcher ---


class Tape:
    """A function and a record of it that note what is called."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.calls: list[str] = []
        self.said: list[str] = []
        self.fails = fails

    def function(self) -> None:
        self.calls.append("real")

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        assert function == self.function
        self.calls.append("record")
        if self.fails is not None:
            raise self.fails
        return partial(self.calls.append, "replay")


def test_a_launcher_records_once_after_three_real_calls() -> None:
    tape = Tape()
    launch = Launcher(tape.function, record=tape.record, on_failure=tape.said.append)
    for _ in range(6):
        launch()
    assert tape.calls == ["real", "real", "real", "record", "replay", "replay", "replay"]
    assert tape.said == []


def test_a_launcher_without_a_record_never_records() -> None:
    tape = Tape()
    launch = Launcher(tape.function)
    for _ in range(6):
        launch()
    assert tape.calls == ["real"] * 6


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("operation not permitted\nwhen stream is capturing"), "RuntimeError: operation not permitted"),
        (NotImplementedError(), "NotImplementedError"),
        (AssertionError("\n"), "AssertionError"),
    ],
)
def test_a_failed_recording_is_said_once_and_loses_no_call(error: Exception, line: str) -> None:
    tape = Tape(fails=error)
    launch = Launcher(tape.function, record=tape.record, on_failure=tape.said.append)
    for _ in range(6):
        launch()
    assert tape.calls == ["real", "real", "real", "record", "real", "real", "real"]
    assert tape.said == [line]


def test_an_error_of_the_function_itself_is_no_failed_recording() -> None:
    tape = Tape()

    def broken() -> None:
        raise RuntimeError("out of memory")

    launch = Launcher(broken, record=tape.record, on_failure=tape.said.append)
    with pytest.raises(RuntimeError, match="out of memory"):
        launch()
    assert tape.calls == tape.said == []


def test_a_run_whose_capture_fails_goes_on_eagerly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, however many steps follow, and the results of an eager run."""
    cfg = configuration(tmp_path, "kd", student="tiny_net")
    run(cfg, tmp_path / "eager")
    capsys.readouterr()

    def refuse(function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(stepper, "cuda_graph", lambda generators: refuse)
    monkeypatch.setattr(trainer, "choose_engine", lambda *_: Engine("graph", "for the test", captures=True))
    monkeypatch.setattr(trainer, "cuda_graph", Recorder)
    run(cfg, tmp_path / "graph")
    failed = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert failed == [f"engine: graph failed ({reason}); going on eagerly, with the same results"]
    assert_same_runs(tmp_path / "eager", tmp_path / "graph")


# --- choose_engine ---

ON_HOST = [torch.Generator()]
ON_DEVICE: list[Any] = [SimpleNamespace(device=CUDA)]
HOST_DRAWS = "this method draws random numbers on the host, which cannot be captured"


@pytest.mark.parametrize(
    ("asked", "device", "generators", "expected"),
    [
        ("auto", CPU, [], Engine("eager", "the CPU's")),
        ("auto", CPU, ON_HOST, Engine("eager", "the CPU's")),
        ("eager", CPU, [], Engine("eager", "as asked")),
        ("compile", CPU, [], Engine("compile", "as asked")),
        ("compile", CPU, ON_HOST, Engine("compile", "as asked")),
        ("auto", CUDA, [], Engine("graph", "one launch a step", captures=True)),
        ("auto", CUDA, ON_DEVICE, Engine("graph", "one launch a step", captures=True)),
        ("auto", CUDA, ON_HOST, Engine("eager", HOST_DRAWS)),
        ("auto", CUDA, ON_DEVICE + ON_HOST, Engine("eager", HOST_DRAWS)),
        ("eager", CUDA, [], Engine("eager", "as asked")),
        ("eager", CUDA, ON_HOST, Engine("eager", "as asked")),
        ("graph", CUDA, [], Engine("graph", "as asked", captures=True)),
        ("graph", torch.device("cuda:1"), ON_DEVICE, Engine("graph", "as asked", captures=True)),
        ("graph", CUDA, ON_HOST, Engine("eager", HOST_DRAWS)),
        ("compile", CUDA, [], Engine("compile", "as asked", captures=True)),
        ("compile", CUDA, ON_HOST, Engine("eager", HOST_DRAWS)),
    ],
)
def test_every_engine_and_device(
    asked: Any, device: torch.device, generators: list[Any], expected: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert choose_engine(asked, device, generators) == expected


@pytest.mark.parametrize("generators", [[], ON_HOST])
def test_there_are_no_graphs_on_the_cpu(generators: list[Any]) -> None:
    with pytest.raises(UserError) as caught:
        choose_engine("graph", CPU, generators)
    line = "run.engine: graph needs a CUDA device, this run is on cpu; use auto, eager or compile"
    assert str(caught.value) == line


@pytest.mark.parametrize("there", ["g++", "clang++", None])
def test_compiling_on_the_cpu_needs_a_compiler(there: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == there else None)
    assert choose_engine("compile", CUDA).name == "compile"
    if there is not None:
        assert choose_engine("compile", CPU).name == "compile"
        return
    with pytest.raises(UserError) as caught:
        choose_engine("compile", CPU)
    assert len(str(caught.value).splitlines()) == 1
    assert "run.engine: compile needs a C++ compiler on the CPU" in str(caught.value)


@pytest.mark.parametrize("engine", ["graph", "compile"])
@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--seeds", "0,1"]])
def test_an_engine_that_cannot_be_had_is_refused_before_anything_is_written(
    engine: str,
    more: list[str],
    train: Train,
    student_cfg: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    before = sorted(tmp_path.rglob("*"))
    assert train(student_cfg, f"run.engine={engine}", *more) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: run.engine: {engine} needs a ")
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


# --- compiled networks ---

compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


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


@compiler
def test_a_compiled_run_is_close_to_an_eager_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The compiler that users get; what the run writes has the same names and shapes."""
    cfg = configuration(tmp_path, "kd", student="tiny_net")
    run(cfg, tmp_path / "eager", "run.engine=eager", "solver.epochs=2")
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        run(cfg, tmp_path / "compile", "run.engine=compile", "solver.epochs=2")
    torch._dynamo.reset()
    out = capsys.readouterr().out
    assert "engine: compile (as asked)" in out
    assert "failed" not in out
    eager, compiled = (state_of(tmp_path / name)["model"] for name in ("eager", "compile"))
    assert eager.keys() == compiled.keys()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5, msg=key)
    exported = [torch.load(next((tmp_path / name).rglob("student.pt"))) for name in ("eager", "compile")]
    assert exported[0]["model"].keys() == exported[1]["model"].keys() == TinyNet(10, 16).state_dict().keys()


@pytest.mark.parametrize(
    ("method", "student"), [("kd", "tiny_net"), ("vanilla", "resnet8"), ("pooled_method", "resnet8")]
)
def test_only_full_training_batches_are_compiled(
    method: str, student: str, tmp_path: Path, compilations: list[Any]
) -> None:
    """One graph a run: not evaluation, not the last batch, no second epoch, not the teacher."""
    cfg = configuration(tmp_path, method, student=student)
    run(cfg, tmp_path / "eager", "run.engine=eager")
    assert compilations == []
    made = run(cfg, tmp_path / "compile", "run.engine=compile", "data.eval_batch_size=24")
    assert len(compilations) == 1
    assert_same(state_of(tmp_path / "eager"), state_of(tmp_path / "compile"))
    exported = [torch.load(next((tmp_path / name).rglob("student.pt"))) for name in ("eager", "compile")]
    assert_same(*exported)
    made.trials[0].distiller.train()
    made.trials[0].distiller.student(torch.zeros(7, 3, 32, 32))  # the watch does see others
    assert len(compilations) == 2 if method != "pooled_method" else len(compilations) >= 1


def test_trials_share_a_compilation(tmp_path: Path, compilations: list[Any]) -> None:
    cfg = configuration(tmp_path, "kd", student="tiny_net")
    run(cfg, tmp_path / "eager", "run.engine=eager", seeds=(0, 1, 2))
    run(cfg, tmp_path / "compile", "run.engine=compile", seeds=(0, 1, 2))
    assert len(compilations) == 1
    for seed in range(3):
        one, other = ((tmp_path / name / f"tiny/kd/tiny_net_tiny_net/seed{seed}") for name in ("eager", "compile"))
        assert_same(state_of(one), state_of(other))


@pytest.mark.parametrize("stop_after", [1, 7, 10])
def test_a_compiled_run_is_stopped_and_resumed(stop_after: int, tmp_path: Path, compilations: list[Any]) -> None:
    cfg = configuration(tmp_path, "mcld", student="tiny_net")
    run(cfg, tmp_path / "whole", "run.engine=compile")
    run(cfg, tmp_path / "parts", "run.engine=compile", stop_after=stop_after)
    stopped = state_of(tmp_path / "parts")["progress"]
    assert (stopped["epoch"], stopped["step"]) == (stop_after // 5 + 1, stop_after % 5)
    run(cfg, tmp_path / "parts", "run.engine=compile", mode="resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert compilations


def test_compiling_and_undoing_it_leave_the_state_as_it_is(compilations: list[Any]) -> None:
    for features in (False, True):
        network = MODELS.build("resnet8", 10).eval()
        names, image = list(network.state_dict()), torch.zeros(2, 3, 32, 32)
        before, attributes = network(image), set(network.__dict__)
        compile_network(network, features=features)
        assert list(network.state_dict()) == names
        with cuda_graph.uncompiled():
            assert torch.equal(network(image), before)
        assert len(compilations) == features
        assert torch.equal(network(image), before)
        assert len(compilations) == features + 1
        undo_compile(network)
        network(torch.zeros(3, 3, 32, 32))
        assert len(compilations) == features + 1
        assert set(network.__dict__) - attributes <= {"_compiled_call_impl"}


class _Refused(torch.autograd.Function):
    """Passes through; its backward pass fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("no kernel")


def broken_compiler(when: str, message: str = "no kernel\nand much more") -> Callable[..., Callable[..., Any]]:
    """Stands in for ``torch.compile``: what it returns fails, before, after or in the pass back of, its first call."""

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if when == "before":
                raise RuntimeError(message)
            result = function(*args, **kwargs)
            if when == "after":
                raise RuntimeError(message)
            return _Refused.apply(result)

        return call

    return compile


@pytest.mark.parametrize("when", ["before", "after", "backward"])
@pytest.mark.parametrize("method", ["mcld", "drawing_method"])
def test_a_compilation_that_fails_is_said_once_and_changes_nothing(
    method: str, when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, BatchNorm's statistics, queue and generators are those before the step that failed."""
    cfg = configuration(tmp_path, method, student="tiny_net")
    run(cfg, tmp_path / "eager", "run.engine=eager")
    capsys.readouterr()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch, "compile", broken_compiler(when))
    run(cfg, tmp_path / "compile", "run.engine=compile")
    failed = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert failed == ["engine: compile failed (RuntimeError: no kernel); going on eagerly, with the same results"]
    assert_same(state_of(tmp_path / "eager"), state_of(tmp_path / "compile"))


def test_a_compilation_that_fails_after_a_resume_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch, with momentum and sums there already."""
    cfg = configuration(tmp_path, "mcld", student="tiny_net")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch, "compile", broken_compiler("after"))
    run(cfg, tmp_path / "eager", "run.engine=eager")
    run(cfg, tmp_path / "parts", "run.engine=compile", stop_after=7)
    run(cfg, tmp_path / "parts", "run.engine=compile", mode="resume")
    assert_same(state_of(tmp_path / "eager"), state_of(tmp_path / "parts"))


@pytest.mark.parametrize("message", ["", "\n"])
def test_a_compilation_that_fails_without_a_word_is_survived(
    message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configuration(tmp_path, "vanilla", student="tiny_net")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch, "compile", broken_compiler("before", message))
    run(cfg, tmp_path / "compile", "run.engine=compile", "solver.epochs=1")
    assert "engine: compile failed (RuntimeError); going on eagerly" in capsys.readouterr().out


# --- the steps' static memory ---


def test_what_a_step_reads_and_writes_stays_where_it_is(tmp_path: Path) -> None:
    """Places in memory, over epochs: the plan, the place in it, the epoch, the teacher's rows, sums and state."""
    made = experiment(tmp_path, "mcld")
    trial, sums = made.trials[0], EpochSums(CPU)
    walk = trainer.make_stepper(made, trial, sums, Engine("eager", "for the test"))
    trial.solver.set_lr(0.05)
    trial.distiller.train()
    places: list[dict[str, int]] = []
    for epoch in (1, 2, 3):
        walk.begin(epoch, 0)
        for number in range(walk.steps):
            walk.step(number)
        walk.finish()
        assert walk._rows is not None
        tensors = {
            **{name: getattr(walk, name) for name in ("_pairs", "_at", "_epoch", "_offsets")},
            **{f"rows.{name}": getattr(walk._rows, name) for name in ("logits", "changed", "_todo", "_at", "_largest")},
            **{f"sums.{name}": getattr(sums, name) for name in ("counts", "terms", "first_bad")},
            **trial.distiller.training_state(),
        }
        for number, state in trial.solver.state_dict()["state"].items():
            tensors[f"momentum.{number}"] = state["momentum_buffer"]
        places.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
        assert (int(walk._epoch), int(walk._at)) == (epoch, IMAGES)
        assert sums.read(epoch).images == IMAGES
        sums.reset()
        assert not any(tensor.any() for tensor in (sums.counts, sums.terms, sums.first_bad))
        trial.solver.set_lr(0.05 / epoch)
    assert len(set(places[0].values())) == len(places[0])
    assert places[0] == places[1] == places[2]


def test_a_step_sees_the_images_of_the_plan(tmp_path: Path) -> None:
    """Also when an epoch is begun in its middle, and when another one had been prepared."""
    made = experiment(tmp_path, "kd")
    seen: list[Any] = []
    walk = stepper.Stepper(
        made.trials[0].distiller,
        lambda batch, epoch: seen.append((batch.index.tolist(), batch.view.tolist(), int(epoch))),
        made.dataset,
        seed=4,
        batch_size=BATCH,
        mixing=None,
        device=CPU,
        engine=Engine("eager", "for the test"),
        make_rows=None,
        say=lambda line: None,
    )
    walk.look_ahead(9)
    for epoch, first in ((2, 0), (3, 2)):
        seen.clear()
        walk.begin(epoch, first)
        for number in range(first, walk.steps):
            walk.step(number)
        plan = epoch_plan(4, epoch, IMAGES, 162)
        cuts = range(first * BATCH, IMAGES, BATCH)
        assert seen == [
            (plan.index[at : at + BATCH].tolist(), plan.view[at : at + BATCH].tolist(), epoch) for at in cuts
        ]


def experiment(folder: Path, method: str) -> build.Experiment:
    cfg = configuration(folder, method, student="tiny_net")
    roots = {"data_root": folder, "checkpoint_root": folder, "output_root": folder}
    return build.build([config.load(cfg)], CPU, **roots)
