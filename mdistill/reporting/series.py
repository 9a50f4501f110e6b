"""Runs that belong together: trials of one cell are a series, series of one teacher and student compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mdistill.errors import plural
from mdistill.reporting.records import Record


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed alone."""

    label: str  # apart from those of the other series of a picture
    runs: Sequence[Record]  # by seed

    @property
    def first(self) -> Record:
        """Any of them, for what they share."""
        return self.runs[0]

    @cached_property
    def finished(self) -> list[Record]:
        """Those that are complete, collapsed ones among them."""
        return [run for run in self.runs if run.complete]

    @cached_property
    def values(self) -> list[float]:
        """Top-1 of the last epoch of each finished run, percent."""
        return [run.top1 for run in self.finished if run.top1 is not None]

    @cached_property
    def sound(self) -> list[float]:
        """Those of them that did not collapse, beside which the others cannot be told apart; all where all did."""
        return [run.top1 for run in self.finished if run.top1 is not None and not run.collapsed] or self.values

    @property
    def left_out(self) -> str:
        """How many values are not in ``sound``, for people."""
        count = len(self.values) - len(self.sound)
        return f", without {plural(count, 'collapsed run')}" if count else ""


def series(records: Sequence[Record]) -> list[Series]:
    """``records`` by cell, in the order of their first; the labels say as much as tells them apart.

    Runs are of one series where they are of one method, pair, data set, variant and cell.
    """
    cells: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        cells.setdefault((record.key, record.variant, record.identity), []).append(record)
    groups = [sorted(runs, key=lambda run: run.seed) for runs in cells.values()]
    several_data = len({record.dataset for record in records}) > 1
    several_pairs = len({record.pair for record in records if record.teacher}) > 1
    labels = []
    for first, *_ in groups:
        pair = f" ({first.pair})" if several_pairs or not first.teacher else ""
        labels.append(f"{first.name}{pair}" + (f" on {first.dataset}" if several_data else ""))
    apart = [
        f"{label} [{runs[0].identity[:6]}]" if labels.count(label) > 1 else label
        for label, runs in zip(labels, groups, strict=True)
    ]
    return [Series(label, runs) for label, runs in zip(apart, groups, strict=True)]


def by_pair(records: Sequence[Record]) -> dict[str, list[Series]]:
    """Series that compare, by data set, teacher and student: those of a pair, and its student without a teacher.

    Networks without a teacher that are no pair's student are together, by data set.
    """
    several = len({record.dataset for record in records}) > 1
    taught = [record for record in records if record.teacher]
    students = {(record.dataset, record.student) for record in taught}
    groups: dict[str, list[Record]] = {}
    for record in sorted(taught, key=lambda record: (record.dataset, record.pair)):
        groups.setdefault(f"{record.dataset}: {record.pair}" if several else record.pair, []).append(record)
    for runs in groups.values():
        own = runs[0].dataset, runs[0].student
        runs += [record for record in records if not record.teacher and (record.dataset, record.student) == own]
    for record in records:
        if not record.teacher and (record.dataset, record.student) not in students:
            title = "without a teacher"
            groups.setdefault(f"{record.dataset}: {title}" if several else title, []).append(record)
    return {title: series(runs) for title, runs in groups.items()}
