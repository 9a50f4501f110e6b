"""Run records as their folders tell them: ``config.yaml``, ``env.json`` and ``metrics.jsonl``.

Hundreds of them are read in a second: of the metrics the end alone, until a curve is asked for, and nothing here
imports torch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

from mdistill.engine.run_folder import read_metrics, read_sessions
from mdistill.errors import UserError, printable, suggestion
from mdistill.files import read_text
from mdistill.settings import checkpoints, flat_settings

SKIPPED = {"tensorboard", "teacher_cache", "class_distances"}  # folders that hold no runs
TAIL = 1 << 16  # bytes of a file of metrics that are read; a line takes a few hundred
HEADLINE = "test/top1"
GUESS, MARGIN = 1.5, 1.0  # a guess is below so many times chance, and no more than so many points above it
CHANCE = 4.5  # top-5 over top-1 from which on it is one, of a data set whose classes are not known; a guess has 5
CLASSES = {"cifar100": 100, "imagenet": 1000, "tiny_imagenet": 200}  # of runs that do not record them
FALLEN = 0.5  # of the best epoch's top-1, below which a run has collapsed

State = Literal["complete", "collapsed", "failed", "unfinished", "untested", "empty"]
"""``collapsed`` is complete too; ``untested`` has all epochs and no accuracy on the test split."""


@dataclass(frozen=True)
class Record:
    """One run."""

    folder: Path
    config: Mapping[str, Any]  # as recorded, every default written out
    sessions: Sequence[Mapping[str, Any]]  # of ``env.json``
    last: Mapping[str, Any] | None  # the last epoch of the last phase that was evaluated on the test split
    done: int  # epochs, of all phases

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What of ``config`` changes results, by dotted key."""
        return flat_settings(self.config)

    @cached_property
    def checkpoints(self) -> dict[str, str]:
        """The weights that it began from, by dotted key, as its configuration names them; "" for none."""
        return checkpoints(self.config)

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of their files, by the same keys; those that the record tells."""
        found = {}
        for section in ("teacher", "student"):
            keys = [key for key in self.checkpoints if key.startswith(section)]
            files = self._section(section).get("files")
            for key, file in zip(keys, files if isinstance(files, list) else [], strict=False):
                if isinstance(file, Mapping) and file.get("sha256"):
                    found[key] = str(file["sha256"])
        return found

    @cached_property
    def key(self) -> tuple[str, str, str, str]:
        """Data set, method, teacher ("" without one) and student."""
        return key_of(self.config)

    @property
    def dataset(self) -> str:
        """Its name."""
        return self.key[0]

    @property
    def method(self) -> str:
        """Its name."""
        return self.key[1]

    @property
    def teacher(self) -> str:
        """Its network, "" without one; members of an ensemble are joined by +."""
        return self.key[2]

    @property
    def student(self) -> str:
        """Its network."""
        return self.key[3]

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.config["seed"])

    @property
    def variant(self) -> str:
        """What sets it apart from others of its method and pair, as its folder is named."""
        return str(self.config.get("variant") or "")

    @property
    def pair(self) -> str:
        """Teacher and student, for people."""
        return printable(f"{self.teacher} → {self.student}" if self.teacher else self.student)

    @property
    def name(self) -> str:
        """The method, and what sets the run apart from others of it, for people."""
        return printable(f"{self.method}, {self.variant}" if self.variant else self.method)

    @property
    def epochs(self) -> int:
        """That it was to be trained for, of all phases."""
        phases = self.config.get("phases") or {}
        return int(self.config["solver"]["epochs"]) + sum(int(phase["epochs"]) for phase in phases.values())

    @property
    def batch_size(self) -> int:
        """Images of a step."""
        return int(self.config["data"]["batch_size"])

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """A line for each epoch of the last phase; the whole file is read for it."""
        return [line for line in read_metrics(self.folder) if line.get("phase") is None]

    @property
    def complete(self) -> bool:
        """Whether its last epoch is done and was evaluated on the test split."""
        return self.last is not None and self.last["epoch"] == self.done >= self.epochs

    @property
    def state(self) -> State:
        """How far it came, and whether it learnt anything."""
        if self.complete:
            return "collapsed" if self.collapsed else "complete"
        if self.failure:
            return "failed"
        if self.done >= self.epochs:
            return "untested"
        return "unfinished" if self.done else "empty"

    @property
    def top1(self) -> float | None:
        """On the test split after the last epoch that was evaluated, percent."""
        return self.accuracy("top1")

    def accuracy(self, metric: str) -> float | None:
        """``metric``, such as ``top5``, on the test split after the last epoch that was evaluated, percent."""
        found = (self.last or {}).get(f"test/{metric}")
        return None if found is None else float(found)

    @property
    def best_of(self) -> str | None:
        """The split that its best epoch was chosen on, by top-1; None where there is no such epoch."""
        if self.last is None or "best/top1" not in self.last:
            return None
        return "val" if "val/top1" in self.last else "test"

    def best_accuracy(self, metric: str) -> float | None:
        """``metric`` on the test split after the best epoch, percent."""
        if self.last is None or self.best_of is None:
            return None
        if self.best_of == "test" and metric == "top1":
            return float(self.last["best/top1"])
        at = self.last["best/epoch"]
        found = next((line.get(f"test/{metric}") for line in self.metrics if line["epoch"] == at), None)
        return None if found is None else float(found)

    @property
    def failure(self) -> str:
        """What ended its last session, where that was an error of the run itself."""
        return "" if self.complete else str(self.session.get("failed", ""))

    @property
    def classes(self) -> int | None:
        """Of its data set; None where that is not known."""
        noted = self._section("data").get("classes")
        return noted if isinstance(noted, int) and noted > 0 else CLASSES.get(self.dataset)

    @property
    def collapsed(self) -> bool:
        """Whether its last epoch is no better than a guess, or far below its best one."""
        if self.last is None or self.top1 is None:
            return False
        if self.best_of is not None and self.last[f"{self.best_of}/top1"] < FALLEN * self.last["best/top1"]:
            return True
        if self.classes is None:
            return float(self.last.get("test/top5", 0)) >= CHANCE * self.top1
        chance = 100 / self.classes
        return self.top1 < min(GUESS * chance, chance + MARGIN)

    @property
    def session(self) -> Mapping[str, Any]:
        """The last one; empty where none is recorded."""
        return self.sessions[-1] if self.sessions else {}

    def noted(self, key: str) -> Any:
        """What the last session that says anything of ``key`` noted; None where none does."""
        return next((session[key] for session in reversed(self.sessions) if session.get(key) is not None), None)

    def noting(self, key: str, value: Mapping[str, Any]) -> "Record":
        """The same, as if it had noted ``value`` under ``key``."""
        return replace(self, sessions=[*self.sessions, {key: value}])

    @cached_property
    def identity(self) -> str:
        """16 digits that trials of one cell share: as it noted them, else of its settings alone."""
        noted = self.noted("cell")
        if isinstance(noted, str) and noted:
            return noted
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def commit(self) -> str:
        """Of the code; "" where the record does not say."""
        return str(self.noted("commit") or "")

    @property
    def short_commit(self) -> str:
        """12 digits of it, and ``+changes`` where files differed; "" where the record does not say."""
        commit, mark, changes = self.commit.partition("+")
        return f"{commit[:12]}{mark}{changes}"

    @property
    def copies(self) -> dict[str, str]:
        """Fingerprints of the data, the teacher's weights and those that the student began with."""
        found = {
            "data": self._section("data").get("fingerprint"),
            "teacher": self._section("teacher").get("fingerprint"),
            "starting weights": _first_file(self._section("student")).get("sha256"),
        }
        return {what: str(fingerprint) for what, fingerprint in found.items() if fingerprint}

    @property
    def teacher_top1(self) -> float | None:
        """As it was measured before training, percent, else as its configuration says; of an ensemble the first's."""
        for session in reversed(self.sessions):
            told = session.get("teacher")
            measured = told.get("top1") if isinstance(told, Mapping) else None
            measured = measured[0] if isinstance(measured, list) and measured else measured
            if isinstance(measured, (int, float)):
                return float(measured)
        expected = (self.config.get("teacher") or {}).get("expected_top1")
        return float(expected) if isinstance(expected, (int, float)) else None

    @property
    def teacher_file(self) -> Path | None:
        """Where the weights of the teacher were, of an ensemble the first's; None where the record does not say."""
        path = _first_file(self._section("teacher")).get("path")
        return Path(str(path)) if path else None

    @property
    def extra_parameters(self) -> int | None:
        """Parameters that were trained beside the student's; None where the record does not say."""
        extra = self._section("parameters").get("extra")
        return extra if isinstance(extra, int) else None

    @cached_property
    def step_ms(self) -> float | None:
        """Milliseconds for a batch, the median of the epochs."""
        rates = [float(line["images_per_second"]) for line in self.metrics if line.get("images_per_second")]
        return 1000.0 * self.batch_size / median(rates) if rates else None

    def _section(self, name: str) -> Mapping[str, Any]:
        section = self.noted(name)
        return section if isinstance(section, Mapping) else {}


