"""Run records as their folders tell them: ``config.yaml``, ``env.json`` and the end of ``metrics.jsonl``.

Hundreds of them are read in a second: of the metrics the last epoch alone, and nothing here imports torch.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mdistill.engine.run_folder import read_metrics, read_sessions
from mdistill.errors import UserError, printable
from mdistill.files import read_text
from mdistill.settings import leaves, results_only

SKIPPED = {"tensorboard", "teacher_cache", "class_distances"}  # folders that hold no runs
TAIL = 1 << 16  # bytes of a file of metrics that are read; a line takes a few hundred
CHANCE = 4.5  # top-5 over top-1 from which on a network is taken to guess; a guess has 5, what has learnt less
FALLEN = 0.5  # of the best epoch's top-1, below which a run has collapsed


@dataclass(frozen=True)
class Record:
    """One run."""

    folder: Path
    config: Mapping[str, Any]  # as recorded, every default written out
    session: Mapping[str, Any]  # the last one of ``env.json``; empty where it has none
    last: Mapping[str, Any] | None  # the last epoch of the last phase that is in ``metrics.jsonl``
    done: int  # epochs, of all phases

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What of ``config`` changes results, by dotted key."""
        return flat_settings(self.config)

    @cached_property
    def key(self) -> tuple[str, str, str, str]:
        """Data set, method, teacher ("" without one) and student."""
        return key_of(self.config)

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.config["seed"])

    @property
    def variant(self) -> str:
        """What sets it apart from others of its method and pair, as its folder is named."""
        return str(self.config.get("variant") or "")

    @property
    def epochs(self) -> int:
        """That it was to be trained for, of all phases."""
        phases = self.config.get("phases") or {}
        return int(self.config["solver"]["epochs"]) + sum(int(phase["epochs"]) for phase in phases.values())

    @property
    def complete(self) -> bool:
        """Whether its last epoch is done and was evaluated on the test split."""
        return self.done >= self.epochs and self.top1 is not None

    @property
    def top1(self) -> float | None:
        """On the test split after the last epoch that is there, percent."""
        return self.accuracy("top1")

    def accuracy(self, metric: str) -> float | None:
        """``metric``, such as ``top5``, on the test split after the last epoch that is there, percent."""
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
        lines = [line for line in read_metrics(self.folder) if line["epoch"] == at and "phase" not in line]
        found = lines[0].get(f"test/{metric}") if lines else None
        return None if found is None else float(found)

    @property
    def failure(self) -> str:
        """What ended its last session, where that was an error of the run itself."""
        return "" if self.complete else str(self.session.get("failed", ""))

    @property
    def collapsed(self) -> bool:
        """Whether its last epoch is no better than a guess, or far below its best one."""
        top1, last = self.top1, self.last or {}
        if top1 is None:
            return False
        fallen = top1 < FALLEN * float(last.get("best/top1", 0)) and "val/top1" not in last
        return fallen or float(last.get("test/top5", 0)) >= CHANCE * top1

    @property
    def identity(self) -> str:
        """16 digits that trials of one cell share; "" where the record does not say."""
        return str(self.session.get("cell") or "")

    @property
    def commit(self) -> str:
        """Of the code; "" where the record does not say."""
        return str(self.session.get("commit") or "")

    @property
    def copies(self) -> dict[str, str]:
        """Fingerprints of the data, the teacher's weights and those that the student began with."""
        files = _section(self.session, "student").get("files")
        began = files[0] if isinstance(files, list) and files else None
        found = {
            "data": _section(self.session, "data").get("fingerprint"),
            "teacher": _section(self.session, "teacher").get("fingerprint"),
            "starting weights": began.get("sha256") if isinstance(began, Mapping) else None,
        }
        return {what: str(fingerprint) for what, fingerprint in found.items() if fingerprint}


@dataclass
class Found:
    """What is in the folders that were looked through."""

    records: list[Record] = field(default_factory=list)
    external: list[Path] = field(default_factory=list)  # folders of imported runs
    problems: list[str] = field(default_factory=list)  # a line for each folder that could not be read


def find_records(roots: Sequence[Path]) -> Found:
    """All run records below ``roots``, in the order of their paths; of a folder that is given twice once."""
    found, seen = Found(), set[Path]()
    for root in roots:
        for folder, names in _folders(root):
            resolved = folder.resolve()
            if resolved in seen:
                continue
            seen.add(resolved)
            if "external.json" in names:
                found.external.append(folder)
            elif "config.yaml" in names and ("metrics.jsonl" in names or "env.json" in names):
                try:
                    found.records.append(read_record(folder))
                except UserError as error:
                    found.problems.append(printable(str(error).splitlines()[0], 300))
    return found


def read_record(folder: Path) -> Record:
    """The record in ``folder``.

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
    sessions = read_sessions(folder)
    last, done = _end_of_metrics(folder / "metrics.jsonl")
    record = Record(folder, config, sessions[-1] if sessions else {}, last, done)
    try:
        _ = record.key, record.seed, record.epochs, record.settings
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged: it is not the complete configuration of a run") from None
    return record


def key_of(config: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Data set, method, teacher ("" without one) and student of a resolved configuration."""
    teacher = config.get("teacher") or {}
    members = [teacher, *(teacher.get("ensemble") or ())] if teacher else []
    names = "+".join(str(member["name"]) for member in members)
    return config["data"]["name"], config["distiller"]["name"], names, config["student"]["name"]


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved configuration changes results, by dotted key.

    A teacher's precision that is the student's is null, as where none is set.
    """
    settings = {".".join(key): value for key, value in leaves(results_only(config))}
    if "run.teacher_precision" in settings and settings["run.teacher_precision"] == settings.get("run.precision"):
        settings["run.teacher_precision"] = None
    return settings


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in SKIPPED and not name.startswith("."))
        yield Path(folder), names


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
    """The last line, unless it is of a first phase, and how many epochs are done; a line cut short is left out."""
    from mdistill.file_schemas import EpochLine

    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    for text in reversed(lines):
        try:
            line = EpochLine.model_validate_json(text)
        except ValueError:
            continue
        values = line.model_dump(exclude_unset=True)
        return (None if line.phase is not None else values), line.epoch
    return None, 0


def _section(session: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = session.get(name)
    return section if isinstance(section, Mapping) else {}
