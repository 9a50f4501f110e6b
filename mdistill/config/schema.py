"""What a run is: its sections and their types, what must hold between them, the folder it writes, its identity."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, ValidationError

from mdistill.data import DATASETS
from mdistill.data.batch import Pick
from mdistill.data.mixing import Mixing
from mdistill.distillers import DISTILLERS
from mdistill.errors import UserError, printable, shown, suggestion
from mdistill.models import MODELS
from mdistill.optim import SOLVERS
from mdistill.optim.averaging import Statistics
from mdistill.optim.schedules import Schedule, learning_rate
from mdistill.precision import Precision
from mdistill.registry import NonNegativeInt, Positive, PositiveInt, Registry, problem_lines
from mdistill.settings import results_only


def _folder_name(text: str) -> str:
    if text in {".", ".."} or not text.isprintable() or set(text) & {"/", "\\"} or len(text.encode()) > 255:
        raise ValueError("should be usable as the name of one folder")
    return text


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, which are not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Component(_Section):
    """A section that names something registered; its other keys are that builder's arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    name: str  # registered name

    @property
    def arguments(self) -> dict[str, Any]:
        """The builder's keyword arguments."""
        return dict(self.model_extra or {})


class MixingConfig(_Section):
    """How training images are mixed."""

    name: Literal["mixup", "cutmix", "cutmix_pick"]
    alpha: Positive  # of Beta(alpha, alpha), the distribution of lam; 1 is uniform
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0  # that an image is mixed at all
    candidates: Annotated[int, Field(ge=2)] | None = None  # cutmix_pick: mixed images for each one trained on
    pick: Pick = "teacher"  # cutmix_pick: trained on are those of which it is least certain
    mode: Literal["replace", "beside"] = "replace"  # the plain images, with soft labels; or trained on beside them
    share: Literal["image", "batch"] = "image"  # what draws lam, and a box, of its own
    partner: Literal["epoch", "batch", "next"] = "epoch"  # any image, another one of the batch, the next one there
    larger_share: bool = False  # whether an image keeps the larger share of itself: max(lam, 1 - lam)


class DataConfig(_Component):
    """The data set and how it is cut into batches."""

    batch_size: PositiveInt  # images per training step
    eval_batch_size: PositiveInt | None = None  # images per forward pass of evaluation; null: what suits the device
    holdout: NonNegativeInt = 0  # training images held out as a validation split
    mixing: MixingConfig | None = None  # of training images; null: none

    @property
    def mixing_settings(self) -> Mixing | None:
        """``mixing`` as the data code takes it."""
        if self.mixing is None:
            return None
        settings = self.mixing.model_dump()
        return Mixing(**{**settings, "candidates": self.mixing.candidates or 1})


class ModelConfig(_Component):
    """A network."""

    checkpoint: str | None = None  # weights to begin with, as of a teacher; null: initial ones, by the seed


Channels = Annotated[tuple[float, float, float], Field(strict=False)]


class PreprocessingConfig(_Section):
    """How images come to a teacher; what is null is as published with its weights, else as in the data set."""

    mean: Channels | None = None  # of the three channels, on the scale 0 to 1
    std: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] | None = None  # the same
    image_size: PositiveInt | None = None  # pixels, height and width


class MemberConfig(_Component):
    """A frozen network and its weights."""

    checkpoint: str  # a run folder, our student.pt, a file, or published weights; relative to the checkpoint root
    classes: str | None = None  # what its outputs are: imagenet, or a file of names; null: the data set's classes
    preprocessing: PreprocessingConfig = PreprocessingConfig()  # of its images
    expected_top1: Annotated[float, Field(ge=0, le=100)] | None = None  # percent on the test split; checked to 1 point


class TeacherConfig(MemberConfig):
    """The teacher: one network, or several that are averaged."""

    ensemble: Annotated[tuple[MemberConfig, ...], Field(strict=False)] = ()  # further networks
    average: Literal["probabilities", "logits"] = "probabilities"  # what is averaged over an ensemble

    @property
    def members(self) -> tuple[MemberConfig, ...]:
        """All its networks, the first one first."""
        return (self, *self.ensemble)


