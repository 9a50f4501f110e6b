"""Table files: which pairs, methods and seeds a table has, and the runs behind its cells."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, ValidationError

from mdistill.config import Config, for_pair, load
from mdistill.config.files import read_yaml
from mdistill.errors import UserError, suggestion
from mdistill.models.names import student_file_name
from mdistill.registry import problem_lines


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class RowConfig(_Section):
    """One row: a method."""

    name: Annotated[str, Field(min_length=1, max_length=80)]  # as the table prints it
    method: str  # a folder of ``configs/<dataset>`` or beside the table file; or, where there is one pair, a file
    set: Annotated[tuple[str, ...], Field(strict=False)] = ()  # ``key=value``, for this row


class TableConfig(_Section):
    """A table file."""

    title: Annotated[str, Field(min_length=1)]
    source: str = ""  # of its published figures, as in ``results/published.csv``
    table: Annotated[str, BeforeValidator(str)] = ""  # its number there
    dataset: str = "cifar100"  # a folder of ``configs``
    pairs: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]  # files of ``configs/<dataset>/_pairs``
    methods: Annotated[tuple[str | RowConfig, ...], Field(strict=False, min_length=1)]
    seeds: Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(strict=False, min_length=1)] = (0, 1, 2)
    set: Annotated[tuple[str, ...], Field(strict=False)] = ()  # ``key=value``, for every run


@dataclass(frozen=True)
class Row:
    """A method of a table."""

    name: str
    method: str  # the folder of its configurations
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A method for a pair: runs that differ in their seed alone."""

    row: Row
    pair: str
    cfg: Path  # of its configuration, or the folder of its method
    of_pair: bool  # whether ``cfg`` is taken for ``pair``, else as it is
    overrides: tuple[str, ...]

    def config(self, seed: int) -> Config:
        """Of the run with ``seed``."""
        files = for_pair(self.cfg, self.pair)[0] if self.of_pair else [self.cfg]
        return load(files, self.overrides, seed=seed)

    def arguments(self, seed: int) -> list[str]:
        """Of ``mdistill train`` for that run."""
        pair = ["--pair", self.pair] if self.of_pair else []
        return ["--cfg", str(self.cfg), *pair, "--seed", str(seed), *self.overrides]


@dataclass(frozen=True)
class Table:
    """A table file, its rows and pairs found."""

    path: Path
    title: str
    source: str
    number: str
    rows: tuple[Row, ...]
    pairs: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]  # row by row

    def cell(self, row: Row, pair: str) -> Cell:
        """The cell of ``row`` and ``pair``."""
        return next(cell for cell in self.cells if (cell.row, cell.pair) == (row, pair))


def find_table(name: str, configs: Path) -> Path:
    """The table file called ``name``: a path, or a file of ``configs/tables`` without its ending.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"no such table file: {path}")
        return path
    known = sorted(file.stem for file in (configs / "tables").glob("*.yaml"))
    if name not in known:
        raise UserError(f"unknown table {name!r}{suggestion(name, known)} (known: {', '.join(known)}; or a path)")
    return configs / "tables" / f"{name}.yaml"


def read_table(
    path: Path,
    configs: Path,
    *,
    methods: Sequence[str] | None = None,
    pairs: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> Table:
    """The table of ``path``, or the part of it that is asked for.

    Args:
        configs: the folder of all configurations.
        methods: names of rows.
        overrides: ``key=value`` for every run, after the table's own.

    Raises:
        UserError: the file, a row or a pair is none.
    """
    given = _parsed(path)
    rows = tuple(_row(each, given, path, configs) for each in given.methods)
    for kind, names in (("methods", [row.name for row in rows]), ("pairs", list(given.pairs))):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{path}: {kind}: {twice[0]!r} is given twice")
    if methods is not None:
        rows = tuple(rows[_index(name, [row.name for row in rows], "--methods")] for name in methods)
    files = [row for row in rows if Path(row.method).is_file()]
    if files and len(given.pairs) > 1:
        raise UserError(
            f"{path}: methods: {files[0].method} is a file, which is of one pair, and the table has {len(given.pairs)};"
            " name a folder with _method.yaml"
        )
    wanted = given.pairs if pairs is None else tuple(given.pairs[_index(n, given.pairs, "--pairs")] for n in pairs)
    cells = tuple(
        Cell(row, pair, *_configuration(row, pair, path), (*given.set, *row.overrides, *overrides))
        for row in rows
        for pair in wanted
    )
    chosen = given.seeds if seeds is None else tuple(seeds)
    return Table(path, given.title, given.source, given.table, rows, wanted, chosen, cells)


def _parsed(path: Path) -> TableConfig:
    try:
        return TableConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = []
        for detail, line in zip(error.errors(), problem_lines(error), strict=True):
            key = str(detail["loc"][-1])
            if detail["type"] == "extra_forbidden":
                known = RowConfig.model_fields if len(detail["loc"]) > 1 else TableConfig.model_fields
                line = f"{'.'.join(map(str, detail['loc']))}: unknown key{suggestion(key, known)}"
            lines.append(f"{path}: {line}")
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def _row(given: str | RowConfig, table: TableConfig, path: Path, configs: Path) -> Row:
    row = RowConfig(name=given, method=given) if isinstance(given, str) else given
    folders = [configs / table.dataset / row.method, path.parent / row.method]
    for folder in folders:
        if folder.exists() and row.method:
            return Row(row.name, str(folder), row.set)
    known = [each.name for each in (configs / table.dataset).glob("[!_]*") if each.is_dir()]
    raise UserError(
        f"{path}: methods: {row.method!r} is neither a folder of {configs / table.dataset} nor beside the table file"
        f"{suggestion(row.method, known)}"
    )


def _configuration(row: Row, pair: str, path: Path) -> tuple[Path, bool]:
    """That of a method for a pair; of a method without a teacher, that of the pair's student alone."""
    folder = Path(row.method)
    if folder.is_file():
        return folder, False
    pair_file = folder / ".." / "_pairs" / f"{pair}.yaml"
    if pair_file.is_file() and not (folder / f"{pair}.yaml").is_file():
        student = read_yaml(pair_file).get("student")
        alone = folder / student_file_name(student["name"]) if isinstance(student, dict) else folder
        if alone.is_file():
            return alone, False
    try:
        for_pair(folder, pair)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return folder, True


def _index(name: str, known: Sequence[str], flag: str) -> int:
    if name not in known:
        raise UserError(f"{flag}: unknown {name!r}{suggestion(name, known)} (in this table: {', '.join(known)})")
    return list(known).index(name)


def runs_of(table: Table) -> Iterator[tuple[Cell, int]]:
    """Every run: all cells of the first seed, then those of the next, so that a table that is cut short is balanced."""
    for seed in table.seeds:
        for cell in table.cells:
            yield cell, seed
