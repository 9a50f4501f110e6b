"""CRLD: Zhang, Liu, Cai, Ma, "Cross-View Consistency Regularisation for Knowledge Distillation", arXiv:2412.16493.

Letters: B batch, C classes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Needs, Signals
from mdistill.distillers.kd import kd_loss
from mdistill.distillers.two_views import TwoViewDistiller
from mdistill.registry import Fraction, NonNegative, Positive


def confident(teacher_logits: Tensor, *, threshold: float) -> Tensor:
    """1 for each sample whose largest probability, not softened, is at least ``threshold``; else 0: (B, C) -> (B,)."""
    largest = F.softmax(teacher_logits, dim=1).amax(dim=1)
    return (largest >= threshold).to(teacher_logits.dtype)


def view_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    other_student_logits: Tensor,
    other_teacher_logits: Tensor,
    weights: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """w (K(t, s) + K(t', s')), where K(t, s) = T^2 KL(p^t || p^s), both softened: two pairs of logits.

    Paper: arXiv:2412.16493; within views, a pair is of one view; across views, the student's strong view follows the
    teacher's weak one, and the other way round.

    Differs from the released code: nothing. As there, samples of weight 0 count in the mean, and one weight, the weak
    view's within views and the strong view's across them, gates both pairs.

    Args:
        student_logits: (B, C), of s.
        teacher_logits: (B, C), of t.
        other_student_logits: (B, C), of s'.
        other_teacher_logits: (B, C), of t'.
        weights: (B,), w.
        temperature: T.

    Returns:
        (), the mean over B.
    """
    first = kd_loss(student_logits, teacher_logits, temperature=temperature, weights=weights)
    return first + kd_loss(other_student_logits, other_teacher_logits, temperature=temperature, weights=weights)


@DISTILLERS.register("crld")
class CRLD(TwoViewDistiller):
    """``ce_weight`` CE + ``within_weight`` KD within views + ``cross_weight`` KD across them, on confident samples.

    Cross-entropy is the sum of both views'. How confident the teacher is, its raw logits say.

    Args:
        within_weight: of the student's views following the teacher's own ones; 0 leaves the term out.
        cross_weight: of each following the other one; 0 leaves the term out.
        temperature: T, which softens both networks.
        weak_threshold: the teacher's least confidence in the weak view, for the term within views.
        strong_threshold: the same in the strong view, for the term across views.
    """

    needs = Needs(teacher="logits", views=2, labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        within_weight: NonNegative,
        cross_weight: NonNegative,
        temperature: Positive,
        weak_threshold: Fraction,
        strong_threshold: Fraction,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(within_weight=within_weight, cross_weight=cross_weight)
        self.within_weight, self.cross_weight, self.temperature = within_weight, cross_weight, temperature
        self.weak_threshold, self.strong_threshold = weak_threshold, strong_threshold

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``within`` and ``cross``, whichever has a weight."""
        weak, strong, terms = signals, signals.strong, {}
        assert strong is not None
        if self.within_weight:
            weights = confident(weak.raw_teacher_logits, threshold=self.weak_threshold)
            pairs = weak.student_logits, weak.teacher_logits, strong.student_logits, strong.teacher_logits
            terms["within"] = self.within_weight * view_loss(*pairs, weights, temperature=self.temperature)
        if self.cross_weight:
            weights = confident(strong.raw_teacher_logits, threshold=self.strong_threshold)
            pairs = strong.student_logits, weak.teacher_logits, weak.student_logits, strong.teacher_logits
            terms["cross"] = self.cross_weight * view_loss(*pairs, weights, temperature=self.temperature)
        return terms
