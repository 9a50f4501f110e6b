"""The typed, strict configuration: everything that changes a result, from one YAML, its one base and overrides."""

import copy
import hashlib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, ValidationError

from mdistill.data import DATASETS
from mdistill.data.mixing import Mixing
from mdistill.distillers import DISTILLERS
from mdistill.errors import UserError, suggestion
from mdistill.models import MODELS
from mdistill.optim.schedules import Schedule, learning_rate
from mdistill.optim.solvers import SOLVERS
from mdistill.precision import Precision
from mdistill.registry import NonNegativeInt, Positive, PositiveInt, Registry, problem_lines

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?\.?inf|\.?nan", re.IGNORECASE)
_NAME_LIMIT = 180  # characters of a folder name, below the 255 bytes of common file systems


def _folder_name(text: str) -> str:
    if text in {".", ".."} or not text.isprintable() or set(text) & {"/", "\\"} or len(text.encode()) > 255:
        raise ValueError("should be usable as the name of one folder")
    return text


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
    alpha: Positive  # of Beta(alpha, alpha), the distribution of an image's share; 1 is uniform
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0  # that an image is mixed at all
    candidates: Annotated[int, Field(ge=2)] | None = None  # cutmix_pick: mixed images for each one trained on


class DataConfig(_Component):
    """The data set and how it is cut into batches."""

    batch_size: PositiveInt  # images a training step
    eval_batch_size: PositiveInt | None = None  # images a forward pass of evaluation; null: what suits the device
    holdout: NonNegativeInt = 0  # training images kept back as a validation split
    mixing: MixingConfig | None = None  # of training images; null: none

    @property
    def mixing_settings(self) -> Mixing | None:
        """``mixing`` as the data code takes it."""
        it = self.mixing
        return None if it is None else Mixing(it.name, it.alpha, it.probability, it.candidates or 1)


class ModelConfig(_Component):
    """A network."""


class MemberConfig(_Component):
    """A frozen network and its weights."""

    checkpoint: str  # a run folder, our student.pt or a published file; relative to the checkpoint root
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
    """The optimiser and its schedule."""

    epochs: PositiveInt
    lr: Annotated[float, Field(gt=0, le=1e6)]  # initial learning rate
    schedule: Schedule = "step"  # or cosine, which takes no milestones
    milestones: Annotated[tuple[StrictInt, ...], Field(strict=False)]  # epochs after which the rate drops
    gamma: Annotated[float, Field(gt=0, le=1e6)]  # factor of each drop

    def rate(self, epoch: int) -> float:
        """The learning rate in ``epoch``, counted from 1."""
        return learning_rate(
            epoch,
            schedule=self.schedule,
            lr=self.lr,
            milestones=self.milestones,
            gamma=self.gamma,
            epochs=self.epochs,
        )


class RunConfig(_Section):
    """How the numbers are computed."""

    precision: Precision = "tf32"  # of the student; tf32: convolutions on TF32 units where the device has them
    teacher_precision: Precision | None = None  # of the teacher; null: the student's
    teacher_logits: Literal["float16", "float32"] = "float16"  # what the teacher's logits are kept in
    engine: Literal["auto", "eager", "graph", "compile"] = "auto"  # how steps are launched
    evaluate_every: PositiveInt = 1  # epochs; the last one is always evaluated
    deterministic: bool = False  # deterministic kernels on CUDA (slower); a CPU run always is


