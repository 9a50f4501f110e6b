"""Checkpoints: what is in them, when they are written, and what can go wrong while they are."""

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mdistill import config
from mdistill.data.loader import BatchLoader
from mdistill.engine import checkpoint
from mdistill.engine.build import Experiment, Trial
from mdistill.engine.checkpoint import Snapshot, Writer
from mdistill.engine.first_steps import FirstSteps
from mdistill.engine.metrics import RunningMetrics
from mdistill.engine.run_folder import RunFolder, read_metrics
from mdistill.errors import RunFailed, UserError
from mdistill.file_schemas import Checkpoint, Progress, checked

from .. import runs
from ..same import assert_same

PATIENCE = 60  # seconds until a test whose thread hangs fails


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    """With everything that a checkpoint holds: averages of weights and momentum."""
    return runs.write_config(tmp_path, "vanilla", solver={"ema_decay": 0.9, "average_from": 2})


def state_of(experiment: Experiment, progress: Progress | None = None) -> dict[str, Any]:
    """The state of the first trial as it is."""
    trial: Trial = experiment.trials[0]
    return checkpoint.state_of(
        trial.distiller,
        trial.averages,
        trial.phases[-1].solver,
        progress or Progress(),
        RunningMetrics(experiment.device).state_dict(),
        config=trial.config,
        fingerprints=experiment.fingerprints,
    )


@contextmanager
def full_disk(size: int = 4096) -> Iterator[None]:
    """A file that may not grow is a disk that is full: the same write fails, in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- a copy of the state ---


def test_a_snapshot_does_not_change_when_training_goes_on() -> None:
    weight, momentum = torch.ones(3, requires_grad=True), torch.arange(4.0)
    snapshot = Snapshot({"model": {"weight": weight}, "solver": [{"momentum": momentum, "lr": 0.1}], "pair": (1, "a")})
    with torch.no_grad():
        weight += 1
    momentum.zero_()
    copied = snapshot.get()
    assert not copied["model"]["weight"].requires_grad
    assert_same(
        copied,
        {
            "model": {"weight": torch.ones(3)},
            "solver": [{"momentum": torch.arange(4.0), "lr": 0.1}],
            "pair": (1, "a"),
        },
    )


def test_a_snapshot_keeps_types_and_layouts() -> None:
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"half": torch.ones(2, dtype=torch.bfloat16), "count": torch.tensor(3), "map": channels_last}
    copied = Snapshot(state).get()
    assert_same(copied, state)
    assert copied["map"].stride() == channels_last.stride()


def test_an_epoch_that_is_being_written_is_not_changed_by_the_next_one(
    cfg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is written only once the last step of the second epoch has begun."""
    runs.train(cfg, tmp_path / "one", "solver.epochs=1")
    far_enough, written = threading.Event(), []
    write, fetch = checkpoint.write, BatchLoader.fetch

    def late(path: Path, state: Any) -> None:
        assert far_enough.wait(PATIENCE)
        write(path, state)
        written.append(torch.load(path, weights_only=True))

    def counted(loader: BatchLoader, step: int) -> int:
        counts.append(step)
        if len(counts) == 2 * runs.STEPS:
            far_enough.set()
        return fetch(loader, step)

    counts: list[int] = []
    monkeypatch.setattr(checkpoint, "write", late)
    monkeypatch.setattr(BatchLoader, "fetch", counted)
    runs.train(cfg, tmp_path / "two", "solver.epochs=2")
    assert_same(written[0], runs.state(tmp_path / "one"), ignore={"config"})
    assert [state["progress"]["epoch"] for state in written] == [2, 3]


# --- what is written, in which order ---


def test_the_metrics_of_an_epoch_are_there_before_its_checkpoint_and_its_networks_after(
    cfg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, bool]] = []
    write = checkpoint.write

    def watched(path: Path, state: Any) -> None:
        seen.append((state["progress"]["epoch"], len(read_metrics(path.parent)), (path.parent / "student.pt").exists()))
        write(path, state)

    monkeypatch.setattr(checkpoint, "write", watched)
    runs.train(cfg, tmp_path)
    assert seen == [(2, 1, False), (3, 2, True), (4, 3, True)]


