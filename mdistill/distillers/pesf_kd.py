"""PESFKD: Rao et al., "Parameter-Efficient and Student-Friendly Knowledge Distillation", arXiv:2205.15308.

PESF-KD. Letters: B batch, C classes, D the teacher's pooled width, H hidden units of the adapter.
"""

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.kd import kd_loss
from mdistill.distillers.la import swap
from mdistill.models import feature_shapes
from mdistill.registry import NonNegative, Positive, PositiveInt


def swapped_loss(
    student_logits: Tensor, teacher_logits: Tensor, adapted_logits: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """T^2 [KL(p(swap(z^t)) || p(z^s)) + KL(p(z^a) || p(swap(z^s)))], all softened; swapped logits have no gradient.

    The student learns from the swapped teacher, the adapter from the swapped student; ``swap`` is that of LA.

    Differs from the paper: there one KL between z^a and z^s trains both; in the released code that line is commented
    out and this term stands in its place.

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        adapted_logits: (B, C), z^a, of the adapted teacher.
        target: (B,) int64, the true class.
        temperature: T.

    Returns:
        (), the mean over B.
    """
    of_student = kd_loss(student_logits, swap(teacher_logits, target).detach(), temperature=temperature)
    return of_student + kd_loss(swap(student_logits, target).detach(), adapted_logits, temperature=temperature)


class Adapter(nn.Module):
    """W2 relu(W1 l(f) + b1) + b2, l a linear layer: what is taken from the teacher's logits.

    Args:
        width: D, of the teacher's pooled features f.
    """

    def __init__(self, width: int, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, num_classes)
        self.down, self.up = nn.Linear(num_classes, hidden), nn.Linear(hidden, num_classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, D) -> (B, C)."""
        correction: Tensor = self.up(F.relu(self.down(self.read(pooled))))
        return correction


@DISTILLERS.register("pesf_kd")
class PESFKD(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD beside an adapted teacher + ``adapter_ce_weight`` CE of the adapted teacher.

    The teacher stays frozen. An adapter reads its pooled features and is taken from its logits; it learns with the
    student, from the labels and from the KD term, and is not exported.

    Paper: arXiv:2205.15308; KD as in Hinton et al., arXiv:1503.02531.

    Differs from the paper: "released" is ``swapped_loss``, the term of the released code; "paper" is KD of the adapted
    teacher and the student, with gradient to both.

    Differs from the released code: the solver steps on every batch, there on the summed gradients of every fourth; and
    ``adapter_lr_scale`` holds throughout, there the adapter has the student's rate after epoch 150.

    Args:
        kd_weight: weight of the distillation term; 0 leaves it out.
        adapter_ce_weight: weight of the adapted teacher's cross-entropy with the labels; 0 leaves it out.
        temperature: T of the distillation term.
        adapter_hidden: H.
        adapter_lr_scale: learning rate of the adapter over that of the student.
        variant: "released" or "paper".
    """

    needs = Needs(teacher="pooled", features=("pooled",))

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
        variant: Literal["released", "paper"],
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        assert teacher is not None
        self.kd_weight, self.adapter_ce_weight, self.temperature = kd_weight, adapter_ce_weight, temperature
        self.adapter_lr_scale, self.variant = adapter_lr_scale, variant
        width = feature_shapes(teacher, data.image_size).pooled[0]
        self.adapter = Adapter(width, data.num_classes, adapter_hidden)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``kd`` and ``adapter_ce``, whichever has a weight."""
        assert signals.teacher_pooled is not None  # what ``needs`` asks for
        student, teacher = signals.student_logits, signals.teacher_logits
        adapted, terms = teacher - self.adapter(signals.teacher_pooled), {}
        if self.kd_weight:
            if self.variant == "released":
                loss = swapped_loss(student, teacher, adapted, signals.target, temperature=self.temperature)
            else:
                loss = kd_loss(student, adapted, temperature=self.temperature)
            terms["kd"] = self.kd_weight * loss
        if self.adapter_ce_weight:
            terms["adapter_ce"] = self.adapter_ce_weight * F.cross_entropy(adapted, signals.target)
        return terms

    def param_groups(self) -> list[dict[str, Any]]:
        """The student's weights, and the adapter's at a rate of their own."""
        adapter = list(self.adapter.parameters())
        student = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        return [{"params": student}, {"params": adapter, "lr_scale": self.adapter_lr_scale}]