class Config(_Section):
    """A complete run."""

    imports: Annotated[tuple[str, ...], Field(strict=False)] = ()  # user modules loaded before anything is built
    data: DataConfig
    teacher: TeacherConfig | None = None
    student: ModelConfig
    distiller: DistillerConfig
    solver: SolverConfig
    run: RunConfig = RunConfig()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    variant: Annotated[str, AfterValidator(_folder_name)] = (
        ""  # what sets this run apart from others of its method and pair; names its folder
    )

    def resolved(self) -> dict[str, Any]:
        """Plain containers, every default written out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that ``load`` reads back unchanged."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, default_flow_style=None, width=120)

    def run_folder(self) -> Path:
        """``<dataset>/<method>/<teacher>_<student>[/<variant>]/seed<k>``."""
        teacher = "+".join(member.name for member in self.teacher.members) if self.teacher else None
        pair = f"{teacher}_{self.student.name}" if teacher else self.student.name
        return Path(self.data.name, self.distiller.name, pair, self.variant, f"seed{self.seed}")

    def warnings(self) -> list[str]:
        """Settings that are legal but probably not meant."""
        epochs, found = self.solver.epochs, []
        late = [milestone for milestone in self.solver.milestones if milestone >= epochs]
        if late:
            found.append(f"solver.milestones: {late} lie at or past the last epoch ({epochs}) and have no effect")
        first = self.distiller.arguments.get("average_from")
        if first is not None and first > epochs:
            found.append(f"distiller.average_from: {first} lies past the last epoch ({epochs}), so nothing is averaged")
        return found


def load(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    imports: Sequence[str] = (),
    seed: int | None = None,
    search: Sequence[Path] = (),
) -> Config:
    """Read ``path``, its one ``base:`` and ``key=value`` overrides; check everything and resolve all defaults.

    Args:
        overrides: words such as ``solver.lr=0.1``; values are YAML.
        imports: further modules to load first, as ``imports:`` in the file.
        seed: replaces the file's.
        search: folders with user modules, beside the current one and the file's.

    Raises:
        UserError: every unknown, missing and ill-typed key together, one line each with its file and key.
    """
    path = Path(path)
    tree, origins = _read_with_base(path)
    changed = _apply_overrides(tree, origins, overrides)
    if imports:
        tree["imports"] = [
            *_as_list(tree.get("imports")),
            *(m for m in imports if m not in _as_list(tree.get("imports"))),
        ]
    if seed is not None:
        tree["seed"] = seed
        origins[("seed",)] = "--seed"
    cosine = _get(tree, ("solver", "schedule")) == "cosine"
    variant = _variant({key: value for key, value in changed.items() if cosine or key != ("solver", "epochs")})
    if variant:
        tree["variant"] = _shortened(",".join(part for part in (str(tree.get("variant") or ""), variant) if part))
    for module in _as_list(tree.get("imports")):
        import_user_module(str(module), [path.resolve().parent, Path.cwd(), *search])
    return _validate(tree, origins, path)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two resolved configurations differ, with both values (None where absent)."""
    old_leaves, new_leaves = dict(_leaves(old)), dict(_leaves(new))
    keys = [*old_leaves, *(key for key in new_leaves if key not in old_leaves)]
    return {
        ".".join(key): (old_leaves.get(key), new_leaves.get(key))
        for key in keys
        if old_leaves.get(key) != new_leaves.get(key)
    }


# ---- reading -------------------------------------------------------------------------------------------------------

_Key = tuple[str, ...]
_Origins = dict[_Key, str]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem="merge keys (<<) are not read", problem_mark=key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key should be a word", problem_mark=key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_with_base(path: Path) -> tuple[dict[str, Any], _Origins]:
    tree = _read(path)
    base = tree.pop("base", None)
    if base is None:
        return tree, dict.fromkeys((key for key, _ in _leaves(tree)), str(path))
    if not isinstance(base, str):
        raise UserError(f"{path}: base: should be a path relative to this file, found {base!r}")
    base_path = path.parent / base
    if not base_path.is_file():
        raise UserError(f"{path}: base: no such file {base_path}")
    merged = _read(base_path)
    if "base" in merged:
        raise UserError(f"{base_path}: base: a base has no base of its own; {path} already extends it")
    origins = dict.fromkeys((key for key, _ in _leaves(merged)), str(base_path))
    for key, value in _leaves(tree):
        if value == {} and isinstance(_get(merged, key), dict):
            continue  # an empty section changes nothing
        _set(merged, key, value, str(path))
        origins[key] = str(path)
    return merged, origins


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"no such configuration file: {path}{suggestion(str(path), siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a YAML file: {error}") from None
    try:
        tree = _parse(text)
    except _UNREADABLE as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: should hold `key: value` lines, found {type(tree).__name__}")
    return tree


_UNREADABLE = (yaml.YAMLError, ValueError, TypeError, RecursionError)  # the latter of impossible dates, or cycles


