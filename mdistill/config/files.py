"""From YAML files, their bases and the command line to a checked configuration; every message names its source."""

import functools
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from mdistill import settings
from mdistill.config.schema import COMPONENTS, Config, check, phases_of, without_defaults
from mdistill.distillers import DISTILLERS
from mdistill.errors import UserError, printable, shown, suggestion
from mdistill.registry import Registry
from mdistill.settings import flat_settings, leaves, results_only
from mdistill.user_code import import_user_module

SOURCES = ("certain: ", "inferred: ", "ours: ")
"""How sure it is that a setting is the published one: a file or a table says so, something else does, or nothing."""

MAX_DEPTH = 16  # files that are based on each other
MAX_NESTING = 16  # sections within sections
MAX_LENGTH = 1 << 18  # characters of a file, or of a value on the command line
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?\.?inf|\.?nan", re.IGNORECASE)
_NAME_LIMIT = 180  # characters of a folder name, below the 255 bytes of common file systems

CHANGED = {
    "taid.variant": "moved its target once an epoch, as no variant does",
    "pesf_kd.variant": "had an adapter of the teacher's logits, as no variant has",
    "sinkd.variant": "was 'paper' with a kd_temperature equal to temperature and a kd_anneal_epochs of null",
}
"""Settings without which a run is of an earlier version, where no value alone says what the method did: what it did."""


@dataclass(frozen=True)
class Inline:
    """Sections of a configuration that stand in a file of another kind."""

    path: Path  # of that file, beside which user modules are
    tree: Mapping[str, Any]
    place: str = ""  # in it, for messages


def load(
    path: Path | str | Sequence[Path | Inline],
    overrides: Sequence[str] = (),
    *,
    imports: Sequence[str] = (),
    seed: int | None = None,
    folders: Sequence[Path] | None = None,
    trusted: bool = True,
) -> Config:
    """Read ``path``, its bases and ``key=value`` overrides; check everything and resolve all defaults.

    ``base:`` of a file is a path, or a list of paths, relative to it. Bases are merged key by key, depth first and in
    order: later ones win, the file's own keys win over all of them. Where a file names another component than its
    bases, their arguments are dropped that the old one knows and the new one does not; so are phases of a method.
    ``sources:`` of a file, which tells where its settings come from, is no setting.

    Args:
        path: a file; or several, which are merged in order, as ``for_pair`` gives them; or what stands elsewhere.
        overrides: ``solver.lr=0.1`` and the like; values are YAML.
        imports: further modules to load first, as ``imports:`` in the file.
        seed: replaces the file's.
        folders: where user modules are; None for beside the files and the current one.
        trusted: whether modules that the files name may be loaded; else only those that ``imports`` names too.

    Raises:
        UserError: every unknown, missing and ill-typed key together, one line each with its file and key.
    """
    parts: list[Path | Inline] = [Path(path)] if isinstance(path, (str, Path)) else list(path)
    files = [part.path if isinstance(part, Inline) else part for part in parts]
    draft = _Draft()
    for part in parts:
        if isinstance(part, Inline):
            draft.add(part.tree, ": ".join(text for text in (str(part.path), part.place) if text))
            continue
        for source, tree, _ in _with_bases(part):
            draft.add(tree, str(source))
    variant = _apply_overrides(draft, overrides)
    tree = draft.tree
    if variant:
        tree["variant"] = _shortened(",".join(part for part in (str(tree.get("variant") or ""), variant) if part))
    if seed is not None:
        draft.set(("seed",), seed, "--seed")
    modules = [str(module) for module in _as_list(tree.get("imports"))]
    unnamed = [module for module in modules if module not in imports]
    if unnamed and not trusted:
        flags = " ".join(f"--import {printable(module)}" for module in unnamed[:4])
        raise UserError(
            f"{files[-1]}: imports: it names code, {printable(', '.join(unnamed))}; code that a run folder names is run"
            f" only when you name it ({flags}) or trust the folder (--trust)"
        )
    if imports:
        tree["imports"] = modules = [*modules, *(module for module in imports if module not in modules)]
    if folders is None:
        folders = [*(file.resolve().parent for file in files), Path.cwd()]
    for module in modules:
        import_user_module(module, folders)
    draft.drop_foreign_arguments()
    retired = retire(tree)
    config, problems = check(tree)
    problems = [_of_earlier_version(line, tree) for line in problems]
    if config is None or retired:
        raise UserError("\n".join(f"{draft.origin(line, files[-1])}: {line}" for line in [*retired, *problems]))
    return config


