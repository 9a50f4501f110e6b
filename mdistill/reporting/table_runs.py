"""The runs behind a table: what is there, what is missing, and training what is missing."""

import hashlib
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from mdistill.engine.claims import Claims
from mdistill.engine.run_folder import read_metrics, read_sessions
from mdistill.errors import Stopped, UserError, printable, shown
from mdistill.files import lock_folder, read_text, signature_of
from mdistill.reporting.table_files import Cell, Row, Table, as_overrides, runs_of, shared_folder, short
from mdistill.settings import leaves

if TYPE_CHECKING:
    from mdistill.config import Config

LOSSES = 3  # workers that a run may lose before it counts as failed
SETTLE = 90.0  # seconds that a network file system may take to show what a run on another machine has written
POLL = 0.5  # seconds between two looks at what is running
SCAN = 5.0  # seconds between two looks at what others have claimed, where nothing else can be begun
QUIET = 90.0  # seconds without a sign of the owner of a claim, after which it is told of
RECENT = 20  # epochs of a record by which the speed of a run is judged, its last ones
MOST_BYTES = 200  # of a run's key, which names files
IN_USE = "is in use by another running process"  # as ``lock_folder`` says
TEACHER = "teacher"  # the row that a missing teacher's run is of

State = Literal["complete", "begun", "missing", "other"]


@dataclass(frozen=True)
class Run:
    """One training of a table."""

    cell: Cell
    seed: int
    config: "Config"
    folder: Path
    key: str  # its name among all runs below one output folder
    needs: str | None = None  # key of the run that trains its teacher
    missing: str | None = None  # why its teacher cannot be had
    weights: Mapping[str, Path] = field(default_factory=dict, compare=False)  # files that it begins from, by key
    _seen: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.cell.row.name} {self.cell.pair} seed {self.seed}"

    @property
    def epochs(self) -> int:
        """Of all its phases."""
        return self.config.epochs

    @property
    def epochs_done(self) -> int:
        """Whole lines of its record."""
        self._look()
        return min(int(self._seen["lines"]), self.epochs)

    @property
    def state(self) -> State:
        """Complete: the last epoch is in its record and its student is there. Other: a run of other settings is."""
        self._look()
        state: State = self._seen["state"]
        return state

    def is_complete(self) -> bool:
        """Whether it is by now."""
        return self.state == "complete"

    @property
    def difference(self) -> str:
        """In what a run of other settings is another one."""
        self._look()
        return str(self._seen["difference"])

    def _look(self) -> None:
        """Read what is in the folder, where it has changed since."""
        names = ("metrics.jsonl", "config.yaml", "student.pt", "env.json")
        signature = [signature_of(self.folder / name) for name in names]
        if self._seen.get("signature") == signature:
            return
        lines = _count_lines(self.folder / "metrics.jsonl") if signature[0] else 0
        difference = _difference(self) if signature[1] else ""
        state: State = "begun" if lines or signature[1] else "missing"
        if difference:
            state = "other"
        elif lines >= self.epochs and signature[1] and signature[2]:
            with suppress(UserError):  # it has gone this moment, so it is being begun anew
                metrics = read_metrics(self.folder)
                state = "complete" if metrics and metrics[-1]["epoch"] == self.epochs else "begun"
        self._seen.update(signature=signature, lines=lines, state=state, difference=difference)


def _count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _difference(run: Run) -> str:
    """The settings in which the run that is recorded in its folder is another one; "" where there are none."""
    from mdistill.reporting.records import read_record
    from mdistill.reporting.table_cells import wanted

    try:
        record = read_record(run.folder)
    except UserError as error:
        whole = all((run.folder / name).exists() for name in ("config.yaml", "metrics.jsonl"))
        return str(error).splitlines()[0] if whole else ""  # else it is being written
    weights = {key: digest for key, path in run.weights.items() if key in record.weights and (digest := _sha256(path))}
    changed = wanted(run.cell, run.config, run.config).changes(record, weights)
    was, now = changed.get("solver.epochs", (None, None))
    if run.config.solver.schedule != "cosine" and isinstance(was, int) and isinstance(now, int) and was < now:
        del changed["solver.epochs"]  # it may grow
    listed = [f"{key}: {shown(old, 80)} there, {shown(new, 80)} here" for key, (old, new) in changed.items()]
    return "; ".join([*listed[:3], *(["..."] if listed[3:] else [])])