@dataclass
class Found:
    """What is in the folders that were looked through."""

    records: list[Record] = field(default_factory=list)
    external: list[Path] = field(default_factory=list)  # folders of imported runs
    problems: list[str] = field(default_factory=list)  # a line for each folder that could not be read


def find_records(roots: Sequence[Path]) -> Found:
    """All run records below ``roots``, in the order of their paths; a run of which there are copies once."""
    found = Found()
    for folder, external in _run_folders(roots):
        if external:
            found.external.append(folder)
            continue
        try:
            found.records.append(read_record(folder))
        except UserError as error:
            found.problems.append(printable(str(error).splitlines()[0], 300))
    found.records = _once(found.records)
    return found


def find_named(paths: Sequence[Path]) -> Found:
    """``find_records`` below what a user named.

    Raises:
        UserError: nothing is at one of ``paths``, or no run is there or below; or none can be read.
    """
    for path in paths:
        if not path.is_dir():
            beside = path.parent.iterdir() if path.parent.is_dir() else []
            near = suggestion(path.name, [entry.name for entry in beside])
            what = "is a file, not a folder of runs" if path.exists() else f"does not exist{near}"
            raise UserError(f"{path} {what}")
        if all(external for _, external in _run_folders([path])):
            raise UserError(f"{path}: no run in it or below (config.yaml and metrics.jsonl would be in its folder)")
    found = find_records(paths)
    if not found.records:
        raise UserError(found.problems[0])
    return found


