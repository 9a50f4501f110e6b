"""Learning curves of a few runs of one seed each."""

from collections.abc import Sequence
from pathlib import Path

from mdistill.reporting.drawing import curves, save
from mdistill.reporting.figures import Band
from mdistill.reporting.runs import RunRecord


def learning_curves(records: Sequence[RunRecord], path: Path, *, title: str, split: str = "test") -> None:
    """Draw top-1 of ``split`` by epoch of several runs into the picture ``path``."""
    bands = []
    for record in records:
        lines = [line for line in record.metrics if f"{split}/top1" in line]
        top1 = [float(line[f"{split}/top1"]) for line in lines]
        bands.append(Band(record.label, 1, [line["epoch"] for line in lines], top1, [0.0] * len(top1)))
    bands.sort(key=lambda band: -band.mean[-1])  # as the curves end, from top to bottom
    save(curves({split: bands}, title=title, ylabel=f"{split} top-1 (%)"), path)
