"""USKD: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", arXiv:2303.13005.

Soft labels without a teacher, one for the target class and one for the others. Letters: B batch, C classes (at least
2), D channels of an intermediate stage. s, w: class probabilities of the network and of the weak head; y: the true
class.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_mask, masked_log_softmax, of_class
from mdistill.errors import UserError
from mdistill.models import feature_shapes
from mdistill.registry import NonNegative

SMOOTHING = 0.1
"""Of the weak head's labels."""
EPSILON = 1e-6
"""Added to what the scores are divided by, in the released code."""

Variant = Literal["released", "paper"]


def target_label_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Target-class term: -P_y log s_y, with the smoothed soft label P_y = s_y^2 + 1 - mean over the batch of s_y^2.

    Paper: arXiv:2303.13005, the self-distillation part; the labels are 1 here, since there is no mixing of images. P
    has no gradient.

    Differs from the paper: nothing known; as in the published code.

    Args:
        logits: (B, C), of s.
        target: (B,) int64, y.

    Returns:
        (), the mean over B.
    """
    log_prob = of_class(F.log_softmax(logits, dim=1), target).squeeze(1)  # (B,)
    square = (2 * log_prob.detach()).exp()
    return -((square + 1 - square.mean()) * log_prob).mean()


def released_score(logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """What the released code ranks by: w_i / (1 - w_y + 1e-6) + ln s_i / (1 - ln s_y + 1e-6), of every class i.

    Differs from the paper, which ranks probabilities of both: in the code s holds its logarithm by then.

    Args:
        logits: (B, C), of s.
        weak_logits: (B, C), of w.
        target: (B,) int64, y.

    Returns:
        (B, C).
    """
    log_prob, weak_prob = F.log_softmax(logits, dim=1), weak_logits.softmax(dim=1)
    weak = weak_prob / (1 - of_class(weak_prob, target) + EPSILON)
    return weak + log_prob / (1 - of_class(log_prob, target) + EPSILON)


def paper_score(logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """What the paper ranks by: s_i / (1 - s_y) + w_i / (1 - w_y), of every class i but y; -inf at y.

    Args:
        logits: (B, C), of s.
        weak_logits: (B, C), of w.
        target: (B,) int64, y.

    Returns:
        (B, C).
    """
    at_target = class_mask(target, logits.shape[1])
    score = masked_log_softmax(logits, ~at_target).exp() + masked_log_softmax(weak_logits, ~at_target).exp()
    return score.masked_fill(at_target, -torch.inf)


def rank_labels(score: Tensor, target: Tensor) -> Tensor:
    """Soft labels of the non-target classes: (1/r) / sum of 1/r, where r = 1, 2, ... ranks them (Zipf's law).

    Ranked by ``score``, the highest first, a tie by the number of the class. Paper: arXiv:2303.13005.

    Differs from the paper where ``score`` ranks the target among the others: as in the released code, its rank is then
    missing among theirs.

    Args:
        score: (B, C).
        target: (B,) int64, y.

    Returns:
        (B, C), 0 at the target, the rest sums to 1.
    """
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1  # (B, C)
    label = rank.to(score.dtype).reciprocal() * ~class_mask(target, score.shape[1])
    return label / label.sum(dim=1, keepdim=True)


def non_target_label_loss(logits: Tensor, weak_logits: Tensor, target: Tensor, *, variant: Variant) -> Tensor:
    """Non-target term: cross-entropy of the softmax over all classes but y with ``rank_labels``.

    Paper: arXiv:2303.13005. The labels have no gradient.

    Args:
        logits: (B, C), of s.
        weak_logits: (B, C), of w.
        target: (B,) int64, y.
        variant: whether ``released_score`` or ``paper_score`` ranks the classes.

    Returns:
        (), the mean over B.
    """
    score = released_score if variant == "released" else paper_score
    labels = rank_labels(score(logits.detach(), weak_logits.detach(), target), target)
    log_probs = masked_log_softmax(logits, ~class_mask(target, logits.shape[1]))
    return -(labels * log_probs).sum(dim=1).mean()


def weak_loss(weak_logits: Tensor, target: Tensor) -> Tensor:
    """Weak supervision: cross-entropy of the weak head with labels smoothed by 0.1; arXiv:2303.13005.

    Differs from the paper: nothing known; the 0.1 is the published code's.

    Args:
        weak_logits: (B, C), of w.
        target: (B,) int64, y.

    Returns:
        (), the mean over B.
    """
    return F.cross_entropy(weak_logits, target, label_smoothing=SMOOTHING)


@DISTILLERS.register("uskd")
class USKD(Distiller):
    """``ce_weight`` CE + ``alpha`` target label + ``beta`` non-target labels + ``mu`` weak supervision; no teacher.

    The weak head is linear on an intermediate stage, averaged over space; it learns with the student and is not
    exported. Its gradient reaches the stages below.

    Differs from the paper: "released" ranks the non-target classes as the released code does; "paper" ranks them by
    probabilities, as the equations read.

    Args:
        alpha: weight of the target class's soft label; 0 leaves the term out.
        beta: weight of the non-target classes' soft labels; 0 leaves the term out.
        mu: weight of the weak head's labels, without which it stays as it was drawn; 0 leaves the term out.
        stage: which of the student's stages the weak head reads, as in a list (the stem is 0); the paper's is the last
            but one, -2.
        variant: "released" or "paper".
    """

    needs = Needs(teacher="none", student="features", features=("stages",))

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        alpha: NonNegative,
        beta: NonNegative,
        mu: NonNegative,
        stage: int,
        variant: Variant,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(alpha=alpha, beta=beta, mu=mu)
        self.alpha, self.beta, self.mu, self.stage, self.variant = alpha, beta, mu, stage, variant
        self.head = nn.Linear(_stage_width(student, data, stage), data.num_classes)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``target``, ``non_target`` and ``weak``, whichever has a weight."""
        assert signals.student_features is not None
        terms = {}
        stage = signals.student_features.stages[self.stage]  # (B, D, H, W)
        weak_logits = self.head(stage.mean(dim=(2, 3), dtype=self.head.weight.dtype))
        if self.alpha:
            gathered = self.gather(signals.student_logits), self.gather(signals.target)
            terms["target"] = self.alpha * target_label_loss(*gathered)
        if self.beta:
            logits = signals.student_logits, weak_logits
            loss = non_target_label_loss(*logits, signals.target, variant=self.variant)
            terms["non_target"] = self.beta * loss
        if self.mu:
            terms["weak"] = self.mu * weak_loss(weak_logits, signals.target)
        return terms


def _stage_width(student: nn.Module, data: DataInfo, stage: int) -> int:
    """Channels of the student's ``stage``."""
    stages = feature_shapes(student, data.image_size).stages
    count = len(stages)
    if not -count <= stage < count:
        raise UserError(f"distiller.stage: {stage} is none of the student's {count} stages, {-count} to {count - 1}")
    return stages[stage][0]