def read_records(paths: Sequence[Path]) -> list[Record]:
    """The runs at or below ``paths``, each with a finished epoch at least, for a picture.

    Raises:
        UserError: as ``find_named``; or a record is damaged or of a newer version, or one that ``paths`` name, or
            every one, has no finished epoch.
    """
    found = find_named(paths)
    if found.problems:
        raise UserError(found.problems[0])
    for record in found.records:
        if record.folder in paths and not record.done:
            raise UserError(f"{record.folder} holds no finished epoch: nothing of this run can be shown")
    begun = [record for record in found.records if record.done]
    if not begun:
        raise UserError(f"{paths[0]}: none of the {len(found.records)} runs there has a finished epoch")
    return knowing_teachers(begun)


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
        found.append(record if top1 is None else record.noting("teacher", {**record._section("teacher"), "top1": top1}))
    return found


def read_record(folder: Path) -> Record:
    """The record in ``folder``, which may have no epoch yet.

    Raises:
        UserError: the folder holds none, or one that is damaged or of a newer version.
    """
    if not folder.is_dir():
        raise UserError(f"no such run folder: {folder}")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}, so it is no record of a run")
    path = folder / "config.yaml"
    config = _read_config(path)
    record = Record(folder, config, read_sessions(folder), *_end_of_metrics(folder / "metrics.jsonl"))
    try:
        sound = all(isinstance(name, str) for name in record.key)
        _ = record.seed, record.epochs, record.batch_size, record.settings, record.checkpoints, record.teacher_top1
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged: it is not the complete configuration of a run")
    return record