def sources(path: Path) -> dict[str, str]:
    """Where the settings of ``path`` come from, as ``sources:`` of it and its bases say.

    A line for a section speaks for those keys of it that its own file sets; where the file sets none of them, for those
    that the files before it set. The line of a key goes before that of its section. A key that a file sets without a
    line has no source, whatever earlier files say of it.

    Returns:
        for each dotted key that a file sets and tells of: "certain: ", "inferred: " or "ours: ", and from where.

    Raises:
        UserError: a file cannot be read, or its ``sources:`` are none.
    """
    found: dict[str, str] = {}  # of every key that is set so far; "" where nothing is told of it
    for _, tree, told in _with_bases(path):
        own = {(dotted := ".".join(key)): _line_for(dotted, told) for key, _ in leaves(tree)}
        taken = {"", *own.values()}
        lines = {key: line for key in found if (line := _line_for(key, told)) not in taken} | own
        found |= {key: told.get(line, "") for key, line in lines.items()}
    return {key: text for key, text in found.items() if text}


def _line_for(key: str, told: Mapping[str, str]) -> str:
    """Which line of ``told`` is for ``key``, such as ``distiller.beta``: its own or its section's; "" for none."""
    while key and key not in told:
        key = key.rpartition(".")[0]
    return key


def for_pair(cfg: Path, pair: str) -> tuple[list[Path], str]:
    """The files of a method and a pair: the method's own for that pair, else the pair's and the method's base.

    Settings that are published for one pair are in that pair's file alone, so none is carried over to another pair.

    Args:
        cfg: the method's folder, or any file in it.
        pair: such as ``res56_res20``, a file of ``_pairs`` beside the method's folder.

    Returns:
        what ``load`` takes, and a line that says which files these are.

    Raises:
        UserError: there is no such folder or pair.
    """
    if not cfg.exists():
        raise UserError(f"no such configuration file or folder: {cfg}{_near(cfg)}")
    folder = cfg if cfg.is_dir() else cfg.parent
    method = folder / "_method.yaml"
    pairs = (folder / ".." / "_pairs").glob("*.yaml") if method.is_file() else ()
    own = {path.stem: path for path in folder.glob("[!_]*.yaml")}
    general = {path.stem: _tidy(path) for path in pairs}
    if pair in own:
        return [own[pair]], f"pair {pair}: {own[pair]}"
    if pair in general:
        return [general[pair], method], (
            f"pair {pair}: {folder} has no file for it, so {general[pair]} and {method}; settings published for other"
            " pairs are left out"
        )
    known = sorted({*own, *general})
    raise UserError(f"--pair: unknown pair {pair!r} in {folder}{suggestion(pair, known)} (known: {', '.join(known)})")


# ---- putting it together -------------------------------------------------------------------------------------------

_Key = tuple[str, ...]
_ABSENT = object()


