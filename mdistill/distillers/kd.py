"""KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531v1.

Letters: B batch, C classes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import kl_divergence
from mdistill.registry import NonNegative, Positive


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """T^2 KL(p^t || p^s), both softened: Hinton et al., arXiv:1503.02531v1, Eq. (1), with the T^2 of Sec. 2.

    Differs from the paper: KL in place of the cross-entropy with soft targets (the same gradient; 0 at its minimum).

    Args:
        student_logits: (B, C), z_i.
        teacher_logits: (B, C), v_i.
        temperature: T.
        weights: of each sample, (B,), which the mean does not divide by; None for 1.

    Returns:
        (), the mean over B.
    """
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=1)
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    return temperature**2 * kl_divergence(teacher_log_probs, student_log_probs, weights=weights)


@DISTILLERS.register("kd")
class KD(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD.

    Args:
        kd_weight: weight of the distillation term; 0 leaves it out.
        temperature: T, which softens both networks.
    """

    needs = Needs(teacher="logits", labels="none", sparse_logits=("temperature",))

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        self.kd_weight, self.temperature = kd_weight, temperature

    def sample_weights(self, signals: Signals) -> Tensor | None:
        """Of each sample, (B,); None for 1. For variants of the method."""
        return None

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        if self.kd_weight == 0:
            return {}
        logits, weights = (signals.student_logits, signals.teacher_logits), self.sample_weights(signals)
        loss = kd_loss(*logits, temperature=self.temperature, weights=weights)
        return {"kd": self.kd_weight * loss}
