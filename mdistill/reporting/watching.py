"""What runs are doing at this moment, by their records, locks and claims; nothing is written and nothing locked.

A record is read again when its files have changed, so that hundreds of runs can be looked at every few seconds.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from mdistill.engine.claims import Claim, is_dead, is_here, read_claims
from mdistill.engine.run_folder import read_metrics
from mdistill.errors import UserError, printable
from mdistill.files import Locked, is_locked, locked_files, signature_of
from mdistill.reporting.figures import POINTS, thinned
from mdistill.reporting.records import Record, folders_below, read_record
from mdistill.reporting.table_plan import claim_key

State = Literal["running", "waiting", "failed", "stopped", "complete"]
STATES: tuple[State, ...] = ("running", "waiting", "failed", "stopped", "complete")

WRITTEN = ("metrics.jsonl", "env.json")  # while a run goes on
FILES = (*WRITTEN, "config.yaml")
SEARCH = 10.0  # seconds between two searches for new runs
LAST = 5  # epochs by whose time the rest is estimated
LATE = 120.0  # seconds beyond twice an epoch's time, after which a run that cannot be asked is taken to have ended
NETWORK = ("9p", "afs", "beegfs", "ceph", "cifs", "fuse.", "gfs", "gpfs", "lustre", "nfs", "panfs", "smb")


@dataclass(frozen=True)
class Run:
    """One run, as it is shown."""

    folder: Path
    seed: int
    state: State
    failure: str  # why it failed, else ""
    epoch: int  # that are done
    epochs: int
    split: str  # that ``top1`` is of: test, or val where the test split is not evaluated
    top1: float | None  # percent, after the last epoch
    best: float | None
    loss: float | None  # in training
    rate: float | None  # images per second
    ends: float | None  # when, in seconds since 1970, by the time of the last epochs; None where it does not run
    device: str
    changed: float  # when its record was written last
    points: Sequence[tuple[int, float | None, float | None]]  # (epoch, top-1, loss)


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone."""

    key: str
    name: str  # the method, with what sets it apart
    place: str  # data set, teacher and student
    runs: Sequence[Run]  # by seed

    @property
    def running(self) -> bool:
        """Whether any of them is, or is about to."""
        return any(run.state in ("running", "waiting") for run in self.runs)


@dataclass(frozen=True)
class Worker:
    """A process that trains a table."""

    name: str
    alive: bool
    sign: float  # the last one of it, in seconds since 1970
    runs: Sequence[str]  # that it has claimed


@dataclass(frozen=True)
class View:
    """All that is shown at a moment."""

    cells: Sequence[Cell]  # those with running runs first, then the latest first
    workers: Sequence[Worker]
    problems: Sequence[str]  # a line for each record that cannot be read
    older: int  # runs that have not changed for too long to be shown

    def count(self, state: State) -> int:
        """How many runs are in ``state``."""
        return sum(run.state == state for cell in self.cells for run in cell.runs)


@dataclass
class _Known:
    """What is remembered of a run folder."""

    signature: tuple[object, ...] = ()
    changed: float = 0.0
    network: bool = False  # its processes may be on other machines
    cell: Cell | None = None  # with this run alone, whose state is not judged yet
    seconds: float | None = None  # that an epoch takes
    problem: str = ""


class Watch:
    """Looks at the runs below ``roots``, again and again.

    Args:
        hours: how long a run that has ended is shown.

    Raises:
        UserError: one of ``roots`` is no folder.
    """

    def __init__(self, roots: Sequence[Path], *, hours: float = 24.0, clock: Callable[[], float] = time.time) -> None:
        for root in roots:
            if not root.is_dir():
                raise UserError(
                    f"{root} is a file, not a folder of runs" if root.exists() else f"no such folder: {root}"
                )
        self._roots, self._seconds, self._clock = roots, 3600 * hours, clock
        self._known: dict[Path, _Known] = {}
        self._claims: list[Path] = []
        self._searched = float("-inf")

    def view(self) -> View:
        """What there is now."""
        now = self._clock()
        if not 0 <= now - self._searched < SEARCH:
            self._searched = now
            self._search()
        locked = locked_files()
        claims = {(root, key): claim for root in self._claims for key, claim in read_claims(root).items()}
        by_folder = self._by_folder(claims)
        cells: dict[str, list[Cell]] = {}
        older, problems = 0, []
        for folder, known in self._known.items():
            self._refresh(folder, known)
            claim = by_folder.get(folder)
            busy = (claim is not None and not is_dead(claim)) or (locked is not None and is_locked(folder, locked))
            if not busy and now - known.changed > self._seconds:
                older += 1
                continue
            self._read(folder, known)
            if known.problem:
                problems.append(known.problem)
            if known.cell is not None:
                state = _state(folder, known, claim, locked, now)
                cells.setdefault(known.cell.key, []).append(_in_state(known, state))
        merged = [
            replace(several[0], runs=sorted((run for each in several for run in each.runs), key=lambda run: run.seed))
            for several in cells.values()
        ]
        merged.sort(key=lambda cell: (not cell.running, -max(run.changed for run in cell.runs), cell.name))
        return View(merged, self._workers(claims, now), problems, older)

    def _search(self) -> None:
        found: dict[Path, _Known] = {}
        self._claims = []
        for folder, names in folders_below(self._roots):
            if ".claims" in names:
                self._claims.append(folder / ".claims")
            if {"config.yaml", "metrics.jsonl"} <= names:
                found[folder] = self._known.get(folder) or _Known()
        devices = _network_devices()
        for folder, known in found.items():
            with suppress(OSError):
                known.network = folder.stat().st_dev in devices
        self._known = found

    def _refresh(self, folder: Path, known: _Known) -> None:
        """When the record was written last."""
        for name in WRITTEN:
            with suppress(OSError):
                known.changed = max(known.changed, (folder / name).stat().st_mtime)

    def _read(self, folder: Path, known: _Known) -> None:
        """Read the record if it has changed; one that cannot be read leaves what was known of it."""
        signature = tuple(signature_of(folder / name) for name in FILES)
        if signature == known.signature:
            return
        known.signature, known.problem = signature, ""
        try:
            record = read_record(folder)
            lines = [line for line in read_metrics(folder) if line.get("phase") is None]
            known.seconds = _epoch_seconds(lines)
            known.cell = _cell(record, lines, known.changed)
        except UserError as error:
            known.problem = printable(str(error).splitlines()[0], 300)
        except (ValueError, TypeError, KeyError, OverflowError):  # numbers or texts where others should be
            known.problem = printable(f"{folder}: its record is damaged", 300)

    def _by_folder(self, claims: Mapping[tuple[Path, str], Claim]) -> dict[Path, Claim]:
        found = {}
        if claims:
            for folder in self._known:
                for root in self._claims:
                    output = root.parent
                    if output in folder.parents and (
                        claim := claims.get((root, claim_key(folder.relative_to(output))))
                    ):
                        found[folder] = claim
        return found

    def _workers(self, claims: Mapping[tuple[Path, str], Claim], now: float) -> list[Worker]:
        found: dict[str, list[tuple[str, Claim]]] = {}
        for (_, key), claim in claims.items():
            found.setdefault(claim.place, []).append((key, claim))
        return [
            Worker(
                name,
                not all(is_dead(claim) for _, claim in held),
                now - min(claim.silent for _, claim in held),
                [printable(key.replace("--", " "), 200) for key, _ in held],
            )
            for name, held in sorted(found.items())
        ]