def _sha256(path: Path) -> str:
    """Of the weights in ``path``, a file or a run folder; "" where there are none."""
    file = path / "student.pt" if path.is_dir() else path
    signature = signature_of(file)
    return "" if signature is None else _digest(file, signature)


@cache
def _digest(file: Path, signature: tuple[int, int]) -> str:
    """As long as its time and size, which are its ``signature``, are the same."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def plan(table: Table, *, output: Path, checkpoint_root: Path, configs: Path, train_teachers: bool) -> list[Run]:
    """Every run of ``table``, teachers that have to be trained first, then seed by seed; one of several cells once.

    A teacher whose file is missing and which an earlier call has trained below ``output`` is taken from there.

    Raises:
        UserError: a configuration does not fit, or two rows would share a run folder.
    """
    runs: list[Run] = []
    teachers: list[Run] = []
    sources: dict[tuple[str, str], Run | None] = {}
    configurations: dict[tuple[Row, str], tuple[Cell, Config]] = {}
    for cell, seed in runs_of(table):
        place = (cell.row, cell.pair)
        if place not in configurations:
            configurations[place] = _configured(cell, table.seeds[0], table.epochs)
        shortened, config = configurations[place]
        run = _run(shortened, config.model_copy(update={"seed": seed}), output)
        weights, missing = _weights(config, checkpoint_root)
        run = replace(run, weights=weights)
        if missing is not None and config.teacher is not None:
            known = (cell.pair, config.teacher.model_dump_json())
            if known not in sources:
                sources[known] = _teacher(run, table, output, configs)
            source = sources[known]
            if source is not None and (train_teachers or source.state == "complete"):
                override = (f"teacher.checkpoint={source.folder.resolve()}", "teacher.expected_top1=null")
                teachers.append(source)
                own = replace(run.cell, overrides=(*run.cell.overrides, *override))
                trained = {**weights, "teacher.checkpoint": source.folder}
                run = replace(run, cell=own, needs=source.key, weights=trained)
            else:
                hint = "" if source is None else "; or train it here, with --train-teachers"
                run = replace(run, missing=f"{missing}{hint}")
        runs.append(run)
    folders: dict[Path, Run] = {}
    for run in [*runs, *teachers]:
        other = folders.setdefault(run.folder, run)
        if other.config.model_copy(update={"imports": run.config.imports}) != run.config:
            raise shared_folder(table.path, other.label, run.label, run.folder)
    first = {each.folder: folders.pop(each.folder) for each in teachers if each.folder in folders}
    return [*first.values(), *folders.values()]


def _configured(cell: Cell, seed: int, epochs: int | None) -> "tuple[Cell, Config]":
    try:
        if epochs is not None:
            cell = short(cell, epochs)
        return cell, cell.config(seed)
    except UserError as error:
        lines = str(error).splitlines()
        raise UserError("\n".join(f"{cell.row.name} {cell.pair}: {line}" for line in lines)) from None


def _run(cell: Cell, config: "Config", output: Path) -> Run:
    folder = config.run_folder()
    return Run(cell, config.seed, config, output / folder, claim_key(folder))


def claim_key(folder: Path) -> str:
    """The name by which the run in ``folder``, as it lies below the output folder, is claimed."""
    key = "--".join(folder.parts)
    if len(key.encode()) > MOST_BYTES:
        key = f"{key[:60]}~{hashlib.sha256(key.encode()).hexdigest()[:16]}--{folder.name}"
    return key


def _weights(config: "Config", checkpoint_root: Path) -> tuple[dict[str, Path], str | None]:
    """The teacher's files of a run, by setting, and why one is missing; without those that the run itself downloads."""
    from mdistill.models.pretrained import published_weights
    from mdistill.models.teachers import locate

    found: dict[str, Path] = {}
    members = config.teacher.members if config.teacher is not None else ()
    places = ["teacher", *(f"teacher.ensemble.{number}" for number in range(len(members)))]
    try:
        for place, member in zip(places, members, strict=False):
            if published_weights(member.name, member.checkpoint, "teacher") is None:
                path = locate(member.checkpoint, checkpoint_root, model=member.name, dataset=config.data.name)
                found[f"{place}.checkpoint"] = path
    except UserError as error:
        return found, str(error).splitlines()[0]
    return found, None


