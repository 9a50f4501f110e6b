"""Runs of other projects, as their logs and checkpoints tell them; ``mdistill import`` writes down what was found.

Formats, of the code at the commits named:

- ``mdistiller`` (megvii-research/mdistiller a08d46f; RLD, zju-SWJ/RLD 8b6cf60, and logit-standardization-KD write the
  same): a folder ``<project>/<method>,<teacher>,<student>[,...]`` with ``worklog.txt``, blocks of ``key: value`` lines,
  one for each epoch, and at the end ``best_acc``; ``student_best`` and ``student_latest``, each ``{"model": ...}``. RLD
  adds a folder named after the time, and ``config.txt``, which is YAML. A worklog may stand alone under such a name.
- ``RepDistiller`` (HobbitLong/RepDistiller 1143dfe): a folder
  ``S:<student>_T:<teacher>_<data>_<method>_r:<r>_a:<a>_b:<b>_<trial>`` with ``ckpt_epoch_<n>.pth`` (``epoch``,
  ``accuracy``), ``<student>_best.pth`` (``epoch``, ``best_acc``) and ``<student>_last.pth``; or what the program
  printed, where ``* Acc@1`` stands once after training and, below ``epoch <n>, total time``, once after testing.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mdistill.errors import UserError, printable
from mdistill.files import read_text

FILE = "external.json"
Project = Literal["mdistiller", "RepDistiller"]

_LINE = re.compile(r"\s*([a-zA-Z_0-9]+):\s*([-+.\deE]+|nan|inf)\s*")
_REP_NAME = re.compile(
    r"S:(?P<student>.+?)_T:(?P<teacher>.+?)_(?P<dataset>cifar100|imagenet)_(?P<method>[^_:]+)_(?P<settings>r:.*)"
    r"_(?P<trial>\w+)"
)
_OPTIONS = re.compile(
    r"(?P<student>.+?)(?P<options>[A-Z]{2}[A-Z_]*(?:\.[A-Z_]+)+:.*)"
)  # glued to the name by mdistiller
_REP_EPOCH = re.compile(r"epoch (\d+), total time")
_REP_ACCURACY = re.compile(r"\*\s+(?:Test )?Acc@1 ([\d.]+) Acc@5 ([\d.]+)")
_CHECKPOINT = re.compile(r"ckpt_epoch_(\d+)\.pth")
_NETWORKS = {"mobile_half": "MobileNetV2"}  # RepDistiller's name of what others call so


@dataclass(frozen=True)
class EpochFigures:
    """What is told of an epoch."""

    epoch: int  # counted from 1
    top1: float  # percent
    top5: float | None = None


@dataclass(frozen=True)
class Measured:
    """A network that was evaluated here."""

    file: str
    sha256: str
    top1: float  # percent


@dataclass(frozen=True)
class External:
    """A run of another project."""

    project: Project
    source: str  # who published it
    dataset: str
    method: str
    teacher: str  # "" without one
    student: str
    trial: str
    epochs: int  # that were trained, as far as is told
    last: EpochFigures | None
    best: EpochFigures | None  # chosen on the test split by both projects
    files: Mapping[str, str]  # that this is from: SHA-256 by name
    label: str = ""  # of its row; "" for the method's
    measured: Mapping[str, Measured] = field(default_factory=dict)  # "last", "best": what was evaluated here
    settings: str = ""  # that the run was begun with, in that project's words; "" where nothing tells any

    def accuracy(self, epoch: str, metric: str = "top1") -> float | None:
        """Of the last or the best epoch, percent: what was measured here, which is top-1, else what its log says."""
        if metric == "top1" and epoch in self.measured:
            return self.measured[epoch].top1
        figures = self.last if epoch == "last" else self.best
        return None if figures is None else figures.top1 if metric == "top1" else figures.top5

    @property
    def length(self) -> str:
        """``"240 epochs"``, where its last epoch is told."""
        return f"{self.epochs} epochs" if self.last is not None else "epochs not told"

    def to_json(self) -> str:
        """For ``external.json``."""
        from mdistill.file_schemas import RECORD_FORMAT

        return json.dumps({"format": RECORD_FORMAT, **asdict(self)}, indent=2, allow_nan=False) + "\n"


def read_external(folder: Path) -> External:
    """What ``mdistill import`` wrote into ``folder``.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    from mdistill.file_schemas import ExternalRun, read_json

    content = read_json(ExternalRun, folder / FILE, "import it again").model_dump(exclude={"format"})
    for which in ("last", "best"):
        content[which] = EpochFigures(**content[which]) if content[which] else None
    content["measured"] = {which: Measured(**each) for which, each in content["measured"].items()}
    return External(**content)