class DistillerConfig(_Component):
    """The method."""


class SolverConfig(_Component):
    """The optimiser, its schedule, and the averages of the student's weights."""

    epochs: PositiveInt
    lr: Annotated[float, Field(gt=0, le=1e6)]  # initial learning rate
    schedule: Schedule = "step"  # or cosine, which takes no milestones
    milestones: Annotated[tuple[StrictInt, ...], Field(strict=False)]  # epochs after which the rate drops
    gamma: Annotated[float, Field(gt=0, le=1e6)]  # factor of each drop
    lr_warmup_epochs: NonNegativeInt = 0  # in which the rate rises with every step, in proportion, from 0
    decay_norms: bool = True  # false: no weight decay of norms and biases, the weights of fewer than 2 dimensions
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # of a moving average of the student's weights
    average_from: PositiveInt | None = None  # first epoch of a plain average of the student's weights
    average_statistics: Statistics = "averaged"  # its BatchNorm's: averaged too, or those of its first step

    def rate(self, epoch: int, progress: float = 1.0) -> float:
        """The learning rate in ``epoch``, counted from 1; of a warm-up, where ``progress`` of its steps are done."""
        return learning_rate(
            epoch,
            schedule=self.schedule,
            lr=self.lr,
            milestones=self.milestones,
            gamma=self.gamma,
            epochs=self.epochs,
            warmup_epochs=self.lr_warmup_epochs,
            progress=progress,
        )


AVERAGES = ("ema_decay", "average_from", "average_statistics")
"""Settings of a solver that are of the last phase alone."""


class RunConfig(_Section):
    """How the numbers are computed."""

    precision: Precision = "tf32"  # of the student; tf32: convolutions on TF32 units where the device has them
    teacher_precision: Precision | None = None  # of the teacher; null: the student's
    teacher_logits: Literal["float16", "float32", "sparse"] = "float16"  # what the teacher's logits are stored as
    teacher_top_k: PositiveInt = 50  # classes of a sparse entry
    engine: Literal["auto", "eager", "graph", "compile"] = "auto"  # how steps are launched
    evaluate_every: PositiveInt = 1  # epochs; the last one is always evaluated
    evaluate_test: bool = True  # false: the held-out images alone, as while settings are chosen
    checkpoint_minutes: Positive = 15.0  # within a longer epoch, the state is saved about as often
    deterministic: bool = False  # deterministic kernels on CUDA (slower); a CPU run always is