def test_the_networks_are_those_of_the_checkpoint(cfg: Path, tmp_path: Path) -> None:
    runs.train(cfg, tmp_path)
    state, folder = runs.state(tmp_path), tmp_path / "seed0"
    networks = {name: torch.load(folder / f"{name}.pt", weights_only=True)["model"] for name in ("student", "ema")}
    assert_same(networks["student"], {key.removeprefix("student."): value for key, value in state["model"].items()})
    averaged = {key.removeprefix("network."): value for key, value in state["averages"]["ema"].items()}
    assert_same(networks["ema"] | {"count": torch.tensor(3 * runs.STEPS)}, averaged)
    assert state["averages"]["average"]["count"] == 2 * runs.STEPS  # from the second epoch on


def test_a_state_read_back_is_the_one_written(cfg: Path, tmp_path: Path) -> None:
    runs.train(cfg, tmp_path, stop_at=8)
    before = runs.state(tmp_path)
    assert before["solver"]["state"]
    assert before["averages"].keys() == {"ema", "average"}
    assert before["metrics"]["totals"].tolist()[-1] > 0
    built = runs.experiment(cfg, seeds=(0,))
    trial, metrics = built.trials[0], RunningMetrics(built.device)
    path = tmp_path / "seed0" / "last.pt"
    saved = checkpoint.read(path, trial.config, built.fingerprints, steps=runs.STEPS)
    (phase,) = trial.phases
    more = {"terms": phase.terms, "first_steps": FirstSteps(torch.device("cpu"), 3)}
    checkpoint.restore(saved, path, trial.distiller, trial.averages, phase.solver, metrics, **more)
    assert saved.progress.model_dump() == before["progress"]
    after = checkpoint.state_of(
        trial.distiller,
        trial.averages,
        trial.phases[-1].solver,
        saved.progress,
        metrics.state_dict(),
        config=trial.config,
        fingerprints=built.fingerprints,
    )
    assert_same(Snapshot(after).get(), before)


# --- the thread that writes ---


def test_jobs_are_done_one_after_the_other() -> None:
    done: list[int] = []
    writer = Writer(torch.device("cpu"))
    for number in range(5):
        writer.submit(lambda number=number: done.append(number))
    writer.wait()
    assert done == [0, 1, 2, 3, 4]
    writer.close()


@pytest.mark.parametrize("call", ["submit", "wait"])
def test_an_error_of_the_thread_surfaces_at_the_next_call_and_once(call: str) -> None:
    def fails() -> None:
        raise RunFailed("disk full")

    done: list[str] = []
    writer = Writer(torch.device("cpu"))
    writer.submit(fails)
    with pytest.raises(RunFailed, match="disk full"):
        writer.submit(lambda: done.append("another")) if call == "submit" else writer.wait()
    writer.wait()
    assert done == []
    writer.close()


def test_closing_waits_for_the_job_at_hand_and_ends_the_thread() -> None:
    go_on, done = threading.Event(), []

    def job() -> None:
        assert go_on.wait(PATIENCE)
        done.append(threading.current_thread())

    writer = Writer(torch.device("cpu"))
    writer.submit(job)
    go_on.set()
    writer.close()
    assert len(done) == 1
    assert not done[0].is_alive()


