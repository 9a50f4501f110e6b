"""LumiNet: Hossain et al., "LumiNet: The Bright Side of Perceptual Knowledge Distillation", arXiv:2310.03669.

Letters: B batch, C classes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import kl_divergence
from mdistill.registry import NonNegative, Positive

EPSILON = 1e-5  # added to the variance, as in the published code


def perception(logits: Tensor) -> Tensor:
    """h_ij = (z_ij - U_j) / sqrt(V_j + 1e-5), U_j and V_j mean and variance of class j over the batch.

    Paper: arXiv:2310.03669, the perception. V_j is the biased variance. A batch of 1 gives 0, with gradient 0.

    Args:
        logits: (B, C), z.

    Returns:
        (B, C).
    """
    centred = logits - logits.mean(dim=0)
    return centred * (centred.square().mean(dim=0) + EPSILON).rsqrt()


def luminet_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """tau^2 KL(softmax(h^t / tau) || softmax(h^s / tau)), h the perception of each network: arXiv:2310.03669.

    Differs from the paper: the factor. The published code has alpha^2, set for each pair, where tau^2 and the weight
    stand here: ``luminet_weight`` = (alpha / tau)^2 gives its loss.

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        temperature: tau.

    Returns:
        (), the mean over B.
    """
    teacher_log_probs = F.log_softmax(perception(teacher_logits) / temperature, dim=1)
    student_log_probs = F.log_softmax(perception(student_logits) / temperature, dim=1)
    return temperature**2 * kl_divergence(teacher_log_probs, student_log_probs)


@DISTILLERS.register("luminet")
class LumiNet(Distiller):
    """``ce_weight`` CE + ``luminet_weight`` LumiNet; the published code warms the last one up over 20 epochs.

    Args:
        luminet_weight: weight of the distillation term, (alpha / tau)^2 of the published code; 0 leaves it out.
        temperature: tau of both networks' perceptions.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        luminet_weight: NonNegative,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(luminet_weight=luminet_weight)
        self.luminet_weight, self.temperature = luminet_weight, temperature

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``luminet``."""
        if self.luminet_weight == 0:
            return {}
        signals = self.whole_batch(signals)  # a class's mean and variance are those of the batch
        loss = luminet_loss(signals.student_logits, signals.teacher_logits, temperature=self.temperature)
        return {"luminet": self.luminet_weight * loss}
