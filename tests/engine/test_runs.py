"""Whole runs: what they write, that they resume exactly, and what they refuse."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdistill import config
from mdistill.data import Batch, DataInfo
from mdistill.data.loader import BatchLoader
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import uniform
from mdistill.engine import build, checkpoint, trainer
from mdistill.engine.console import StopRequest
from mdistill.engine.evaluate import evaluate
from mdistill.engine.run_folder import Mode, RunFolder, read_metrics, read_sessions
from mdistill.errors import RunFailed, Stopped, UserError
from mdistill.models import MODELS
from mdistill.models.weights import load_weights

from .. import runs
from ..conftest import refused
from ..faults import forked, renames
from ..same import TIMINGS, assert_same

ROOT = Path(__file__).resolve().parents[2]
FILES = {".lock", "config.yaml", "env.json", "last.pt", "metrics.jsonl", "student.pt", "tensorboard"}


@DISTILLERS.register("noisy_method")
class Noise(Distiller):
    """A method with everything that must survive a stop: a parameter, a counter, draws, a shared warm-up."""

    needs = Needs(teacher="logits")

    def __init__(self, student: Any, teacher: Any, data: DataInfo, **shared: Any) -> None:
        super().__init__(student, teacher, data, **shared)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def distillation(self, signals: Signals) -> dict[str, torch.Tensor]:
        noise = uniform(signals.seed, signals.epoch, signals.index, signals.teacher_logits.shape[1])
        gap = signals.student_logits - self.scale * signals.teacher_logits
        return {"noise": (noise * gap.square()).mean() + 0.01 * self.steps}

    def after_step(self, signals: Signals) -> None:
        self.steps += 1


@pytest.fixture
def mcld_cfg(kd_cfg: Path) -> Path:
    """A method with a queue that wraps around within an epoch."""
    text = kd_cfg.read_text().splitlines()[:-1]
    path = kd_cfg.with_name("queue.yaml")
    settings = "ce_weight: 0.5, temperature: 0.2, queue_size: 70, instance: true, sample: true, category: true"
    path.write_text("\n".join([*text, f"distiller: {{name: mcld, {settings}}}"]) + "\n")
    return path


@pytest.fixture
def noise_cfg(kd_cfg: Path) -> Path:
    text = kd_cfg.read_text().splitlines()[:-1]
    path = kd_cfg.with_name("noise.yaml")
    path.write_text("\n".join([*text, "distiller: {name: noisy_method, ce_weight: 1.0, warmup_epochs: 2}"]) + "\n")
    return path


def run(cfg: Path, output: Path, mode: Mode = "new", *overrides: str) -> list[dict[str, Any]]:
    """A run in this process, in ``output/seed0``."""
    return runs.train(cfg, output, *overrides, mode=mode)[0]


def test_a_run_writes_what_it_says(kd_cfg: Path, teacher_file: Path, tmp_path: Path) -> None:
    metrics = run(kd_cfg, tmp_path / "runs")
    folder = tmp_path / "runs" / "seed0"
    assert {entry.name for entry in folder.iterdir()} == FILES
    assert [line["epoch"] for line in metrics] == [1, 2, 3]
    assert metrics == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = {"lr", "train/loss", "train/loss_ce", "train/loss_kd", "train/top1", "test/top1", "test/top5", "test/loss"}
    keys |= TIMINGS - {"seconds"} | {"epoch", "best/epoch", "best/top1"}
    assert [set(line) - keys for line in metrics] == [{"first_steps"}, set(), set()]
    assert all(keys <= set(line) for line in metrics)
    assert [line["lr"] for line in metrics] == pytest.approx([0.05, 0.05, 0.005])
    assert all(line["train/loss"] == pytest.approx(line["train/loss_ce"] + line["train/loss_kd"]) for line in metrics)
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    best = max(metrics, key=lambda line: line["test/top1"])
    assert (metrics[-1]["best/top1"], metrics[-1]["best/epoch"]) == (best["test/top1"], best["epoch"])
    assert config.load(folder / "config.yaml") == config.load(kd_cfg)
    (session,) = json.loads((folder / "env.json").read_text())["sessions"]
    assert session["versions"]["torch"] == torch.__version__
    (file,) = session["teacher"]["files"]
    assert file["path"] == str(teacher_file)
    assert file["sha256"] == hashlib.sha256(teacher_file.read_bytes()).hexdigest()
    assert file["checksums"] is True
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("test/top1")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([m["train/loss"] for m in metrics])


def test_the_checkpoint_never_holds_the_teacher(kd_cfg: Path, teacher_file: Path, tmp_path: Path) -> None:
    run(kd_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    folder = tmp_path / "runs" / "seed0"
    state = runs.state(tmp_path / "runs")
    assert state["model"]
    assert all(key.startswith("student.") for key in state["model"])
    student = torch.load(folder / "student.pt", weights_only=True)
    assert list(student) == ["model"]
    assert_same(student["model"], {key.removeprefix("student."): value for key, value in state["model"].items()})


@pytest.mark.parametrize("stop_after", [5, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 3, 6))])
@pytest.mark.parametrize("method", ["mcld", "noise"])
def test_a_stopped_and_resumed_run_equals_an_unbroken_one(
    method: str, stop_after: int, request: pytest.FixtureRequest, teacher_file: Path, tmp_path: Path
) -> None:
    """Bit for bit: weights, momentum, queue, metrics and exported networks; stops within and between epochs."""
    cfg = request.getfixturevalue(f"{method}_cfg")
    run(cfg, tmp_path / "whole")
    runs.train(cfg, tmp_path / "parts", stop_at=stop_after)
    assert runs.place(tmp_path / "parts") == (stop_after // 3 + 1, stop_after % 3)
    run(cfg, tmp_path / "parts", "resume")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert len(json.loads((tmp_path / "parts" / "seed0" / "env.json").read_text())["sessions"]) == 2


def test_a_stopped_run_tells_where_it_is_and_how_to_go_on(student_cfg: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "seed0" / "last.pt"
    for at, where in ((2, "step 2 of epoch 1"), (1, "epoch 1")):
        experiment = runs.experiment(student_cfg)
        with runs.stopping(at), pytest.raises(Stopped) as caught:
            trainer.fit(experiment, [RunFolder(path.parent, "resume")])
        assert str(caught.value) == f"SIGTERM: stopped after {where}, saved to {path}; continue with --resume"
        assert caught.value.exit_code == 75


def test_a_signal_in_the_last_epoch_s_last_step_lets_the_run_end(student_cfg: Path, tmp_path: Path) -> None:
    experiment = runs.experiment(student_cfg)
    with runs.stopping(9):
        (metrics,) = trainer.fit(experiment, [RunFolder(tmp_path / "seed0", "new")])
    assert len(metrics) == 3
    assert runs.place(tmp_path) == (4, 0)


def test_method_state_does_change_and_is_saved(mcld_cfg: Path, teacher_file: Path, tmp_path: Path) -> None:
    run(mcld_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    model = runs.state(tmp_path / "runs")["model"]
    assert model["queue.filled"] == 70
    assert model["queue.pointer"] == 150 % 70


def test_resume_starts_fresh_where_nothing_is(student_cfg: Path, tmp_path: Path) -> None:
    assert len(run(student_cfg, tmp_path / "runs", "resume")) == 3


def test_resume_of_a_complete_run_changes_nothing(
    student_cfg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(student_cfg, tmp_path / "runs")
    (tmp_path / "runs" / "seed0" / "student.pt").unlink()  # as a kill just after last.pt would leave it
    assert run(student_cfg, tmp_path / "runs", "resume") == first
    assert "is complete: 3 of 3 epochs" in capsys.readouterr().out
    assert (tmp_path / "runs" / "seed0" / "student.pt").exists()


@pytest.mark.slow
def test_epochs_may_grow(student_cfg: Path, tmp_path: Path) -> None:
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=2")
    grown = run(student_cfg, tmp_path / "runs", "resume", "solver.epochs=3")
    assert [line["epoch"] for line in grown] == [1, 2, 3]
    with pytest.raises(UserError, match=r"solver.epochs: was 3, now 1"):
        run(student_cfg, tmp_path / "runs", "resume", "solver.epochs=1")


def test_resume_refuses_a_changed_configuration(kd_cfg: Path, teacher_file: Path, tmp_path: Path) -> None:
    run(kd_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    before = runs.state(tmp_path / "runs")
    kd_cfg.write_text(kd_cfg.read_text().replace("temperature: 4.0", "temperature: 2.0"))
    pattern = r"last.pt: cannot resume with another configuration \(distiller.temperature: was 4.0, now 2.0\)"
    with pytest.raises(UserError, match=pattern):
        run(kd_cfg, tmp_path / "runs", "resume")
    assert_same(before, runs.state(tmp_path / "runs"))


def test_resume_refuses_another_teacher(kd_cfg: Path, teacher_file: Path, tmp_path: Path) -> None:
    run(kd_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    weights = torch.load(teacher_file, weights_only=True)
    weights["model"]["hidden.bias"] += 1
    torch.save(weights, teacher_file)
    with pytest.raises(
        UserError, match=r"cannot resume with another teacher: its fingerprint was \w{12}, it is now \w{12}"
    ):
        run(kd_cfg, tmp_path / "runs", "resume", "solver.epochs=2")


def test_a_taken_folder_is_never_overwritten_silently(student_cfg: Path, tmp_path: Path) -> None:
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    folder = tmp_path / "runs" / "seed0"
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"already holds a run with 1 epochs done: continue it with --resume, replace"):
        run(student_cfg, tmp_path / "runs")
    assert (folder / "metrics.jsonl").read_text() == before
    (folder / "notes.txt").write_text("mine")
    run(student_cfg, tmp_path / "runs", "overwrite", "solver.epochs=2")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert (folder / "notes.txt").read_text() == "mine"


def test_two_processes_cannot_share_a_folder(student_cfg: Path, tmp_path: Path) -> None:
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    folder = tmp_path / "runs" / "seed0"
    other = RunFolder(folder, "resume")
    other.acquire()
    with pytest.raises(UserError, match="is in use by another running process"):
        run(student_cfg, tmp_path / "runs", "resume", "solver.epochs=2")
    other.close()
    assert len(run(student_cfg, tmp_path / "runs", "resume", "solver.epochs=2")) == 2


@pytest.mark.slow
def test_metrics_past_the_checkpoint_are_cut_back(student_cfg: Path, tmp_path: Path) -> None:
    """A kill between the metrics line and the checkpoint: the epoch runs again and is logged once."""
    run(student_cfg, tmp_path / "whole")
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=2")
    folder = tmp_path / "runs" / "seed0"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "test/top1": 99.0}\n{"epoch": 4, "tes')
    metrics = run(student_cfg, tmp_path / "runs", "resume")
    assert_same(metrics, [json.loads(x) for x in (tmp_path / "whole" / "seed0" / "metrics.jsonl").open()])
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("test/top1")] == [1, 2, 3]


def test_a_non_finite_loss_stops_and_keeps_the_last_good_state(student_cfg: Path, tmp_path: Path) -> None:
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    folder = tmp_path / "runs" / "seed0"
    before = (folder / "last.pt").read_bytes()
    experiment = runs.experiment(student_cfg, output=tmp_path / "runs")
    original, calls = experiment.dataset.train_batch, [0]

    def poisoned(index: torch.Tensor, view: torch.Tensor) -> Batch:
        calls[0] += 1
        batch = original(index, view)
        return Batch(batch.image * float("nan"), batch.target, index, view) if calls[0] == 2 else batch

    experiment.dataset.train_batch = poisoned
    pattern = r"loss term 'ce' is not finite from step 2 of epoch 2 on; .*last.pt keeps the last good state"
    with pytest.raises(RunFailed, match=pattern):
        trainer.fit(experiment, [RunFolder(folder, "resume")])
    assert (folder / "last.pt").read_bytes() == before
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    first, own = read_sessions(folder)
    assert "failed" not in first
    assert own["failed"].startswith("loss term 'ce' is not finite from step 2 of epoch 2 on; ")


def test_a_damaged_checkpoint_is_one_line(student_cfg: Path, tmp_path: Path) -> None:
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    path = tmp_path / "runs" / "seed0" / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last.pt is truncated: its 1,000 bytes") as caught:
        run(student_cfg, tmp_path / "runs", "resume", "solver.epochs=2")
    assert len(str(caught.value).splitlines()) == 1


def distiller(cfg: Path, info: DataInfo, **flags: Any) -> Distiller:
    settings = config.load(cfg, **flags)
    return build.build_distiller(settings, info, build.build_teacher(settings, info))


def test_the_seed_fixes_the_student_whatever_the_method(
    student_cfg: Path, kd_cfg: Path, mcld_cfg: Path, teacher_file: Path
) -> None:
    info = DataInfo(num_classes=10, num_samples=150, image_size=32, num_views=162, batch_size=64)
    students = [distiller(cfg, info).student for cfg in (student_cfg, kd_cfg, mcld_cfg)]
    torch.manual_seed(99)
    students.append(distiller(student_cfg, info).student)
    for other in students[1:]:
        assert_same(students[0].state_dict(), other.state_dict())
    different = distiller(student_cfg, info, seed=1).student
    assert not torch.equal(students[0].hidden.weight, different.hidden.weight)


@pytest.mark.slow
def test_nothing_reads_the_global_generators(kd_cfg: Path, teacher_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = run(kd_cfg, tmp_path / "a")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert_same(first, run(kd_cfg, tmp_path / "b"))
    assert torch.equal(before, torch.get_rng_state())


def test_holdout_is_evaluated_and_never_trained_on(student_cfg: Path, tmp_path: Path) -> None:
    metrics = run(student_cfg, tmp_path / "runs", "new", "data.holdout=30")
    assert {"val/top1", "val/top5", "val/loss", "test/top1"} <= set(metrics[0])
    best = max(metrics, key=lambda line: line["val/top1"])
    assert metrics[-1]["best/epoch"] == best["epoch"]
    settings = config.load(student_cfg, ["data.holdout=30"])
    data = build.build_dataset(settings, data_root=tmp_path, download=False)
    assert data.num_samples == 120
    assert data.splits == ("val", "test")


def start(cfg: Path, output: Path, *words: str) -> subprocess.Popen[str]:
    flags = ["--device", "cpu", "--output", str(output)]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "train.py"), "--cfg", str(cfg), *flags, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cfg.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def cli_cfg(tmp_path: Path) -> Path:
    """A real network on the embedded data set, small: for runs in a process of their own."""
    path = tmp_path / "cli.yaml"
    sizes = "superclasses: 2, fine_classes: 2, train_images: 256, test_images: 64"
    path.write_text(
        f"data: {{name: synthetic, batch_size: 32, {sizes}}}\n"
        "student: {name: resnet8}\n"
        "distiller: {name: vanilla, ce_weight: 1.0}\n"
        "solver: {name: sgd, epochs: 2, lr: 0.05, milestones: [], gamma: 0.1, momentum: 0.9, weight_decay: 5e-4}\n"
    )
    return path


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.slow
def test_command_line_run_is_killed_stopped_and_resumed(cli_cfg: Path, tmp_path: Path) -> None:
    """Kill -9 costs at most the running epoch and the one being written; SIGTERM exits with 75; the end is the same."""
    words = ("--seed", "1", "solver.epochs=4")
    whole, folder = (tmp_path / name / config.load(cli_cfg, words[2:], seed=1).run_folder() for name in ("a", "b"))
    unbroken = start(cli_cfg, tmp_path / "a", *words)
    killed = start(cli_cfg, tmp_path / "b", *words)
    wait_for_line(killed, "epoch 3/4")
    killed.kill()
    killed.communicate(timeout=60)
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["progress"]["epoch"] in {2, 3, 4}
    assert not any(line["epoch"] > 3 for line in read_metrics(folder))

    stopped = start(cli_cfg, tmp_path / "b", *words, "--resume")
    wait_for_line(stopped, "resuming")
    stopped.send_signal(signal.SIGTERM)
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, err
    (line,) = err.splitlines()
    assert line.startswith(("SIGTERM: stopped after ", "SIGTERM: stopped before "))
    assert line.endswith("; continue with --resume")

    last = start(cli_cfg, tmp_path / "b", *words, "--resume")
    _, err = last.communicate(timeout=120)
    assert last.returncode == 0, err
    out, err = unbroken.communicate(timeout=120)
    assert unbroken.returncode == 0, err
    assert len([line for line in out.splitlines() if line.startswith("epoch ")]) == 4
    assert_same(*(torch.load(at / "last.pt", weights_only=True) for at in (whole, folder)))
    assert_same(*(read_metrics(at) for at in (whole, folder)))


def test_resume_refuses_a_run_whose_checkpoint_is_gone(student_cfg: Path, tmp_path: Path) -> None:
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    folder = tmp_path / "runs" / "seed0"
    (folder / "last.pt").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"holds a run with 1 epochs done but no last.pt to resume from"):
        run(student_cfg, tmp_path / "runs", "resume", "solver.epochs=2")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_resume_starts_fresh_after_a_kill_in_the_first_epoch(student_cfg: Path, tmp_path: Path) -> None:
    settings = config.load(student_cfg)
    folder = RunFolder(tmp_path / "runs" / "seed0", "new")
    folder.acquire()
    folder.prepare(settings.to_yaml(), {}, epochs_done=0)
    folder.close()
    (folder.path / ".last.pt.1.tmp").write_text("half")
    assert len(run(student_cfg, tmp_path / "runs", "resume")) == 3
    assert not (folder.path / ".last.pt.1.tmp").exists()


@pytest.mark.slow
def test_a_kill_between_the_first_metrics_line_and_the_first_checkpoint_costs_one_epoch(
    student_cfg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(student_cfg, tmp_path / "whole")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(student_cfg, tmp_path / "runs")
    folder = tmp_path / "runs" / "seed0"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (folder / "last.pt").exists()
    assert_same(run(student_cfg, tmp_path / "runs", "resume"), whole)


def test_further_students_are_evaluated_under_their_names(student_cfg: Path, tmp_path: Path) -> None:
    """The first of ``students()`` is the headline, whatever it is called."""
    experiment = runs.experiment(student_cfg, "solver.epochs=1")
    averaged = MODELS.build("tiny_net", 10)
    distiller = experiment.trials[0].distiller
    distiller.students = lambda: {"other": averaged, "raw": distiller.student}
    ((line,),) = trainer.fit(experiment, [RunFolder(tmp_path / "runs" / "seed0", "new")])
    folder = tmp_path / "runs" / "seed0"
    for key, file in (("test/top1", "other.pt"), ("raw/test/top1", "raw.pt")):
        network = MODELS.build("tiny_net", 10)
        load_weights(network, folder / file, name="tiny_net")
        assert line[key] == evaluate(network, experiment.dataset, "test", batch_size=50).top1


def test_resume_refuses_lost_metrics(student_cfg: Path, tmp_path: Path) -> None:
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=2")
    metrics = tmp_path / "runs" / "seed0" / "metrics.jsonl"
    metrics.write_bytes(b"\xff\xfe\n[1]\n" + metrics.read_bytes().splitlines()[1] + b"\n")
    with pytest.raises(UserError, match=r"metrics.jsonl: 2 epochs are done, but it holds 1 of their lines"):
        run(student_cfg, tmp_path / "runs", "resume")


def test_a_folder_that_vanishes_ends_the_run_in_one_line(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the teacher's logits with it."""
    fetch = BatchLoader.fetch

    def vanished(loader: BatchLoader, step: int) -> int:
        if step == 2:
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        return fetch(loader, step)

    monkeypatch.setattr(BatchLoader, "fetch", vanished)
    with pytest.raises(RunFailed, match=r"could not write .*metrics\.jsonl: .*No such file or directory") as caught:
        runs.train(kd_cfg, tmp_path / "runs")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("where", ["distiller", "writing"])
