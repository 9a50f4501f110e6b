"""What the cells of a table want, in plain containers.

Finding it out builds every configuration, which imports torch and takes seconds; so it is written down beside the runs
and read back as long as no file that it depends on has changed.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from mdistill.errors import RunFailed, UserError
from mdistill.files import read_text, write_text
from mdistill.reporting.records import Record, key_of
from mdistill.reporting.table_files import known_to_table, shared_folder
from mdistill.reporting.transfers import split_metric, targets_of
from mdistill.settings import changes, checkpoints, flat_settings

if TYPE_CHECKING:
    from mdistill.config import Config, Inline
    from mdistill.reporting.table_files import Cell, Table

MEMORY = ".tables"  # a folder beside the runs
TEACHER = "teacher.checkpoint"
KEPT = 4  # files in it for each table: of several --epochs and overrides


@dataclass(frozen=True)
class Wanted:
    """A cell: what the runs of a method and a pair have to be."""

    row: str
    pair: str
    key: tuple[str, str, str, str]  # data set, method, teacher, student
    published: str  # variant of its published figure
    epochs: int
    settings: dict[str, Any]  # that change results, by dotted key
    chosen: tuple[str, ...]  # those of them that are not at their default
    checkpoints: dict[str, str] = field(default_factory=dict)  # the weights that they begin from, by dotted key
    variant: str = ""  # of its own runs
    metric: str = "top1"  # of its figures

    def changes(self, record: Record, weights: Mapping[str, str] | None = None) -> dict[str, tuple[Any, Any]]:
        """The settings in which ``record`` is another run, with both values; none where it is of this cell.

        The weights that it began from are compared by their files' SHA-256 where both are known; else by the names that
        the configurations have for them, as far as both name the path. A teacher that the table has trained itself, for
        want of the file, has a name of its own.

        Args:
            weights: SHA-256 of this cell's files, by dotted key, where they are there.
        """
        found = changes(record.settings, self.settings, self.chosen)
        recorded = record.weights if weights else {}
        for key, wanted in self.checkpoints.items():
            name = record.checkpoints.get(key, "")
            mine, theirs = (weights or {}).get(key, ""), recorded.get(key, "")
            if mine and theirs:
                if mine != theirs:
                    found[key] = (f"{name} (SHA-256 {theirs[:12]})", f"{wanted} (SHA-256 {mine[:12]})")
            elif not _may_be(name, wanted) and not (key == TEACHER and self._has_trained(name)):
                found[key] = (name or None, wanted or None)
        return found

    def _has_trained(self, checkpoint: str) -> bool:
        """Whether the table may have trained this teacher itself, for want of the file that the cell names."""
        return self._is_run_of_teacher(checkpoint) and not self._is_run_of_teacher(self.checkpoints[TEACHER])

    def _is_run_of_teacher(self, checkpoint: str) -> bool:
        """Whether it names one of it alone, of whose path a published record may have no more than the end."""
        *above, last = _parts(checkpoint) or ("",)
        return re.fullmatch(r"seed\d+", last) is not None and (not above or self.key[2].replace("/", "-") in above)

    def difference(self, record: Record) -> str | None:
        """The first setting in which ``record`` is another run, with both values; None where it is of this cell."""
        for name, (there, here) in self.changes(record).items():
            lacks = name in self.chosen and name not in record.settings
            told = f"no {name}" if lacks else f"{name} {_plain(there)}"
            foreign = name not in self.settings and name not in self.checkpoints
            return f"{told} instead of {'none' if foreign else _plain(here)}"
        return None

    def other_names(self, record: Record) -> dict[str, tuple[str, str]]:
        """The weights that ``record`` has another name for than this cell has, with both."""
        both = {key: (record.checkpoints.get(key, ""), name) for key, name in self.checkpoints.items()}
        return {key: names for key, names in both.items() if not _may_be(*names)}


@dataclass(frozen=True)
class Layout:
    """A table: its words, rows, columns and cells."""

    title: str
    source: str  # of its published figures
    number: str
    rows: tuple[str, ...]
    pairs: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Wanted, ...]
    without: dict[str, dict[str, str]] = field(default_factory=dict)  # rows and their pairs without a cell, and why
    metrics: tuple[str, ...] = ("top1",)
    notes: tuple[str, ...] = ()
    shortened: int | None = None  # epochs that every schedule was shortened to
    transfer: dict[str, Any] = field(default_factory=dict)  # settings of metrics on targets
    tuned: dict[str, dict[str, str]] = field(default_factory=dict)  # rows and their pairs: how, or that they are not
    rivals: tuple[Wanted, ...] = ()  # cells of the whole table that this part of it leaves out

    @property
    def targets(self) -> tuple[str, ...]:
        """Data sets that its students' features are tried on."""
        return targets_of(self.metrics)

    def holds(self, record: Record) -> bool:
        """Whether ``record`` is of one of its cells and seeds."""
        of_cell = (cell.key == record.key and self.difference(cell, record) is None for cell in self.cells)
        return record.seed in self.seeds and any(of_cell)

    def difference(self, cell: Wanted, record: Record) -> str | None:
        """In what ``record`` is no run of ``cell``; None where it is one.

        Of cells with equal settings, which differ in the weights that their runs begin from or in their variants alone,
        it is of the one whose weights it names, then of the one whose variant it has.
        """
        why = cell.difference(record)
        if why is not None:
            return why
        rivals = [
            other
            for other in (*self.cells, *self.rivals)
            if (other.variant, other.checkpoints) != (cell.variant, cell.checkpoints)
            and other.key == cell.key
            and other.settings == cell.settings
            and other.difference(record) is None
        ]
        named = [other for other in rivals if not other.other_names(record)]
        for key, (there, here) in cell.other_names(record).items():
            if named:
                return f"{key} {there} instead of {here}"
        rivals = rivals if cell.other_names(record) else named
        if record.variant != cell.variant and any(other.variant != cell.variant for other in rivals):
            return f"variant {record.variant or 'none'} instead of {cell.variant or 'none'}"
        return None

    def showing(self, metrics: Sequence[str]) -> "Layout":
        """Its cells with figures of ``metrics``: a column for each pair, or for each pair and metric of several."""
        if len(metrics) == 1:
            return replace(self, cells=tuple(replace(cell, metric=metrics[0]) for cell in self.cells))

        def column(pair: str, metric: str) -> str:
            target, accuracy = split_metric(metric)
            return " ".join([pair, *([target] if target else []), *([] if accuracy == "top1" else ["top-5"])])

        columns = {pair: {metric: column(pair, metric) for metric in metrics} for pair in self.pairs}
        return replace(
            self,
            pairs=tuple(name for pair in self.pairs for name in columns[pair].values()),
            cells=tuple(
                replace(cell, pair=name, metric=metric)
                for cell in self.cells
                for metric, name in columns[cell.pair].items()
            ),
            without={
                row: {name: why for pair, why in pairs.items() for name in columns.get(pair, {}).values()}
                for row, pairs in self.without.items()
            },
        )

    def part(self, rows: Sequence[str] | None, pairs: Sequence[str] | None, seeds: Sequence[int] | None) -> "Layout":
        """Some of its rows, pairs and seeds, in the order asked for; None for all.

        Raises:
            UserError: a row or a pair is none of its own.
        """
        for names, known, flag in ((rows, self.rows, "--methods"), (pairs, self.pairs, "--pairs")):
            for name in names or ():
                known_to_table(name, known, flag)
        chosen_rows = self.rows if rows is None else tuple(rows)
        chosen_pairs = self.pairs if pairs is None else tuple(pairs)
        wanted = {(cell.row, cell.pair): cell for cell in self.cells}
        cells = tuple(wanted[row, pair] for row in chosen_rows for pair in chosen_pairs if (row, pair) in wanted)
        return replace(
            self,
            rows=chosen_rows,
            pairs=chosen_pairs,
            seeds=self.seeds if seeds is None else tuple(seeds),
            notes=tuple(note for note in self.notes if self._is_shown(note, {*chosen_rows, *chosen_pairs})),
            cells=cells,
            rivals=(*self.rivals, *(cell for cell in self.cells if cell not in cells)),
        )

    def _is_shown(self, note: str, chosen: Set[str]) -> bool:
        """Whether what ``note`` is about, if it begins with names of rows and pairs and a colon, is ``chosen``."""
        names = {name.strip() for name in note.partition(":")[0].split(",")}
        if not names <= {*self.rows, *self.pairs}:
            return True
        return all(not of & names or of & names & chosen for of in ({*self.rows}, {*self.pairs}))


