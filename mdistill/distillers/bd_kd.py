"""BDKD: Amara, Sepahvand, Meyer, Gross, Clark, "BD-KD: Balancing the Divergences for Online Knowledge Distillation",
arXiv:2212.12965.

Letters: B batch, C classes.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import kl_divergence_per_sample
from mdistill.registry import NonNegative, Positive

AtLeast1 = Annotated[float, Field(ge=1, allow_inf_nan=False)]


def bd_kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, balance: float) -> Tensor:
    """T^2 (w_f KL(t || s) + w_r KL(s || t)), weighed sample by sample by which of the two entropies H is larger.

    Paper: arXiv:2212.12965, the student's loss. Where H(t) > H(s), the student is too certain: (w_f, w_r) =
    (``balance``, 1), since KL(t || s) spreads the student over what the teacher holds likely. Elsewhere
    (1, ``balance``).

    Differs from the paper: the teacher is frozen, there it learns too. Our interpretation, not checked against the
    paper's formula: that the weights are two constants which the sign of the gap assigns (their size is ``balance``),
    and that the entropies are those of the softened distributions.

    Args:
        student_logits: (B, C), of s before softening.
        teacher_logits: (B, C), of t before softening.
        temperature: T, which softens both.
        balance: weight of the favoured direction, at least 1.

    Returns:
        (), the mean over B.
    """
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=1)
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    forward = kl_divergence_per_sample(teacher_log_probs, student_log_probs)
    reverse = kl_divergence_per_sample(student_log_probs, teacher_log_probs)
    too_certain = _entropy(teacher_log_probs) > _entropy(student_log_probs)  # (B,)
    return temperature**2 * torch.where(too_certain, balance * forward + reverse, forward + balance * reverse).mean()


@DISTILLERS.register("bd_kd")
class BDKD(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD with both directions of the divergence, balanced sample by sample.

    Args:
        kd_weight: weight of the distillation term; 0 leaves it out.
        temperature: T, which softens both networks.
        balance: weight of the favoured direction, at least 1; at 1 the term is the sum of both.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperature: Positive,
        balance: AtLeast1,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        self.kd_weight, self.temperature, self.balance = kd_weight, temperature, balance

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        if self.kd_weight == 0:
            return {}
        logits = signals.student_logits, signals.teacher_logits
        return {"kd": self.kd_weight * bd_kd_loss(*logits, temperature=self.temperature, balance=self.balance)}


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(dim=1)
