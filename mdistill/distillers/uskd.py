"""USKD: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", arXiv:2303.13005.

Soft labels without a teacher, one for the target class and one for the others. Letters: B batch, C classes (at least
2), D channels of an intermediate stage. s, w: class probabilities of the network and of the weak head; y: the true
class.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_mask, masked_log_softmax, of_class
from mdistill.errors import UserError
from mdistill.models.base import Features
from mdistill.registry import NonNegative

SMOOTHING = 0.1
"""Of the weak head's labels."""


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


def rank_labels(logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """Soft labels of the non-target classes: (1/r) / sum of 1/r, where r = 1, 2, ... ranks them (Zipf's law).

    Ranked by s_i / (1 - s_y) + w_i / (1 - w_y), the highest first, a tie by the number of the class.
    Paper: arXiv:2303.13005.

    Differs from the published code, which ranks the target too, so that the ranks skip its place, and which adds
    log-probabilities of s, divided by 1 - log s_y, to probabilities of w. Here both are normalised the same way.

    Args:
        logits: (B, C), of s.
        weak_logits: (B, C), of w.
        target: (B,) int64, y.

    Returns:
        (B, C), 0 at the target, the rest sums to 1.
    """
    others = ~class_mask(target, logits.shape[1])
    score = masked_log_softmax(logits, others).exp() + masked_log_softmax(weak_logits, others).exp()
    order = score.masked_fill(~others, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1) + 1  # (B, C); the target's is C
    label = rank.to(logits.dtype).reciprocal() * others
    return label / label.sum(dim=1, keepdim=True)


def non_target_label_loss(logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """Non-target term: cross-entropy of the softmax over all classes but y with ``rank_labels``.

    Paper: arXiv:2303.13005. The labels have no gradient.

    Differs from the paper: nothing known beyond what ``rank_labels`` says.

    Args:
        logits: (B, C), of s.
        weak_logits: (B, C), of w.
        target: (B,) int64, y.

    Returns:
        (), the mean over B.
    """
    labels = rank_labels(logits.detach(), weak_logits.detach(), target)
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

    Args:
        alpha: weight of the target class's soft label; 0 leaves the term out.
        beta: weight of the non-target classes' soft labels; 0 leaves the term out.
        mu: weight of the weak head's labels, without which it stays as it was drawn; 0 leaves the term out.
        stage: which of the student's stages the weak head reads, as in a list (the stem is 0); the paper's is the last
            but one, -2.
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
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(alpha=alpha, beta=beta, mu=mu)
        self.alpha, self.beta, self.mu, self.stage = alpha, beta, mu, stage
        self.head = nn.Linear(_stage_width(student, data, stage), data.num_classes)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``target``, ``non_target`` and ``weak``, whichever has a weight."""
        assert signals.student_features is not None
        terms = {}
        stage = signals.student_features.stages[self.stage]  # (B, D, H, W)
        weak_logits = self.head(stage.mean(dim=(2, 3), dtype=self.head.weight.dtype))
        if self.alpha:
            logits, target = self.gather(signals.student_logits), self.gather(signals.target)
            terms["target"] = self.alpha * target_label_loss(logits, target)
        if self.beta:
            terms["non_target"] = self.beta * non_target_label_loss(signals.student_logits, weak_logits, signals.target)
        if self.mu:
            terms["weak"] = self.mu * weak_loss(weak_logits, signals.target)
        return terms


def _stage_width(student: nn.Module, data: DataInfo, stage: int) -> int:
    """Channels of the student's ``stage``, read off a pass over an empty image, which changes nothing in it."""
    like, training = next(student.parameters()), student.training
    image = like.new_zeros(1, 3, data.image_size, data.image_size)
    with torch.no_grad():
        features: Features = student.eval().forward_features(image)  # type: ignore[operator]
    student.train(training)
    count = len(features.stages)
    if not -count <= stage < count:
        raise UserError(f"distiller.stage: {stage} is none of the student's {count} stages, {-count} to {count - 1}")
    return features.stages[stage].shape[1]