def parse_worklog(text: str) -> list[EpochFigures]:
    """The epochs of a ``worklog.txt``; of an epoch that was run again after a stop, the last one."""
    epochs: dict[int, EpochFigures] = {}
    block: dict[str, str] = {}
    for line in [*text.splitlines(), "---"]:
        match = _LINE.fullmatch(line)
        if match and match[1] != "epoch":
            block[match[1]] = match[2]
            continue
        figures = _figures(block.get("epoch"), block.get("test_acc"), block.get("test_acc_top5"))
        if figures is not None:
            epochs[figures.epoch] = figures
        block = {"epoch": match[2]} if match else {}
    return [epochs[epoch] for epoch in sorted(epochs)]


def parse_printed(text: str) -> list[EpochFigures]:
    """The epochs of what RepDistiller printed: of each, the second accuracy, that of the test."""
    epochs: list[EpochFigures] = []
    epoch: str | None = None
    for line in text.splitlines():
        begun, accuracy = _REP_EPOCH.search(line), _REP_ACCURACY.search(line)
        if begun:
            epoch = begun[1]
        elif accuracy:  # the line before "epoch n" is of training
            figures = _figures(epoch, accuracy[1], accuracy[2])
            epochs += [figures] if figures is not None else []
            epoch = None
    return epochs


def names_of(path: Path) -> dict[str, str]:
    """Method, teacher, student, settings and trial as far as the path of a run tells them, in that project's words."""
    match = _REP_NAME.fullmatch(path.name)
    if match:
        return {**match.groupdict(), "settings": match["settings"].replace("_", " ")}
    for part in (path.name.removesuffix(".txt"), path.parent.name):
        words = [word.strip() for word in part.replace("|", ",").split(",")]
        if len(words) >= 3:
            method, teacher, student, *settings = words
            glued = _OPTIONS.fullmatch(student)
            if glued:
                student, settings = glued["student"], [glued["options"], *settings]
            found = {"method": method, "teacher": teacher, "student": student}
            return {**found, "settings": " ".join(word for word in settings if word)}
    return {}


def settings_of(path: Path) -> dict[str, str]:
    """Data set, method, teacher and student as RLD's ``config.txt`` in the folder of a run tells, if it is there.

    Its settings are 8 digits, which runs share whose files differ in nothing but the project, its name and the log.
    """
    file = path / "config.txt"
    if not file.is_file():
        return {}
    from mdistill.config.files import read_yaml

    tree = read_yaml(file)
    method, data = tree.get("DISTILLER"), tree.get("DATASET")
    method, data = (section if isinstance(section, dict) else {} for section in (method, data))
    keys = {"method": method.get("TYPE"), "teacher": method.get("TEACHER"), "student": method.get("STUDENT")}
    found = {key: str(value) for key, value in {**keys, "dataset": data.get("TYPE")}.items() if value}
    experiment = tree.get("EXPERIMENT")
    if isinstance(experiment, dict):
        experiment = {key: value for key, value in experiment.items() if key not in ("PROJECT", "NAME")}
    rest = {key: value for key, value in tree.items() if key != "LOG"} | {"EXPERIMENT": experiment}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return found | {"settings": f"config.txt {digest}", "trial": path.name}  # the time that it began


def best_of(epochs: Sequence[EpochFigures]) -> EpochFigures | None:
    """The first of the best epochs."""
    return max(epochs, key=lambda each: (each.top1, -each.epoch), default=None)


