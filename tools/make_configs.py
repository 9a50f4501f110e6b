#!/usr/bin/env python3
"""Write the configurations of a data set from the facts that its ``_published.yaml`` collects."""

import argparse
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mdistill import cli
from mdistill.errors import RunFailed, UserError, suggestion
from mdistill.files import write_text
from mdistill.models.names import SHORT_NAMES, pair_file_name
from mdistill.registry import problem_lines

FACTS = "_published.yaml"
COMMENT_WIDTH, SECTION_WIDTH = 120, 130  # columns; a section that is longer has a line for each of its keys

DESCRIPTION = f"""Write the configurations that {FACTS} describes: beside it, in a folder for each method and variant.

What is already as it should be is not touched, and nothing is removed: configurations that {FACTS} does not
describe are named."""

EXAMPLES = """  python tools/make_configs.py            write
  python tools/make_configs.py --check    write nothing, name each file that differs

exit codes: 0 done, 1 files differ (--check) or are not described, 2 bad input"""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Teacher(_Part):
    """A released network."""

    checkpoint: str
    top1: float  # percent

    def section(self, name: str) -> dict[str, Any]:
        """``teacher:`` of a configuration."""
        return {"name": name, "checkpoint": self.checkpoint, "expected_top1": self.top1}


class Student(_Part):
    """A network to train."""

    top1: float  # percent, alone
    lr: float | None = None  # null: the recipe's


class Row(_Part):
    """Published top-1 in percent."""

    source: str
    mark: str = ""  # what a reader must know of it
    top1: list[float | None] | dict[str, float]  # of all pairs in order, or by file


class Contents(_Part):
    """What a file holds beside what follows from its networks."""

    data: dict[str, Any] = {}
    teacher: dict[str, Any] = {}
    distiller: dict[str, Any] = {}
    solver: dict[str, Any] = {}
    note: str | None = None  # a comment; each line is a paragraph

    def plus(self, other: "Contents") -> "Contents":
        """The same with the keys of ``other`` added or replaced, and with its note if it has one."""
        return Contents(
            data={**self.data, **other.data},
            teacher={**self.teacher, **other.teacher},
            distiller={**self.distiller, **other.distiller},
            solver={**self.solver, **other.solver},
            note=self.note if other.note is None else other.note,
        )


class Folder(Contents):
    """A method or a variant of one: a file for each pair, or for each student alone."""

    method: str
    alone: bool = False
    pairs: list[tuple[str, str]] | None = None  # null: all
    published: list[Row] = []
    files: dict[str, Contents] = {}  # by file


class Facts(_Part):
    """The whole of ``_published.yaml``; a file goes by its name without ``.yaml``."""

    by_hand: list[str]
    teachers: dict[str, Teacher]
    students: dict[str, Student]
    pairs: dict[str, list[tuple[str, str]]]  # by group
    sources: dict[str, str | dict[str, str]]  # of all pairs, or by group
    folders: dict[str, Folder]

    @property
    def groups(self) -> dict[str, str]:
        """Which group the pair of each file is of, in order."""
        return {file_of(*pair): group for group, pairs in self.pairs.items() for pair in pairs}

    def files(self, folder: Folder) -> dict[str, tuple[str | None, str]]:
        """The files of ``folder``, each with its teacher, if any, and its student."""
        pairs = [pair for group in self.pairs.values() for pair in group] if folder.pairs is None else folder.pairs
        if folder.alone:
            return {student: (None, student) for _, student in pairs}
        return {file_of(*pair): pair for pair in pairs}


def read(path: Path) -> Facts:
    """The facts in ``path``.

    Raises:
        UserError: it cannot be read, or holds something else; a line for each mistake.
    """
    try:
        facts = Facts.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UserError("\n".join(problem_lines(error))) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot be read as a YAML file: {' '.join(str(error).split())}") from None
    for group, pairs in facts.pairs.items():
        require_pairs(facts, pairs, f"pairs.{group}")
    for name, folder in facts.folders.items():
        check(facts, name, folder)
    return facts


def check(facts: Facts, name: str, folder: Folder) -> None:
    """Refuse what ``folder``, called ``name``, names and the facts do not have."""
    where = f"folders.{name}"
    if name != folder.method and not name.startswith(f"{folder.method}_"):
        raise UserError(f"{where}: should be called {folder.method} or {folder.method}_<variant>")
    require_pairs(facts, folder.pairs or [], f"{where}.pairs")
    files = facts.files(folder)
    for file in folder.files:
        require("file", file, files, f"{where}.files")
    for row in folder.published:
        place = f"{where}.published"
        require("source", row.source, facts.sources, place)
        if isinstance(row.top1, list) and len(row.top1) != len(facts.groups):
            raise UserError(f"{place}: {len(row.top1)} values of {row.source!r}, should be {len(facts.groups)}")
        source = facts.sources[row.source]
        for file in row.top1 if isinstance(row.top1, dict) else ():
            require("file", file, files, place)
            if isinstance(source, dict):
                require("group", facts.groups.get(file, ""), source, f"{place}: {row.source} of {file}")


