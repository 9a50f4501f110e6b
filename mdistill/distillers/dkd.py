"""DKD: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", arXiv:2203.08679v2.

Letters: B batch, C classes (at least 2).
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import binary_log_probs, class_mask, kl_divergence, masked_log_softmax
from mdistill.registry import NonNegative, Positive


def tckd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Target-class term: T^2 KL(b^T || b^S), where b = {p_t, 1 - p_t} and t is the true class.

    Paper: arXiv:2203.08679v2, Sec. 3.1, Eqs. (5) and (6).

    Differs from the paper: softened by T and multiplied by T^2, as its experiments are; on log-probabilities.

    Args:
        student_logits: (B, C), z^S.
        teacher_logits: (B, C), z^T.
        target: (B,) int64, the true class t.
        temperature: T.
        weights: of each sample, (B,), which the mean does not divide by; None for 1.

    Returns:
        (), the mean over B.
    """
    teacher_log_probs = binary_log_probs(F.log_softmax(teacher_logits / temperature, dim=1), target)  # (B, 2)
    student_log_probs = binary_log_probs(F.log_softmax(student_logits / temperature, dim=1), target)  # (B, 2)
    return temperature**2 * kl_divergence(teacher_log_probs, student_log_probs, weights=weights)


def nckd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Non-target term: T^2 KL(q^T || q^S), where q (p-hat there) is the softmax over all classes but the true one.

    Paper: arXiv:2203.08679v2, Sec. 3.1, Eqs. (2), (5) and (6).

    Differs from the paper: softened by T and multiplied by T^2, as its experiments are; on log-probabilities.

    Args:
        student_logits: (B, C), z^S.
        teacher_logits: (B, C), z^T.
        target: (B,) int64, the true class t.
        temperature: T.
        weights: of each sample, (B,), which the mean does not divide by; None for 1.

    Returns:
        (), the mean over B.
    """
    keep = ~class_mask(target, student_logits.shape[1])
    teacher_log_probs = masked_log_softmax(teacher_logits / temperature, keep)
    student_log_probs = masked_log_softmax(student_logits / temperature, keep)
    return temperature**2 * kl_divergence(teacher_log_probs, student_log_probs, weights=weights)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    weights: Tensor | None = None,
) -> Tensor:
    """alpha TCKD + beta NCKD: arXiv:2203.08679v2, Eq. (7).

    Differs from the paper: nothing beyond what the two terms say; without cross-entropy.

    Args:
        student_logits: (B, C), z^S.
        teacher_logits: (B, C), z^T.
        target: (B,) int64, the true class t.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T of both.
        weights: of each sample, (B,), which the mean does not divide by; None for 1.

    Returns:
        (), the mean over B.
    """
    logits = student_logits, teacher_logits
    tckd, nckd = (loss(*logits, target, temperature=temperature, weights=weights) for loss in (tckd_loss, nckd_loss))
    return alpha * tckd + beta * nckd


@DISTILLERS.register("dkd")
class DKD(Distiller):
    """``ce_weight`` CE + ``alpha`` TCKD + ``beta`` NCKD; the published code warms the last two up.

    Args:
        alpha: weight of the target-class term; 0 leaves it out.
        beta: weight of the non-target term; 0 leaves it out.
        temperature: T of both terms.
    """

    needs = Needs(teacher="logits", sparse_logits=("temperature",))

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        alpha: NonNegative,
        beta: NonNegative,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(alpha=alpha, beta=beta)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def sample_weights(self, signals: Signals) -> Tensor | None:
        """Of each sample, (B,); None for 1. For variants of the method."""
        return None

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``tckd`` and ``nckd``, whichever has a weight."""
        inputs = signals.student_logits, signals.teacher_logits, signals.target
        weights, terms = self.sample_weights(signals), {}
        if self.alpha:
            terms["tckd"] = self.alpha * tckd_loss(*inputs, temperature=self.temperature, weights=weights)
        if self.beta:
            terms["nckd"] = self.beta * nckd_loss(*inputs, temperature=self.temperature, weights=weights)
        return terms