def _teacher(run: Run, table: Table, output: Path, configs: Path) -> Run | None:
    """The run that trains the teacher of ``run`` alone; None where no configuration has it."""
    assert run.config.teacher is not None
    cell = None if run.config.teacher.ensemble else _teacher_cell(run, table, configs)
    return None if cell is None else _run(*_configured(cell, 0, table.epochs), output)


def _teacher_cell(run: Run, table: Table, configs: Path) -> Cell | None:
    """The teacher alone, on the data of its pair, with what the table changes of data and arithmetic."""
    from mdistill.config import Inline, load, without_defaults
    from mdistill.config.files import read_tree
    from mdistill.models.names import student_file_name

    teacher = run.config.teacher
    assert teacher is not None
    cfg = configs / table.dataset / f"vanilla/{student_file_name(teacher.name)}"
    if not cfg.is_file():
        return None
    pair_file = configs / table.dataset / "_pairs" / f"{run.cell.pair}.yaml"
    data = run.cell.data or (read_tree(pair_file).get("data") if pair_file.is_file() else None) or {}
    own = dict(leaves(read_tree(cfg).get("data") or {}))
    given = {".".join(("data", *key)): value for key, value in leaves(data) if own.get(key) != value}
    network, plain = without_defaults(run.config)["teacher"], without_defaults(load(cfg))["student"]
    arguments = [key for key in teacher.arguments if network.get(key) != plain.get(key)]
    given |= {f"student.{key}": teacher.arguments[key] for key in arguments}
    modules = run.config.imports if "data.name" in given else ()  # one of them has it
    every_run = tuple(each for each in table.every_run if each.startswith(("data.", "run.")))
    return Cell(
        Row(TEACHER, str(cfg)),
        teacher.name,
        (cfg, *([Inline(table.path, {"imports": list(modules)})] if modules else [])),
        ("--cfg", str(cfg), *(word for module in modules for word in ("--import", module))),
        overrides=(*as_overrides(given), *every_run),
        folders=run.cell.folders,
    )


# ---- how long it takes ---------------------------------------------------------------------------------------------


class Speeds:
    """Seconds that an epoch takes, by what was recorded.

    An epoch is taken to last as long as the last ones of the same cell; else of its pair, whatever the method.

    Args:
        outputs: folders of runs, among them those of shortened schedules.
        threads: that each run will have on a CPU: what was recorded there with others is taken to be as much faster or
            slower as they were more or fewer. None to take it as it is.
    """

    def __init__(self, runs: Sequence[Run], outputs: Iterable[Path], threads: int | None = None) -> None:
        self._outputs, self._threads = list(dict.fromkeys(outputs)), threads
        self._pairs = sorted({_cell_place(run)[::2] for run in runs})
        self.read()

    def read(self) -> None:
        """Look at the records anew."""
        self._cells: dict[tuple[str, str, str], list[float]] = {}
        for dataset, pair in self._pairs:
            self._read(dataset, pair)

    def epoch(self, run: Run) -> float | None:
        """Seconds of an epoch of ``run``; None where nobody has timed its pair."""
        dataset, method, pair = _cell_place(run)
        own = self._cells.get((dataset, method, pair))
        others = [
            seconds
            for (other_dataset, _, other_pair), all_seconds in self._cells.items()
            if (other_dataset, other_pair) == (dataset, pair)
            for seconds in all_seconds
        ]
        known = own or others
        return statistics.median(known) if known else None

    def left(self, runs: Sequence[Run]) -> tuple[float, int]:
        """Seconds that are left, one run after the other, and how many epochs nobody has timed."""
        total, unknown = 0.0, 0
        for run in runs:
            left = 0 if run.state in {"complete", "other"} or run.missing else run.epochs - run.epochs_done
            each = self.epoch(run) if left else None
            if each is not None:
                total += left * each
            else:
                unknown += left
        return total, unknown

    def _read(self, dataset: str, pair: str) -> None:
        for output in self._outputs:
            for path in sorted(output.glob(f"{dataset}/*/{pair}/**/metrics.jsonl")):
                method = path.relative_to(output).parts[1]
                share = _threads(path.parent) / self._threads if self._threads else 0.0
                seconds = [each * (share or 1.0) for each in _seconds(path)]
                self._cells.setdefault((dataset, method, pair), []).extend(seconds)


