"""SP: Tung, Mori, "Similarity-Preserving Knowledge Distillation", arXiv:1907.09682.

Letters: B batch, C channels, H and W height and width.
"""

from typing import Any

from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features, unit
from mdistill.registry import Positive


def similarities(features: Tensor) -> Tensor:
    """G: the products between samples, each row scaled to length 1: (B, D) -> (B, B).

    Args:
        features: (B, D), flattened maps.
    """
    return unit(features @ features.T, dim=1)


def sp_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Sum of (G^s - G^t)^2 over B^2, G the row-wise normalised similarities; arXiv:1907.09682.

    Differs from the paper: the last stage alone, as in the published code, where the paper sums over pairs of layers.

    Args:
        student_features: (B, D), the last stage of the student, flattened.
        teacher_features: (B, E), of the teacher, of any width.

    Returns:
        ().
    """
    return (similarities(teacher_features) - similarities(student_features)).square().mean()


@DISTILLERS.register("sp")
class SP(Distiller):
    """``ce_weight`` CE + ``sp_weight`` distance of the similarities between images, at the last stage.

    Args:
        sp_weight: gamma, the weight of the similarities.
    """

    needs = Needs(teacher="features", features=("stages",), labels="none")

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, data: DataInfo, *, sp_weight: Positive, **shared: Any
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.sp_weight = sp_weight

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``sp``."""
        student, teacher = (self.gather(features.stages[-1].flatten(1)) for features in both_features(signals))
        return {"sp": self.sp_weight * sp_loss(student, teacher)}