def _cell(record: Record, lines: Sequence[Mapping[str, Any]], changed: float) -> Cell:
    dataset, method, teacher, student = record.key
    split = "val" if any("val/top1" in line for line in lines) else "test"
    split = "test" if any("test/top1" in line for line in lines) else split
    last = lines[-1] if lines else {}
    points = [(int(line["epoch"]), _number(line, f"{split}/top1"), _number(line, "train/loss")) for line in lines]
    evaluated = [line for line in lines if f"{split}/top1" in line]
    complete = record.complete or (record.done >= record.epochs and f"{split}/top1" in last)
    run = Run(
        folder=record.folder,
        seed=record.seed,
        state="complete" if complete else "failed" if record.failure else "stopped",
        failure=printable(record.failure, 400),
        epoch=record.done,
        epochs=record.epochs,
        split=split,
        top1=_number(evaluated[-1], f"{split}/top1") if evaluated else None,
        best=_number(last, "best/top1"),
        loss=_number(last, "train/loss"),
        rate=_number(last, "images_per_second"),
        ends=None,
        device=printable(record.session.get("device") or "", 60),
        changed=changed,
        points=thinned(points, POINTS),
    )
    name = f"{method}, {record.variant}" if record.variant else method
    pair = f"{teacher} → {student}" if teacher else student
    key = f"{record.identity or record.folder.parent} {name} {dataset} {pair}"
    return Cell(key, printable(name, 100), printable(f"{dataset}, {pair}", 200), [run])


def _number(line: Mapping[str, Any], key: str) -> float | None:
    value = line.get(key)
    return None if value is None else float(value)


def _epoch_seconds(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """That an epoch takes, by the last ones; None before the first."""
    timed = [line for line in lines[-LAST:] if "seconds/train" in line]
    return (
        median(float(line["seconds/train"]) + float(line.get("seconds/eval", 0)) for line in timed) if timed else None
    )


def _state(folder: Path, known: _Known, claim: Claim | None, locked: Locked | None, now: float) -> State:
    """Whether it is trained at this moment, where its record does not say how it ended."""
    assert known.cell is not None
    (run,) = known.cell.runs
    if run.state == "complete":
        return "complete"
    if locked is not None and is_locked(folder, locked):
        return "running"
    if claim is not None and not is_dead(claim):
        return "waiting" if locked is not None and is_here(claim.owner) else "running"
    unseen = known.network or locked is None  # its process may be there all the same
    if unseen and run.state == "stopped" and now - known.changed < 2 * (known.seconds or 0) + LATE:
        return "running"
    return run.state


def _in_state(known: _Known, state: State) -> Cell:
    assert known.cell is not None
    (run,) = known.cell.runs
    ends = _end(known.changed, run.epochs - run.epoch, known.seconds) if state == "running" else None
    failure = run.failure if state == "failed" else ""
    return replace(known.cell, runs=[replace(run, state=state, ends=ends, failure=failure, changed=known.changed)])


def _end(changed: float, epochs: int, seconds: float | None) -> float | None:
    """When so many further epochs are done; None where that is not known, or beyond all calendars."""
    if seconds is None:
        return None
    with suppress(OverflowError, ValueError, OSError):
        ends = changed + epochs * seconds
        time.localtime(ends)
        return ends
    return None


def _network_devices() -> set[int]:
    """Of the file systems that several machines may share."""
    found = set()
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            place, _, kind = line.partition(" - ")  # 30 27 0:52 / /home rw - nfs4 server:/home rw
            if kind.startswith(NETWORK):
                major, minor = place.split()[2].split(":")
                found.add(os.makedev(int(major), int(minor)))
    return found