def key_of(config: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Data set, method, teacher ("" without one) and student of a resolved configuration."""
    teacher = config.get("teacher") or {}
    members = [teacher, *(teacher.get("ensemble") or ())] if teacher else []
    names = "+".join(str(member["name"]) for member in members)
    return config["data"]["name"], config["distiller"]["name"], names, config["student"]["name"]


def folders_below(roots: Sequence[Path]) -> Iterator[tuple[Path, set[str]]]:
    """Folders at or below ``roots`` in which runs may be, each once, and the names of all that is in it.

    A hidden folder holds a run half replaced. Symbolic links are followed, but for one to a folder that its root is in.
    """
    seen = set[Path]()
    for root in roots:
        above = root.resolve().parents
        for place, below, names in os.walk(root, followlinks=True):
            folder = Path(place)
            resolved = folder.resolve()
            if resolved in seen or resolved in above:
                below.clear()
                continue
            seen.add(resolved)
            yield folder, {*below, *names}
            below[:] = sorted(name for name in below if name not in SKIPPED and not name.startswith("."))


def _run_folders(roots: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Folders that hold a run, and whether it was imported."""
    for folder, names in folders_below(roots):
        if "external.json" in names:
            yield folder, True
        elif "metrics.jsonl" in names or {"config.yaml", "env.json"} <= names:
            yield folder, False


def _once(records: Sequence[Record]) -> list[Record]:
    """Of each run and its published copies the one that has come farthest, the first of these."""
    runs: dict[tuple[Any, ...], Record] = {}
    for number, record in enumerate(records):
        started = record.sessions[0].get("started") if record.sessions else None
        key = (record.key, record.identity, record.seed, started) if isinstance(started, str) else (number,)
        if key not in runs or record.done > runs[key].done:
            runs[key] = record
    return list(runs.values())


def _read_config(path: Path) -> dict[str, Any]:
    import yaml  # slow to import

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where PyYAML has it
    text = read_text(path)
    try:
        if "&" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=loader)):
            raise ValueError("aliases (*name) are not read")
        config = yaml.load(text, Loader=loader)
    except Exception as error:  # the constructors let out whatever Python raises
        raise UserError(f"{path}: not valid YAML: {printable(' '.join(str(error).split()), 200)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: should hold `key: value` lines, found {type(config).__name__}")
    return config


def _end_of_metrics(path: Path) -> tuple[dict[str, Any] | None, int]:
    """The last line of the last phase that was evaluated, and how many epochs are done; no line that was cut short.

    Raises:
        UserError: it cannot be read, or has lines and none of an epoch.
    """
    from mdistill.file_schemas import EpochLine

    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            text = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    done = 0
    for each in reversed(text.splitlines()):
        try:
            line = EpochLine.model_validate_json(each)
        except ValueError:
            continue
        done = done or line.epoch
        if line.phase is not None:
            break
        values = line.model_dump(exclude_unset=True)
        if HEADLINE in values:
            return values, done
    if not done and b"\n" in text:  # a single line that is not ended may be about to be written
        raise UserError(f"{path} is damaged: it has no line of an epoch")
    return None, done


def _first_file(section: Mapping[str, Any]) -> Mapping[str, Any]:
    files = section.get("files")
    first = files[0] if isinstance(files, list) and files else None
    return first if isinstance(first, Mapping) else {}
