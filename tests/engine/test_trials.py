"""Several seeds in one process, epochs without an evaluation, and what a run says and takes while it goes on."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mdistill import config
from mdistill.data.sampling import epoch_plan
from mdistill.engine import build, trainer
from mdistill.engine.cuda_graph import Engine
from mdistill.engine.metrics import EpochSums
from mdistill.engine.run_folder import RunFolder, read_metrics
from mdistill.models import MODELS

from ..same import assert_same

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[..., int]


@pytest.fixture
def mcld_cfg(kd_cfg: Path) -> Path:
    """A method with a queue that wraps around within an epoch."""
    text = kd_cfg.read_text().splitlines()[:-1]
    path = kd_cfg.with_name("queue.yaml")
    settings = "ce_weight: 0.5, temperature: 0.2, queue_size: 70, instance: true, sample: true, category: true"
    path.write_text("\n".join([*text, f"distiller: {{name: mcld, {settings}}}"]) + "\n")
    return path


@contextmanager
def stopping(after: int) -> Iterator[None]:
    """Within, this process gets SIGTERM in its training step number ``after``, those of all trials counted."""
    step, count = trainer.train_step, itertools.count(1)

    def counted(*args: Any) -> None:
        if next(count) == after:
            os.kill(os.getpid(), signal.SIGTERM)
        step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", counted)
        yield


def folder_of(output: Path, seed: int) -> Path:
    (found,) = output.rglob(f"seed{seed}")
    return found


def state_of(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / "last.pt", weights_only=True))


def place_of(folder: Path) -> tuple[int, int]:
    """Epoch and step of the checkpoint."""
    progress = state_of(folder)["progress"]
    return progress["epoch"], progress["step"]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def assert_same_runs(left: Path, right: Path) -> None:
    """Checkpoint, exported network, configuration and metrics of two run folders."""
    for file in ("last.pt", "student.pt"):
        assert_same(*(torch.load(folder / file, weights_only=True) for folder in (left, right)), file)
    assert (left / "config.yaml").read_text() == (right / "config.yaml").read_text()
    assert_same(read_metrics(left), read_metrics(right), "metrics")


@pytest.fixture
def alone(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[Path]]:
    """The folders of the three seeds, each run in a call of its own with a table of its own."""

    def call(cfg: Path, *words: str) -> list[Path]:
        folders = []
        for seed in range(3):
            output = tmp_path / "alone" / str(seed)
            assert train(cfg, "--seed", str(seed), "--output", str(output), *words) == 0
            folders.append(folder_of(output, seed))
        capsys.readouterr()
        return folders

    return call


# --- seeds ---


@pytest.mark.parametrize("method", ["kd", "mcld"])
def test_seeds_together_equal_each_alone(
    method: str,
    request: pytest.FixtureRequest,
    train: Train,
    alone: Callable[..., list[Path]],
    teacher_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit: checkpoint, metrics, config.yaml and the exported network."""
    cfg = request.getfixturevalue(f"{method}_cfg")
    folders = alone(cfg)
    assert train(cfg, "--seeds", "0,1,2") == 0
    out = capsys.readouterr().out
    for seed, folder in enumerate(folders):
        together = folder_of(tmp_path / "runs", seed)
        assert_same_runs(folder, together)
        assert {path.name for path in together.iterdir()} == {path.name for path in folder.iterdir()}
        lines = [line for line in out.splitlines() if line.startswith(f"seed {seed}: ")]
        assert [line.split()[2] for line in lines] == ["writing", "epoch", "epoch", "epoch", "test"]
    weights = [state_of(folder)["model"]["student.hidden.weight"] for folder in folders]
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("method", ["kd", "mcld"])
def test_each_of_several_stopped_seeds_resumes_by_itself(
    method: str,
    request: pytest.FixtureRequest,
    train: Train,
    alone: Callable[..., list[Path]],
    teacher_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All stop in the middle of an epoch, one goes on alone, then the others beside the one that is complete."""
    cfg = request.getfixturevalue(f"{method}_cfg")
    folders = alone(cfg)
    with stopping(after=14):
        assert train(cfg, "--seeds", "0,1,2") == 75
    captured = capsys.readouterr()
    together = [folder_of(tmp_path / "runs", seed) for seed in range(3)]
    assert [place_of(folder) for folder in together] == [(2, 2), (2, 2), (2, 1)]
    lines = sorted(captured.err.splitlines())
    assert len(lines) == 3
    for seed, (line, folder) in enumerate(zip(lines, together, strict=True)):
        stop = f"seed {seed}: SIGTERM: stopped after step {2 - seed // 2} of epoch 2"
        assert line == f"{stop}, saved to {folder / 'last.pt'}; go on with --resume"
    before = [contents(folder) for folder in together]
    assert train(cfg, "--seed", "1", "--resume") == 0
    assert [contents(folder) == files for folder, files in zip(together, before, strict=True)] == [True, False, True]
    assert train(cfg, "--seeds", "0,1,2", "--resume") == 0
    assert f"seed 1: {together[1]} is complete: 3 of 3 epochs" in capsys.readouterr().out
    for folder, other in zip(folders, together, strict=True):
        assert_same_runs(folder, other)


def test_seeds_at_different_epochs_go_on_together(
    train: Train, alone: Callable[..., list[Path]], mcld_cfg: Path, teacher_file: Path, tmp_path: Path
) -> None:
    """One that is not begun, one in the middle of its second epoch and one that has a single epoch left."""
    folders = alone(mcld_cfg)
    with stopping(after=5):
        assert train(mcld_cfg, "--seed", "1") == 75
    assert train(mcld_cfg, "--seed", "2", "solver.epochs=2", "solver.milestones=[2]") == 0
    assert [place_of(folder_of(tmp_path / "runs", seed)) for seed in (1, 2)] == [(2, 2), (3, 0)]
    assert train(mcld_cfg, "--seeds", "2,0,1", "--resume") == 0
    for seed, folder in enumerate(folders):
        assert_same_runs(folder, folder_of(tmp_path / "runs", seed))


def test_a_stop_between_epochs_reaches_every_seed(
    train: Train, alone: Callable[..., list[Path]], kd_cfg: Path, teacher_file: Path, tmp_path: Path
) -> None:
    """The first has just finished its epoch, the last is one step behind; and one that has not begun at all."""
    folders = alone(kd_cfg)
    for after, places in ((7, [(2, 0), (1, 2), (1, 2)]), (1, [(2, 1), (1, 2), (1, 2)])):
        with stopping(after):
            assert train(kd_cfg, "--seeds", "0,1,2", "--resume") == 75
        assert [place_of(folder_of(tmp_path / "runs", seed)) for seed in range(3)] == places
    assert train(kd_cfg, "--seeds", "0,1,2", "--resume") == 0
    for seed, folder in enumerate(folders):
        assert_same_runs(folder, folder_of(tmp_path / "runs", seed))


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, the second trial's student gets NaN behind its fifth step, the second of its second epoch."""
    original = build.build

    def built(*args: Any, **kwargs: Any) -> build.Experiment:
        made = original(*args, **kwargs)
        distiller, count = made.trials[1].distiller, itertools.count(1)
        after_step = distiller.after_step

        def poison() -> None:
            after_step()
            if next(count) == 5:
                distiller.student.hidden.bias[0] = float("nan")  # type: ignore[union-attr, operator]

        distiller.after_step = poison  # type: ignore[method-assign]
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build", built)
        yield


def test_a_seed_that_fails_leaves_the_others_to_finish(
    train: Train,
    alone: Callable[..., list[Path]],
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 1, one line that names the seed; its last good state is there and it can be run again."""
    folders = alone(kd_cfg)
    with poisoned():
        assert train(kd_cfg, "--seeds", "0,1,2") == 1
    together = [folder_of(tmp_path / "runs", seed) for seed in range(3)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: seed 1: loss term 'ce' is not finite from step 3 of epoch 2 on;"
        f" {together[1] / 'last.pt'} keeps the state before this epoch"
    )
    assert place_of(together[1]) == (2, 0)
    assert len(read_metrics(together[1])) == 1
    for seed in (0, 2):
        assert_same_runs(folders[seed], together[seed])
    assert train(kd_cfg, "--seed", "1", "--resume") == 0
    assert_same_runs(folders[1], together[1])


def test_a_failed_seed_and_stopped_ones_each_have_their_line(
    train: Train, kd_cfg: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The failure decides the exit code."""
    with poisoned(), stopping(after=19):
        assert train(kd_cfg, "--seeds", "0,1,2") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0].split(", saved")[0] for line in lines] == [
        "error: seed 1: loss term 'ce' is not finite from step 3 of epoch 2 on",
        "error: seed 2: SIGTERM: stopped after epoch 2",
        "error: seed 0: SIGTERM: stopped after step 1 of epoch 3",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seeds", "1,1"], "argument --seeds: 1 is given twice in '1,1'; each seed is one run"),
        (["--seeds", "1,01"], "argument --seeds: 1 is given twice in '1,01'; each seed is one run"),
        (["--seeds", "a"], "argument --seeds: 'a' in 'a' is not a seed; write whole numbers, 0,1,2"),
        (["--seeds", "0,"], "argument --seeds: '' in '0,' is not a seed; write whole numbers, 0,1,2"),
        (["--seeds", "0 1"], "argument --seeds: '0 1' in '0 1' is not a seed; write whole numbers, 0,1,2"),
        (["--seeds", "1.0"], "argument --seeds: '1.0' in '1.0' is not a seed; write whole numbers, 0,1,2"),
        (["--seeds", ""], "argument --seeds: '' in '' is not a seed; write whole numbers, 0,1,2"),
        (["--seeds", "-1"], "argument --seeds: '-1' in '-1' is not a seed; write whole numbers, 0,1,2"),
        (["--seeds=-1"], "argument --seeds: '-1' in '-1' is not a seed; write whole numbers, 0,1,2"),
        (["--seeds", "0,-1"], "argument --seeds: '-1' in '0,-1' is not a seed; write whole numbers, 0,1,2"),
        (["--seed", "0", "--seeds", "1"], "argument --seeds: not allowed with argument --seed"),
        (["--seeds"], "argument --seeds: expected one argument"),
    ],
)
def test_wrong_seeds_are_refused_in_one_line(
    words: list[str],
    line: str,
    train: Train,
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        train(kd_cfg, *words)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {line} (see --help)\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_seed_that_is_too_large_is_refused_before_anything_is_written(
    train: Train, student_cfg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert train(student_cfg, "--seeds", f"0,{2**63}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "seed" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_taken_folder_of_one_seed_stops_all_before_anything_is_written(
    train: Train, kd_cfg: Path, teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(kd_cfg, "--seed", "1", "solver.epochs=1") == 0
    capsys.readouterr()
    taken = folder_of(tmp_path / "runs", 1)
    before = contents(tmp_path)
    assert train(kd_cfg, "--seeds", "0,1,2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{taken} already holds a run with 1 epochs done" in line
    assert contents(tmp_path) == before
    assert not taken.with_name("seed0").exists()


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_folder_of_one_seed_that_is_in_use_leaves_all_others_as_they_are(
    flag: str, train: Train, student_cfg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No run is cleared or cut back before every folder is known to be free."""
    assert train(student_cfg, "--seeds", "0,1") == 0
    capsys.readouterr()
    before = contents(tmp_path)
    other = RunFolder(folder_of(tmp_path / "runs", 1), "resume")
    other.acquire()
    try:
        assert train(student_cfg, "--seeds", "0,1", flag, "solver.epochs=4") == 2
    finally:
        other.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{other.path} is in use by another running process" in line
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_of_one_seed_leaves_all_others_as_they_are(
    train: Train, student_cfg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(student_cfg, "--seeds", "1,2") == 0
    capsys.readouterr()
    damaged = folder_of(tmp_path / "runs", 2) / "last.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    before = contents(tmp_path)
    assert train(student_cfg, "--seeds", "0,1,2", "--resume", "solver.epochs=4") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{damaged} is truncated" in line
    assert contents(tmp_path) == before


def test_one_teacher_is_shared_and_its_rows_stay_with_their_seed(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path
) -> None:
    """Step by step in turn, over two epochs, with a table that is filled by both."""
    settings = [config.load(kd_cfg, ["run.teacher_logits=float32"], seed=seed) for seed in (0, 1)]
    roots = {"data_root": tmp_path, "checkpoint_root": tmp_path, "output_root": tmp_path}
    made = build.build(settings, torch.device("cpu"), **roots, cache_root=tmp_path / "cache")
    assert made.teacher is not None
    assert made.table is not None
    first, second = made.trials
    assert first.distiller.teacher is second.distiller.teacher is not None
    assert first.distiller.student is not second.distiller.student
    steppers = [trainer.make_stepper(made, trial, EpochSums(made.device), Engine("eager", "")) for trial in made.trials]
    for trial in made.trials:
        trial.solver.set_lr(0.01)
        trial.distiller.train()
    for epoch in (1, 2):
        for walk in steppers:
            walk.begin(epoch, 0)
        for number in range(3):
            for walk in steppers:
                walk.step(number)
        for seed, walk in enumerate(steppers):
            plan = epoch_plan(seed, epoch, 150, 162)
            batch = made.dataset.train_batch(torch.from_numpy(plan.index), torch.from_numpy(plan.view))
            assert walk._rows is not None
            torch.testing.assert_close(walk._rows.logits[:-1], made.teacher(batch.image), rtol=1e-5, atol=1e-5)
            assert torch.equal(made.table.read(plan.index * 162 + plan.view), walk._rows.logits[:-1])
    made.table.close()


# --- epochs without an evaluation ---


@pytest.mark.parametrize(
    ("epochs", "every", "evaluated"), [(3, 2, [2, 3]), (5, 2, [2, 4, 5]), (3, 1, [1, 2, 3]), (3, 7, [3]), (1, 2, [1])]
)
def test_only_every_so_many_epochs_are_evaluated_and_the_last(
    epochs: int,
    every: int,
    evaluated: list[int],
    train: Train,
    student_cfg: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (f"run.evaluate_every={every}", f"solver.epochs={epochs}", "solver.milestones=[]")
    assert train(student_cfg, *words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    printed = [line for line in captured.out.splitlines() if line.startswith("epoch ")]
    folder = folder_of(tmp_path / "runs", 0)
    metrics = read_metrics(folder)
    assert [line["epoch"] for line in metrics] == list(range(1, epochs + 1))
    for line, text in zip(metrics, printed, strict=True):
        there = line["epoch"] in evaluated
        assert {"test/top1" in line, "test/top5" in line, "test/loss" in line, "test top-1" in text} == {there}
        done = [other for other in metrics[: line["epoch"]] if other["epoch"] in evaluated]
        best = max(done, key=lambda other: other["test/top1"], default=None)
        expected = None if best is None else (best["epoch"], best["test/top1"])
        assert (None if best is None else (line["best/epoch"], line["best/top1"])) == expected
        assert ("best/top1" in line) == (best is not None)
    assert f"test top-1 {metrics[-1]['test/top1']:.2f} after the last epoch, {epochs} (best " in captured.out


def test_evaluating_less_often_trains_the_same(train: Train, kd_cfg: Path, teacher_file: Path, tmp_path: Path) -> None:
    assert train(kd_cfg) == 0
    assert train(kd_cfg, "run.evaluate_every=2") == 0
    often, rarely = (tmp_path / "runs/tiny/kd/tiny_net_tiny_net" / name for name in ("seed0", "evaluate_every=2/seed0"))
    assert_same(state_of(often)["model"], state_of(rarely)["model"])
    assert read_metrics(often)[-1]["test/top1"] == read_metrics(rarely)[-1]["test/top1"]


@pytest.mark.parametrize("after", [2, 3, 6, 7, 9, 14])
def test_a_resumed_run_evaluates_when_an_unbroken_one_does(
    after: int, train: Train, mcld_cfg: Path, teacher_file: Path, tmp_path: Path
) -> None:
    """Stopped within epochs that are and are not evaluated, and behind them; once before there is a best."""
    words = ("run.evaluate_every=2", "solver.epochs=5")
    assert train(mcld_cfg, *words, "--output", str(tmp_path / "whole")) == 0
    with stopping(after):
        assert train(mcld_cfg, *words) == 75
    assert place_of(folder_of(tmp_path / "runs", 0)) == (after // 3 + 1, after % 3)
    assert train(mcld_cfg, *words, "--resume") == 0
    assert_same_runs(folder_of(tmp_path / "whole", 0), folder_of(tmp_path / "runs", 0))


def test_a_run_that_grows_evaluates_its_new_last_epoch(train: Train, student_cfg: Path, tmp_path: Path) -> None:
    words = ("run.evaluate_every=3", "solver.milestones=[]")
    for epochs in (1, 2, 5):
        assert train(student_cfg, *words, f"solver.epochs={epochs}", "--resume") == 0
    metrics = read_metrics(folder_of(tmp_path / "runs", 0))
    assert [line["epoch"] for line in metrics if "test/top1" in line] == [1, 2, 3, 5]


# --- what a run says and takes ---


@pytest.mark.parametrize(
    ("words", "teacher"),
    [
        ([], r"teacher: logits come from \S+ \(float16, 0\.0 % of 24,300 rows there\)"),
        (["--no-cache"], r"teacher: runs on every image: no cache was asked for$"),
    ],
)
def test_a_run_says_where_its_teacher_and_engine_are_and_what_memory_it_took(
    words: list[str],
    teacher: str,
    train: Train,
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(kd_cfg, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(teacher, lines[0])
    assert lines[1] == "engine: eager (the CPU's); precision tf32"
    (memory,) = (line for line in lines if line.startswith("peak memory: "))
    assert re.fullmatch(r"peak memory: [1-9]\d* MiB on the host", memory)
    table = [line for line in lines if line.startswith("teacher table: ")]
    assert len(table) == (0 if words else 1)
    assert json.loads((folder_of(tmp_path / "runs", 0) / "env.json").read_text())["sessions"][0]["engine"] == "eager"


def test_a_run_without_a_teacher_does_not_mention_one(
    train: Train, student_cfg: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(student_cfg, "solver.epochs=1", "solver.milestones=[]") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("engine: ")
    assert not [line for line in lines if line.startswith("teacher")]


DRIVER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import train
from mdistill.engine import trainer

say, page = trainer.say, os.sysconf("SC_PAGE_SIZE")

def watched(message):
    say(message)
    if message.startswith("epoch "):
        print("resident", int(Path("/proc/self/statm").read_text().split()[1]) * page, flush=True)

trainer.say = watched
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_resident_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.save({"model": MODELS.build("resnet8", 4).state_dict()}, tmp_path / "teacher.pt")
    cfg = tmp_path / "cfg.yaml"
    cfg.write_text(
        "data: {name: synthetic, batch_size: 32, superclasses: 2, fine_classes: 2, train_images: 80, test_images: 16}\n"
        "teacher: {name: resnet8, checkpoint: teacher.pt}\n"
        "student: {name: resnet8}\n"
        "distiller: {name: kd, ce_weight: 0.5, kd_weight: 0.5, temperature: 4.0}\n"
        "solver: {name: sgd, epochs: 30, lr: 0.05, milestones: [], gamma: 0.1, momentum: 0.9, weight_decay: 5e-4}\n"
    )
    flags = ["--device", "cpu", "--output", str(tmp_path / "runs"), "--checkpoint-root", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(ROOT / "tools"), "--cfg", str(cfg), *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "teacher: logits come from" in done.stdout
    sizes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("resident ")]
    assert len(sizes) == 30
    assert min(sizes[-5:]) - min(sizes[:5]) < 20e6  # the least of five, as what is about to be freed comes and goes
