"""WTTM: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", arXiv:2402.11148v2, Sec. 4.

TTM (``ttm.py``) with a weight for each sample: the smoother the teacher, the closer the student follows it.

Letters: B batch, C classes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import kl_divergence
from mdistill.registry import NonNegative, Positive


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, power: float) -> Tensor:
    """U_gamma(p^t) D(p^t_T || q), where U_gamma(p) = sum_c p_c^gamma: arXiv:2402.11148v2, Sec. 4.

    p^t_T = (p^t)^gamma / U_gamma(p^t) is the transformed teacher. For gamma < 1, U is 1 where the teacher is certain
    and C^(1 - gamma) where it is uniform. Without student temperature and without a factor T^2.

    Differs from the paper: nothing; without the cross-entropy and the weight beta. On log-probabilities.

    Args:
        student_logits: (B, C), of q.
        teacher_logits: (B, C), of p^t.
        power: gamma, 1 / T.

    Returns:
        (), the mean over B.
    """
    powers = power * F.log_softmax(teacher_logits, dim=1)  # (B, C), log p^gamma
    log_sums = powers.logsumexp(dim=1, keepdim=True)  # (B, 1), log U
    student_log_probs = F.log_softmax(student_logits, dim=1)
    return kl_divergence(powers - log_sums, student_log_probs, weights=log_sums.squeeze(1).exp())


@DISTILLERS.register("wttm")
class WTTM(Distiller):
    """``ce_weight`` CE + ``wttm_weight`` WTTM.

    Args:
        wttm_weight: beta, the weight of the distillation term; 0 leaves it out.
        power: gamma, between 0 and 1 in the paper; the smaller, the softer the teacher.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        wttm_weight: NonNegative,
        power: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(wttm_weight=wttm_weight)
        self.wttm_weight, self.power = wttm_weight, power

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``wttm``."""
        if self.wttm_weight == 0:
            return {}
        return {"wttm": self.wttm_weight * wttm_loss(signals.student_logits, signals.teacher_logits, power=self.power)}
