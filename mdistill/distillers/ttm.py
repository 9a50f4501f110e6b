"""TTM: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", arXiv:2402.11148v2.

Letters: B batch, C classes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import kl_divergence
from mdistill.registry import NonNegative, Positive


def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, power: float) -> Tensor:
    """D(p^t_T || q): the power-transformed teacher against the student as it is. arXiv:2402.11148v2, Secs. 3.1, 3.2.

    p^t_T = (p^t)^gamma, normalised (Eq. 7): the teacher at temperature T = 1 / gamma (Eq. 9). The student is not
    softened, and there is no factor T^2.

    Differs from the paper: nothing; without the cross-entropy and the weight beta.

    Args:
        student_logits: (B, C), of q.
        teacher_logits: (B, C), of p^t.
        power: gamma.

    Returns:
        (), the mean over B.
    """
    return kl_divergence(F.log_softmax(power * teacher_logits, dim=1), F.log_softmax(student_logits, dim=1))


@DISTILLERS.register("ttm")
class TTM(Distiller):
    """``ce_weight`` CE + ``ttm_weight`` TTM.

    Args:
        ttm_weight: beta, the weight of the distillation term; 0 leaves it out.
        power: gamma, between 0 and 1 in the paper; the smaller, the softer the teacher.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        ttm_weight: NonNegative,
        power: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(ttm_weight=ttm_weight)
        self.ttm_weight, self.power = ttm_weight, power

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``ttm``."""
        if self.ttm_weight == 0:
            return {}
        return {"ttm": self.ttm_weight * ttm_loss(signals.student_logits, signals.teacher_logits, power=self.power)}
