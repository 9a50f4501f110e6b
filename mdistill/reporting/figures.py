"""What pictures of runs show, as plain numbers. Nothing here draws; ``drawing`` does."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from mdistill.reporting.records import Record
from mdistill.reporting.series import Series
from mdistill.reporting.statistics import mean_std, mean_std_text

if TYPE_CHECKING:
    from torch import Tensor

POINTS = 120  # of a curve, about: more than a phone has room for
Point = TypeVar("Point")


@dataclass(frozen=True)
class Band:
    """A curve over epochs: the mean over seeds, and one sample standard deviation to either side."""

    label: str
    seeds: int
    epochs: list[int]
    mean: list[float]
    deviation: list[float]  # 0 for a single seed

    @property
    def last(self) -> str:
        """Of the last epoch, for a legend."""
        deviation = f" ± {self.deviation[-1]:.2f}" if self.seeds > 1 else ""
        return f"{self.mean[-1]:.2f}{deviation}"


def band(each: Series, metric: str, most: int | None = None) -> Band | None:
    """``metric`` of the finished runs of a series, or where none is of all, at the epochs that they have in common.

    Runs without it do not count.

    Args:
        most: about how many epochs, as ``thinned``; None for all.

    Returns:
        None where no run has it, or where those that have it have no epoch in common.
    """
    found = [
        {int(line["epoch"]): float(line[metric]) for line in run.metrics if _is_number(line.get(metric))}
        for run in each.finished or each.runs
    ]
    curves = [curve for curve in found if curve]
    epochs: Sequence[int] = sorted(set(curves[0]).intersection(*curves[1:])) if curves else []
    if not epochs:
        return None
    if most is not None:
        epochs = thinned(epochs, most)
    spreads = [mean_deviation([curve[epoch] for curve in curves]) for epoch in epochs]
    means, deviations = zip(*spreads, strict=True)
    return Band(each.label, len(curves), list(epochs), list(means), list(deviations))


def thinned(points: Sequence[Point], most: int) -> Sequence[Point]:
    """About ``most`` of ``points``, equally far from each other, the last one among them."""
    stride = max(1, -(-len(points) // most))
    return points[(len(points) - 1) % stride :: stride]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 of a single value."""
    mean, deviation = mean_std(values)
    return mean, deviation or 0.0


@dataclass(frozen=True)
class Cost:
    """What a method costs and gives."""

    label: str
    step_ms: float  # for a batch, mean over the runs
    top1: float  # percent, mean over the runs that did not collapse
    extra: int | None  # parameters trained beside the student's; None where no record says
    left_out: str  # collapsed runs
    text: str  # all of it, for people


def costs(groups: Sequence[Series]) -> list[Cost]:
    """Time, accuracy and extra parameters of each series that has finished runs; others are left out."""
    found = []
    for each in groups:
        times = [run.step_ms for run in each.finished if run.step_ms is not None]
        if not times or not each.values:
            continue
        extra = next((run.extra_parameters for run in each.runs if run.extra_parameters is not None), None)
        size = "extra parameters not recorded" if extra is None else f"{extra:,} extra parameters"
        text = f"{each.label}: {fmean(times):.1f} ms a batch, {mean_std_text(each.sound)} %{each.left_out}, {size}"
        found.append(Cost(each.label, fmean(times), fmean(each.sound), extra, each.left_out, text))
    return found


@dataclass(frozen=True)
class Taught:
    """A student by one teacher."""

    teacher: str
    teacher_top1: float  # percent
    top1: float  # the student's, percent, mean over the runs that did not collapse
    deviation: float  # over these, 0 for one
    left_out: str = ""  # collapsed runs


def by_teacher(groups: Sequence[Series]) -> dict[str, list[Taught]]:
    """Students by method, and where there are several students or data sets by these too, weakest teacher first.

    Series without a teacher of known accuracy, or without a finished run, are left out. Where a teacher would be twice
    in a line, there is a line for each choice of the other settings.
    """
    taught = [each for each in groups if each.values and each.first.teacher and each.first.teacher_top1 is not None]
    several = len({(each.first.dataset, each.first.student) for each in taught}) > 1
    methods: dict[str, list[Series]] = {}
    for each in taught:
        label = f"{each.first.name} → {each.first.student}" if several else each.first.name
        methods.setdefault(label, []).append(each)
    lines = {}
    for label, members in methods.items():
        parts: dict[str, list[Series]] = {}
        twice = len({each.first.teacher for each in members}) < len(members)
        for each in members:
            parts.setdefault(_beside_teacher(each.first) if twice else "", []).append(each)
        for part in parts.values():
            apart = f"{label} [{part[0].first.identity[:6]}]" if len(parts) > 1 else label
            lines[apart] = sorted(map(_taught, part), key=lambda each: each.teacher_top1)
    return lines