def _parse(text: str) -> Any:
    return _numbers(yaml.load(text, Loader=_Loader))


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads ``5e-4`` as text: turn text that is a number into it. Booleans stay booleans."""
    if isinstance(value, dict):
        return {str(key): _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        try:
            return int(value)
        except ValueError:
            return float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return value


def _leaves(tree: Mapping[str, Any], prefix: _Key = ()) -> Iterator[tuple[_Key, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value


def _set(tree: dict[str, Any], key: _Key, value: Any, where: str) -> None:
    for depth, part in enumerate(key[:-1]):
        below = tree.get(part)
        if below is None:
            below = tree[part] = {}
        if not isinstance(below, dict):
            place = ".".join(key[: depth + 1])
            raise UserError(f"{where}: {'.'.join(key)}: {place} is not a section, it holds {below!r}")
        tree = below
    tree[key[-1]] = value


def _get(tree: Mapping[str, Any], key: _Key) -> Any:
    """What ``tree`` holds at ``key``, or ``_ABSENT``."""
    for part in key:
        if not isinstance(tree, Mapping) or part not in tree:
            return _ABSENT
        tree = tree[part]
    return tree


_ABSENT = object()


def _apply_overrides(tree: dict[str, Any], origins: _Origins, overrides: Sequence[str]) -> dict[_Key, Any]:
    """Apply ``key=value`` words in place; return the keys that they changed, with their new values."""
    original = copy.deepcopy(tree)
    keys = []
    for word in overrides:
        name, equals, text = word.partition("=")
        if not equals or not name or not all(name.split(".")):
            raise UserError(f"command line: {word!r} is not an override; write key=value, such as solver.lr=0.1")
        try:
            value = _parse(text)
        except _UNREADABLE as error:
            raise UserError(f"command line: {word!r}: not a YAML value: {_one_line(error)}") from None
        key = tuple(name.split("."))
        if len(key) == 1 and key[0] not in Config.model_fields:
            known = {dotted[-1]: ".".join(dotted) for dotted, _ in _leaves(tree)}
            hint = f"; did you mean {known[name]}?" if name in known else suggestion(name, known.values())
            raise UserError(
                f"command line: {word!r}: unknown key {name!r}{hint} (sections: {', '.join(Config.model_fields)})"
            )
        _set(tree, key, value, "command line")
        for replaced in [old for old in origins if old[: len(key)] == key]:
            del origins[replaced]
        origins[key] = "command line"
        keys.append(key)
    return {key: _get(tree, key) for key in keys if _get(tree, key) != _get(original, key)}


# ---- naming --------------------------------------------------------------------------------------------------------


def _variant(changed: Mapping[_Key, Any]) -> str:
    """``beta=4,temperature=2``: what overrides changed, as part of a folder name.

    ``seed`` has a level of its own. The number of epochs is left out where a run may grow: not under a cosine, whose
    every epoch depends on it.
    """
    named = {key: value for key, value in changed.items() if key not in {("seed",), ("variant",)}}
    last = [key[-1] for key in named]
    parts = [
        f"{key[-1] if last.count(key[-1]) == 1 else '.'.join(key)}={_value_text(value)}"
        for key, value in sorted(named.items())
    ]
    return ",".join(sorted(parts))


def _shortened(text: str) -> str:
    """``text`` if it fits a folder name; else its beginning and a hash of it all."""
    if len(text.encode()) <= _NAME_LIMIT:
        return text
    return f"{text[: _NAME_LIMIT - 9]}~{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, dict):
        return "+".join(f"{key}={_value_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return "+".join(_value_text(item) for item in value) or "none"
    return quote(str(value), safe="")


# ---- checking ------------------------------------------------------------------------------------------------------


def _validate(tree: dict[str, Any], origins: _Origins, path: Path) -> Config:
    problems: list[str] = []
    complete = dict(tree)
    components: dict[str, tuple[Registry[Any], type[_Component]]] = {
        "data": (DATASETS, DataConfig),
        "teacher": (MODELS, TeacherConfig),
        "student": (MODELS, ModelConfig),
        "distiller": (DISTILLERS, DistillerConfig),
        "solver": (SOLVERS, SolverConfig),
    }
    for section, (registry, model) in components.items():
        given = tree.get(section)
        if isinstance(given, dict) and isinstance(given.get("name"), str):
            filled, found = _check_component(section, given, registry, model)
            complete[section] = filled
            problems += found
    teacher = complete.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("ensemble"), list):
        members = list(teacher["ensemble"])
        for number, given in enumerate(members):
            if isinstance(given, dict) and isinstance(given.get("name"), str):
                where = f"teacher.ensemble.{number}"
                members[number], found = _check_component(where, given, MODELS, MemberConfig)
                problems += found
        complete["teacher"] = {**teacher, "ensemble": members}
    try:
        config = Config.model_validate(complete)
    except ValidationError as error:
        problems += _schema_problems(error)
    if not problems:
        problems += _cross_checks(config)
    if problems:
        raise UserError("\n".join(f"{_origin(problem, origins, path)}: {problem}" for problem in problems))
    return config


def _check_component(
    section: str, given: dict[str, Any], registry: Registry[Any], model: type[_Component]
) -> tuple[dict[str, Any], list[str]]:
    own = {key: value for key, value in given.items() if key in model.model_fields}
    rest = {key: value for key, value in given.items() if key not in model.model_fields}
    try:
        own["name"] = registry.canonical(given["name"])
    except UserError as error:
        return own, [f"{section}.name: {error}"]
    beside = tuple(model.model_fields)
    arguments, problems = registry.check(own["name"], rest, where=f"{section}.", beside=beside)
    return {**own, **arguments}, problems


def _schema_problems(error: ValidationError) -> list[str]:
    problems = []
    for detail, line in zip(error.errors(), problem_lines(error), strict=True):
        place = ".".join(str(step) for step in detail["loc"])
        known = _known_keys(detail["loc"][:-1])
        if detail["type"] == "extra_forbidden":
            near = suggestion(str(detail["loc"][-1]), known)
            line = f"{place}: unknown key (value {detail['input']!r}){near} (allowed: {', '.join(known)})"
        elif detail["type"] == "missing":
            line = f"{place}: missing"
        elif detail["type"] in {"model_type", "dict_type", "model_attributes_type"}:
            line = f"{place}: should be a section of `key: value` lines, found {detail['input']!r}"
        problems.append(line)
    return problems


def _known_keys(section: tuple[int | str, ...]) -> list[str]:
    if not section:
        return list(Config.model_fields)
    if section == ("data", "mixing"):
        return list(MixingConfig.model_fields)
    return list(RunConfig.model_fields)  # the other sections take a builder's arguments and are checked against it


def _cross_checks(config: Config) -> list[str]:
    milestones = config.solver.milestones
    problems = []
    if list(milestones) != sorted(set(milestones)) or any(milestone < 1 for milestone in milestones):
        problems.append(f"solver.milestones: should be epochs from 1 in rising order, found {list(milestones)}")
    if config.solver.schedule == "cosine" and milestones:
        problems.append(f"solver.milestones: a cosine schedule takes none, found {list(milestones)}; set it to []")
    if config.teacher is not None and config.teacher.average != "probabilities" and not config.teacher.ensemble:
        problems.append(
            f"teacher.average: {config.teacher.average!r} says what to average over teacher.ensemble, which is empty"
        )
    mixing = config.data.mixing
    if mixing is not None and (mixing.name == "cutmix_pick") != (mixing.candidates is not None):
        problems.append(
            f"data.mixing.candidates: cutmix_pick needs a number of 2 or more and the others take none,"
            f" found {mixing.candidates} with {mixing.name!r}"
        )
    if mixing is not None and mixing.name == "cutmix_pick" and config.teacher is None:
        problems.append("data.mixing.name: cutmix_pick lets the teacher pick, and the configuration has no teacher")
    return problems


def _origin(problem: str, origins: _Origins, path: Path) -> str:
    key = tuple(problem.split(":")[0].split("."))
    while key and key not in origins:
        key = key[:-1]
    return origins.get(key, str(path))


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def import_user_module(module: str, folders: Sequence[Path]) -> None:
    """Import ``module`` from one of ``folders`` or the installed packages.

    Raises:
        UserError: there is no such module, or it fails to load.
    """
    sys.path[:0] = [folder for folder in dict.fromkeys(map(str, folders)) if folder not in sys.path]
    if module.endswith(".py") or "/" in module:
        raise UserError(f"imports: {module!r} is a file; name the module, {Path(module).stem!r}")
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"imports: module {module!r} was found but needs {error.name!r}, which is missing"
            ) from None
        raise UserError(
            f"imports: no module {module!r} in {', '.join(map(str, folders))} or among the installed packages"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(f"imports: module {module!r} failed to load: {type(error).__name__}: {error}") from error
