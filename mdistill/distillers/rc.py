"""RC: Cao, Zhang, He, Shen, "Be an Excellent Student: Review, Preview, and Correction", doi:10.1109/LSP.2023.3333240.

IEEE Signal Processing Letters 30, 2023. Letters: B batch, C classes.
"""

from typing import Any

from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_mask
from mdistill.distillers.kd import kd_loss
from mdistill.registry import NonNegative, Positive


def correct(logits: Tensor, target: Tensor) -> Tensor:
    """The true class gets its own entry plus the row's largest, without gradient.

    The true class then leads wherever its own entry is positive. A constant added to the row adds to its gain too.

    Args:
        logits: (B, C).
        target: (B,) int64, the true class.

    Returns:
        (B, C).
    """
    logits = logits.detach()
    return logits + logits.amax(dim=1, keepdim=True) * class_mask(target, logits.shape[1])


def rc_loss(student_logits: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """Response correction, T^2 KL(p_rc || p): the student learns from its own corrected logits.

    Paper: doi:10.1109/LSP.2023.3333240, the response correction mechanism: z_rc = z_true + max z takes the place of
    z_true, and p_rc, p are the softmax of both over T.

    Differs from the paper: KL in place of its cross-entropy, whose gradient is the same for a fixed p_rc; the factor
    T^2 and the fixed p_rc are those of the code published with Sun et al., arXiv:2408.07703v2.

    Args:
        student_logits: (B, C), z.
        target: (B,) int64, the true class.
        temperature: T.

    Returns:
        (), the mean over B.
    """
    return kd_loss(student_logits, correct(student_logits, target), temperature=temperature)


@DISTILLERS.register("rc")
class RC(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD + ``rc_weight`` response correction.

    Differs from the paper: without its feature terms (review and preview), as Sun et al., arXiv:2408.07703v2, compare
    with it.

    Args:
        kd_weight: weight of the teacher's term; 0 leaves it out.
        rc_weight: weight of response correction; 0 leaves it out.
        temperature: T of both terms.
    """

    needs = Needs(teacher="logits", sparse_logits=("temperature",))

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        rc_weight: NonNegative,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight, rc_weight=rc_weight)
        self.kd_weight, self.rc_weight, self.temperature = kd_weight, rc_weight, temperature

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``kd`` and ``rc``, whichever has a weight."""
        student_logits, terms = signals.student_logits, {}
        if self.kd_weight:
            terms["kd"] = self.kd_weight * kd_loss(student_logits, signals.teacher_logits, temperature=self.temperature)
        if self.rc_weight:
            terms["rc"] = self.rc_weight * rc_loss(student_logits, signals.target, temperature=self.temperature)
        return terms
