"""Several seeds in one process, epochs without an evaluation, and what a run prints and takes while it goes on."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mdistill.data.loader import BatchLoader
from mdistill.data.sampling import epoch_plan
from mdistill.engine import trainer
from mdistill.engine.active_trial import ActiveTrial
from mdistill.engine.run_folder import RunFolder, read_metrics
from mdistill.engine.trainer import train_step
from mdistill.errors import RunFailed, Stopped, UserError

from .. import runs

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(params=["kd", "mcld"])
def cfg(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A stateless method, and one with a queue that wraps around within an epoch."""
    queue = {"queue_size": 70} if request.param == "mcld" else None
    return runs.write_config(tmp_path, request.param, distiller=queue)


@pytest.fixture
def vanilla_cfg(tmp_path: Path) -> Path:
    return runs.write_config(tmp_path, "vanilla")


@pytest.fixture
def kd_cfg(tmp_path: Path) -> Path:
    return runs.write_config(tmp_path, "kd")


@pytest.fixture
def alone(tmp_path: Path) -> Callable[[Path], Path]:
    """Runs each of the seeds in a call of its own; where."""

    def call(cfg: Path) -> Path:
        for seed in SEEDS:
            runs.train(cfg, tmp_path / "alone", seeds=(seed,))
        return tmp_path / "alone"

    return call


