"""A table from the records of its runs: mean and deviation of the last epoch, beside the published figure."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

from mdistill.config import Config, differences, results_only
from mdistill.config.files import read_yaml
from mdistill.engine.run_folder import read_metrics
from mdistill.errors import UserError
from mdistill.reporting.published import Figure, read_published
from mdistill.reporting.table_files import Cell, Row, Table
from mdistill.reporting.table_runs import short
from mdistill.reporting.tables import text_table

Format = Literal["text", "markdown", "csv"]


@dataclass(frozen=True)
class Result:
    """What the runs of a cell say."""

    top1: dict[int, float]  # of the last epoch, percent, by seed
    wanted: int  # seeds
    published: float | None
    other: dict[int, str]  # seed: the first setting in which the run that is there differs from the table's

    @property
    def mean(self) -> float | None:
        """Over the seeds that are there."""
        return mean(self.top1.values()) if self.top1 else None

    @property
    def text(self) -> str:
        """Mean, sample standard deviation, and of how many seeds where some are missing."""
        if not self.top1:
            return f"0 of {self.wanted}"
        values = list(self.top1.values())
        words = f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
        return words if len(values) == self.wanted else f"{words} ({len(values)} of {self.wanted})"


def show(table: Table, output: Path, published: Path, form: Format, epochs: int | None = None) -> str:
    """``table`` in ``form``, from the run folders below ``output``.

    Args:
        published: the file of published figures.
        epochs: what the schedules were shortened to.
    """
    figures = read_published(published) if table.source else []
    cells = {(cell.row, cell.pair): result(cell, table, output, figures, epochs) for cell in table.cells}
    return _csv(table, cells) if form == "csv" else _table(table, cells, form, epochs)


def result(cell: Cell, table: Table, output: Path, figures: Sequence[Figure], epochs: int | None) -> Result:
    """What is recorded of ``cell``."""
    top1: dict[int, float] = {}
    other: dict[int, str] = {}
    run = cell if epochs is None else short(cell, epochs)
    config = cell.config(table.seeds[0])
    for seed in table.seeds:
        own = run.config(seed)
        folder = output / own.run_folder()
        lines = read_metrics(folder)
        if len(lines) < own.solver.epochs or not (folder / "student.pt").exists():
            continue
        strange = _first_difference(folder, own)
        if strange is None:
            top1[seed] = float(lines[-1]["test/top1"])
        else:
            other[seed] = strange
    return Result(top1, len(table.seeds), _published(config, table, figures), other)


def _first_difference(folder: Path, config: Config) -> str | None:
    """The first setting that changes results in which the run in ``folder`` differs from ``config``."""
    try:
        recorded = results_only(read_yaml(folder / "config.yaml"))
    except UserError:
        return "its config.yaml"
    return next(iter(differences(recorded, results_only(config.resolved()))), None)


def _published(config: Config, table: Table, figures: Sequence[Figure]) -> float | None:
    teacher = config.teacher.name if config.teacher is not None else ""
    key = (config.data.name, config.distiller.name, config.variant, teacher, config.student.name)
    for figure in figures:
        own = (figure.dataset, figure.method, figure.variant, figure.teacher, figure.student)
        if (own, figure.metric, figure.source, figure.table) == (key, "top1", table.source, table.number):
            return figure.value
    return None


def _table(table: Table, cells: dict[tuple[Row, str], Result], form: Format, epochs: int | None) -> str:
    rows: list[list[str]] = []
    ranks = {pair: _ranks([cells[row, pair].mean for row in table.rows]) for pair in table.pairs}
    for number, row in enumerate(table.rows):
        results = [cells[row, pair] for pair in table.pairs]
        marks = [ranks[pair][number] for pair in table.pairs]
        rows.append([row.name, *(_marked(each.text, mark, form) for each, mark in zip(results, marks, strict=True))])
        if table.source:
            rows.append(["  published", *("" if each.published is None else f"{each.published:.2f}" for each in results)])
            rows.append(["  difference", *(_difference(each) for each in results)])
    header = ["top-1, last epoch", *table.pairs]
    lines = [table.title + (f", schedules shortened to {epochs} epochs" if epochs else ""), ""]
    if form == "markdown":
        rows = [[cell.strip() for cell in row] for row in rows]
        lines += ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]
    else:
        lines.append(text_table(header, rows))
    notes = [f"mean ± sample standard deviation over seeds {', '.join(map(str, table.seeds))}"]
    if table.source:
        notes.append(f"published: {table.source}" + (f", Table {table.number}" if table.number else ""))
    for (row, pair), each in cells.items():
        for seed, key in each.other.items():
            notes.append(f"left out: {row.name} {pair} seed {seed}, a run of other settings ({key})")
    return "\n".join([*lines, "", *notes])


def _difference(each: Result) -> str:
    return "" if each.mean is None or each.published is None else f"{each.mean - each.published:+.2f}"


def _ranks(means: Sequence[float | None]) -> list[int]:
    """1 for the best of a column, 2 for the second, 0 for the others; nothing where there are fewer than two."""
    ordered = sorted({round(value, 2) for value in means if value is not None}, reverse=True)
    if sum(value is not None for value in means) < 2:
        return [0] * len(means)
    return [0 if value is None or round(value, 2) not in ordered[:2] else ordered.index(round(value, 2)) + 1 for value in means]


def _marked(text: str, rank: int, form: Format) -> str:
    if form != "markdown":
        return text
    return {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(rank, text)


def _csv(table: Table, cells: dict[tuple[Row, str], Result]) -> str:
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(["method", "pair", "seeds", "wanted", "mean", "std", "published", "values"])
    for (row, pair), each in cells.items():
        values = list(each.top1.values())
        writer.writerow(
            [
                row.name,
                pair,
                len(values),
                each.wanted,
                "" if each.mean is None else f"{each.mean:.4f}",
                f"{stdev(values):.4f}" if len(values) > 1 else "",
                "" if each.published is None else f"{each.published:.2f}",
                " ".join(f"{seed}:{value:.4f}" for seed, value in each.top1.items()),
            ]
        )
    return output.getvalue().rstrip("\n")