def texts(facts: Facts, dataset: str) -> dict[str, str]:
    """Every file's path below the folder of ``dataset``, and what it should hold."""
    return {
        f"{name}/{file}.yaml": "".join(f"{line}\n" for line in lines(facts, f"{dataset}/{name}", file, *networks))
        for name, folder in facts.folders.items()
        for file, networks in facts.files(folder).items()
    }


def lines(facts: Facts, place: str, file: str, teacher: str | None, student: str) -> Iterator[str]:
    """The configuration ``file`` of the folder ``place``."""
    folder = facts.folders[place.split("/")[-1]]
    contents = folder.plus(folder.files.get(file, Contents()))
    variant = place.split("/")[-1].removeprefix(folder.method).removeprefix("_")
    sections: dict[str, dict[str, Any]] = {
        "data": contents.data,
        "teacher": {} if teacher is None else {**facts.teachers[teacher].section(teacher), **contents.teacher},
        "student": {"name": student},
        "distiller": {"name": folder.method, **contents.distiller},
        "solver": {**contents.solver},
    }
    if (lr := facts.students[student].lr) is not None:
        sections["solver"].setdefault("lr", lr)

    yield f"# python tools/train.py --cfg configs/{place}/{file}.yaml"
    known = f"student alone {facts.students[student].top1:.2f}."
    if (expected := sections["teacher"].get("expected_top1")) is not None:
        known = f"teacher {expected:.2f}, {known}"
    top1 = "; ".join(figures(facts, folder, file))
    known = f"Published top-1: {top1}. {known[0].upper()}{known[1:]}" if top1 else f"Top-1: {known}"
    for paragraph in (known, *(contents.note or "").splitlines()):
        yield from textwrap.wrap(
            paragraph, COMMENT_WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
    yield "base: ../_recipe.yaml"
    if variant:
        yield f"variant: {variant}"
    for key, values in sections.items():
        if values:
            yield from section(key, values)


def figures(facts: Facts, folder: Folder, file: str) -> Iterator[str]:
    """What is published of ``file``, each figure with its source."""
    for row in folder.published:
        top1 = row.top1 if isinstance(row.top1, dict) else dict(zip(facts.groups, row.top1, strict=True))
        if (value := top1.get(file)) is not None:
            source = facts.sources[row.source]
            named = source if isinstance(source, str) else source[facts.groups[file]]
            yield f"{value:.2f} ({named}{row.mark and f', {row.mark}'})"


def section(key: str, values: Mapping[str, Any]) -> list[str]:
    """``key: {...}``; with a line for each value where that is too long."""
    line = f"{key}: {inline(dict(values))}"
    if len(line) <= SECTION_WIDTH:
        return [line]
    return [f"{key}:", *(f"  {name}: {inline(value)}" for name, value in values.items())]


def inline(value: Any) -> str:
    """``value`` as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def file_of(teacher: str, student: str) -> str:
    """The name of a pair's file, without ``.yaml``."""
    return pair_file_name(teacher, student).removesuffix(".yaml")


def require_pairs(facts: Facts, pairs: Sequence[tuple[str, str]], where: str) -> None:
    """Refuse a pair of which the facts do not have both networks."""
    for teacher, student in pairs:
        require("teacher", teacher, facts.teachers, where)
        require("student", student, facts.students, where)
        for name in (teacher, student):
            require("network", name, SHORT_NAMES, where)


def require(kind: str, name: str, known: Mapping[str, Any], where: str) -> None:
    """Refuse a name that is not ``known``."""
    if name not in known:
        raise UserError(f"{where}: unknown {kind} {name!r}{suggestion(name, known)}")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.plain_parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    parser.add_argument("--folder", type=Path, default=Path("configs/cifar100"), help=f"where {FACTS} is (%(default)s)")
    return parser.parse_args(words)


def make(args: argparse.Namespace) -> None:
    root: Path = args.folder
    try:
        facts = read(root / FACTS)
    except UserError as error:
        raise UserError("\n".join(f"{root / FACTS}: {line}" for line in str(error).splitlines())) from None
    wanted = {root / name: text for name, text in texts(facts, root.resolve().name).items()}
    there = [path for path in sorted(root.glob("*/*.yaml")) if path.parent.name not in facts.by_hand]
    foreign = [path for path in there if path.parent.name not in facts.folders]
    unexpected = [path for path in there if path not in wanted and path not in foreign]
    missing = [path for path in wanted if path not in there]
    differing = [path for path in wanted if path in there and path.read_text(encoding="utf-8") != wanted[path]]
    problems = [f"{path}: its folder is neither in folders nor in by_hand of {FACTS}" for path in foreign]
    problems += [f"{path}: unexpected, {FACTS} does not have it" for path in unexpected]
    if args.check:
        problems += [f"{path}: missing" for path in missing]
        problems += [f"{path}: differs from what {FACTS} says" for path in differing]
    else:
        for path in (*missing, *differing):
            write_text(path, wanted[path])
            print(f"written: {path}")
    if problems:
        raise RunFailed("\n".join(problems))
    print(f"{len(wanted)} files are as {root / FACTS} says")


def main(words: Sequence[str] | None = None) -> int:
    return cli.run(make, parse(words))


if __name__ == "__main__":
    sys.exit(main())
