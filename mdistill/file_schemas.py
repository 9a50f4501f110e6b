"""What each kind of file beside the weights holds; ``read_json`` and ``checked`` compare a file with its schema.

``EpochLine``: a line of ``metrics.jsonl``. ``Environment``: ``env.json``. ``Teachers``: ``teachers.json``.
``ExternalRun``: ``external.json``. ``TransferRecord``: ``transfer/<target>.json``.
``Checkpoint``: the plain part of ``last.pt``; its tensors are compared with those that they go into. ``ChunkHeader``:
the header of a file of cached logits, or of distances between classes. ``TableFile``: a table file. ``TunedFile``: the
settings that were chosen for one.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    model_validator,
)

from mdistill import __version__
from mdistill.errors import UserError
from mdistill.files import read_text
from mdistill.registry import problem_lines

Schema = TypeVar("Schema", bound=BaseModel)

Count = Annotated[int, Field(ge=0, lt=2**31)]
Epoch = Annotated[int, Field(ge=1, lt=2**31)]
Percent = Annotated[float, Field(ge=0, le=100)]
Text = Annotated[str, Field(max_length=4096)]
EXPORT_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}$")  # of a network that a run writes
TAKEN = ("last", "ema", "average")  # files of a run that are no network of a method


def _export_name(name: str) -> str:
    if not EXPORT_NAME.fullmatch(name) or name.casefold() == "last":
        raise ValueError("should be the name of an exported network")
    return name


ExportName = Annotated[str, AfterValidator(_export_name)]


class _Exact(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Open(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class FirstSteps(_Exact):
    """What a run records of its first steps, for an audit."""

    terms: dict[Text, list[float]]  # of the loss, weighted: each by name, its values in these steps
    weights: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]  # digest of what is trained, after the last of them


class EpochLine(_Open):
    """Every other value is a finite number."""

    __pydantic_extra__: dict[str, Annotated[int, Field(ge=-(2**53), le=2**53)] | float]
    epoch: Epoch
    phase: Text | None = None  # the name of a first phase; of the last one there is none
    first_steps: FirstSteps | None = None  # in the first line, since they are recorded


class Session(_Open):
    """What a session of a run notes; most of it is for people."""

    config_folder: Text = ""  # of the file that began it
    exports: list[ExportName] = []  # names of the networks that it writes
    processes: Count = 1  # that trained together
    failed: Text = ""  # what ended it, where that was an error of the run itself


RECORD_FORMAT = 1
"""Of the records that this version writes; a record that names none has it."""


class _Record(_Exact):
    format: Annotated[int, Field(ge=1, le=RECORD_FORMAT)] = RECORD_FORMAT


class Environment(_Record):
    sessions: list[Session]


class _EpochFigures(_Exact):
    epoch: Epoch
    top1: Percent
    top5: Percent | None = None


class _Measured(_Exact):
    file: Text
    sha256: Text
    top1: Percent


class ExternalRun(_Record):
    """A run of another project, as it was imported."""

    project: Literal["mdistiller", "RepDistiller"]
    source: Text
    dataset: Text
    method: Text
    label: Text = ""  # of its row
    teacher: Text
    student: Text
    trial: Text
    epochs: Count
    last: _EpochFigures | None
    best: _EpochFigures | None
    files: dict[Text, Text]  # SHA-256 by name
    measured: dict[Literal["last", "best"], _Measured] = {}
    settings: Text = ""  # in that project's words


TARGET_NAME = r"(?:stl10|tiny_imagenet|folder-[A-Za-z0-9_.\-]{1,80})"


class TransferSettings(_Exact):
    """How a linear classifier on frozen features is trained, and what the images are turned into before."""

    epochs: Annotated[int, Field(ge=1, le=10**6)] = 100
    batch_size: Annotated[int, Field(ge=1, lt=2**31)] = 64
    lr: Annotated[float, Field(gt=0, le=1e9)] = 0.1
    milestones: Annotated[tuple[Epoch, ...], Field(strict=False)] = (30, 60, 90)  # epochs after which the rate falls
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1  # by this factor
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    standardize: bool = False  # each feature, by its mean and deviation over the training images
    mirror: bool = False  # train on the features of every image and of its mirror image
    image_size: Annotated[int, Field(ge=1, le=4096)] = 32
    resize: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    normalize: Literal["student", "target", "imagenet", "half"] = "student"  # by whose mean and deviation

    @model_validator(mode="after")
    def _in_order(self) -> "TransferSettings":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones should ascend, found {list(self.milestones)}")
        return self


class _Feature(_Exact):
    layer: Text
    width: Count


class _TargetData(_Exact):
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    classes: Count
    train_images: Count
    test_images: Count
    notes: list[Text] = []


class _Student(_Exact):
    name: Text
    file: Text
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _OfRun(_Exact):
    started: Text
    epoch: Count  # how many it had done


class TransferRecord(_Record):
    """What a linear classifier on the features of a run's student reaches on another data set."""

    target: Annotated[str, Field(pattern=f"^{TARGET_NAME}$")]
    top1: Percent  # on the target's test images, after the last epoch
    top5: Percent
    loss: float  # there: mean cross-entropy, nats
    train_top1: Percent  # on the features that it was trained on
    settings: TransferSettings
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    mean: list[float]  # that images were normalised by
    std: list[float]
    precision: Text  # of the student's arithmetic
    feature: _Feature
    data: _TargetData
    student: _Student
    run: _OfRun | None  # of the run whose student it is; None for a file that stands alone
    seconds: dict[Text, float]
    environment: dict[str, Any]  # commit, versions, device and the like