def _seconds(path: Path) -> list[float]:
    """Of each of the last epochs in a run's metrics, but for a first phase's."""
    seconds: list[float] = []
    try:
        lines = read_text(path).splitlines()[-RECENT:]
    except UserError:  # it has gone this moment
        return seconds
    for text in lines:
        with suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            if "phase" not in line:
                seconds.append(float(line["seconds/train"]) + float(line["seconds/eval"]))
    return seconds


def _threads(folder: Path) -> int:
    """Of the run in ``folder``, where it was on a CPU; else 0."""
    with suppress(UserError):  # no more than a time depends on it
        for session in reversed(read_sessions(folder)):
            if session.get("kernels"):
                return int(session.get("threads") or 0)
    return 0


def _cell_place(run: Run) -> tuple[str, str, str]:
    dataset, method, pair, *_ = run.config.run_folder().parts
    return dataset, method, pair


# ---- training ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of the runs of a table."""

    complete: list[Run] = field(default_factory=list)
    failed: dict[str, tuple[Run, str]] = field(default_factory=dict)  # by key: and why
    stopped: list[Run] = field(default_factory=list)

    def failures(self) -> list[str]:
        """A line for each reason, with the runs that failed for it."""
        runs: dict[str, list[str]] = {}
        for run, why in self.failed.values():
            runs.setdefault(why, []).append(run.label)
        return [f"{_listed(labels)}: {why}" for why, labels in runs.items()]


def _listed(labels: Sequence[str], most: int = 4) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


class Process(Protocol):
    """What a run trains in."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def terminate(self) -> None:
        """Ask it to save and end."""


@runtime_checkable
class RemoteProcess(Process, Protocol):
    """One on another machine; its ``poll`` may raise ``WorkerLost``."""

    def has_begun(self) -> bool:
        """Whether there was room for it."""


class WorkerLost(Exception):  # noqa: N818  (reads as the sentence it prints)
    """The machine or the worker that a run was handed to is gone; says how."""


Start = Callable[[Sequence[str], Path, Mapping[str, str]], Process]


class Agenda:
    """What is done with a run beside training it, while it is claimed; with a table's runs nothing."""

    def settled(self, run: Run) -> Run | None:
        """``run`` as it is to be trained, under the same key; None where it has ended already."""
        return run

    def complete(self, run: Run) -> None:
        """It is; several processes may say so."""

    def failed(self, run: Run) -> bool:
        """Whether a run that has failed is done with nevertheless."""
        return False


@dataclass
class _Job:
    run: Run
    process: Process
    log: Path
    lost: bool = False  # another process has taken its claim over
    asked: bool = False  # to save and end
    settled: float | None = None  # when what it has written on another machine is seen here, at the latest

    @property
    def has_begun(self) -> bool:
        """Whether it runs, and does not wait for room."""
        return not isinstance(self.process, RemoteProcess) or self.process.has_begun()

    def is_settling(self) -> bool:
        """Whether it ended well on another machine and its last files cannot be seen from here yet."""
        if not isinstance(self.process, RemoteProcess) or self.run.state == "complete":
            return False
        if self.settled is None:
            self.settled = time.monotonic() + SETTLE
        return time.monotonic() < self.settled


def train(
    runs: Sequence[Run],
    claims: Claims,
    *,
    logs: Path,
    jobs: int,
    flags: Sequence[str],
    asked_to_stop: Callable[[], bool],
    report: Callable[[Sequence[Run], Outcome], None],
    tell: Callable[[str], None] = print,
    start: Start | None = None,
    agenda: Agenda | None = None,
) -> Outcome:
    """Train every run that is not complete, ``jobs`` at a time; a run that fails does not keep the others.

    What another process has claimed is waited for. On a stop the running ones are asked to save and end.

    Args:
        flags: of ``mdistill train``, the same for all.
        report: is told, every ``POLL`` seconds, what is running and what has become of the others.
        tell: prints a line.
        start: begins a process with arguments, the file that it prints to, and its environment.
        agenda: is asked about each run.
    """
    training = _Training(runs, claims, logs, jobs, flags, tell, start or _start, agenda or Agenda())
    return training.run(asked_to_stop, report)


