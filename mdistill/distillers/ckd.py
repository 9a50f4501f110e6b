"""CKD: Zhu, Zhou, Zhu, Wang, Hu, "CKD: Contrastive Knowledge Distillation from A Sample-wise Perspective",
arXiv:2404.14109.

Letters: B batch, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.mcld import similarity
from mdistill.registry import NonNegative, Positive


def ckd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Which student row of the batch is mine? asks each teacher row: arXiv:2404.14109.

    Cross-entropy of t_i . s_j / T with label i, where t and s are L2-normalised. It is the sample-wise term of MCLD
    with the two networks exchanged.

    Differs from the released code: the norm is sqrt(|z|^2 + 1e-12), which has a gradient at z = 0 too, where there it
    is at least 1e-12.

    Args:
        student_logits: (B, C), of s.
        teacher_logits: (B, C), of t.
        temperature: T.

    Returns:
        (), the mean over B.
    """
    sim_BB = similarity(teacher_logits, student_logits, temperature=temperature, epsilon=1e-12)
    return F.cross_entropy(sim_BB, torch.arange(len(sim_BB), device=sim_BB.device))


@DISTILLERS.register("ckd")
class CKD(Distiller):
    """``ce_weight`` CE + ``ckd_weight`` CKD.

    Args:
        ckd_weight: weight of the contrastive term; 0 leaves it out.
        temperature: T of the similarities.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        ckd_weight: NonNegative,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(ckd_weight=ckd_weight)
        self.ckd_weight, self.temperature = ckd_weight, temperature

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``ckd``."""
        if self.ckd_weight == 0:
            return {}
        signals = self.whole_batch(signals)
        loss = ckd_loss(signals.student_logits, signals.teacher_logits, temperature=self.temperature)
        return {"ckd": self.ckd_weight * loss}