def assert_same_trials(left: Path, right: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    for seed in seeds:
        runs.assert_same_runs(left, right, seed=seed)
        one, other = (output / f"seed{seed}" for output in (left, right))
        assert (one / "config.yaml").read_text() == (other / "config.yaml").read_text()
        assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


# --- several seeds ---


@pytest.mark.slow
def test_seeds_together_equal_each_alone(
    cfg: Path, alone: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit: checkpoint, metrics, config.yaml and the exported network; each line names its seed."""
    expected, together = alone(cfg), tmp_path / "together"
    capsys.readouterr()
    runs.train(cfg, together, seeds=SEEDS)
    out = capsys.readouterr().out
    assert_same_trials(expected, together)
    for seed in SEEDS:
        lines = [line for line in out.splitlines() if line.startswith(f"seed {seed}: ")]
        assert [line.split()[2] for line in lines] == ["writing", "epoch", "epoch", "epoch", "test"]
    weights = [runs.state(expected, seed)["model"]["student.hidden.weight"] for seed in (0, 1)]
    assert not torch.equal(*weights)


@pytest.mark.slow
def test_each_of_several_stopped_seeds_resumes_by_itself(
    cfg: Path, alone: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All stop after the same step of an epoch, one goes on alone, then the others beside the one that is complete."""
    expected, together = alone(cfg), tmp_path / "together"
    with runs.stopping(at=20), pytest.raises(Stopped) as caught:  # by the second seed, in the second step of epoch 2
        runs.train(cfg, together, seeds=SEEDS)
    assert [runs.place(together, seed) for seed in SEEDS] == [(2, 2)] * 3
    stop = "SIGTERM: stopped after step 2 of epoch 2"
    assert str(caught.value).splitlines() == [
        f"seed {seed}: {stop}, saved to {together / f'seed{seed}' / 'last.pt'}; continue with --resume"
        for seed in SEEDS
    ]
    before = [contents(together / f"seed{seed}") for seed in SEEDS]
    runs.train(cfg, together, seeds=(1,), mode="resume")
    after = [contents(together / f"seed{seed}") for seed in SEEDS]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]
    capsys.readouterr()
    runs.train(cfg, together, seeds=SEEDS, mode="resume")
    assert f"seed 1: {together / 'seed1'} is complete: 3 of 3 epochs" in capsys.readouterr().out
    assert_same_trials(expected, together)


@pytest.mark.slow
def test_seeds_at_different_places_go_on_together(
    cfg: Path, alone: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One not begun, one in its first epoch, one with a single epoch left: those that are ahead wait."""
    expected, together = alone(cfg), tmp_path / "together"
    runs.train(cfg, together, seeds=(1,), stop_at=3)
    runs.train(cfg, together, "solver.epochs=2", seeds=(2,))
    assert [runs.place(together, seed) for seed in (1, 2)] == [(1, 3), (3, 0)]
    fetch, order = BatchLoader.fetch, []

    def noted(loader: BatchLoader, step: int) -> int:
        order.append((loader.seed, step))
        return fetch(loader, step)

    monkeypatch.setattr(BatchLoader, "fetch", noted)
    runs.train(cfg, together, seeds=(2, 0, 1), mode="resume")
    assert order == [
        *((0, step) for step in range(3)),
        *((seed, step) for step in (3, 4) for seed in (0, 1)),
        *((seed, step) for step in range(5) for seed in (0, 1)),
        *((seed, step) for step in range(5) for seed in (2, 0, 1)),
    ]
    assert_same_trials(expected, together)


@pytest.mark.slow
def test_a_stop_reaches_seeds_that_are_an_epoch_ahead_and_ends_an_epoch_that_is_complete(
    kd_cfg: Path, alone: Callable[[Path], Path], tmp_path: Path
) -> None:
    expected, together = alone(kd_cfg), tmp_path / "together"
    runs.train(kd_cfg, together, seeds=(1,), stop_at=5)  # in the last step of its first epoch
    assert runs.place(together, 1) == (2, 0)
    runs.train(kd_cfg, together, seeds=SEEDS, mode="resume", stop_at=3)
    assert [runs.place(together, seed) for seed in SEEDS] == [(1, 2), (2, 0), (1, 2)]
    assert [len(read_metrics(together / f"seed{seed}")) for seed in SEEDS] == [0, 1, 0]
    runs.train(kd_cfg, together, seeds=SEEDS, mode="resume")
    assert_same_trials(expected, together)


@contextmanager
def poisoned(seed: int, step: int) -> Iterator[None]:
    """Within, a weight of this seed's student becomes NaN behind its training step of this number."""
    count = 0

    def poisoning(trial: ActiveTrial, size: int) -> None:
        nonlocal count
        train_step(trial, size)
        count += trial.config.seed == seed
        if trial.config.seed == seed and count == step:
            trial.student.hidden.bias.data[0] = float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", poisoning)
        yield


@pytest.mark.slow
def test_a_seed_that_fails_leaves_the_others_to_finish(
    kd_cfg: Path, alone: Callable[[Path], Path], tmp_path: Path
) -> None:
    """One line that names the seed; its last good state is there and goes on when the cause is gone."""
    expected, together = alone(kd_cfg), tmp_path / "together"
    with poisoned(seed=1, step=7), pytest.raises(RunFailed) as caught:
        runs.train(kd_cfg, together, seeds=SEEDS)
    assert str(caught.value) == (
        "seed 1: loss term 'ce' is not finite from step 3 of epoch 2 on;"
        f" {together / 'seed1' / 'last.pt'} keeps the last good state"
    )
    assert runs.place(together, 1) == (2, 0)
    assert len(read_metrics(together / "seed1")) == 1
    assert_same_trials(expected, together, seeds=(0, 2))
    runs.train(kd_cfg, together, seeds=(1,), mode="resume")
    assert_same_trials(expected, together)


@pytest.mark.slow
def test_a_failed_seed_and_stopped_ones_each_have_their_line(kd_cfg: Path, tmp_path: Path) -> None:
    """The failure decides the kind of error, and so the exit code."""
    with poisoned(seed=1, step=7), runs.stopping(at=31), pytest.raises(RunFailed) as caught:
        runs.train(kd_cfg, tmp_path / "runs", seeds=SEEDS)
    assert [re.split("; |, saved", line)[0] for line in str(caught.value).splitlines()] == [
        "seed 0: SIGTERM: stopped after step 1 of epoch 3",
        "seed 1: loss term 'ce' is not finite from step 3 of epoch 2 on",
        "seed 2: SIGTERM: stopped after step 1 of epoch 3",
    ]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        *(
            (["--seeds", text], f"{value!r} in {text!r} is not a seed; write whole numbers, 0,1,2")
            for text, value in (("a", "a"), ("0,", ""), ("0 1", "0 1"), ("1.0", "1.0"), ("", ""), ("0,-1", "-1"))
        ),
        (["--seeds=-1"], "'-1' in '-1' is not a seed; write whole numbers, 0,1,2"),
        (["--seeds", "1,01"], "1 is given twice in '1,01'; each seed is one run"),
        (["--seed", "0", "--seeds", "1"], "not allowed with argument --seed"),
        (["--seeds"], "expected one argument"),
    ],
)
def test_wrong_seeds_are_refused_in_one_line(
    flags: list[str],
    line: str,
    train: Callable[..., int],
    kd_cfg: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        train(kd_cfg, *flags)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: argument --seeds: {line} (see --help)\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_seed_that_is_too_large_is_refused_before_anything_is_written(vanilla_cfg: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="seed"):
        runs.train(vanilla_cfg, tmp_path / "runs", seeds=(0, 2**63))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_taken_folder_of_one_seed_stops_all_before_anything_is_written(kd_cfg: Path, tmp_path: Path) -> None:
    runs.train(kd_cfg, tmp_path / "runs", "solver.epochs=1", seeds=(1,))
    before = contents(tmp_path)
    with pytest.raises(UserError, match="seed1 already holds a run with 1 epochs done"):
        runs.train(kd_cfg, tmp_path / "runs", seeds=SEEDS)
    assert contents(tmp_path) == before
    assert not (tmp_path / "runs" / "seed0").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["overwrite", "resume"])
