"""Read what a run folder says about itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdistill.engine.run_folder import read_metrics
from mdistill.errors import UserError


@dataclass(frozen=True)
class RunRecord:
    """A finished run as its folder tells it."""

    label: str
    parameters: int  # of the student
    metrics: list[Mapping[str, Any]]  # one entry per epoch

    @property
    def last(self) -> Mapping[str, Any]:
        """Metrics of the last epoch, the headline."""
        return self.metrics[-1]

    @property
    def seconds(self) -> float:
        """Training and evaluation time of all epochs."""
        return float(sum(line["seconds/train"] + line["seconds/eval"] for line in self.metrics))


def read_run(folder: Path, label: str, parameters: int) -> RunRecord:
    """The record of the run in ``folder``.

    Raises:
        UserError: the folder holds no finished epoch.
    """
    metrics = read_metrics(folder)
    if not metrics:
        raise UserError(f"{folder} holds no finished epoch")
    return RunRecord(label, parameters, list(metrics))
