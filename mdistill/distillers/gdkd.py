"""GDKD: Zheng, Cheng, "Rethinking Decoupled Knowledge Distillation: A Predictive Distribution Perspective",
arXiv:2512.04625.

Decoupled by the k classes that the teacher holds most likely, where DKD has the true class. Letters: B batch, C classes
(more than k).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import kl_divergence, masked_log_softmax
from mdistill.errors import UserError
from mdistill.registry import NonNegative, Positive, PositiveInt

Divergence = Literal["forward", "reverse", "both"]


def top_classes(logits: Tensor, k: int) -> Tensor:
    """True at each row's ``k`` largest entries: (B, C) -> (B, C) bool."""
    top = logits.topk(k, dim=1).indices  # (B, k)
    return (top[:, :, None] == torch.arange(logits.shape[1], device=logits.device)).any(dim=1)


def group_loss(student_logits: Tensor, teacher_logits: Tensor, top: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(b^t || b^s), where b = {sum of p over the top classes, sum over the others}: arXiv:2512.04625.

    Differs from the released code: on log-probabilities, so that neither sum is log(0).

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        top: (B, C) bool, which classes are on top; at least one is, and one is not.
        temperature: T.

    Returns:
        (), the mean over B.
    """
    teacher, student = (_group_log_probs(logits / temperature, top) for logits in (teacher_logits, student_logits))
    return temperature**2 * kl_divergence(teacher, student)


def within_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    keep: Tensor,
    *,
    temperature: float,
    divergence: Divergence = "forward",
) -> Tensor:
    """T^2 KL(q^t || q^s), where q is the softmax over the classes that ``keep`` marks: arXiv:2512.04625.

    Differs from the released code: classes are left out, where it lowers their softened logits by 1000.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        keep: (B, C) bool, which classes count.
        temperature: T.
        divergence: "forward"; "reverse", KL(q^s || q^t); or "both", half the sum of the two.

    Returns:
        (), the mean over B.
    """
    teacher, student = (masked_log_softmax(logits / temperature, keep) for logits in (teacher_logits, student_logits))
    loss = {
        "forward": lambda: kl_divergence(teacher, student),
        "reverse": lambda: kl_divergence(student, teacher),
        "both": lambda: (kl_divergence(teacher, student) + kl_divergence(student, teacher)) / 2,
    }[divergence]()
    return temperature**2 * loss


def gdkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int,
    w0: float,
    w1: float,
    w2: float,
    temperature: float,
    divergence: Divergence = "forward",
) -> Tensor:
    """w0 group term + w1 term within the k top classes of the teacher + w2 term within the others: arXiv:2512.04625.

    With k = 1 and a teacher that is right this is DKD with alpha = w0 and beta = w2.

    Differs from the released code: nothing beyond what the two terms say; without cross-entropy.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        k: how many classes are on top, less than C.
        w0: weight of the group term.
        w1: weight of the term within the top classes.
        w2: weight of the term within the others.
        temperature: T of all three.
        divergence: of the last two: "forward", "reverse" or "both".

    Returns:
        (), the mean over B.
    """
    logits, top = (student_logits, teacher_logits), top_classes(teacher_logits, k)
    return (
        w0 * group_loss(*logits, top, temperature=temperature)
        + w1 * within_loss(*logits, top, temperature=temperature, divergence=divergence)
        + w2 * within_loss(*logits, ~top, temperature=temperature, divergence=divergence)
    )


@DISTILLERS.register("gdkd")
class GDKD(Distiller):
    """``ce_weight`` CE + ``w0`` group term + ``w1`` term within the top classes + ``w2`` term within the others.

    The published code warms the last three up.

    Args:
        k: how many of the teacher's largest classes are on top.
        w0: weight of the group term; 0 leaves it out.
        w1: weight of the term within the top classes; 0 leaves it out.
        w2: weight of the term within the others; 0 leaves it out.
        temperature: T of all three.
        divergence: of the last two: "forward", "reverse" or "both".
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        k: PositiveInt,
        w0: NonNegative,
        w1: NonNegative,
        w2: NonNegative,
        temperature: Positive,
        divergence: Divergence,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(w0=w0, w1=w1, w2=w2)
        if k >= data.num_classes:
            raise UserError(f"distiller.k: {k} leaves no other of {data.num_classes} classes; give less")
        self.k, self.w0, self.w1, self.w2 = k, w0, w1, w2
        self.temperature, self.divergence = temperature, divergence

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``group``, ``top`` and ``others``, whichever has a weight."""
        logits = signals.student_logits, signals.teacher_logits
        top, terms = top_classes(signals.teacher_logits, self.k), {}
        settings: dict[str, Any] = {"temperature": self.temperature, "divergence": self.divergence}
        if self.w0:
            terms["group"] = self.w0 * group_loss(*logits, top, temperature=self.temperature)
        if self.w1:
            terms["top"] = self.w1 * within_loss(*logits, top, **settings)
        if self.w2:
            terms["others"] = self.w2 * within_loss(*logits, ~top, **settings)
        return terms


def _group_log_probs(logits: Tensor, top: Tensor) -> Tensor:
    """log of the two sums of the softmax, over the classes of ``top`` and over the others: (B, C), (B, C) -> (B, 2)."""
    log_probs = F.log_softmax(logits, dim=1)
    return torch.stack([log_probs.masked_fill(~each, -torch.inf).logsumexp(dim=1) for each in (top, ~top)], dim=1)