def test_a_full_disk_ends_the_run_with_one_line_and_the_old_checkpoint(
    cfg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second epoch's checkpoint cannot be written, which the end of the third tells; then the run is resumed."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs.train(cfg, whole)
    runs.train(cfg, parts, "solver.epochs=1")
    before = (parts / "seed0" / "last.pt").read_bytes()
    assert len(before) > 4096
    with full_disk(), pytest.raises(RunFailed) as caught:
        runs.train(cfg, parts, mode="resume")
    (line,) = str(caught.value).splitlines()
    assert line == (
        f"could not write {parts / 'seed0' / 'last.pt'}: [Errno 27] File too large; the previous file is kept"
    )
    assert caught.value.exit_code == 1
    assert (parts / "seed0" / "last.pt").read_bytes() == before
    assert not list((parts / "seed0").glob(".*.tmp"))
    assert len(read_metrics(parts / "seed0")) == 2
    assert ", the last one" not in capsys.readouterr().out.splitlines()[-1]
    runs.train(cfg, parts, mode="resume")
    runs.assert_same_runs(whole, parts)


def test_a_full_disk_ends_the_command_with_exit_code_1(
    train: Callable[..., int], cfg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(cfg, "solver.epochs=1") == 0
    capsys.readouterr()
    with full_disk():
        assert train(cfg, "--resume") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: could not write ")
    assert line.endswith("last.pt: [Errno 27] File too large; the previous file is kept")


def test_a_disk_that_is_full_in_the_last_epoch_ends_the_run_too(cfg: Path, tmp_path: Path) -> None:
    runs.train(cfg, tmp_path, "solver.epochs=1")
    with full_disk(), pytest.raises(RunFailed, match=r"could not write .*last\.pt: .* the previous file is kept"):
        runs.train(cfg, tmp_path, "solver.epochs=2", mode="resume")
    assert runs.place(tmp_path) == (2, 0)


def test_metrics_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", "new")
    folder.acquire()
    folder.prepare("", {}, epochs_done=0)
    folder.log({"epoch": 1, "train/loss": 2.0})
    with full_disk(folder.metrics.stat().st_size), pytest.raises(RunFailed) as caught:
        folder.log({"epoch": 2, "train/loss": 2.0})
    assert str(caught.value).startswith(f"could not write {folder.metrics}: [Errno 27] File too large")
    folder.close()


def test_events_that_cannot_be_written_cost_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "run", "new")
    folder.acquire()
    folder.prepare("", {}, epochs_done=0)
    folder.log({"epoch": 1, "train/loss": 2.0})
    (events,) = folder.events.folder.iterdir()
    with full_disk(events.stat().st_size):
        folder.events.add({"epoch": 2, "train/loss": 2.0})
    for epoch in (2, 3):
        folder.log({"epoch": epoch, "train/loss": 2.0})
    folder.close()
    assert [line["epoch"] for line in read_metrics(folder.path)] == [1, 2, 3]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"warning: no more TensorBoard events are written to {folder.events.folder} ([Errno 27] File too large);"
        " metrics and checkpoints go on"
    )


# --- what is refused ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["model", "averages", "solver"])
def test_a_state_that_is_not_finite_is_never_written(part: str, value: float, cfg: Path, tmp_path: Path) -> None:
    runs.train(cfg, tmp_path, "solver.epochs=1")
    path = tmp_path / "seed0" / "last.pt"
    before = path.read_bytes()
    state = runs.state(tmp_path)
    tensor, name = {
        "model": (state["model"]["student.hidden.bias"], "model.student.hidden.bias"),
        "averages": (state["averages"]["ema"]["network.hidden.bias"], "averages.ema.network.hidden.bias"),
        "solver": (state["solver"]["state"][0]["momentum_buffer"], "solver.state.0.momentum_buffer"),
    }[part]
    tensor.view(-1)[0] = value
    message = f"state is not finite, nothing is saved: {name}; {path} keeps the last good state"
    with pytest.raises(RunFailed) as caught:
        checkpoint.write(path, state)
    assert str(caught.value) == message
    assert path.read_bytes() == before