class Teachers(RootModel[dict[str, Percent]]):
    """Measured top-1 by fingerprints of weights and data."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Best(_Exact):
    epoch: Epoch
    split: Text
    top1: Percent


class Progress(_Exact):
    """Where a run is; between epochs ``step`` is 0 and ``epoch`` the one to come."""

    epoch: Epoch = 1  # in progress, counted from 1
    step: Count = 0  # steps done in it
    seconds: Annotated[float, Field(ge=0)] = 0.0  # training time spent in it so far
    best: Annotated[Best | None, BeforeValidator(lambda best: best or None)] = None  # epoch so far; {} once


class _Metrics(_Exact):
    names: list[Text]
    totals: Any


class _FirstTotals(_Exact):
    totals: Any
    weights: Any


class _Versions(_Exact):
    mdistill: Text
    torch: Text


class Checkpoint(_Exact):
    """Mappings of tensors are left as they are."""

    format: Literal[2]
    model: dict[str, Any]
    averages: dict[str, dict[str, Any]]
    solver: dict[str, Any]
    progress: Progress
    metrics: _Metrics
    config: dict[str, Any]
    fingerprints: dict[str, Text]
    versions: _Versions
    first_steps: _FirstTotals | None = None  # in the middle of the first epoch


class ChunkHeader(_Exact):
    identity: str
    checksum: str


class _Named(BaseModel):
    """A section that may be written as its name alone."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return given
        if not isinstance(given, str):
            raise ValueError("should be a name, or a section of `key: value` lines")
        return cls._short(given)

    @classmethod
    def _short(cls, name: str) -> dict[str, Any]:
        return {"name": name}


Label = Annotated[str, Field(min_length=1, max_length=80)]
Overrides = Annotated[tuple[str, ...], Field(strict=False)]  # ``key=value`` each
PairName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}$")]


