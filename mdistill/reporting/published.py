"""The published figures, from ``results/published.csv``."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from mdistill.errors import UserError


@dataclass(frozen=True)
class Figure:
    """One number in a paper or a README."""

    dataset: str
    method: str  # as it is registered, where it is; vanilla for a network alone
    variant: str  # as in a configuration
    teacher: str  # "" for a network alone
    student: str
    epochs: int | None  # of its training; None where the source does not say
    metric: str
    value: float  # percent
    source: str
    table: str  # its number in the source, or ""
    note: str

    @cached_property
    def cell(self) -> tuple[str, ...]:
        """Data set, method, variant, teacher and student, without the prefixes of libraries."""
        return _without_prefixes((self.dataset, self.method, self.variant, self.teacher, self.student))


COLUMNS = tuple(field.name for field in fields(Figure))


def read_published(path: Path) -> list[Figure]:
    """All figures in ``path``, in its order.

    Raises:
        UserError: it cannot be read, or a line of it holds something else.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *lines = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV file: {error}") from None
    if tuple(header) != COLUMNS:
        raise UserError(f"{path}: the first line should be {','.join(COLUMNS)}, found {','.join(header)}")
    return [_figure(line, f"{path}: line {number}") for number, line in enumerate(lines, start=2)]


def _figure(line: Sequence[str], where: str) -> Figure:
    if len(line) != len(COLUMNS):
        raise UserError(f"{where}: should hold {len(COLUMNS)} values, found {len(line)}")
    dataset, method, variant, teacher, student, epochs, metric, value, source, table, note = line
    try:
        numbers = int(epochs) if epochs else None, float(value)
    except ValueError:
        raise UserError(f"{where}: epochs and value should be numbers, found {epochs!r} and {value!r}") from None
    return Figure(dataset, method, variant, teacher, student, numbers[0], metric, numbers[1], source, table, note)


def figure_of(
    figures: Sequence[Figure], cell: Sequence[str], *, epochs: int, source: str, table: str, metric: str = "top1"
) -> Figure | None:
    """What ``source`` publishes of a cell in its table ``table``; a number that it repeats stands once, in another one.

    A figure of as many epochs comes first; one of another number is taken where the table has no such figure.

    Args:
        cell: data set, method, variant, teacher ("" for a network alone) and student; a library's prefix is left out.
        epochs: of its training.
    """
    key = _without_prefixes(cell)
    own = [each for each in figures if (each.cell, each.metric, each.source) == (key, metric, source)]
    as_long = [each for each in own if each.epochs in (None, epochs)]
    here = [each for each in as_long if each.table == table]
    return next(iter([*here, *as_long, *(each for each in own if each.table == table)]), None)


def disagreeing(figures: Sequence[Figure], figure: Figure) -> list[Figure]:
    """Other values of the cell of ``figure`` after as many epochs, in other tables and sources too."""
    return [
        each
        for each in figures
        if (each.cell, each.metric, each.epochs) == (figure.cell, figure.metric, figure.epochs)
        and each.value != figure.value
    ]


def _without_prefixes(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.rpartition("/")[2] for name in names)