def test_a_folder_of_one_seed_that_is_in_use_leaves_all_others_as_they_are(
    mode: Any, vanilla_cfg: Path, tmp_path: Path
) -> None:
    """No run is cleared or cut back before every folder is known to be free."""
    runs.train(vanilla_cfg, tmp_path / "runs", seeds=(0, 1))
    before = contents(tmp_path)
    other = RunFolder(tmp_path / "runs" / "seed1", "resume")
    other.acquire()
    try:
        with pytest.raises(UserError, match="seed1 is in use by another running process"):
            runs.train(vanilla_cfg, tmp_path / "runs", "solver.epochs=4", seeds=(0, 1), mode=mode)
    finally:
        other.close()
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_of_one_seed_leaves_all_others_as_they_are(vanilla_cfg: Path, tmp_path: Path) -> None:
    """Nor is any folder locked afterwards."""
    runs.train(vanilla_cfg, tmp_path / "runs", seeds=(1, 2))
    damaged = tmp_path / "runs" / "seed2" / "last.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{damaged} is truncated") as caught:
        runs.train(vanilla_cfg, tmp_path / "runs", "solver.epochs=4", seeds=SEEDS, mode="resume")
    assert contents(tmp_path) == before
    for seed in SEEDS:  # while the error is still at hand, as in a notebook
        folder = RunFolder(tmp_path / "runs" / f"seed{seed}", "overwrite")
        folder.acquire()
        folder.close()
    assert caught


def test_one_teacher_is_shared_and_its_logits_stay_with_their_seed(kd_cfg: Path) -> None:
    """In lockstep over two epochs, with a cache that is filled by both."""
    experiment = runs.experiment(kd_cfg, "run.teacher_logits=float32", seeds=(0, 1))
    first, second = experiment.trials
    assert experiment.teacher is not None
    assert first.distiller.teacher is second.distiller.teacher is not None
    assert first.distiller.student is not second.distiller.student
    trials = [ActiveTrial(experiment, trial) for trial in experiment.trials]
    for epoch in (1, 2):
        for trial in trials:
            trial.begin_epoch(epoch)
        for step in range(runs.STEPS):
            for trial in trials:
                trial.run(train_step, trial.loader.fetch(step))
        for seed, trial in enumerate(trials):
            trial.loader.finish()
            plan = epoch_plan(seed, epoch, runs.IMAGES, 162)
            image = experiment.dataset.train_batch(*map(torch.from_numpy, (plan.index, plan.view))).image
            assert trial.loader._teacher is not None
            logits = trial.loader._teacher.rows[:-1]
            torch.testing.assert_close(logits, experiment.teacher(image), rtol=1e-5, atol=1e-5)