class _Training:
    def __init__(
        self,
        runs: Sequence[Run],
        claims: Claims,
        logs: Path,
        jobs: int,
        flags: Sequence[str],
        tell: Callable[[str], None],
        start: Start,
        agenda: Agenda,
    ) -> None:
        self.claims, self.logs, self.jobs, self.flags, self.tell, self.start = claims, logs, jobs, flags, tell, start
        self.agenda = agenda
        self.outcome = Outcome()
        self.pending = {run.key: run for run in runs}
        self.active: dict[str, _Job] = {}
        self.told: set[Path] = set()  # claims and run folders that were waited for
        self.losses: Counter[str] = Counter()  # of workers, by run
        self.environment = _environment(jobs)
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output: {logs} cannot be written: {error.strerror}") from None

    def run(self, asked_to_stop: Callable[[], bool], report: Callable[[Sequence[Run], Outcome], None]) -> Outcome:
        """Until nothing is left to do."""
        next_scan = 0.0
        while self.pending or self.active:
            stopping = asked_to_stop()
            if stopping:
                self.outcome.stopped += self.pending.values()
                self.pending.clear()
            ended = self._end_jobs(stopping)
            if len(self.active) < self.jobs and (ended or time.monotonic() >= next_scan):
                self._begin_jobs()
                next_scan = time.monotonic() + SCAN
            report([job.run for job in self.active.values() if job.has_begun], self.outcome)
            if self.pending or self.active:
                time.sleep(POLL)
        return self.outcome

    def _end_jobs(self, stopping: bool) -> bool:
        """See which jobs have ended, and whether any has."""
        ended = False
        for key, job in list(self.active.items()):
            if not job.lost and not self.claims.holds(key):
                job.lost = True
                self.tell(f"{job.run.label}: another process has taken it over, so it is stopped here")
            code, lost = self._poll(job)
            if code is None and not lost:
                if (stopping or job.lost) and not job.asked:  # a second time would end it at once
                    job.asked = True
                    job.process.terminate()
                continue
            if code == 0 and job.is_settling():
                continue
            ended = True
            del self.active[key]
            if job.run.state == "complete":
                self._complete(job.run)
            elif stopping:
                self.outcome.stopped.append(job.run)
            elif lost and self.losses[key] < LOSSES:
                self.pending[key] = job.run
                self.tell(f"{job.run.label}: {lost}, so it is resumed")
            elif job.lost or IN_USE in (why := lost or _reason(job.log, code)):  # by a run whose worker was killed
                self.pending[key] = job.run
            else:
                if self.agenda.failed(job.run):
                    self.outcome.complete.append(job.run)
                else:
                    self._fail(job.run, why)
                self.tell(f"failed: {job.run.label}: {why}")
            self.claims.release(key)
        return ended

    def _poll(self, job: _Job) -> tuple[int | None, str]:
        """Its exit code, or how its worker was lost; None and "" while it runs."""
        try:
            code = job.process.poll()
            if code == Stopped.exit_code and isinstance(job.process, RemoteProcess) and not job.asked:
                raise WorkerLost("its process was told to stop, as where a machine is taken away")
        except WorkerLost as error:
            self.losses[job.run.key] += 1
            return None, printable(str(error), 400)
        return code, ""

    def _begin_jobs(self) -> None:
        """Begin what nobody has, until ``jobs`` are running."""
        for key, run in list(self.pending.items()):
            if len(self.active) >= self.jobs:
                return
            if run.state == "complete":
                self.agenda.complete(run)
                self.outcome.complete.append(self.pending.pop(key))
            elif why := self._hindrance(run):
                self._fail(self.pending.pop(key), why)
            elif run.needs not in {*self.pending, *self.active} and self._is_free(run) and self._claim(run):
                self._begin(self.pending.pop(key))

    def _is_free(self, run: Run) -> bool:
        """Whether no process of this machine trains into its folder; one that no worker has claimed is told of, once.

        Where that cannot be found out the run fails.
        """
        why = _lock_problem(run.folder)
        if why and IN_USE not in why:
            self._fail(self.pending.pop(run.key), why)
        elif why and run.folder not in self.told:
            claim = self.claims.last(run.key)
            if claim is None or claim.released or self.claims.is_stale(claim):
                self.told.add(run.folder)
                self.tell(f"{run.label}: waits for another process, which trains into {run.folder}")
        return not why

    def _begin(self, claimed: Run) -> None:
        """Train what is ``claimed``: nobody else writes its folder now."""
        run = self.agenda.settled(claimed)
        if run is None:
            self.outcome.complete.append(claimed)
        elif run.is_complete():  # by another process, a moment ago
            self._complete(run)
        elif run.difference:
            settings = f"a run of other settings ({run.difference})"
            self._fail(run, f"{run.folder} holds {settings}; move it away, or set variant=NAME")
        else:
            log = self.logs / f"{run.key}.log"
            arguments = [*run.cell.arguments(run.seed), "--resume", *self.flags]
            self.active[run.key] = _Job(run, self.start(arguments, log, self.environment), log)
            return
        self.claims.release(claimed.key)

    def _claim(self, run: Run) -> bool:
        """Claim ``run``, and tell of an owner that is not there any more."""
        before = self.claims.last(run.key)
        other = self.claims.take(run.key)
        if other is None:
            if before is not None and not before.released:
                how = "which has ended" if self.claims.is_gone(before) else f"silent for {before.silent:.0f} s"
                self.tell(f"{run.label}: taken over from {before.place}, {how}")
            return True
        if other.silent > QUIET and other.path not in self.told:
            self.told.add(other.path)
            self.tell(
                f"{run.label}: claimed by {other.place}, silent for {other.silent:.0f} s; if it stays so, it is taken"
                f" over after {self.claims.stale:.0f} s"
            )
        return False

    def _complete(self, run: Run) -> None:
        self.agenda.complete(run)
        self.outcome.complete.append(run)
        self.tell(f"complete: {run.label}")

    def _fail(self, run: Run, why: str) -> None:
        self.outcome.failed[run.key] = (run, why)

    def _hindrance(self, run: Run) -> str | None:
        if run.missing is not None:
            return run.missing
        failed = self.outcome.failed
        return f"its teacher failed: {failed[run.needs][1]}" if run.needs in failed else None


