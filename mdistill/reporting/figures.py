"""What pictures of runs show, as plain numbers. Nothing here draws; ``drawing`` does."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from mdistill.errors import UserError, shown, suggestion
from mdistill.reporting.series import Series
from mdistill.reporting.statistics import mean_std, mean_std_text

if TYPE_CHECKING:
    from torch import Tensor


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


def band(each: Series, metric: str, most: int | None = None) -> Band:
    """``metric`` of the finished runs of a series, or where none is of all, at the epochs that they have in common.

    Args:
        most: about how many epochs, equally far from each other, the last one among them; None for all.

    Raises:
        UserError: no epoch is common to all; names the metrics that there are.
    """
    runs = each.finished or each.runs
    curves = [{int(line["epoch"]): float(line[metric]) for line in run.metrics if metric in line} for run in runs]
    epochs = sorted(set(curves[0]).intersection(*curves[1:]))
    if not epochs:
        known = sorted({key for run in each.runs for line in run.metrics for key in line} - {"epoch"})
        raise UserError(
            f"--metric: {shown(metric)} is at no epoch of all runs of {each.label} in {each.first.folder.parent}"
            f"{suggestion(metric, known)} (there is: {', '.join(known)})"
        )
    if most is not None:
        stride = -(-len(epochs) // most)
        epochs = epochs[(len(epochs) - 1) % stride :: stride]
    spreads = [mean_deviation([curve[epoch] for curve in curves]) for epoch in epochs]
    means, deviations = zip(*spreads, strict=True)
    return Band(each.label, len(curves), epochs, list(means), list(deviations))


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

    Series without a teacher of known accuracy, or without a finished run, are left out.
    """
    taught = [each for each in groups if each.values and each.first.teacher and each.first.teacher_top1 is not None]
    several = len({(each.first.dataset, each.first.student) for each in taught}) > 1
    lines: dict[str, list[Taught]] = {}
    for each in taught:
        first, (mean, deviation) = each.first, mean_deviation(each.sound)
        assert first.teacher_top1 is not None
        label = f"{first.name} → {first.student}" if several else first.name
        lines.setdefault(label, []).append(Taught(first.teacher, first.teacher_top1, mean, deviation, each.left_out))
    return {label: sorted(line, key=lambda each: each.teacher_top1) for label, line in lines.items()}


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
    """The bands of ``groups``, highest end first where the metric is an accuracy, else lowest."""
    bands = (band(each, metric, most) for each in groups)
    return sorted(bands, key=lambda each: each.mean[-1], reverse="top" in metric)