@dataclass
class _Draft:
    """A configuration in the making, and where each of its keys comes from."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[_Key, str] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)  # of the components, as the files say
    written_for: dict[_Key, Any] = field(default_factory=dict)  # (section, argument): the name at the time

    def add(self, tree: Mapping[str, Any], source: str) -> None:
        """Merge ``tree``, of a file, key by key; an empty section changes nothing."""
        changes = {
            key: value for key, value in leaves(tree) if value != {} or not isinstance(_get(self.tree, key), dict)
        }
        for key, value in changes.items():
            self.set(key, value, source)
        for section, *rest in changes:
            if section in COMPONENTS and rest:
                self.names[section] = self.tree[section].get("name")
                self.written_for[section, rest[0]] = self.names[section]
        for section, *rest in changes:
            if section == "phases" and rest:
                self.written_for[section, rest[0]] = self.names.get("distiller")

    def set(self, key: _Key, value: Any, source: str) -> None:
        """Put ``value`` at ``key``, whole."""
        tree = self.tree
        for depth, part in enumerate(key[:-1]):
            below = tree.get(part)
            if below is None:
                below = tree[part] = {}
            if not isinstance(below, dict):
                place = ".".join(key[: depth + 1])
                raise UserError(f"{source}: {'.'.join(key)}: {place} is not a section, it holds {shown(below)}")
            tree = below
        tree[key[-1]] = value
        for known in (self.origins, self.written_for):
            for old in [old for old in known if old[: len(key)] == key[: len(old)]]:
                del known[old]
        self.origins[key] = source

    def drop_foreign_arguments(self) -> None:
        """Leave out what a file has for a component that a later one replaced, where it does not apply."""
        for (section, argument), name in self.written_for.items():
            component = "distiller" if section == "phases" else section
            registry, model = COMPONENTS[component]
            old, new = _canonical(registry, name), _canonical(registry, self.names.get(component))
            if old is None or new is None or old == new:
                continue
            if section == "phases":
                foreign = argument in phases_of(old) and argument not in phases_of(new)
            elif argument in model.model_fields:
                foreign = argument in {"checkpoint", "expected_top1", "classes", "preprocessing"}  # of that network
            else:
                foreign = argument in registry.arguments(old) and argument not in registry.arguments(new)
            if foreign:
                del self.tree[section][argument]
                self.origins.pop((section, argument), None)

    def origin(self, problem: str, default: Path) -> str:
        """Where the key that ``problem`` begins with was set."""
        key = tuple(problem.split(":")[0].split("."))
        within = next((source for place, source in self.origins.items() if place[: len(key)] == key), str(default))
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins.get(key, within)


def _apply_overrides(draft: _Draft, overrides: Sequence[str]) -> str:
    """Apply ``key=value`` in place; return what they change of the result, as part of a folder name."""
    original = results_only(draft.tree)
    keys = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name or not all(name.split(".")):
            raise UserError(
                f"command line: {shown(override)} is not an override; write key=value, such as solver.lr=0.1"
            )
        try:
            key, value = tuple(_plain_text(name).split(".")), _parse(text)
        except Exception as error:
            raise UserError(f"command line: {shown(override)}: not a YAML value: {_one_line(error)}") from None
        if len(key) > MAX_NESTING:
            raise UserError(
                f"command line: {shown(override)}: a key of {len(key)} parts; no section is nested deeper than"
                f" {MAX_NESTING}"
            )
        if len(key) == 1 and key[0] not in Config.model_fields:
            known = {dotted[-1]: ".".join(dotted) for dotted, _ in leaves(draft.tree)}
            hint = f"; did you mean {known[name]}?" if name in known else suggestion(name, known.values())
            raise UserError(
                f"command line: {shown(override)}: unknown key {shown(name)}{hint}"
                f" (sections: {', '.join(Config.model_fields)})"
            )
        draft.set(key, value, "command line")
        keys.append(key)
    final = results_only(draft.tree)
    changed = {key: _get(final, key) for key in keys if _get(final, key) != _get(original, key)}
    if _get(final, ("solver", "schedule")) != "cosine":
        changed.pop(("solver", "epochs"), None)  # a run may grow; not under a cosine, where every epoch depends on it
    return _variant(changed)


def retire(tree: dict[str, Any]) -> list[str]:
    """Take settings of earlier versions out of ``tree``; a line for each that did something."""
    given = tree.get("distiller")
    if not isinstance(given, dict) or (method := _canonical(DISTILLERS, given.get("name"))) is None:
        return []
    return settings.retire(given, method, DISTILLERS.arguments(method))


def changes(before: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that change results in which ``config`` differs from a recorded one, as ``settings.changes``."""
    chosen = flat_settings(without_defaults(config))
    return settings.changes(flat_settings(before), flat_settings(config.resolved()), chosen)


def _of_earlier_version(problem: str, tree: Mapping[str, Any]) -> str:
    """``problem`` of ``tree``; where a setting of ``CHANGED`` is missing, with what its method did without."""
    method = _canonical(DISTILLERS, _get(tree, ("distiller", "name")))
    for setting, did in CHANGED.items():
        owner, key = setting.split(".")
        if owner == method and problem.startswith(f"distiller.{key}: missing"):
            return (
                f"{problem}; of earlier versions, where {method!r} had none and {did}, a run is evaluated and resumed"
                " by the version that began it (env.json names its commit)"
            )
    return problem


# ---- reading -------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, and aliases, which can unfold to more than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)

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


def _with_bases(path: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[str, Any], dict[str, str]]]:
    """What ``path`` and its bases hold, and their ``sources:``, in the order of merging: every file after its bases.

    Args:
        above: the files that this one is a base of, the first one first.
    """
    tree = read_yaml(path)
    bases, told = tree.pop("base", None), _sources(path, tree.pop("sources", None))
    bases = [bases] if isinstance(bases, str) else [] if bases is None else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(
            f"{path}: base: should be a path or a list of paths relative to this file, found {shown(bases)}"
        )
    chain = (*above, path)
    for base in bases:
        base_path = _tidy(path.parent / base)
        if not base_path.is_file():
            raise UserError(f"{path}: base: no such file {base_path}{_near(base_path)}")
        if any(base_path.samefile(file) for file in chain):
            raise UserError(f"{path}: base: {base_path} is based on this file in turn")
        if len(chain) == MAX_DEPTH:
            raise UserError(f"{path}: base: more than {MAX_DEPTH} files are based on each other, from {chain[0]} on")
        yield from _with_bases(base_path, chain)
    yield path, tree, told


def read_tree(path: Path) -> dict[str, Any]:
    """What a YAML file and its bases hold, unchecked.

    Raises:
        UserError: one of them cannot be read.
    """
    draft = _Draft()
    for source, tree, _ in _with_bases(path):
        draft.add(tree, str(source))
    return draft.tree


