"""What run folders say of themselves, read without building anything: for pictures and reports of many runs."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Literal

from mdistill import __version__
from mdistill.engine.run_folder import read_metrics, read_sessions
from mdistill.errors import UserError, printable, shown, suggestion
from mdistill.files import read_text

FORMAT = 1
"""Of the records that this version writes, which say no number; a later one says its own as ``format``."""

RECORDS = ("metrics.jsonl", "config.yaml")
UNCHANGING = ("seed", "imports")  # settings that trials of one cell need not share
HEADLINE = "test/top1"
COLLAPSE = 0.5
"""A run collapsed whose last top-1 is less than this part of its best."""

State = Literal["complete", "unfinished", "collapsed", "empty"]


@dataclass(frozen=True)
class Record:
    """One run."""

    folder: Path
    dataset: str
    method: str
    variant: str
    teacher: str  # "" for a network alone; members of an ensemble are joined by +
    student: str
    seed: int
    epochs: int  # that it should have, of all phases
    batch_size: int
    cell: str  # equal for trials that differ in their seed alone
    expected_top1: float | None  # the teacher's, percent, as its configuration says
    metrics: Sequence[Mapping[str, Any]]  # a line for each epoch of the last phase
    sessions: Sequence[Mapping[str, Any]]  # of env.json

    @property
    def pair(self) -> str:
        """For people."""
        return f"{self.teacher} → {self.student}" if self.teacher else self.student

    @property
    def name(self) -> str:
        """The method, and what sets the run apart from others of it."""
        return f"{self.method}, {self.variant}" if self.variant else self.method

    @cached_property
    def evaluated(self) -> list[Mapping[str, Any]]:
        """The lines of epochs that were evaluated on the test split."""
        return [line for line in self.metrics if HEADLINE in line]

    @cached_property
    def top1(self) -> float | None:
        """Of the last epoch, percent; None before one was evaluated."""
        return float(self.evaluated[-1][HEADLINE]) if self.evaluated else None

    @cached_property
    def best(self) -> float | None:
        """The highest top-1 of any epoch, percent."""
        return max((float(line[HEADLINE]) for line in self.evaluated), default=None)

    @cached_property
    def state(self) -> State:
        """How far it came, and whether its accuracy fell far below what it had been."""
        if self.top1 is None or self.best is None:
            return "empty"
        if self.metrics[-1]["epoch"] < self.epochs:
            return "unfinished"
        return "collapsed" if self.top1 < COLLAPSE * self.best else "complete"

    @cached_property
    def teacher_top1(self) -> float | None:
        """As it was measured before training, percent, else as its configuration says; of an ensemble the first's."""
        for session in reversed(self.sessions):
            told = session.get("teacher")
            measured = told.get("top1") if isinstance(told, Mapping) else None
            measured = measured[0] if isinstance(measured, list) and measured else measured
            if isinstance(measured, (int, float)):
                return float(measured)
        return self.expected_top1

    @property
    def teacher_file(self) -> Path | None:
        """Where the weights of the teacher were, of an ensemble the first's; None where the record does not say."""
        for session in reversed(self.sessions):
            told = session.get("teacher")
            files = told.get("files") if isinstance(told, Mapping) else None
            if isinstance(files, list) and files and isinstance(files[0], Mapping) and files[0].get("path"):
                return Path(str(files[0]["path"]))
        return None

    @property
    def extra_parameters(self) -> int | None:
        """Parameters that were trained beside the student's; None where the record does not say."""
        for session in reversed(self.sessions):
            told = session.get("parameters")
            extra = told.get("extra") if isinstance(told, Mapping) else None
            if isinstance(extra, int):
                return extra
        return None

    @cached_property
    def step_ms(self) -> float | None:
        """Milliseconds for a batch, the median of the epochs."""
        rates = [float(line["images_per_second"]) for line in self.metrics if line.get("images_per_second")]
        return 1000.0 * self.batch_size / median(rates) if rates else None

    def said(self, key: str) -> str:
        """What the last session that says anything of ``key`` noted, or "" (commit, device, started)."""
        value = next((session[key] for session in reversed(self.sessions) if session.get(key) is not None), None)
        return printable(value, 80) if value is not None else ""

    def noting(self, key: str, value: Mapping[str, Any]) -> "Record":
        """The same, as if it had noted ``value`` under ``key``."""
        return replace(self, sessions=[*self.sessions, {key: value}])


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed alone."""

    label: str  # apart from those of the other series of a picture
    runs: Sequence[Record]  # by seed

    @property
    def first(self) -> Record:
        """Any of them, for what they share."""
        return self.runs[0]

    @cached_property
    def finished(self) -> list[Record]:
        """Those whose last epoch is done."""
        return [run for run in self.runs if run.state in ("complete", "collapsed")]

    @cached_property
    def values(self) -> list[float]:
        """Top-1 of the last epoch of each finished run, percent."""
        return [run.top1 for run in self.finished if run.top1 is not None]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; the value alone where there is one, "-" for none."""
    if not values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def series(records: Sequence[Record]) -> list[Series]:
    """``records`` by cell, in the order of their first; the labels say as much as tells them apart.

    Runs are of one series where they are of one method, pair, data set and cell.
    """
    cells: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        key = (record.dataset, record.teacher, record.student, record.method, record.variant, record.cell)
        cells.setdefault(key, []).append(record)
    groups = [sorted(runs, key=lambda run: run.seed) for runs in cells.values()]
    several_data = len({record.dataset for record in records}) > 1
    several_pairs = len({record.pair for record in records if record.teacher}) > 1
    labels = []
    for first, *_ in groups:
        pair = f" ({first.pair})" if several_pairs or not first.teacher else ""
        labels.append(f"{first.name}{pair}" + (f" on {first.dataset}" if several_data else ""))
    apart = [
        f"{label} [{runs[0].cell[:6]}]" if labels.count(label) > 1 else label
        for label, runs in zip(labels, groups, strict=True)
    ]
    return [Series(label, runs) for label, runs in zip(apart, groups, strict=True)]