class SearchSpace(_Exact):
    """Values of a setting among which one is searched: a range, of whole numbers where both ends are, or choices."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False  # whether a range is searched evenly in its logarithm
    choices: Annotated[list[Any], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one_of_the_two(self) -> "SearchSpace":
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("should have either choices, or low and high")
            try:
                texts = [json.dumps(choice, sort_keys=True, allow_nan=False) for choice in self.choices]
            except TypeError:
                raise ValueError("choices should be numbers, words, true, false, null or lists of them") from None
            if len(set(texts)) < len(texts):
                raise ValueError("a choice is given twice")
        elif self.low is None or self.high is None:
            raise ValueError("should have low and high, such as {low: 0.1, high: 10, log: true}, or choices: [1, 2, 4]")
        elif not self.low < self.high:
            raise ValueError("low should be below high")
        elif self.log and self.low <= 0:
            raise ValueError("low should be above 0 where log is true")
        return self

    @property
    def whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


class TableRow(_Named):
    """A method of a table file; or its folder alone."""

    name: Label  # as the table prints it
    method: Label  # a folder of configurations; with ``settings`` a registered method; or, of one pair, a file
    settings: dict[str, Any] | None = None  # all of the method's, in the place of a configuration
    set: Overrides = ()  # for this row's runs
    published: str | None = None  # variant of its published figures, where it is not that of its runs
    without: dict[str, str] = {}  # pairs that it cannot be trained for, and why
    search: dict[str, SearchSpace] = {}  # what ``mdistill tune`` searches, by dotted setting

    @classmethod
    def _short(cls, name: str) -> dict[str, Any]:
        return {"name": name, "method": name}


class TablePair(_Named):
    """A pair of a table file: the name of a file, or a teacher, a student and further sections of a configuration."""

    model_config = ConfigDict(strict=True, extra="allow")
    name: PairName
    teacher: dict[str, Any] | None = None
    student: dict[str, Any] | None = None

    @property
    def sections(self) -> dict[str, Any]:
        """Of a configuration; none where a file has them."""
        given = {"teacher": self.teacher, "student": self.student, **(self.model_extra or {})}
        return {key: value for key, value in given.items() if value is not None}


METRIC = re.compile(rf"(?:{TARGET_NAME}/)?top[15]")


def _metric(name: str) -> str:
    if not METRIC.fullmatch(name):
        raise ValueError(
            "should be top1 or top5, or either on a target: stl10/top1, tiny_imagenet/top1, folder-NAME/top1"
        )
    return name


Metric = Annotated[str, AfterValidator(_metric)]
"""An accuracy of a run on its own test split, or of a linear classifier on its student's features on another's."""


class TuneSettings(_Exact):
    """How the rows of a table file are tuned."""

    holdout: Annotated[int, Field(ge=1, lt=2**31)] | None = None  # training images; None for a tenth of them


class TableFile(BaseModel):
    """A table file: which pairs, methods and seeds a table has."""

    model_config = ConfigDict(strict=True, extra="forbid")
    title: Annotated[str, Field(min_length=1)]
    source: str = ""  # of its published figures, as in ``results/published.csv``
    table: Annotated[str, BeforeValidator(str)] = ""  # its number there
    metrics: Annotated[tuple[Metric, ...], Field(strict=False, min_length=1)] = ("top1",)
    transfer: TransferSettings = TransferSettings()  # of the metrics on targets
    notes: Annotated[tuple[str, ...], Field(strict=False)] = ()  # on published figures
    dataset: str = "cifar100"  # a folder of ``configs``
    imports: Annotated[tuple[str, ...], Field(strict=False)] = ()  # user modules, looked for beside the file
    pairs: Annotated[tuple[TablePair, ...], Field(strict=False, min_length=1)]
    methods: Annotated[tuple[TableRow, ...], Field(strict=False, min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(strict=False, min_length=1)] = (0, 1, 2)
    set: Overrides = ()  # for every run
    epochs: Annotated[int, Field(ge=1)] | None = None  # that every schedule is shortened to
    tune: TuneSettings = TuneSettings()
    tuned: str = ""  # a file beside this one with the settings that were chosen


class ChosenSettings(_Exact):
    """What a search has chosen for a row and a pair of a table, and how."""

    row: Text
    pair: Text
    settings: dict[Text, Any]  # by dotted key
    own_settings: dict[Text, Any]  # the table's own, of the first trial
    top1: Percent  # of the last epoch on the held-out images
    own_top1: Percent | None  # the same with the table's own settings; None where that trial failed
    trial: Count  # that was chosen, from 0
    trials: Count  # that there were
    failed: Count  # of them
    budget: Count
    whole_space: bool  # whether all settings of the space were tried
    holdout: Count  # images
    data: Text  # fingerprint of the images that were trained on and held out
    epochs: Count  # of a trial
    own_epochs: Count  # of a run of the table
    seed: Annotated[int, Field(ge=0, lt=2**63)]  # of every trial
    sampler: Text
    commit: Text
    of: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]  # digest of what the table file says of the row and the pair


class TunedFile(_Record):
    """The settings that ``mdistill tune`` has chosen for a table."""

    chosen: list[ChosenSettings]


def checked(schema: type[Schema], content: Any, path: Path, advice: str = "") -> Schema:
    """``content`` of ``path`` as ``schema``; text is read as JSON.

    Raises:
        UserError: it is not; one line with what is wrong first, and ``advice``. Or it is of a newer format.
    """
    try:
        if isinstance(content, str):
            return schema.model_validate_json(content)
        return schema.model_validate(content)
    except ValidationError as error:
        if issubclass(schema, _Record):
            _refuse_newer(content, path)
        lines = problem_lines(error)
        more = f" (and {len(lines) - 1} more)" if lines[1:] else ""
        raise UserError(f"{path} is damaged: {lines[0]}{more}{f'; {advice}' if advice else ''}") from None


def _refuse_newer(content: Any, path: Path) -> None:
    """Say of a record of a newer format that it is one."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            return
    found = content.get("format") if isinstance(content, dict) else None
    if type(found) is int and found > RECORD_FORMAT:
        raise UserError(
            f"{path} is of format {found}, which a newer version of mdistill wrote; this one, {__version__}, reads"
            f" format {RECORD_FORMAT}: update mdistill"
        )


def read_json(schema: type[Schema], path: Path, advice: str = "") -> Schema:
    """The JSON file ``path``.

    Raises:
        UserError: it cannot be read, or is not as ``schema`` says.
    """
    return checked(schema, read_text(path), path, advice)