@dataclass(frozen=True)
class Run:
    """What the folder of a run, or its log, holds."""

    project: Project
    epochs: list[EpochFigures]  # of its log
    files: tuple[Path, ...]  # that this is from
    last: EpochFigures | None = None  # as its checkpoints tell
    best: EpochFigures | None = None
    students: dict[str, Path] = field(default_factory=dict)  # files of weights, by "last" and "best"


def read_folder(path: Path) -> Run:
    """What a run folder, or a log that stands alone, holds.

    Raises:
        UserError: nothing that one of the projects writes is there.
    """
    if not path.exists():
        raise UserError(f"no such folder or log: {path}")
    if path.is_file():
        return _log(path)
    if (path / "worklog.txt").is_file():
        students = {"last": path / "student_latest", "best": path / "student_best"}
        there = {what: file for what, file in students.items() if file.is_file()}
        log = _log(path / "worklog.txt")
        return replace(log, files=(*log.files, *there.values()), students=there)
    if not any(path.glob("*.pth")):
        raise UserError(
            f"{path}: neither worklog.txt, as mdistiller and RLD write it, nor *.pth, as RepDistiller does; name the"
            " folder of one run, or its log"
        )
    return _of_checkpoints(path)


def _log(path: Path) -> Run:
    text = read_text(path)
    worklog = parse_worklog(text)
    if worklog:
        return Run("mdistiller", worklog, (path,))
    printed = parse_printed(text)
    if not printed:
        raise UserError(f"{path}: no epoch in it, neither as worklog.txt of mdistiller nor as RepDistiller prints them")
    return Run("RepDistiller", printed, (path,))


def _of_checkpoints(path: Path) -> Run:
    numbered = {int(match[1]): file for file in path.glob("*.pth") if (match := _CHECKPOINT.fullmatch(file.name))}
    newest = numbered[max(numbered)] if numbered else None
    best = next(iter(sorted(path.glob("*_best.pth"))), None)
    found = {"last": next(iter(sorted(path.glob("*_last.pth"))), newest), "best": best}
    students = {what: file for what, file in found.items() if file is not None}
    files = tuple(dict.fromkeys(file for file in (newest, *students.values()) if file is not None))
    return Run("RepDistiller", [], files, _beside(newest, "accuracy"), _beside(best, "best_acc"), students)


def _beside(file: Path | None, key: str) -> EpochFigures | None:
    """Epoch and accuracy that a checkpoint holds beside the weights."""
    from mdistill.models.torch_files import read_file

    content = None if file is None else read_file(file)
    return _figures(content.get("epoch"), content.get(key)) if isinstance(content, Mapping) else None


def _figures(epoch: Any, top1: Any, top5: Any = None) -> EpochFigures | None:
    """An epoch and its accuracies, each a text, a number or a tensor of one value; None where they can be none."""
    number, first, second = (_number(each) for each in (epoch, top1, top5))
    if not (1 <= number < 2**31 and 0 <= first <= 100):
        return None
    return EpochFigures(int(number), first, second if 0 <= second <= 100 else None)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return float("nan")


def network_name(name: str) -> str:
    """The name of a network in words of other projects, as our own registry may know it."""
    from mdistill.models.names import SHORT_NAMES

    long = {short: full for full, short in SHORT_NAMES.items()}
    return _NETWORKS.get(name, long.get(name, name))


def told(external: External, folder: Path) -> str:
    """A line for a person."""
    last, best = external.accuracy("last"), external.accuracy("best")
    figures = [f"last {last:.2f}"] if last is not None else []
    figures += [f"best {best:.2f}"] if best is not None else []
    pair = f"{external.teacher} -> {external.student}" if external.teacher else external.student
    where = printable(str(folder), 300)
    settings = f", {external.settings}" if external.settings else ""
    return (
        f"{external.method} {pair}{settings}, {external.epochs} epochs, {', '.join(figures) or 'no accuracy'}: {where}"
    )