def by_pair(records: Sequence[Record]) -> dict[str, list[Series]]:
    """Series that compare, by data set, teacher and student: those of a pair, and its student without a teacher.

    Networks without a teacher that are no pair's student are together, by data set.
    """
    several = len({record.dataset for record in records}) > 1
    taught = [record for record in records if record.teacher]
    students = {(record.dataset, record.student) for record in taught}
    groups: dict[str, list[Record]] = {}
    for record in sorted(taught, key=lambda record: (record.dataset, record.pair)):
        groups.setdefault(f"{record.dataset}: {record.pair}" if several else record.pair, []).append(record)
    for runs in groups.values():
        own = runs[0].dataset, runs[0].student
        runs += [record for record in records if not record.teacher and (record.dataset, record.student) == own]
    for record in records:
        if not record.teacher and (record.dataset, record.student) not in students:
            title = "without a teacher"
            groups.setdefault(f"{record.dataset}: {title}" if several else title, []).append(record)
    return {title: series(runs) for title, runs in groups.items()}


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders that ``paths`` are, or that lie below them, in order, each once.

    Raises:
        UserError: nothing is at one of them, or no run is there or below.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            beside = path.parent.iterdir() if path.parent.is_dir() else []
            near = suggestion(path.name, [entry.name for entry in beside])
            what = "is a file, not a folder of runs" if path.exists() else f"does not exist{near}"
            raise UserError(f"{path} {what}")
        below = list(_below(path))
        if not below:
            raise UserError(f"{path}: no run in it or below ({' or '.join(RECORDS)} would be in its folder)")
        found |= dict.fromkeys(below)
    return list(found)


