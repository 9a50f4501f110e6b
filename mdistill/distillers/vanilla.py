"""Vanilla: the student alone, trained on the labels; the baseline of every table."""

from typing import Any

from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals


@DISTILLERS.register("vanilla")
class Vanilla(Distiller):
    """Cross-entropy times ``ce_weight``, without a teacher."""

    needs = Needs(teacher="none", labels="none")

    def __init__(self, student: nn.Module, teacher: nn.Module | None, data: DataInfo, **shared: Any) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term()

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """Nothing beside the task loss."""
        return {}
