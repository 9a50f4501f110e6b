"""LabelRevision: Lan et al., "Improve Knowledge Distillation via Label Revision and Data Selection", arXiv:2404.03693.

LR in comparisons. Letters: B batch, C classes.
"""

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_mask
from mdistill.registry import NonNegative

BelowOne = Annotated[float, Field(gt=0, lt=1)]


def revise(teacher_logits: Tensor, target: Tensor, *, eta: float) -> Tensor:
    """Revised labels p = beta p^t + (1 - beta) y, with beta = eta / (max p^t - p^t_true + 1).

    Paper: arXiv:2404.03693, label revision. For eta < 1 the true class leads: 1 - beta > beta (max p^t - p^t_true).

    Args:
        teacher_logits: (B, C), of p^t.
        target: (B,) int64, the true class, one-hot in y.
        eta: below 1.

    Returns:
        (B, C), each row a distribution.
    """
    probs = F.softmax(teacher_logits, dim=1)
    gap = probs.amax(dim=1, keepdim=True) - probs.gather(1, target[:, None])  # (B, 1)
    beta = eta / (gap + 1)
    return beta * probs + (1 - beta) * class_mask(target, probs.shape[1])


def right_ce_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with the labels over the samples that the teacher gets right.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        target: (B,) int64, the true class.

    Returns:
        (), 0 when there is no such sample.
    """
    cross_entropy = F.cross_entropy(student_logits, target, reduction="none")
    return _mean_where(_teacher_is_right(teacher_logits, target), cross_entropy)


def right_logit_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Mean square of z^s - z^t over the samples that the teacher gets right.

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        target: (B,) int64, the true class.

    Returns:
        (), 0 when there is no such sample.
    """
    square = (student_logits - teacher_logits).square().mean(dim=1)
    return _mean_where(_teacher_is_right(teacher_logits, target), square)


def revised_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, eta: float) -> Tensor:
    """Mean square of p^s minus ``revise`` over the samples that the teacher gets wrong.

    Args:
        student_logits: (B, C), of p^s.
        teacher_logits: (B, C), of p^t.
        target: (B,) int64, the true class.
        eta: of ``revise``.

    Returns:
        (), 0 when there is no such sample.
    """
    gap = F.softmax(student_logits, dim=1) - revise(teacher_logits, target, eta=eta)
    return _mean_where(~_teacher_is_right(teacher_logits, target), gap.square().mean(dim=1))


def label_revision_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, lambda1: float, lambda2: float, eta: float
) -> Tensor:
    """CE + lambda1 logit matching where the teacher is right, lambda2 revised labels where it is wrong.

    Paper: arXiv:2404.03693, label revision; the three terms are averaged over their own samples, 0 when there are none.

    Differs from the paper: without its data selection, for which every sample's influence is needed; the other samples
    here are those that the teacher gets right. Which terms there are, and that they are mean squares over B and C, is
    read from the code published with Sun et al., arXiv:2408.07703v2.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        target: (B,) int64, the true class.
        lambda1: weight of logit matching.
        lambda2: weight of the revised labels.
        eta: of ``revise``.

    Returns:
        ().
    """
    logits = student_logits, teacher_logits, target
    matching = lambda1 * right_logit_loss(*logits) + lambda2 * revised_loss(*logits, eta=eta)
    return right_ce_loss(*logits) + matching


@DISTILLERS.register("label_revision", "lr")
class LabelRevision(Distiller):
    """``ce_weight`` CE + ``lambda1`` logit matching + ``lambda2`` revised labels.

    Cross-entropy counts the samples alone that the teacher gets right: the revised labels hold those of the others.

    Args:
        lambda1: weight of logit matching; 0 leaves it out.
        lambda2: weight of the revised labels; 0 leaves them out.
        eta: share of the teacher in a revised label where it gives the true class as much as its maximum; below 1.
    """

    needs = Needs(teacher="logits")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        lambda1: NonNegative,
        lambda2: NonNegative,
        eta: BelowOne,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(lambda1=lambda1, lambda2=lambda2)
        self.lambda1, self.lambda2, self.eta = lambda1, lambda2, eta

    def task(self, signals: Signals) -> dict[str, Tensor]:
        """``ce``, on the raw logits of the samples that the teacher gets right."""
        if self.ce_weight == 0:
            return {}
        signals = self.whole_batch(signals)
        logits = signals.raw_student_logits, signals.raw_teacher_logits
        return {"ce": self.ce_weight * right_ce_loss(*logits, signals.target)}

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``logit`` and ``revised``, whichever has a weight."""
        signals = self.whole_batch(signals)  # each term divides by the number of its samples
        given = signals.student_logits, signals.teacher_logits, signals.target
        terms = {}
        if self.lambda1:
            terms["logit"] = self.lambda1 * right_logit_loss(*given)
        if self.lambda2:
            terms["revised"] = self.lambda2 * revised_loss(*given, eta=self.eta)
        return terms


def _teacher_is_right(teacher_logits: Tensor, target: Tensor) -> Tensor:
    return teacher_logits.argmax(dim=1) == target


def _mean_where(keep: Tensor, values: Tensor) -> Tensor:
    """Mean of the values that ``keep`` marks, 0 when there are none: (B,) bool, (B,) -> ()."""
    return values.where(keep, 0.0).sum() / keep.sum().clamp(min=1)
