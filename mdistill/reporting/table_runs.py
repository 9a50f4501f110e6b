"""The runs behind a table: what is there, what is missing, and training what is missing."""

import importlib
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mdistill.config import Config
from mdistill.engine.claims import Claims
from mdistill.engine.run_folder import read_metrics
from mdistill.errors import UserError, printable
from mdistill.files import lock_folder, read_text
from mdistill.models.names import student_file_name
from mdistill.models.teachers import locate
from mdistill.reporting.table_files import Cell, Row, Table, runs_of

POLL = 0.5  # seconds between two looks at what is running
TEACHER = "teacher"  # the row that a missing teacher's run is of


@dataclass(frozen=True)
class Run:
    """One training of a table."""

    cell: Cell
    seed: int
    config: Config
    folder: Path
    key: str  # its name among all runs below one output folder
    needs: str | None = None  # key of the run that trains its teacher
    missing: str | None = None  # why its teacher cannot be had

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.cell.row.name} {self.cell.pair} seed {self.seed}"

    @property
    def epochs_done(self) -> int:
        """Epochs in its record."""
        return len(read_metrics(self.folder))

    @property
    def state(self) -> Literal["complete", "begun", "missing"]:
        """Whether its last epoch is done and its student is there."""
        done = self.epochs_done
        if done >= self.config.solver.epochs and (self.folder / "student.pt").exists():
            return "complete"
        return "begun" if done or (self.folder / "config.yaml").exists() else "missing"


def plan(
    table: Table, *, output: Path, checkpoint_root: Path, configs: Path, train_teachers: bool, epochs: int | None = None
) -> list[Run]:
    """Every run of ``table``, teachers that have to be trained first, then seed by seed.

    Args:
        epochs: what every schedule is shortened to.

    Raises:
        UserError: a configuration does not fit, or two rows would share a run folder.
    """
    runs: list[Run] = []
    teachers: dict[str, Run] = {}
    reasons: dict[tuple[str, str], str | None] = {}
    for cell, seed in runs_of(table):
        if epochs is not None:
            cell = short(cell, epochs)
        run = _run(cell, seed, output)
        config = run.config
        teacher = config.teacher
        if teacher is not None:
            known = (teacher.name, teacher.checkpoint)
            if known not in reasons:
                reasons[known] = _why_missing(config, checkpoint_root)
            if reasons[known] is not None and train_teachers and not teacher.ensemble:
                trained = teachers.get(teacher.name)
                if trained is None:
                    trained = teachers[teacher.name] = _teacher_run(cell, config, output, configs, epochs)
                override = (f"teacher.checkpoint={trained.folder.resolve()}", "teacher.expected_top1=null")
                cell = replace(cell, overrides=(*cell.overrides, *override))
                run = replace(_run(cell, seed, output), needs=trained.key)
            else:
                run = replace(run, missing=reasons[known])
        runs.append(run)
    folders: dict[Path, Run] = {}
    for run in runs:
        other = folders.setdefault(run.folder, run)
        if other is not run:
            raise UserError(f"{table.path}: {other.label} and {run.label} are the same run, {run.folder}")
    return [*teachers.values(), *runs]


def _why_missing(config: Config, checkpoint_root: Path) -> str | None:
    assert config.teacher is not None
    try:
        for member in config.teacher.members:
            locate(member.checkpoint, checkpoint_root, model=member.name, dataset=config.data.name)
    except UserError as error:
        return str(error).splitlines()[0]
    return None


def _teacher_run(cell: Cell, config: Config, output: Path, configs: Path, epochs: int | None) -> Run:
    assert config.teacher is not None
    dataset = Path(cell.cfg if cell.cfg.is_dir() else cell.cfg.parent).parent.name
    cfg = configs / dataset / "vanilla" / student_file_name(config.teacher.name)
    if not cfg.is_file():
        raise UserError(f"--train-teachers: there is no {cfg} to train {config.teacher.name} with")
    alone = Cell(Row(TEACHER, str(cfg), ()), config.teacher.name, cfg, False, ())
    return _run(alone if epochs is None else short(alone, epochs), 0, output)


def _run(cell: Cell, seed: int, output: Path) -> Run:
    config = cell.config(seed)
    folder = config.run_folder()
    return Run(cell, seed, config, output / folder, "--".join(folder.parts))


def short(cell: Cell, epochs: int) -> Cell:
    """``cell`` with a schedule of ``epochs``, and all that is counted in epochs in the same proportion."""
    config = cell.config(0)
    solver, distiller = config.solver, config.distiller.arguments
    factor = epochs / solver.epochs
    scaled = {max(1, round(each * factor)) for each in solver.milestones}
    milestones = sorted(each for each in scaled if each < epochs)
    overrides = [
        f"solver.epochs={epochs}",
        f"solver.milestones={milestones}".replace(" ", ""),
    ]
    for key, value in (("lr_warmup_epochs", solver.lr_warmup_epochs), ("average_from", solver.average_from)):
        if value:
            overrides.append(f"solver.{key}={max(1, round(value * factor))}")
    for key in ("warmup_epochs", "epochs"):
        if distiller.get(key):
            overrides.append(f"distiller.{key}={max(1, round(distiller[key] * factor))}")
    return replace(cell, overrides=(*cell.overrides, *overrides))


