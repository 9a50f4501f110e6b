"""PKT: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", arXiv:1803.10837.

Letters: B batch, D width of features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_pooled
from mdistill.registry import Positive

EPSILON = 1e-7  # of the published code, beside a length and a probability


def neighbour_probs(features: Tensor) -> Tensor:
    """p_ij, in proportion to (1 + cos(v_i, v_j)) / 2, a distribution over j for each i: (B, D) -> (B, B).

    Args:
        features: (B, D), v.
    """
    square = features.square().sum(dim=1, keepdim=True)
    positive = square > 0
    length = square.where(positive, 1.0).sqrt() * positive  # so that the gradient at 0 is finite
    directions = features / (length + EPSILON)
    kernel = (directions @ directions.T + 1) / 2
    return kernel / kernel.sum(dim=1, keepdim=True)


def pkt_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean over all pairs of p^t log(p^t / p^s), p the cosine neighbour probabilities; arXiv:1803.10837.

    Differs from the paper, which sums over all pairs of two samples: a mean over all B^2 entries, each sample's
    probability of itself included, and 1e-7 beside both probabilities in the logarithm. As in the published code.

    Args:
        student_features: (B, D).
        teacher_features: (B, E), of any width.

    Returns:
        ().
    """
    student, teacher = neighbour_probs(student_features), neighbour_probs(teacher_features)
    return (teacher * torch.log((teacher + EPSILON) / (student + EPSILON))).mean()


@DISTILLERS.register("pkt")
class PKT(Distiller):
    """``ce_weight`` CE + ``pkt_weight`` divergence of the probabilities of neighbours, from the pooled features.

    Args:
        pkt_weight: weight of the divergence.
    """

    needs = Needs(teacher="pooled", features=("pooled",), labels="none")

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, data: DataInfo, *, pkt_weight: Positive, **shared: Any
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.pkt_weight = pkt_weight

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``pkt``."""
        student, teacher = (self.gather(pooled) for pooled in both_pooled(signals))
        return {"pkt": self.pkt_weight * pkt_loss(student, teacher)}