def threads_of(jobs: int) -> int:
    """Of each job: its share of this process's cores, unless the user has said how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) else max(1, cores // jobs)


def _environment(jobs: int) -> dict[str, str]:
    """That of each job."""
    share = str(threads_of(jobs))
    return {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, **os.environ}


def _lock_problem(folder: Path) -> str:
    """Why ``folder`` cannot be locked, such as that a run whose table was killed a moment ago trains into it; or ""."""
    if not folder.is_dir():
        return ""
    try:
        lock_folder(folder, "run folder").release()
    except UserError as error:
        return str(error)
    return ""


def _start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
    command = [sys.executable, "-c", "from mdistill.reporting.table_runs import child; child()", *arguments]
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        with open(log, "wb") as output:
            return subprocess.Popen(command, stdout=output, env=dict(environment), start_new_session=True, **streams)
    except OSError as error:
        raise UserError(f"{log}: no run can be begun: {error.strerror}") from None


def child() -> None:
    """``mdistill train`` with this process's arguments; it saves and ends when the process that began it is gone."""

    def watch() -> None:
        while os.read(0, 1):  # until the other end is closed
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    sys.argv[0] = "mdistill train"  # as the record of the run has it
    threading.Thread(target=watch, name="parent", daemon=True).start()
    sys.exit(importlib.import_module("mdistill.cli.train").main())


def claiming_child() -> None:
    """``child`` that claims its run first, as a worker would: the folder of claims and the key are its first arguments.

    Where somebody else has it, that is said as where its folder is in use. A claim that is taken over ends it.
    """
    root, key = sys.argv[1:3]
    del sys.argv[1:3]
    claims = Claims(Path(root))
    other = claims.take(key)
    if other is not None:
        print(f"error: {key} {IN_USE}, {other.place}", flush=True)
        claims.close()
        sys.exit(UserError.exit_code)

    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL):
            if not claims.holds(key):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="claim", daemon=True)
    thread.start()
    try:
        child()
    finally:
        ended.set()
        thread.join()
        claims.close()


def _reason(log: Path, code: int | None) -> str:
    """The line of what a run printed that says what was wrong, or how its process ended."""
    lines = [line.strip() for line in read_text(log).splitlines() if line.strip()] if log.is_file() else []
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if told:
        return printable(told[0], 400)
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        hint = ", as where memory runs out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}; run the same command again to go on"
    return printable(lines[-1], 400) if lines else f"exit code {code}, nothing printed"
