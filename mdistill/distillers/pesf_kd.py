"""PESFKD: Rao et al., "Parameter-Efficient and Student-Friendly Knowledge Distillation", arXiv:2205.15308.

PESF-KD. Letters: B batch, C classes, H hidden units of the adapter.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.kd import kd_loss
from mdistill.registry import NonNegative, Positive, PositiveInt


class Adapter(nn.Module):
    """z + W2 relu(W1 z + b1) + b2, which changes how smooth the teacher's soft targets are."""

    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(num_classes, hidden), nn.Linear(hidden, num_classes)

    def forward(self, logits: Tensor) -> Tensor:
        """The teacher's ``logits`` (B, C) to softer or sharper ones (B, C)."""
        adapted: Tensor = logits + self.up(F.relu(self.down(logits)))
        return adapted


@DISTILLERS.register("pesf_kd")
class PESFKD(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD from the adapted teacher + ``adapter_ce_weight`` CE of the adapted teacher.

    The teacher stays frozen. The adapter on its logits learns with the student: from the labels, and from the KD term,
    which pulls the two distributions together from both sides. It is not exported.

    Paper: arXiv:2205.15308; KD as in Hinton et al., arXiv:1503.02531, here with gradient to both of its arguments.

    Differs from the paper: in its published code the adapter reads the teacher's pooled features and begins with a
    linear layer from these to C values; here that layer is the teacher's own classifier, so the adapter reads logits.
    The adapter's output is added, there it is subtracted, which is the same up to the signs of W2 and b2.

    Args:
        kd_weight: weight of the distillation term; 0 leaves it out.
        adapter_ce_weight: weight of the adapted teacher's cross-entropy with the labels; 0 leaves it out.
        temperature: T of the distillation term.
        adapter_hidden: H.
        adapter_lr_scale: learning rate of the adapter over that of the student.
    """

    needs = Needs(teacher="logits", labels="soft")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        adapter_ce_weight: NonNegative,
        temperature: Positive,
        adapter_hidden: PositiveInt,
        adapter_lr_scale: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        self.kd_weight, self.adapter_ce_weight, self.temperature = kd_weight, adapter_ce_weight, temperature
        self.adapter_lr_scale = adapter_lr_scale
        self.adapter = Adapter(data.num_classes, adapter_hidden)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``kd`` and ``adapter_ce``, whichever has a weight."""
        adapted, terms = self.adapter(signals.teacher_logits), {}
        if self.kd_weight:
            loss = kd_loss(signals.student_logits, adapted, temperature=self.temperature)
            terms["kd"] = self.kd_weight * loss
        if self.adapter_ce_weight:
            terms["adapter_ce"] = self.adapter_ce_weight * F.cross_entropy(adapted, signals.target)
        return terms

    def param_groups(self) -> list[dict[str, Any]]:
        """The student's weights, and the adapter's at a rate of their own."""
        adapter = list(self.adapter.parameters())
        student = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        return [{"params": student}, {"params": adapter, "lr_scale": self.adapter_lr_scale}]
