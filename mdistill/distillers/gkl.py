"""GKL: Cui et al., "Generalized Kullback-Leibler Divergence Loss", arXiv:2503.08038.

Letters: B batch, C classes.
"""

from typing import Any

from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Signals
from mdistill.distillers.functional import soft_target_loss
from mdistill.distillers.ikl import IKL, difference_per_sample
from mdistill.registry import Fraction


def smoothed_difference_loss(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, *, gamma: float
) -> Tensor:
    """The wMSE of IKL under q^gamma, divided by the squared sum of q^gamma, both summed over the batch first.

    Paper: arXiv:2503.08038, the smoother weights; with gamma = 0 every two classes weigh the same.

    Differs from the paper: nothing known; the quotient of sums over the batch is the published code's.

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        weights: (B, C), q.
        gamma: the exponent.

    Returns:
        (), of the whole batch.
    """
    smooth = weights**gamma
    return difference_per_sample(student_logits, teacher_logits, smooth).sum() / smooth.sum(dim=1).square().sum()


def gkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    temperature: float,
) -> Tensor:
    """beta smoothed wMSE + alpha cross-entropy with soft labels: arXiv:2503.08038, the GKL loss.

    Differs from the paper in names alone: alpha and beta are those of its code.

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        weights: (B, C), q.
        alpha: weight of the cross-entropy with soft labels.
        beta: weight of the smoothed wMSE.
        gamma: the exponent of q.
        temperature: T of the cross-entropy.

    Returns:
        (), of the whole batch.
    """
    soft = soft_target_loss(student_logits, teacher_logits, temperature=temperature)
    return beta * smoothed_difference_loss(student_logits, teacher_logits, weights, gamma=gamma) + alpha * soft


@DISTILLERS.register("gkl")
class GKL(IKL):
    """``ce_weight`` CE + ``beta`` smoothed wMSE + ``alpha`` cross-entropy with soft labels.

    IKL, whose weights q of the classes are raised to the power of ``gamma`` and not normalised again.

    Differs from the paper in names alone: alpha and beta are those of its code.

    Args:
        gamma: the exponent of q; 0 weighs all classes the same, 1 leaves q as it is.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, data: DataInfo, *, gamma: Fraction, **shared: Any
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.gamma = gamma

    def difference(self, signals: Signals) -> Tensor:
        """The smoothed wMSE, (), of the batch of all processes."""
        whole = self.whole_batch(signals)
        weights = self.class_weights(whole)
        return smoothed_difference_loss(whole.student_logits, whole.teacher_logits, weights, gamma=self.gamma)