def _taught(each: Series) -> Taught:
    mean, deviation = mean_deviation(each.sound)
    assert each.first.teacher_top1 is not None
    return Taught(each.first.teacher, each.first.teacher_top1, mean, deviation, each.left_out)


def _beside_teacher(run: Record) -> str:
    """What tells cells of one method and student apart, but for the teacher."""
    found = {**run.settings, **run.copies}
    return json.dumps({key: found[key] for key in sorted(found) if not key.startswith("teacher")}, default=str)


@dataclass(frozen=True)
class Bins:
    """Predictions by how sure the network was of them, in bins of equal width from 0 to 1."""

    images: list[int]
    confidence: list[float]  # mean probability of the predicted class; 0 for an empty bin
    accuracy: list[float]  # part of the predictions that are right; 0 for an empty bin
    error: float  # expected calibration error, from 0 to 1


def bins(logits: "Tensor", target: "Tensor", count: int) -> Bins:
    """How sure a network is of the images whose (N, C) ``logits`` and (N,) classes these are, in ``count`` bins."""
    from mdistill.engine.fidelity import calibration_error, calibration_sums

    sums = calibration_sums(logits, target, count)
    images, confidence, right = sums.tolist()
    each = [max(number, 1.0) for number in images]
    return Bins(
        [int(number) for number in images],
        [total / number for total, number in zip(confidence, each, strict=True)],
        [total / number for total, number in zip(right, each, strict=True)],
        calibration_error(sums),
    )


def folded(values: Sequence[float]) -> list[list[float | None]]:
    """``values`` in rows of a rectangle as near to a square as can be, filled up with None: 100 classes are 10 x 10."""
    columns = next(width for width in range(1, len(values) + 1) if width * width >= len(values))
    rows = [list[float | None](values[start : start + columns]) for start in range(0, len(values), columns)]
    rows[-1] += [None] * (columns - len(rows[-1]))
    return rows


Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def place_labels(
    points: Sequence[tuple[float, float, float]], sizes: Sequence[tuple[float, float]], frame: Box
) -> list[tuple[float, float]]:
    """Where to put a label beside each point so that none lies on another label or on a point, if there is room.

    Args:
        points: centre and radius.
        sizes: width and height of each label.
        frame: what the labels stay within where they can.

    Returns:
        left and bottom of each label; the nearest free place, from the highest point to the lowest.
    """
    taken: list[Box] = [(x - r, y - r, x + r, y + r) for x, y, r in points]
    places: dict[int, tuple[float, float]] = {}
    for number in sorted(range(len(points)), key=lambda number: -points[number][1]):
        (x, y, radius), (width, height) = points[number], sizes[number]
        others = [*taken[:number], *taken[number + 1 :]]
        tries = [
            (left, y - height / 2 + 0.55 * height * step)
            for distance in range(40)
            for step in ((distance,) if distance == 0 else (distance, -distance))
            for left in (x + radius + 3, x - radius - 3 - width, x - width / 2)
            if left != x - width / 2 or abs(0.55 * height * step) > radius + 0.6 * height
        ]
        free = (each for each in tries if _fits((*each, each[0] + width, each[1] + height), others, frame))
        left, bottom = next(free, tries[0])
        places[number] = left, bottom
        taken.append((left, bottom, left + width, bottom + height))
    return [places[number] for number in range(len(points))]


def _fits(box: Box, others: Sequence[Box], frame: Box) -> bool:
    left, bottom, right, top = box
    inside = left >= frame[0] and bottom >= frame[1] and right <= frame[2] and top <= frame[3]
    return inside and all(right <= a or left >= c or top <= b or bottom >= d for a, b, c, d in others)


def learning(groups: Sequence[Series], metric: str, most: int | None = None) -> list[Band]:
    """The bands of ``groups`` that have one, highest end first where the metric is an accuracy, else lowest."""
    bands = [found for each in groups if (found := band(each, metric, most)) is not None]
    return sorted(bands, key=lambda each: each.mean[-1], reverse="top" in metric)


def metrics_of(groups: Sequence[Series]) -> list[str]:
    """What ``learning`` can show of some of the runs."""
    lines = [line for each in groups for run in each.runs for line in run.metrics]
    return sorted({key for line in lines for key, value in line.items() if _is_number(value)} - {"epoch"})