def test_a_run_whose_state_is_not_finite_stops_at_the_last_good_one(
    cfg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found while it is written: the loss of the epoch was still finite."""
    state_of = checkpoint.state_of

    def overflowed(distiller: Any, averages: Any, solver: Any, progress: Progress, *others: Any, **more: Any) -> Any:
        if progress.epoch == 3:
            with torch.no_grad():
                distiller.student.hidden.bias[0] = torch.inf
        return state_of(distiller, averages, solver, progress, *others, **more)

    monkeypatch.setattr(checkpoint, "state_of", overflowed)
    with pytest.raises(
        RunFailed, match=r"state is not finite, nothing is saved: model\.student\.hidden\.bias"
    ) as caught:
        runs.train(cfg, tmp_path, "solver.epochs=2")
    assert len(str(caught.value).splitlines()) == 1
    assert runs.place(tmp_path) == (2, 0)
    student = torch.load(tmp_path / "seed0" / "student.pt", weights_only=True)["model"]
    assert student["hidden.bias"].isfinite().all()


def test_a_write_that_is_broken_off_leaves_the_old_file(
    cfg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    state = state_of(runs.experiment(cfg))
    checkpoint.write(path, state)
    before = path.read_bytes()

    def broken_off(value: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", broken_off)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(path, state)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.glob("*last.pt*")] == ["last.pt"]


def test_a_checkpoint_of_format_1_is_refused_in_one_line(cfg: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    keys = ("model", "solver", "generators", "progress", "config", "fingerprints", "versions")
    torch.save({"format": 1, **{key: {} for key in keys}}, path)
    with pytest.raises(UserError) as caught:
        checkpoint.read(path, config.load(cfg), {}, steps=runs.STEPS)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: a training state in format 1, of an earlier version, cannot be resumed by")
    assert "--overwrite" in line


@pytest.mark.parametrize("content", [[1], {"format": 3}, {"model": {}}, torch.zeros(2)])
def test_other_things_are_no_training_state(content: Any, cfg: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"last\.pt: not a training state in format 2, the one that this version"):
        checkpoint.read(path, config.load(cfg), {}, steps=runs.STEPS)


def restored(built: Experiment, change: Callable[[dict[str, Any]], object]) -> None:
    """A fresh state, as a file would hold it after ``change``, restored into ``built``."""
    state = Snapshot(state_of(built)).get()
    change(state)
    trial, path = built.trials[0], Path("last.pt")
    saved = checked(Checkpoint, state, path)
    metrics = RunningMetrics(built.device)
    (phase,) = trial.phases
    more = {"terms": phase.terms, "first_steps": FirstSteps(torch.device("cpu"), 3)}
    checkpoint.restore(saved, path, trial.distiller, trial.averages, phase.solver, metrics, **more)


def momentum(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda state: state["solver"]["state"].update({0: {"momentum_buffer": value}})


MISFITS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda state: state["model"].pop("student.hidden.bias"), "model: missing student.hidden.bias, unexpected nothing"),
    (lambda state: state["model"].update(more=torch.zeros(1)), "model: missing nothing, unexpected more"),
    (lambda state: state["averages"].pop("ema"), "averages: missing ema, unexpected nothing"),
    (lambda state: state["averages"]["ema"].pop("count"), "averages.ema: missing count, unexpected nothing"),
    (
        lambda state: state["model"].update({"student.bn.bias": [0.0] * 3}),
        r"student\.bn\.bias is \[0.0, 0.0, 0.0\], not",
    ),
    (
        lambda state: state["model"].update({"student.bn.bias": torch.zeros(3).to_sparse()}),
        r"student\.bn\.bias is a tensor without plain",
    ),
    (lambda state: state["model"].update({"student.bn.bias": torch.zeros(3, device="meta")}), "without plain values"),
    (
        momentum(torch.zeros(4)),
        r"solver\.state\.0\.momentum_buffer is \(4,\) in torch\.float32, not \(3,\) in torch\.fl",
    ),
    (momentum(torch.zeros(0)), r"solver\.state\.0\.momentum_buffer is \(0,\) in torch"),
    (momentum(torch.zeros(3, dtype=torch.complex64)), r"momentum_buffer is \(3,\) in torch\.complex64, not \(3,\)"),
    (momentum("zeros"), "momentum_buffer is 'zeros', not a tensor"),
    (lambda state: state["solver"]["state"].update({99: {}}), r"solver\.state\.99 is of none of the 6 weights"),
    (lambda state: state["solver"]["state"].update({0: {}}), r"solver\.state\.0 should hold momentum_buffer alone"),
    (lambda state: state["solver"]["param_groups"][0].pop("lr"), r"param_groups\.0 should hold lr, lr_scale, momentum"),
    (lambda state: state["solver"]["param_groups"][0].update(lr="high"), r"param_groups\.0\.lr is 'high', not a rate"),
    (lambda state: state["solver"]["param_groups"][0].update(momentum=9.0), r"groups\.0\.momentum is 9\.0, not 0\.9"),
    (lambda state: state["solver"]["param_groups"].append({}), r"solver\.param_groups should be 1 groups"),
    (lambda state: state["solver"].clear(), "solver should hold state and param_groups"),
    (lambda state: state["progress"].update(epoch=2), r"solver\.state holds no momentum"),
    (lambda state: state["metrics"].update(names=["x"]), r"metrics\.names are \['x'\], not \['ce'\]"),
    (momentum(None), r"solver\.state\.0\.momentum_buffer is None, not a tensor"),
    (lambda state: state["metrics"].update(totals=torch.zeros(3)), r"metrics\.totals is \(3,\) in torch\.float32, not"),
    (lambda state: state["model"]["student.bn.bias"].fill_(torch.nan), r"NaN or infinite values in model\.student\.bn"),
    (
        lambda state: state["progress"].update(epoch=0),
        r"progress\.epoch: should be greater than or equal to 1, found 0",
    ),
    (lambda state: state["progress"].update(step=2**70), r"progress\.step: .*, found 1180591620717411303424"),
    (lambda state: state["progress"].update(seconds=float("nan")), r"progress\.seconds: "),
    (lambda state: state["progress"].update(best={"epoch": 1}), r"progress\.best\.split: "),
    (lambda state: state["progress"].update(more=1), r"progress\.more: "),
    (lambda state: state.update(versions={"torch": "2"}), r"versions\.mdistill: "),
    (lambda state: state.pop("fingerprints"), "fingerprints: "),
    (lambda state: state.update(config=[[[]]]), "config: "),
]


@pytest.mark.parametrize(("change", "message"), MISFITS, ids=range(len(MISFITS)))
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    change: Callable[[dict[str, Any]], object], message: str, cfg: Path
) -> None:
    built = runs.experiment(cfg)
    before = Snapshot(state_of(built)).get()
    with pytest.raises(UserError, match=message) as caught:
        restored(built, change)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith("last.pt ")
    assert_same(Snapshot(state_of(built)).get(), before)


def test_momenta_that_share_memory_get_memory_of_their_own(cfg: Path) -> None:
    """A file may hold views of one value; the update writes each entry."""
    built = runs.experiment(cfg)
    restored(built, momentum(torch.ones(1).expand(3)))
    (optimizer,) = [built.trials[0].phases[-1].solver.optimizer]
    buffer = optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"]
    assert buffer.tolist() == [1.0, 1.0, 1.0]
    assert buffer.stride() == (1,)


def test_a_momentum_that_is_lacking_begins_at_0(cfg: Path, tmp_path: Path) -> None:
    """As that of a weight whose first gradient comes late."""
    runs.train(cfg, tmp_path, "solver.epochs=1")
    path = tmp_path / "seed0" / "last.pt"
    state = runs.state(tmp_path)
    torch.save({**state, "solver": {**state["solver"], "state": {}}}, path)
    with pytest.raises(UserError, match=r"solver\.state holds no momentum"):
        runs.train(cfg, tmp_path, mode="resume")
    del state["solver"]["state"][1]
    torch.save(state, path)
    runs.train(cfg, tmp_path, mode="resume")
    assert 1 in runs.state(tmp_path)["solver"]["state"]


def test_a_state_from_before_the_first_evaluation_of_an_earlier_version_is_read(cfg: Path, tmp_path: Path) -> None:
    built, path = runs.experiment(cfg), tmp_path / "last.pt"
    state = Snapshot(state_of(built)).get()
    state["progress"]["best"] = {}
    torch.save(state, path)
    assert checkpoint.read(path, built.trials[0].config, built.fingerprints, steps=runs.STEPS).progress.best is None


def test_a_run_resumes_that_had_a_setting_without_effect_or_lacked_one_that_came_later(tmp_path: Path) -> None:
    built, path = runs.experiment(runs.write_config(tmp_path, "dhkd", distiller={"head": "linear"})), tmp_path / "last"
    state = Snapshot(state_of(built)).get()
    now, before = built.trials[0].config, state["config"]["distiller"]
    del before["head"]
    for align in (False, True):
        before["align"] = align
        torch.save(state, path)
        if not align:
            assert checkpoint.read(path, now, built.fingerprints, steps=runs.STEPS).config["distiller"] == before
    with pytest.raises(UserError, match=r"another configuration \(distiller\.align: was True, now None\)"):
        checkpoint.read(path, now, built.fingerprints, steps=runs.STEPS)


@pytest.mark.parametrize(("epoch", "step"), [(1, runs.STEPS), (runs.EPOCHS + 1, 1), (runs.EPOCHS + 2, 0)])
def test_a_place_beyond_the_run_is_refused(epoch: int, step: int, cfg: Path, tmp_path: Path) -> None:
    built, path = runs.experiment(cfg), tmp_path / "last.pt"
    checkpoint.write(path, state_of(built, Progress(epoch=epoch, step=step)))
    with pytest.raises(
        UserError, match=rf"stands at step {step} of epoch {epoch}, and the run has 3 epochs of 5 steps"
    ):
        checkpoint.read(path, built.trials[0].config, built.fingerprints, steps=runs.STEPS)
