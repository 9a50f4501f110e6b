"""RKD: Park et al., "Relational Knowledge Distillation", arXiv:1904.05068. Letters: B batch, D width of features.

h is the smooth L1 distance with unit threshold (Huber's).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_pooled, unit
from mdistill.registry import NonNegative

EPSILON = 1e-12  # of a squared distance, so that its root has a finite gradient


def distances(features: Tensor) -> Tensor:
    """Euclidean distances between the samples, divided by their mean over pairs: (B, D) -> (B, B), 0 on the diagonal.

    Args:
        features: (B, D).
    """
    squares = (features[None] - features[:, None]).square().sum(dim=2)
    count = len(features)
    diagonal = torch.eye(count, dtype=torch.bool, device=features.device)
    roots = squares.clamp(min=EPSILON).sqrt().masked_fill(diagonal, 0.0)
    return roots * (max(count * (count - 1), 1) / roots.sum().clamp(min=EPSILON))


def angles(features: Tensor) -> Tensor:
    """Cosine of the angle at i between j and k: (B, D) -> (B, B, B), as [i, j, k].

    Args:
        features: (B, D).
    """
    directions = unit(features[None] - features[:, None], dim=2)  # (B, B, D), from i to j
    return directions @ directions.transpose(1, 2)


def rkd_distance_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean over all pairs of h(d^s, d^t), the distances relative to their mean; arXiv:1904.05068, RKD-D.

    Differs from the paper: a mean over all B^2 entries where the paper has a sum, the pairs of a sample with itself
    included, which add 0. As in the published code, which takes the distances from the Gram matrix instead.

    Args:
        student_features: (B, D).
        teacher_features: (B, E), of any width.

    Returns:
        ().
    """
    return F.smooth_l1_loss(distances(student_features), distances(teacher_features))


def rkd_angle_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean over all triplets of h(a^s, a^t), cosines of the angles between samples; arXiv:1904.05068, RKD-A.

    Differs from the paper: a mean over all B^3 entries where the paper has a sum, triplets of fewer than three samples
    included. As in the published code.

    Args:
        student_features: (B, D).
        teacher_features: (B, E), of any width.

    Returns:
        ().
    """
    return F.smooth_l1_loss(angles(student_features), angles(teacher_features))


@DISTILLERS.register("rkd")
class RKD(Distiller):
    """``ce_weight`` CE + ``distance_weight`` distances + ``angle_weight`` angles between the pooled features.

    Args:
        distance_weight: weight of the distances; 0 leaves them out.
        angle_weight: weight of the angles; 0 leaves them out.
    """

    needs = Needs(teacher="pooled", features=("pooled",), labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        distance_weight: NonNegative,
        angle_weight: NonNegative,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``distance`` and ``angle``, whichever has a weight."""
        student, teacher = (self.gather(pooled) for pooled in both_pooled(signals))
        terms = {}
        if self.distance_weight:
            terms["distance"] = self.distance_weight * rkd_distance_loss(student, teacher)
        if self.angle_weight:
            terms["angle"] = self.angle_weight * rkd_angle_loss(student, teacher)
        return terms
