"""Training the runs of a table, some at a time, beside other processes that do the same."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mdistill.engine.claims import Claims
from mdistill.errors import Stopped, UserError, printable
from mdistill.files import IN_USE, lock_folder, read_text
from mdistill.reporting.table_plan import Run

LOSSES = 3  # workers that a run may lose before it counts as failed
SETTLE = 90.0  # seconds that a network file system may take to show what a run on another machine has written
POLL = 0.5  # seconds between two looks at what is running
SCAN = 5.0  # seconds between two looks at what others have claimed, where nothing else can be begun
QUIET = 90.0  # seconds without a sign of the owner of a claim, after which it is told of


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
        elif run.state == "complete":  # by another process, a moment ago
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
