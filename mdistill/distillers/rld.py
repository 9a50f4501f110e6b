"""RLD: Sun, Chen, Lyu, Chen, Chen, Wang, "Knowledge Distillation with Refined Logits", arXiv:2408.07703v2.

Letters: B batch, C classes (at least 2).
"""

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import binary_log_probs, kl_divergence, masked_log_softmax
from mdistill.registry import NonNegative, Positive

Mask = Literal["ge", "g"]


def sample_confidence_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """SCD = T^2 KL(b^T || b^S): arXiv:2408.07703v2, Eqs. (4) to (6).

    b^T = {max_c p^T_c, 1 - max_c p^T_c} is of the class that the teacher predicts (Eq. 4),
    b^S = {p^S_true, 1 - p^S_true} of the true class (Eq. 5).

    Differs from the paper: nothing; on log-probabilities, so that a certain teacher gives no log(0).

    Args:
        student_logits: (B, C), z^S.
        teacher_logits: (B, C), z^T.
        target: (B,) int64, the true class.
        temperature: tau.

    Returns:
        (), the mean over B.
    """
    predicted = teacher_logits.argmax(dim=1)
    teacher_log_probs = binary_log_probs(F.log_softmax(teacher_logits / temperature, dim=1), predicted)  # (B, 2)
    student_log_probs = binary_log_probs(F.log_softmax(student_logits / temperature, dim=1), target)  # (B, 2)
    return temperature**2 * kl_divergence(teacher_log_probs, student_log_probs)


def masked_correlation_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, temperature: float, mask: Mask = "ge"
) -> Tensor:
    """MCD = T^2 KL(p~^T || p~^S), p~ the softmax over unmasked classes: arXiv:2408.07703v2, Eqs. (7) to (9).

    M_ge = {i : z^T_i >= z^T_true} (Eq. 7) holds the true class and all that the teacher ranks above it or ties with
    it; M_g of Table 1 (``mask="g"``) has > instead. A row whose classes are all masked adds 0, with gradient 0.

    Differs from the paper: nothing; it does not say what a row without unmasked classes gives.

    Args:
        student_logits: (B, C), z^S.
        teacher_logits: (B, C), z^T.
        target: (B,) int64, the true class.
        temperature: tau.
        mask: "ge" or "g".

    Returns:
        (), the mean over all B rows, fully masked ones included.
    """
    of_target = teacher_logits.gather(1, target[:, None])  # (B, 1)
    keep = teacher_logits < of_target if mask == "ge" else teacher_logits <= of_target
    teacher_log_probs = masked_log_softmax(teacher_logits / temperature, keep)
    student_log_probs = masked_log_softmax(student_logits / temperature, keep)
    return temperature**2 * kl_divergence(teacher_log_probs, student_log_probs)


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    sc_temperature: float | None = None,
    mask: Mask = "ge",
) -> Tensor:
    """alpha SCD + beta MCD: arXiv:2408.07703v2, Eq. (10) without its cross-entropy.

    Differs from the paper: ``sc_temperature``, when given, is a temperature of SCD alone, as in the published code;
    by default both terms have the same, as in the paper.

    Args:
        student_logits: (B, C), z^S.
        teacher_logits: (B, C), z^T.
        target: (B,) int64, the true class.
        alpha: weight of SCD.
        beta: weight of MCD.
        temperature: tau.
        sc_temperature: tau of SCD alone; None for the same.
        mask: "ge" or "g", of MCD.

    Returns:
        (), the mean over B.
    """
    confidence = sample_confidence_loss(
        student_logits, teacher_logits, target, temperature=temperature if sc_temperature is None else sc_temperature
    )
    correlation = masked_correlation_loss(student_logits, teacher_logits, target, temperature=temperature, mask=mask)
    return alpha * confidence + beta * correlation


@DISTILLERS.register("rld")
class RLD(Distiller):
    """``ce_weight`` CE + ``alpha`` SCD + ``beta`` MCD; the published code warms the last two up, the paper does not.

    Args:
        alpha: weight of sample confidence; 0 leaves the term out.
        beta: weight of masked correlation; 0 leaves the term out.
        temperature: tau of both terms.
        sc_temperature: tau of sample confidence alone; None for the same.
        mask: which classes masked correlation leaves out: "ge" (Eq. 7) or "g" (the alternative of Table 1).
    """

    needs = Needs(teacher="logits", sparse_logits=("temperature", "sc_temperature"))

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        alpha: NonNegative,
        beta: NonNegative,
        temperature: Positive,
        sc_temperature: Positive | None,
        mask: Mask,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(alpha=alpha, beta=beta)
        self.alpha, self.beta, self.temperature, self.mask = alpha, beta, temperature, mask
        self.sc_temperature = temperature if sc_temperature is None else sc_temperature

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``scd`` and ``mcd``, whichever is on."""
        logits = signals.student_logits, signals.teacher_logits
        terms = {}
        if self.alpha:
            terms["scd"] = self.alpha * sample_confidence_loss(*logits, signals.target, temperature=self.sc_temperature)
        if self.beta:
            terms["mcd"] = self.beta * masked_correlation_loss(
                *logits, signals.target, temperature=self.temperature, mask=self.mask
            )
        return terms