# --- epochs without an evaluation ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epochs", "every", "evaluated"), [(3, 2, [2, 3]), (5, 2, [2, 4, 5]), (3, 1, [1, 2, 3]), (3, 7, [3]), (1, 2, [1])]
)
def test_only_every_so_many_epochs_are_evaluated_and_the_last(
    epochs: int,
    every: int,
    evaluated: list[int],
    vanilla_cfg: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = (f"run.evaluate_every={every}", f"solver.epochs={epochs}")
    (metrics,) = runs.train(vanilla_cfg, tmp_path / "runs", *overrides)
    out = capsys.readouterr().out
    printed = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert [line["epoch"] for line in metrics] == list(range(1, epochs + 1))
    for line, text in zip(metrics, printed, strict=True):
        there = line["epoch"] in evaluated
        assert {"test/top1" in line, "test/top5" in line, "test/loss" in line, "test top-1" in text} == {there}
        done = [other for other in metrics[: line["epoch"]] if other["epoch"] in evaluated]
        best = max(done, key=lambda other: other["test/top1"], default={})
        assert line.get("best/epoch") == best.get("epoch")
        assert line.get("best/top1") == best.get("test/top1")
    assert f"test top-1 {metrics[-1]['test/top1']:.2f} after epoch {epochs}, the last one (best " in out


@pytest.mark.slow
def test_evaluating_less_often_trains_the_same(kd_cfg: Path, tmp_path: Path) -> None:
    (often,) = runs.train(kd_cfg, tmp_path / "often")
    (rarely,) = runs.train(kd_cfg, tmp_path / "rarely", "run.evaluate_every=2")
    runs.assert_same(*(runs.state(tmp_path / name)["model"] for name in ("often", "rarely")))
    assert often[-1]["test/top1"] == rarely[-1]["test/top1"]


@pytest.mark.parametrize("stop_at", [3, 5, 9, 10, 14, 23])
@pytest.mark.slow
def test_a_resumed_run_evaluates_when_an_unbroken_one_does(stop_at: int, vanilla_cfg: Path, tmp_path: Path) -> None:
    """Stopped within epochs that are and are not evaluated, and behind them; twice before there is a best."""
    overrides = ("run.evaluate_every=2", "solver.epochs=5")
    runs.train(vanilla_cfg, tmp_path / "whole", *overrides)
    runs.train(vanilla_cfg, tmp_path / "parts", *overrides, stop_at=stop_at)
    assert runs.place(tmp_path / "parts") == (stop_at // 5 + 1, stop_at % 5)
    runs.train(vanilla_cfg, tmp_path / "parts", *overrides, mode="resume")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_grows_evaluates_its_new_last_epoch(vanilla_cfg: Path, tmp_path: Path) -> None:
    for epochs in (1, 2, 5):
        overrides = ("run.evaluate_every=3", f"solver.epochs={epochs}")
        (metrics,) = runs.train(vanilla_cfg, tmp_path / "runs", *overrides, mode="resume")
    assert [line["epoch"] for line in metrics if "test/top1" in line] == [1, 2, 3, 5]


# --- what a run prints and takes ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "teacher"),
    [
        (True, r"teacher: logits come from the cache \S+ \(float16, 0\.0 % of 16,200 entries\)"),
        (False, r"teacher: runs on every image: no cache was asked for$"),
    ],
)
def test_a_run_tells_where_its_teacher_and_engine_are_and_what_memory_it_took(
    cache: bool, teacher: str, kd_cfg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.train(kd_cfg, tmp_path / "runs", cache=cache)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(teacher, lines[0])
    assert (
        lines[1]
        == "engine: eager (CPU); precision tf32; memory format channels_last (measured to be the faster one on a CPU)"
    )
    (memory,) = (line for line in lines if line.startswith("peak memory: "))
    assert re.fullmatch(r"peak memory: [1-9]\d* MiB on the host", memory)
    assert json.loads((tmp_path / "runs/seed0/env.json").read_text())["sessions"][0]["engine"] == "eager"


def test_a_run_without_a_teacher_does_not_mention_one(
    vanilla_cfg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.train(vanilla_cfg, tmp_path / "runs", "solver.epochs=1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("engine: ")
    assert not [line for line in lines if line.startswith("teacher")]


DRIVER = """
import os, sys
from pathlib import Path
from mdistill.engine import active_trial
from tests import conftest, runs

page = os.sysconf("SC_PAGE_SIZE")

def watched(message):
    if message.startswith("epoch "):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        print("resident", resident, len(os.listdir("/proc/self/fd")), flush=True)

active_trial.print_line = watched
folder = Path(sys.argv[1])
cfg = runs.write_config(folder, "kd", student="resnet8", data={"images": 80, "batch_size": 32}, solver={"epochs": 20})
runs.train(cfg, folder / "runs")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_neither_memory_nor_descriptors_grow_over_epochs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    watched = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("resident ")]
    sizes = [int(size) for size, _ in watched]
    assert len(sizes) == 20
    # The first epochs fill the allocators; the least of five, as what is about to be freed comes and goes.
    assert min(sizes[-5:]) - min(sizes[5:10]) < 5e6
    descriptors = [int(count) for _, count in watched]  # one more while a checkpoint is being written
    assert min(descriptors[-5:]) == min(descriptors[5:10])
    assert set(descriptors[2:]) <= {min(descriptors[2:]), min(descriptors[2:]) + 1}


@pytest.mark.slow
def test_saving_within_an_epoch_changes_nothing(tmp_path: Path) -> None:
    cfg = runs.write_config(tmp_path, "mcld", solver={"epochs": 2, "ema_decay": 0.9})
    runs.train(cfg, tmp_path / "whole", seeds=(0, 1))
    runs.train(cfg, tmp_path / "saving", "run.checkpoint_minutes=1e-9", seeds=(0, 1))
    for seed in (0, 1):
        runs.assert_same_runs(tmp_path / "whole", tmp_path / "saving", seed=seed)