class Config(_Section):
    """A complete run."""

    imports: Annotated[tuple[str, ...], Field(strict=False)] = ()  # user modules loaded before anything is built
    data: DataConfig
    teacher: TeacherConfig | None = None
    student: ModelConfig
    distiller: DistillerConfig
    solver: SolverConfig
    phases: dict[str, SolverConfig] = {}  # what the method trains before, by name in its order: a solver each
    run: RunConfig = RunConfig()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    variant: Annotated[str, AfterValidator(_folder_name)] = (
        ""  # what sets this run apart from others of its method and pair; names its folder
    )

    @property
    def epochs(self) -> int:
        """Of all phases."""
        return self.solver.epochs + sum(phase.epochs for phase in self.phases.values())

    def resolved(self) -> dict[str, Any]:
        """Plain containers, every default written out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that ``load`` reads back unchanged."""
        return yaml.dump(self.resolved(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)

    def run_folder(self) -> Path:
        """``<dataset>/<method>/<teacher>_<student>[/<variant>]/seed<k>``."""
        teacher = "+".join(member.name for member in self.teacher.members) if self.teacher else None
        pair = f"{teacher}_{self.student.name}" if teacher else self.student.name
        pair = pair.replace("/", "-")  # of a library's networks
        return Path(self.data.name, self.distiller.name, pair, self.variant, f"seed{self.seed}")

    def warnings(self) -> list[str]:
        """Settings that are legal but probably not meant."""
        solver, warnings = self.solver, []
        for place, phase in self._solvers():
            late = [milestone for milestone in phase.milestones if milestone >= phase.epochs]
            if late:
                warnings.append(
                    f"{place}.milestones: {shown(late)} lie at or past the last epoch ({phase.epochs}) and have no"
                    " effect"
                )
            if phase.lr_warmup_epochs > phase.epochs:
                warnings.append(
                    f"{place}.lr_warmup_epochs: {phase.lr_warmup_epochs} is more than all epochs ({phase.epochs}),"
                    f" so {place}.lr is never reached"
                )
        if solver.average_from is not None and solver.average_from > solver.epochs:
            warnings.append(
                f"solver.average_from: {solver.average_from} lies past the last epoch ({solver.epochs}),"
                " so nothing is averaged"
            )
        length = self.distiller.arguments.get("epochs", solver.epochs)  # of a method that depends on the run's length
        if length != solver.epochs:
            warnings.append(f"distiller.epochs: the method counts on {length} epochs, solver.epochs is {solver.epochs}")
        return warnings

    def _solvers(self) -> Iterator[tuple[str, SolverConfig]]:
        """Every section that is a solver, with its dotted key."""
        yield "solver", self.solver
        yield from ((f"phases.{name}", phase) for name, phase in self.phases.items())


COMPONENTS: dict[str, tuple[Registry[Any], type[_Component]]] = {
    "data": (DATASETS, DataConfig),
    "teacher": (MODELS, TeacherConfig),
    "student": (MODELS, ModelConfig),
    "distiller": (DISTILLERS, DistillerConfig),
    "solver": (SOLVERS, SolverConfig),
}
"""The sections that name something registered."""


# ---- identity ------------------------------------------------------------------------------------------------------

ADDED: dict[str, Any] = {
    "mcld.queue_start": "empty",
    "mcld.category_mean": "positives",
    "mcld.category_denominator": "others",
    "reviewkd.student_preacts": False,
    "uskd.variant": "paper",
    "nd.embedding": "linear",
    "nd.kd_warmup_epochs": 0,
    "dhkd.head": "linear",
}
"""Settings of methods that earlier versions did not have, with the value that says what the method did then. A
configuration without one means that value, and no identity holds it, so that runs of earlier versions remain trials of
the same cell, are evaluated and resumed."""


def cell_identity(config: Config, fingerprints: Mapping[str, str]) -> str:
    """16 hex digits that are equal exactly where two runs are trials of one cell of a table.

    In it are all settings that change results, the final number of epochs and the schedule among them, but not the
    seed. A setting at its default is left out, so that a new setting changes no identity; no default may change.

    Args:
        fingerprints: of the teacher's weights, the data and the weights that the student begins with, which stand for
            their paths.
    """
    settings = without_defaults(config)
    if config.run.teacher_precision == config.run.precision:
        del settings["run"]["teacher_precision"]
    chosen = {section: given for section, given in results_only(settings).items() if given != {}}
    text = json.dumps([chosen, dict(fingerprints)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_defaults(config: Config) -> dict[str, Any]:
    """``config`` in plain containers, without the settings that are at their default."""
    settings = config.model_dump(exclude_defaults=True)
    for section, (registry, model) in COMPONENTS.items():
        given = settings.get(section)
        more = settings.get("phases", {}).values() if section == "solver" else (given or {}).get("ensemble", ())
        for component in [given, *more] if given else ():
            usual = {key: each.default for key, each in registry.arguments(component["name"]).items()}
            usual |= _added(component["name"])
            for key in component.keys() - model.model_fields.keys():
                if key in usual and component[key] == usual[key]:
                    del component[key]
    return settings


def _added(name: str) -> dict[str, Any]:
    """``ADDED`` of one method."""
    return {setting.split(".")[1]: value for setting, value in ADDED.items() if setting.split(".")[0] == name}


# ---- checking ------------------------------------------------------------------------------------------------------


def check(tree: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """The run that ``tree`` describes, with every default filled in.

    Returns:
        the run, or None where something is wrong, and every problem: a line each, which begins with its dotted key.
    """
    problems: list[str] = []
    complete = dict(tree)
    for section, (registry, model) in COMPONENTS.items():
        if section in tree:
            complete[section] = _filled(section, tree[section], registry, model, problems)
    teacher = complete.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("ensemble"), list):
        complete["teacher"] = teacher | {
            "ensemble": [
                _filled(f"teacher.ensemble.{number}", member, MODELS, MemberConfig, problems)
                for number, member in enumerate(teacher["ensemble"])
            ]
        }
    if isinstance(complete.get("phases"), dict):
        complete["phases"] = _phases(complete, problems)
    config = None
    try:
        config = Config.model_validate(complete)
    except ValidationError as error:
        problems += _schema_problems(error)
    problems = [line for line in problems if not _is_inherited(line, tree, problems)]
    if config is not None and not problems:
        problems += _cross_checks(config)
    return (None if problems else config), problems


def _filled(place: str, given: Any, registry: Registry[Any], model: type[_Component], problems: list[str]) -> Any:
    """``given`` with its builder's arguments checked and complete; as it is where it names nothing."""
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return given
    own = {key: value for key, value in given.items() if key in model.model_fields}
    rest = {key: value for key, value in given.items() if key not in model.model_fields}
    try:
        own["name"] = registry.canonical(given["name"])
    except UserError as error:
        problems.append(f"{place}.name: {error}")
        return own
    if registry is DISTILLERS:
        rest = _added(own["name"]) | rest
    arguments, mistakes = registry.check(own["name"], rest, where=f"{place}.", beside=tuple(model.model_fields))
    problems += mistakes
    return {**own, **arguments}


def phases_of(method: Any) -> tuple[str, ...]:
    """The first phases of a method by its canonical name; none of what is no method."""
    known: tuple[str, ...] = getattr(DISTILLERS.get(method), "phases", ()) if method in DISTILLERS.names() else ()
    return known


def _phases(tree: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """``phases:`` of ``tree`` in the method's order, each a complete solver: what it leaves out is as in ``solver:``.

    Its number of epochs is its own, and averages of weights are of the last phase alone.
    """
    given, solver = tree["phases"], tree.get("solver")
    inherited = solver if isinstance(solver, dict) else {}
    inherited = {key: value for key, value in inherited.items() if key not in ("epochs", *AVERAGES)}
    phases = {}
    method = tree["distiller"].get("name") if isinstance(tree.get("distiller"), dict) else None
    for name in dict.fromkeys([*(name for name in phases_of(method) if name in given), *given]):
        phase = given[name]
        if isinstance(phase, dict):
            complete = {key: value for key, value in inherited.items() if _applies(key, phase.get("name"))} | phase
            phase = _filled(f"phases.{name}", complete, SOLVERS, SolverConfig, problems)
        phases[name] = phase
    return phases


def _applies(key: str, solver: Any) -> bool:
    """Whether ``key`` is one of the solver that a phase names, where it names another one."""
    return solver not in SOLVERS.names() or key in SolverConfig.model_fields or key in SOLVERS.arguments(solver)


def _is_inherited(problem: str, tree: Mapping[str, Any], problems: Sequence[str]) -> bool:
    """Whether ``problem`` is of a phase, in a key that it has from ``solver:``, where it is told already."""
    section, *place = problem.split(":")[0].split(".")
    given = tree["phases"].get(place[0]) if section == "phases" and len(place) > 1 else None
    if not isinstance(given, dict) or place[1] in given or place[1] == "epochs":
        return False
    return any(other.split(":")[0].split(".")[:2] == ["solver", place[1]] for other in problems)


def _schema_problems(error: ValidationError) -> list[str]:
    problems = []
    for detail, line in zip(error.errors(), problem_lines(error), strict=True):
        place = ".".join(str(step) for step in detail["loc"])
        known = _known_keys(detail["loc"][:-1])
        if detail["type"] == "extra_forbidden":
            near = suggestion(str(detail["loc"][-1]), known)
            line = f"{place}: unknown key (value {shown(detail['input'])}){near} (allowed: {', '.join(known)})"
        elif detail["type"] == "missing":
            line = f"{place}: missing"
        elif detail["type"] in {"model_type", "dict_type", "model_attributes_type"}:
            line = f"{place}: should be a section of `key: value` lines, found {shown(detail['input'])}"
        problems.append(line)
    return problems


def _known_keys(section: tuple[int | str, ...]) -> list[str]:
    if not section:
        return list(Config.model_fields)
    if section == ("data", "mixing"):
        return list(MixingConfig.model_fields)
    if section[-1] == "preprocessing":
        return list(PreprocessingConfig.model_fields)
    return list(RunConfig.model_fields)  # the other sections take a builder's arguments and are checked against it


def _cross_checks(config: Config) -> list[str]:
    problems = _phase_problems(config)
    for place, solver in config._solvers():
        milestones = list(solver.milestones)
        if milestones != sorted(set(milestones)) or any(milestone < 1 for milestone in milestones):
            problems.append(f"{place}.milestones: should be epochs from 1 in rising order, found {shown(milestones)}")
        if solver.schedule == "cosine" and milestones:
            found = shown(milestones)
            problems.append(f"{place}.milestones: a cosine schedule takes none, found {found}; set it to []")
    if config.teacher is not None and config.teacher.average != "probabilities" and not config.teacher.ensemble:
        problems.append(
            f"teacher.average: {config.teacher.average!r} says what to average over teacher.ensemble, which is empty"
        )
    run, usual = config.run, RunConfig.model_fields["teacher_top_k"].default
    if run.teacher_top_k != usual and run.teacher_logits != "sparse":
        problems.append(
            f"run.teacher_top_k: counts the classes of run.teacher_logits 'sparse', found {run.teacher_top_k} with"
            f" {run.teacher_logits!r}"
        )
    if not run.evaluate_test and config.data.holdout == 0:
        problems.append("run.evaluate_test: false evaluates the held-out images alone, and data.holdout is 0")
    solver = config.solver
    if solver.average_statistics != "averaged" and solver.average_from is None:
        problems.append(
            f"solver.average_statistics: {solver.average_statistics!r} is of the average that solver.average_from"
            " begins, which is null"
        )
    mixing = config.data.mixing
    if mixing is not None and (mixing.name == "cutmix_pick") != (mixing.candidates is not None):
        problems.append(
            f"data.mixing.candidates: cutmix_pick needs a number of 2 or more and the others take none,"
            f" found {mixing.candidates} with {mixing.name!r}"
        )
    if mixing is not None and mixing.name != "cutmix_pick" and mixing.pick != "teacher":
        problems.append(f"data.mixing.pick: cutmix_pick alone picks, found {mixing.pick!r} with {mixing.name!r}")
    if mixing is not None and mixing.name == "cutmix_pick" and mixing.pick == "teacher" and config.teacher is None:
        problems.append("data.mixing.name: cutmix_pick lets the teacher pick, and the configuration has no teacher")
    return problems


def _phase_problems(config: Config) -> list[str]:
    """Phases that the method wants and are not there, or the other way round; averages of a first phase."""
    method = config.distiller.name
    known = phases_of(method)
    problems = [
        f"phases.{name}: missing; the method {method!r} trains it first: add phases: {{{name}: {{epochs: ...}}}}"
        for name in known
        if name not in config.phases
    ]
    for name, phase in config.phases.items():
        if name not in known:
            allowed = f"allowed: {', '.join(known)}" if known else "it has none"
            problems.append(
                f"phases.{printable(name)}: no phase of the method {method!r}{suggestion(name, known)} ({allowed})"
            )
        problems += [
            f"phases.{printable(name)}.{key}: averages are of the last phase alone; set solver.{key}"
            for key in AVERAGES
            if getattr(phase, key) != SolverConfig.model_fields[key].default
        ]
    return problems