@dataclass
class _Stamp:
    """A hash of files by their names, sizes and times."""

    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, paths: Iterable[Path]) -> "_Stamp":
        for path in sorted(paths):
            stat = path.stat()
            self.digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return self


def layout(
    name: str,
    configs: Path,
    output: Path,
    *,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    epochs: int | None = None,
) -> Layout:
    """The whole table called ``name``, from what was written down below ``output`` where that is up to date.

    Args:
        configs: the folder of all configurations.
        overrides: ``key=value`` for every run.
        imports: user modules beside the table's own.
        epochs: what every schedule is shortened to; None for what the table says.

    Raises:
        UserError: there is no such table, or it cannot be built.
    """
    memory = _memory(name, configs, output, overrides, imports, epochs)
    if memory is not None:
        with suppress(UserError, ValueError, TypeError, KeyError):
            return _read(json.loads(read_text(memory)))
    from mdistill.reporting.table_files import find_table, read_table

    table = read_table(find_table(name, configs), configs, overrides=overrides, imports=imports, epochs=epochs)
    found, lasting = _resolved(table, configs)
    if memory is not None and lasting and output.is_dir():
        with suppress(RunFailed, OSError):  # nothing but time depends on it
            write_text(memory, json.dumps(asdict(found)))
            of_table = sorted(
                memory.parent.glob(f"{memory.name.rpartition('-')[0]}-*"), key=lambda file: file.stat().st_mtime
            )
            for old in of_table[:-KEPT]:
                old.unlink()
    return found