def seconds_left(runs: Sequence[Run]) -> tuple[float | None, int]:
    """Seconds of training that are left, by the speed of epochs that were done, and how many epochs nobody has timed.

    An epoch is taken to last as long as others of its cell; else of its pair, whatever the method.
    """
    cells: dict[tuple[str, str], list[float]] = {}
    pairs: dict[str, list[float]] = {}
    for run in runs:
        for line in read_metrics(run.folder):
            spent = float(line["seconds/train"]) + float(line["seconds/eval"])
            cells.setdefault((run.cell.row.name, run.cell.pair), []).append(spent)
            pairs.setdefault(run.cell.pair, []).append(spent)
    total, unknown = 0.0, 0
    for run in runs:
        left = 0 if run.state == "complete" else run.config.solver.epochs - run.epochs_done
        known = cells.get((run.cell.row.name, run.cell.pair)) or pairs.get(run.cell.pair)
        if known:
            total += left * statistics.median(known)
        else:
            unknown += left
    return (total or None), unknown


@dataclass
class Outcome:
    """What became of the runs of a table."""

    complete: list[Run] = field(default_factory=list)
    failed: dict[str, tuple[Run, str]] = field(default_factory=dict)  # by key: and why
    stopped: list[Run] = field(default_factory=list)


@dataclass
class _Job:
    run: Run
    process: "subprocess.Popen[bytes]"
    log: Path


def train(
    runs: Sequence[Run],
    claims: Claims,
    *,
    logs: Path,
    jobs: int,
    flags: Sequence[str],
    asked_to_stop: Callable[[], bool],
    report: Callable[[Sequence[Run], Outcome], None],
    start: "Callable[[Sequence[str], Path, Mapping[str, str]], subprocess.Popen[bytes]] | None" = None,
) -> Outcome:
    """Train every run that is not complete, ``jobs`` at a time; a run that fails does not keep the others.

    What another process has claimed is waited for. On a stop the running ones are asked to save and end.

    Args:
        flags: of ``mdistill train``, the same for all.
        report: is told, every ``POLL`` seconds, what is running and what has become of the others.
        start: begins a process with arguments, the file that it prints to, and its environment.
    """
    outcome, active = Outcome(), {}
    begin, share = start or _start, str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}
    pending = {run.key: run for run in runs}
    logs.mkdir(parents=True, exist_ok=True)
    while pending or active:
        stopping = asked_to_stop()
        if stopping:
            outcome.stopped += pending.values()
            pending.clear()
            for job in active.values():
                if job.process.poll() is None:
                    job.process.terminate()
        for key, job in list(active.items()):
            code = job.process.poll()
            if code is None:
                continue
            del active[key]
            if job.run.state == "complete":
                outcome.complete.append(job.run)
            elif stopping:
                outcome.stopped.append(job.run)
            else:
                outcome.failed[key] = (job.run, _reason(job.log, code))
            claims.release(key)
        for key, run in list(pending.items()):
            if len(active) >= jobs:
                break
            if run.state == "complete":
                outcome.complete.append(pending.pop(key))
            elif why := _blocked(run, outcome):
                outcome.failed[key] = (pending.pop(key), why)
            elif run.needs in {*pending, *active}:
                continue
            elif not _in_use(run.folder) and claims.take(key):
                del pending[key]
                if run.state == "complete":  # by another process, a moment ago
                    outcome.complete.append(run)
                    claims.release(key)
                    continue
                log = logs / f"{key}.log"
                arguments = [*run.cell.arguments(run.seed), "--resume", *flags]
                active[key] = _Job(run, begin(arguments, log, environment), log)
        report([job.run for job in active.values()], outcome)
        if pending or active:
            time.sleep(POLL)
    return outcome


def _blocked(run: Run, outcome: Outcome) -> str | None:
    if run.missing is not None:
        return run.missing
    return f"its teacher failed: {outcome.failed[run.needs][1]}" if run.needs in outcome.failed else None


def _in_use(folder: Path) -> bool:
    """Whether a process of this machine trains into ``folder``, such as one whose table was killed a moment ago."""
    if not folder.is_dir():
        return False
    try:
        lock_folder(folder, "run folder").release()
    except UserError:
        return True
    return False


def _start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", "from mdistill.reporting.table_runs import child; child()", *arguments]
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with open(log, "wb") as output:
        return subprocess.Popen(command, stdout=output, env=dict(environment), start_new_session=True, **streams)


def child() -> None:
    """``mdistill train`` with this process's arguments; it saves and ends when the process that began it is gone."""

    def watch() -> None:
        sys.stdin.read()  # until the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
    sys.exit(importlib.import_module("mdistill.cli.train").main())


def _reason(log: Path, code: int) -> str:
    """The last line of what a run printed that says what was wrong."""
    lines = [line.strip() for line in read_text(log).splitlines() if line.strip()] if log.is_file() else []
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
    return printable(told[0], 300) if told else f"exit code {code}, nothing printed"