def test_memory_that_runs_out_is_one_line(
    where: str,
    train: Callable[..., int],
    student_cfg: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    target = (Distiller, "forward") if where == "distiller" else (torch, "save")
    monkeypatch.setattr(*target, out_of_memory)
    assert refused(capsys, train(student_cfg), 1) == (
        "error: out of memory, a smaller data.batch_size needs less: there is not enough of it"
    )


FOREIGN = ("best_backup.pt", ".mine.tmp", ".last.pt.tmp", ".best.pt.7.tmp", "notes.txt", "tensorboard/notes.txt")


def put_foreign_files(folder: Path) -> None:
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resume", "overwrite"])
@pytest.mark.parametrize("stage", ["nothing", "no checkpoint", "complete"])
def test_only_the_run_s_own_files_are_ever_removed(mode: Mode, stage: str, student_cfg: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "seed0"
    if stage != "nothing":
        runs.train(student_cfg, tmp_path / "runs", "solver.epochs=1", "solver.ema_decay=0.5")
        (folder / ".last.pt.123.tmp").write_text("half")
        (folder / ".ema.pt.123.tmp").write_text("half")
    if stage == "no checkpoint":
        for name in ("last.pt", "student.pt", "ema.pt"):
            (folder / name).unlink()
    put_foreign_files(folder)
    runs.train(student_cfg, tmp_path / "runs", "solver.ema_decay=0.5", mode=mode)
    for name in FOREIGN:
        assert (folder / name).read_text() == name
    events = list((folder / "tensorboard").glob("events.*"))
    assert len(events) == 1
    assert {path.name for path in folder.iterdir()} == FILES | {"ema.pt"} | {name.split("/")[0] for name in FOREIGN}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resume", "overwrite", "new"])
@pytest.mark.parametrize("after", ["last.pt", "student.pt", "env.json", "metrics.jsonl", "config.yaml", ".discarded"])
def test_a_run_whose_replacement_is_killed_is_there_at_the_next_start(
    after: str, mode: Mode, train: Callable[..., int], student_cfg: Path, tmp_path: Path
) -> None:
    """Whole, however far it was moved; once the new run's first files are written, that one is."""
    folder = tmp_path / "runs/tiny/vanilla/tiny_net/seed0"
    assert train(student_cfg) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in {".pt", ".jsonl"}}
    arguments = ["train", "--cfg", str(student_cfg), "--device", "cpu", "--output", str(tmp_path / "runs")]
    ended = forked.command([*arguments, "--overwrite"], before=partial(renames.kill_after, after))
    assert ended.code == -9
    assert train(student_cfg, *([] if mode == "new" else [f"--{mode}"])) == (2 if mode == "new" else 0)
    if mode == "new":
        return
    assert torch.load(folder / "last.pt", weights_only=True)["progress"]["epoch"] == 4
    if mode == "resume" and after != ".discarded":
        del before["last.pt"]
        assert {name: (folder / name).read_bytes() for name in before} == before
    assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.slow
def test_files_of_the_user_named_as_averages_stay(
    student_cfg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "seed0"
    folder.mkdir(parents=True)
    (folder / "ema.pt").write_text("mine")

    def full(path: Path, text: str) -> None:
        if path.name == "config.yaml":
            raise RunFailed("could not write config.yaml: No space left on device")
        path.write_text(text)

    with monkeypatch.context() as patch:
        patch.setattr("mdistill.engine.run_folder.write_text", full)
        with pytest.raises(RunFailed, match="No space left"):
            runs.train(student_cfg, tmp_path / "runs")
    for mode in ("new", "resume", "overwrite"):
        runs.train(student_cfg, tmp_path / "runs", mode=mode)
        assert (folder / "ema.pt").read_text() == "mine"


def test_event_files_of_another_run_are_not_cleared_by_a_new_one(student_cfg: Path, tmp_path: Path) -> None:
    events = tmp_path / "runs" / "seed0" / "tensorboard" / "events.out.tfevents.1"
    events.parent.mkdir(parents=True)
    events.write_text("mine")
    with pytest.raises(UserError, match="already holds a run"):
        runs.train(student_cfg, tmp_path / "runs")
    assert events.read_text() == "mine"


@pytest.mark.slow
def test_a_folder_of_an_earlier_version_that_recorded_no_exports_is_continued(
    student_cfg: Path, tmp_path: Path
) -> None:
    runs.train(student_cfg, tmp_path / "runs", "solver.epochs=1", "solver.ema_decay=0.5")
    record = tmp_path / "runs" / "seed0" / "env.json"
    sessions = json.loads(record.read_text())["sessions"]
    del sessions[0]["exports"]
    record.write_text(json.dumps({"sessions": sessions}))
    runs.train(student_cfg, tmp_path / "runs", "solver.ema_decay=0.5", mode="resume")
    runs.train(student_cfg, tmp_path / "runs", mode="overwrite")
    assert {path.name for path in record.parent.iterdir()} == FILES


@pytest.mark.slow
def test_overwriting_removes_what_the_run_before_exported(student_cfg: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "seed0"
    runs.train(student_cfg, tmp_path / "runs", "solver.ema_decay=0.5")
    runs.train(student_cfg, tmp_path / "runs", mode="overwrite")
    assert {path.name for path in folder.iterdir()} == FILES


def test_a_file_of_the_user_with_the_name_of_an_export_is_not_replaced(student_cfg: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "seed0"
    folder.mkdir(parents=True)
    (folder / "ema.pt").write_text("mine")
    with pytest.raises(UserError, match=r"ema\.pt is not of a run in its folder, and this run would replace it"):
        runs.train(student_cfg, tmp_path / "runs", "solver.ema_decay=0.5", mode="resume")
    assert (folder / "ema.pt").read_text() == "mine"
    runs.train(student_cfg, tmp_path / "runs", mode="resume")  # this one has no such export
    assert (folder / "ema.pt").read_text() == "mine"


@pytest.mark.parametrize("name", ["tensorboard", "metrics.jsonl", "last.pt", ".lock"])
def test_links_out_of_the_folder_are_not_followed(name: str, student_cfg: Path, tmp_path: Path) -> None:
    """They are replaced, or refused; what they lead to stays."""
    folder, elsewhere = tmp_path / "runs" / "seed0", tmp_path / "elsewhere"
    runs.train(student_cfg, tmp_path / "runs", "solver.epochs=1")
    elsewhere.mkdir()
    (elsewhere / "events.out.tfevents.1").write_text("mine")
    target = elsewhere if name == "tensorboard" else elsewhere / "events.out.tfevents.1"
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)
    if name == ".lock":
        with pytest.raises(UserError, match="cannot be written"):
            runs.train(student_cfg, tmp_path / "runs", mode="overwrite")
        assert (folder / "last.pt").is_file()
    else:
        runs.train(student_cfg, tmp_path / "runs", mode="overwrite")
        assert not path.is_symlink()
        assert runs.place(tmp_path / "runs") == (4, 0)
    assert [entry.name for entry in elsewhere.iterdir()] == ["events.out.tfevents.1"]
    assert (elsewhere / "events.out.tfevents.1").read_text() == "mine"


def test_a_run_that_cannot_be_replaced_is_as_it_was(
    student_cfg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.train(student_cfg, tmp_path / "runs", "solver.epochs=1")
    folder = tmp_path / "runs" / "seed0"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def full(path: Path, text: str) -> None:
        if path.name == "env.json":
            raise RunFailed("could not write env.json: No space left on device")
        path.write_text(text)

    monkeypatch.setattr("mdistill.engine.run_folder.write_text", full)
    with pytest.raises(RunFailed, match="No space left"):
        runs.train(student_cfg, tmp_path / "runs", mode="overwrite")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("name", ["last.pt", "config.yaml", "student.pt"])
def test_a_folder_in_the_place_of_a_file_is_told_before_anything_changes(
    name: str, student_cfg: Path, tmp_path: Path
) -> None:
    runs.train(student_cfg, tmp_path / "runs", "solver.epochs=1")
    folder = tmp_path / "runs" / "seed0"
    (folder / name).unlink()
    (folder / name).mkdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=rf"{name} is no file, and a run writes a file of this name: move it away"):
        runs.train(student_cfg, tmp_path / "runs", mode="overwrite")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"sessions": 1}', '{"sessions": [{"exports": ["../../x"]}]}', "[" * 100_000, '{"a": 1']
)
@pytest.mark.slow
def test_a_damaged_record_of_sessions_is_told_and_nothing_changes(
    content: str, student_cfg: Path, tmp_path: Path
) -> None:
    runs.train(student_cfg, tmp_path / "runs", "solver.epochs=1")
    folder = tmp_path / "runs" / "seed0"
    (folder / "env.json").write_text(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"env\.json is damaged: .*; put the file back, or delete it") as caught:
        runs.train(student_cfg, tmp_path / "runs", mode="resume")
    assert len(str(caught.value).splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    (folder / "env.json").unlink()
    runs.train(student_cfg, tmp_path / "runs", mode="resume")


def test_a_folder_filled_meanwhile_is_not_cleared(student_cfg: Path, tmp_path: Path) -> None:
    """Two jobs of the same run: the slower one finds the folder empty, loads its data, and then finds it taken."""
    late = RunFolder(tmp_path / "runs" / "seed0", "new")
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    with pytest.raises(UserError, match="already holds a run"):
        late.acquire()
    late.close()
    assert (late.path / "last.pt").exists()


def test_resume_refuses_other_data(student_cfg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    monkeypatch.setattr("mdistill.data.InMemoryDataset.fingerprint", lambda self: "0" * 64)
    with pytest.raises(
        UserError, match=r"cannot resume with another data: its fingerprint was \w{12}, it is now 0{12}"
    ):
        run(student_cfg, tmp_path / "runs", "resume", "solver.epochs=2")


def test_a_flipped_bit_in_the_checkpoint_is_found(student_cfg: Path, tmp_path: Path) -> None:
    run(student_cfg, tmp_path / "runs", "new", "solver.epochs=1")
    path = tmp_path / "runs" / "seed0" / "last.pt"
    bytes_of_weights = runs.state(tmp_path / "runs")["model"]["student.hidden.weight"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(bytes_of_weights) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last.pt is damaged: the checksum of"):
        run(student_cfg, tmp_path / "runs", "resume", "solver.epochs=2")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_twice_in_one_moment_does_not_lose_the_save(second: signal.Signals) -> None:
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == "SIGINT"
        os.kill(os.getpid(), second)
        assert request.signal == "SIGINT"


@pytest.mark.parametrize(("first", "error"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_second_signal_ends_a_run_in_a_process_of_the_user_s(
    first: signal.Signals, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        os.kill(os.getpid(), first)
        monkeypatch.setattr(request, "_asked", request._asked - 1.0)
        with pytest.raises(error):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_builder_may_take_tuples_and_classes(student_cfg: Path, tmp_path: Path) -> None:
    """What a configuration cannot hold stays the builder's default; what it can reads back as it was."""
    if "flexible_net" not in MODELS.names():

        @MODELS.register("flexible_net")
        def flexible_net(
            num_classes: int, *, widths: tuple[int, ...] = (16,), act: type[torch.nn.Module] = torch.nn.ReLU
        ) -> torch.nn.Module:
            layers = [
                torch.nn.Flatten(),
                torch.nn.Linear(3072, widths[0]),
                act(),
                torch.nn.Linear(widths[0], num_classes),
            ]
            return torch.nn.Sequential(*layers)

    student_cfg.write_text(student_cfg.read_text().replace("tiny_net", "flexible_net"))
    run(student_cfg, tmp_path / "runs", "new", "student.widths=[8]", "solver.epochs=1")
    folder = tmp_path / "runs" / "seed0"
    assert config.load(folder / "config.yaml").student.arguments == {"widths": (8,)}
    run(student_cfg, tmp_path / "default", "new", "solver.epochs=1")
    again = config.load(tmp_path / "default" / "seed0" / "config.yaml")
    assert again == config.load(student_cfg, ["solver.epochs=1"])