def _resolved(table: "Table", configs: Path) -> tuple[Layout, bool]:
    """The table, and whether it depends on nothing but what ``_memory`` looks at."""
    from mdistill.reporting.table_files import how_tuned, short

    cells, lasting = [], True
    folders: dict[Path, tuple[Cell, Config]] = {}
    for cell in table.cells:
        published = cell.config(table.seeds[0])
        config = published if table.epochs is None else short(cell, table.epochs).config(table.seeds[0])
        cells.append(wanted(cell, published, config))
        other, there = folders.setdefault(config.run_folder(), (cell, config))
        if there != config:
            one, two = (f"{each.row.name} {each.pair}" for each in (other, cell))
            raise shared_folder(table.path, one, two, config.run_folder())
        lasting = lasting and not config.imports and all(_is_stamped(part, table.path, configs) for part in cell.parts)
    rows = tuple(row.name for row in table.rows)
    without = {row.name: dict(row.without) for row in table.rows if row.without}
    tuned: dict[str, dict[str, str]] = {}
    if table.names_tuned or any(row.search for row in table.rows):
        for cell in table.cells:
            tuned.setdefault(cell.row.name, {})[cell.pair] = how_tuned(cell, named=bool(table.names_tuned))
    found = Layout(
        table.title,
        table.source,
        table.number,
        rows,
        table.pairs,
        table.seeds,
        tuple(cells),
        without,
        table.metrics,
        table.notes,
        table.epochs,
        table.transfer,
        tuned,
    )
    return found, lasting


def _is_stamped(part: "Path | Inline", table: Path, configs: Path) -> bool:
    """Whether a part of a configuration is of a file that ``_memory`` looks at."""
    path = (part if isinstance(part, Path) else part.path).resolve()
    return path == table.resolve() or path.is_relative_to(configs.resolve())


def wanted(cell: "Cell", published: "Config", config: "Config") -> Wanted:
    """What the runs of ``cell`` have to be, which are of ``config``.

    Args:
        published: its configuration with the whole schedule, whose figure is published.
    """
    from mdistill.config import without_defaults

    plain = config.resolved()
    settings = flat_settings(plain)
    chosen = flat_settings(without_defaults(config))
    return Wanted(
        cell.row.name,
        cell.pair,
        key_of(plain),
        published.variant if cell.row.published is None else cell.row.published,
        config.epochs,
        settings,
        tuple(name for name in settings if name in chosen),
        checkpoints(plain),
        config.variant,
    )


def _memory(
    name: str, configs: Path, output: Path, overrides: Sequence[str], imports: Sequence[str], epochs: int | None
) -> Path | None:
    """The file that the table is written down in, named after all that it depends on; None where there is no table."""
    path = next((path for path in (Path(name), configs / "tables" / f"{name}.yaml") if path.is_file()), None)
    if path is None:
        return None
    code = Path(__file__).resolve().parents[1]
    beside = path.parent.glob("*.yaml")  # among them the one with tuned settings
    stamp = _Stamp().add([path, *beside, *configs.rglob("*.yaml"), *code.rglob("*.py")]).digest
    stamp.update(json.dumps([list(overrides), list(imports), epochs, sys.version]).encode())
    return output / MEMORY / f"{path.stem}-{stamp.hexdigest()[:16]}.json"


def _read(content: dict[str, Any]) -> Layout:
    cells = tuple(
        Wanted(**{**cell, "key": tuple(cell["key"]), "chosen": tuple(cell["chosen"])}) for cell in content["cells"]
    )
    lists = {key: tuple(content[key]) for key in ("rows", "pairs", "seeds", "metrics", "notes", "rivals")}
    return Layout(**{**content, **lists, "cells": cells})


def _may_be(found: str, wanted: str) -> bool:
    """Whether two names of weights may be of one file, each with as much of its path as it has."""
    if found == wanted or not found or not wanted:
        return found == wanted
    one, other = _parts(found), _parts(wanted)
    length = min(len(one), len(other))
    return one[len(one) - length :] == other[len(other) - length :]


def _parts(checkpoint: str) -> tuple[str, ...]:
    """Of its path; a run folder stands for the network in it."""
    path = PurePath(checkpoint)
    return (path.parent if path.name == "student.pt" else path).parts


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)