def _sources(path: Path, given: Any) -> dict[str, str]:
    """``sources:`` of a file, checked."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: sources: should hold `key: where it comes from` lines, found {shown(given)}")
    for key, text in given.items():
        section = str(key).split(".")[0]
        if section not in Config.model_fields:
            near = suggestion(section, Config.model_fields)
            raise UserError(f"{path}: sources.{printable(str(key), 80)}: no section {printable(section, 80)!r}{near}")
        if not isinstance(text, str) or not text.startswith(SOURCES):
            raise UserError(
                f"{path}: sources.{printable(str(key), 80)}: should begin with one of {', '.join(SOURCES)}, found"
                f" {shown(text)}"
            )
    return {str(key): " ".join(text.split()) for key, text in given.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML file holds, without its bases.

    Raises:
        UserError: it cannot be read, or does not hold keys and values.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it, or one of its pairs with --pair")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_LENGTH + 1)
    except FileNotFoundError:
        raise UserError(f"no such configuration file: {path}{_near(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a YAML file: {error}") from None
    try:
        tree = _parse(text)
    except Exception as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: should hold `key: value` lines, found {type(tree).__name__}")
    return tree


def inline_section(text: str, where: str) -> dict[str, Any]:
    """A section of a configuration as it is written on a command line: a name, or ``{name: ..., key: value}``.

    Args:
        where: the flag, for messages.

    Raises:
        UserError: it is neither.
    """
    if not text.startswith("{"):
        return {"name": text}
    try:
        section = _parse(text)
    except Exception as error:
        raise UserError(f"{where}: {shown(text)}: not YAML: {_one_line(error)}") from None
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise UserError(f"{where}: should be a name or {{name: ..., key: value}}, found {shown(text)}")
    return section


def yaml_value(text: str, where: str) -> Any:
    """A YAML value as it is written on a command line; ``where`` is the argument, for messages.

    Raises:
        UserError: it is none.
    """
    try:
        return _parse(text)
    except Exception as error:
        raise UserError(f"command line: {shown(where)}: not a YAML value: {_one_line(error)}") from None


def _parse(text: str) -> Any:
    """The YAML value ``text``; may fail in any way: its constructors let out whatever Python raises."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH:,} characters")
    return _plain(_loaded(text))  # a copy


@functools.lru_cache(maxsize=512)  # a table reads the same bases for each of its cells
def _loaded(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        return f"{place}: {printable(str(error.problem), 200)}"
    text = " ".join(str(error).split())
    return printable(
        text if isinstance(error, (yaml.YAMLError, ValueError)) else f"{type(error).__name__}: {text}", 200
    )


def _plain(value: Any, depth: int = 0) -> Any:
    """``value`` as a configuration can hold it: text that is a number is one (YAML 1.1 reads ``5e-4`` as text).

    Raises:
        ValueError: it is nested too deep, a number that no 64 bits hold, or text that no file can hold.
    """
    if depth > MAX_NESTING:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels")
    if isinstance(value, dict):
        return {_plain_text(str(key)): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, str):
        return _number(value) if len(value) < 400 and _NUMBER.fullmatch(value) else _plain_text(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("a whole number beyond 64 bits")
    return value


def _number(text: str) -> int | float:
    try:
        number: int | float = int(text)
    except ValueError:
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if math.isinf(number) and "inf" not in text.lower():
            raise ValueError(f"{text} is beyond what a number can be") from None
    return _plain(number) if isinstance(number, int) else number


def _plain_text(text: str) -> str:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{shown(text)} holds a character that no file can hold")
    return text


def _get(tree: Any, key: _Key) -> Any:
    """What ``tree`` holds at ``key``, or ``_ABSENT``."""
    for part in key:
        if not isinstance(tree, Mapping) or part not in tree:
            return _ABSENT
        tree = tree[part]
    return tree


def _canonical(registry: Registry[Any], name: Any) -> str | None:
    """The canonical form of ``name``; None where it is no name."""
    try:
        return registry.canonical(name) if isinstance(name, str) else None
    except UserError:
        return None


def _tidy(path: Path) -> Path:
    """``path`` without ``..``, where that is the same file."""
    short = Path(os.path.normpath(path))
    return short if short.exists() and short.samefile(path) else path


def _near(path: Path) -> str:
    """The YAML file beside ``path`` whose name is most like its own, for a message."""
    return suggestion(path.name, [other.name for other in path.parent.glob("*.yaml")])


# ---- naming --------------------------------------------------------------------------------------------------------


def _variant(changed: Mapping[_Key, Any]) -> str:
    """``beta=4,temperature=2``: what overrides changed, as part of a folder name."""
    names = {key: ".".join(key[1:]) if key[0] == "phases" and key[1:] else key[-1] for key in changed}
    short = list(names.values())
    parts = [
        f"{names[key] if short.count(names[key]) == 1 else '.'.join(key)}={_value_text(value)}"
        for key, value in changed.items()
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


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
