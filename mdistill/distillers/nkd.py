"""NKD: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", arXiv:2303.13005.

Letters: B batch, C classes (at least 2). t: the true class.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_mask, masked_log_softmax, of_class
from mdistill.registry import NonNegative, Positive


def target_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """Target term: -T_t log S_t, neither of them softened.

    Paper: arXiv:2303.13005, the first term of the normalised loss; T, S are the softmax of the teacher's and of the
    student's logits.

    Differs from the paper: nothing; without softening also for a temperature other than 1, as in the published code.

    Args:
        student_logits: (B, C), of S.
        teacher_logits: (B, C), of T.
        target: (B,) int64, t.
        weights: of each sample, (B,), which the mean does not divide by; None for 1.

    Returns:
        (), the mean over B.
    """
    log_prob = of_class(F.log_softmax(student_logits, dim=1), target)  # (B, 1)
    each = of_class(F.softmax(teacher_logits, dim=1), target) * log_prob
    return -(each if weights is None else weights[:, None] * each).mean()


def non_target_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """Non-target term: -lambda^2 sum over i != t of N(T_i) log N(S_i).

    Paper: arXiv:2303.13005, the second term of the normalised loss before its weight; N(T), N(S) are the softmax at
    lambda over all classes but t, so that both sum to 1.

    Differs from the paper: nothing. It is the NCKD of DKD plus the entropy of the teacher, a constant.

    Args:
        student_logits: (B, C), of S.
        teacher_logits: (B, C), of T.
        target: (B,) int64, t.
        temperature: lambda.

    Returns:
        (), the mean over B.
    """
    keep = ~class_mask(target, student_logits.shape[1])
    weights = masked_log_softmax(teacher_logits / temperature, keep).exp()
    log_probs = masked_log_softmax(student_logits / temperature, keep)  # 0 at the target
    return -(temperature**2) * (weights * log_probs).sum(dim=1).mean()


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, gamma: float, temperature: float
) -> Tensor:
    """Target term + gamma non-target term: arXiv:2303.13005, the normalised loss.

    Differs from the paper: nothing; without the cross-entropy with the labels that its total adds. One published state
    of its code marks the true class wrongly and keeps it in the non-target term; the equation does not.

    Args:
        student_logits: (B, C), of S.
        teacher_logits: (B, C), of T.
        target: (B,) int64, t.
        gamma: weight of the non-target term.
        temperature: lambda.

    Returns:
        (), the mean over B.
    """
    return target_loss(student_logits, teacher_logits, target) + gamma * non_target_loss(
        student_logits, teacher_logits, target, temperature=temperature
    )


@DISTILLERS.register("nkd")
class NKD(Distiller):
    """``ce_weight`` CE + target term + ``gamma`` non-target term.

    Args:
        gamma: weight of the non-target term; 0 leaves it out.
        temperature: lambda, which softens the non-target term.
    """

    needs = Needs(teacher="logits", sparse_logits=("temperature",))

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        gamma: NonNegative,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.gamma, self.temperature = gamma, temperature

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``target`` and, when it has a weight, ``non_target``."""
        given = signals.student_logits, signals.teacher_logits, signals.target
        terms = {"target": target_loss(*given)}
        if self.gamma:
            terms["non_target"] = self.gamma * non_target_loss(*given, temperature=self.temperature)
        return terms
