"""SLD: Limantoro, Lin, Wang, Tsai, Shuai, Huang, Cheng, "Swapped Logit Distillation via Bi-level Teacher Alignment",
arXiv:2504.20108.

Two teachers that are right on every sample: the teacher, and later the student itself, each with its largest logit and
that of the true class swapped. Letters: B batch, C classes, K temperatures.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Needs, Signals
from mdistill.distillers.functional import of_class
from mdistill.distillers.la import swap
from mdistill.distillers.mlkd import instance_loss
from mdistill.distillers.two_views import TwoViewDistiller
from mdistill.registry import NonNegative, NonNegativeInt, Positive

Temperatures = Annotated[list[Positive], Field(min_length=1)]


def swapped_teacher_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, temperatures: Sequence[float]
) -> Tensor:
    """Sum over k of T_k^2 KL(p^t_k || p^s_k), where p^t comes from the swapped teacher: arXiv:2504.20108.

    Differs from the released code: nothing.

    Args:
        student_logits: (B, C), of p^s.
        teacher_logits: (B, C), of p^t before the swap.
        target: (B,) int64, the true class.
        temperatures: T_k.

    Returns:
        (), the mean over B.
    """
    return instance_loss(student_logits, swap(teacher_logits, target), temperatures=temperatures)


def swapped_student_loss(student_logits: Tensor, target: Tensor, *, temperatures: Sequence[float]) -> Tensor:
    """Sum over k of T_k^2 KL(p'_k || p^s_k), where p' comes from the swapped student: arXiv:2504.20108.

    p' differs from p^s at the student's largest class m and the true class y alone, so that the sum over classes is
    T_k (p^s_m - p^s_y) (z_m - z_y): 0 for a sample that the student has right.

    Differs from the released code: the closed form, whose value and gradient are the same; the gradient reaches p' too.

    Args:
        student_logits: (B, C), of p^s, and of p' before the swap.
        target: (B,) int64, the true class.
        temperatures: T_k.

    Returns:
        (), the mean over B.
    """
    predicted = student_logits.argmax(dim=1)
    gap = of_class(student_logits, predicted) - of_class(student_logits, target)  # (B, 1)
    total = student_logits.new_zeros(())
    for temperature in temperatures:
        probs = F.softmax(student_logits / temperature, dim=1)
        total = total + temperature * ((of_class(probs, predicted) - of_class(probs, target)) * gap).mean()
    return total


@DISTILLERS.register("sld")
class SLD(TwoViewDistiller):
    """``ce_weight`` CE + ``kd_weight`` KD from the swapped teacher and, later, from the swapped student, in two views.

    Every term is the sum of a weakly and a strongly augmented view's. The student's own one is computed in every epoch,
    and counts after ``student_after``.

    Args:
        kd_weight: weight of both distillation terms; 0 leaves them out.
        temperatures: T_k, at least one.
        student_after: the last epoch without the swapped student.
    """

    needs = Needs(teacher="logits", views=2)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperatures: Temperatures,
        student_after: NonNegativeInt,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        self.kd_weight, self.temperatures, self.student_after = kd_weight, temperatures, student_after

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``teacher`` and ``student``, after whom each half is named."""
        if self.kd_weight == 0:
            return {}
        assert signals.strong is not None
        teacher = student = signals.student_logits.new_zeros(())
        for view in (signals, signals.strong):
            logits = view.student_logits, view.teacher_logits
            teacher = teacher + swapped_teacher_loss(*logits, view.target, temperatures=self.temperatures)
            student = student + swapped_student_loss(logits[0], view.target, temperatures=self.temperatures)
        begun = (signals.epoch > self.student_after).to(student.dtype)
        return {"teacher": self.kd_weight * teacher, "student": self.kd_weight * begun * student}