def _below(path: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(path):
        if any(name in files for name in RECORDS):
            yield Path(here)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # those hold a run half replaced


def read_record(folder: Path) -> Record:
    """The record of the run in ``folder``, which may have no epoch yet.

    Raises:
        UserError: a file of it is missing, damaged, or of a newer format.
    """
    settings = _settings(folder / "config.yaml")
    sessions = _sessions(folder)
    where = folder / "config.yaml"
    teacher, data = settings.get("teacher"), _section(settings, "data", where)
    solver, phases = _section(settings, "solver", where), settings.get("phases") or {}
    expected = teacher.get("expected_top1") if isinstance(teacher, dict) else None
    try:
        return Record(
            folder,
            dataset=str(data["name"]),
            method=str(_section(settings, "distiller", where)["name"]),
            variant=str(settings.get("variant") or ""),
            teacher="+".join(str(each["name"]) for each in _members(teacher)),
            student=str(_section(settings, "student", where)["name"]),
            seed=int(settings.get("seed", 0)),
            epochs=int(solver["epochs"]) + sum(int(phase["epochs"]) for phase in phases.values()),
            batch_size=int(data["batch_size"]),
            cell=_cell(settings, sessions),
            expected_top1=float(expected) if isinstance(expected, (int, float)) else None,
            metrics=[line for line in read_metrics(folder) if not line.get("phase")],
            sessions=sessions,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: not the configuration of a run: {type(error).__name__}: {error}") from None


def read_records(paths: Sequence[Path]) -> list[Record]:
    """The runs at or below ``paths``, each with an evaluated epoch at least.

    Raises:
        UserError: as ``find_runs`` and ``read_record``; or a folder that ``paths`` name has no epoch, or none has.
    """
    records = [read_record(folder) for folder in find_runs(paths)]
    for record in records:
        if record.folder in paths and not record.metrics:
            there = "holds no finished epoch" if (record.folder / RECORDS[0]).exists() else "has no metrics.jsonl"
            raise UserError(f"{record.folder} {there}: nothing of this run can be shown")
    shown_ones = [record for record in records if record.metrics]
    if not shown_ones:
        raise UserError(f"{paths[0]}: none of the {len(records)} runs there has a finished epoch")
    return knowing_teachers(shown_ones)


def knowing_teachers(records: Sequence[Record]) -> list[Record]:
    """``records``, those that do not tell their teacher's top-1 with that of its own run where it is among them."""
    alone = {record.folder.resolve(): record.top1 for record in records if record.top1 is not None}
    found = []
    for record in records:
        top1 = None
        if record.teacher and record.teacher_top1 is None:
            weights = record.teacher_file
            places = (weights.resolve(), weights.parent.resolve()) if weights is not None else ()
            top1 = next((alone[place] for place in places if place in alone), None)
        found.append(record if top1 is None else record.noting("teacher", {"top1": top1}))
    return found


def _settings(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: it is not the folder of a run")
    try:
        settings = yaml.load(read_text(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {printable(' '.join(str(error).split()), 200)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: should hold `key: value` lines, found {type(settings).__name__}")
    _refuse_newer(settings, path)
    return settings


def _sessions(folder: Path) -> list[dict[str, Any]]:
    path = folder / "env.json"
    if path.is_file():
        try:
            content = json.loads(read_text(path))
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            _refuse_newer(content, path)
    return read_sessions(folder)


def _refuse_newer(content: Mapping[str, Any], path: Path) -> None:
    found = content.get("format", FORMAT)
    if found != FORMAT:
        raise UserError(
            f"{path}: written in format {shown(found)}, and mdistill {__version__} reads format {FORMAT}: update it"
        )


def _section(settings: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    section = settings.get(name)
    if not isinstance(section, dict):
        raise UserError(f"{path}: not the configuration of a run: {name}: should be a section, found {shown(section)}")
    return section


def _members(teacher: Any) -> list[Mapping[str, Any]]:
    return [teacher, *(teacher.get("ensemble") or ())] if isinstance(teacher, dict) else []


def _cell(settings: Mapping[str, Any], sessions: Sequence[Mapping[str, Any]]) -> str:
    """As the run noted it; of one that did not, of all its settings but the seed."""
    noted = next((session["cell"] for session in reversed(sessions) if isinstance(session.get("cell"), str)), None)
    if noted is not None:
        return str(noted)
    chosen = {key: value for key, value in settings.items() if key not in UNCHANGING}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:16]
