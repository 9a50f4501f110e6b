"""ND: Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", arXiv:2305.17007.

With KD beside it this is what the paper calls KD++.

Letters: B batch, C classes, D width of the teacher's pooled features.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_mask
from mdistill.distillers.kd import kd_loss
from mdistill.models.base import Network
from mdistill.registry import NonNegative, Positive

EPSILON = 1e-6  # no norm is taken for smaller, so that features of 0 have a finite gradient


def nd_loss(student_features: Tensor, teacher_features: Tensor, class_means: Tensor, target: Tensor) -> Tensor:
    """1 - f^s . e_y / max(|f^s|, |f^t|), where e_y = c_y / |c_y|: arXiv:2305.17007, the ND loss.

    e_y is the direction of the teacher's mean feature of the true class. A student shorter than the teacher is pulled
    longer along it; a longer one only turns towards it. Between 0 and 2; 0 for a student along e_y that is no shorter
    than the teacher.

    Differs from the paper: nothing but the guard against norms of 0.

    Args:
        student_features: (B, D), f^s.
        teacher_features: (B, D), f^t.
        class_means: (C, D), c, of the teacher's features.
        target: (B,) int64, y.

    Returns:
        (), the mean over B.
    """
    directions = F.normalize(class_means, dim=1, eps=EPSILON).index_select(0, target)  # (B, D)
    norms = torch.maximum(
        torch.linalg.vector_norm(student_features, dim=1), torch.linalg.vector_norm(teacher_features, dim=1)
    )
    return (1 - (student_features * directions).sum(dim=1) / norms.clamp(min=EPSILON)).mean()


def running_means(means: Tensor, counts: Tensor, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The class means, and how many features each rests on, once ``features`` are counted in.

    Exact: after any number of batches each mean is that of all features of its class; 0 where none came.

    Args:
        means: (C, D), so far.
        counts: (C,), so far.
        features: (B, D).
        target: (B,) int64, the class of each.

    Returns:
        (C, D), (C,): the new means and counts.
    """
    member = class_mask(target, len(means)).to(features.dtype)  # (B, C)
    arrived = member.sum(dim=0)  # (C,)
    total = counts + arrived
    change = member.T @ features - arrived[:, None] * means  # (C, D)
    return means + change / total.clamp(min=1)[:, None], total


@DISTILLERS.register("nd")
class ND(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD + ``nd_weight`` ND on the pooled features.

    Differs from the paper: its class means are computed before the training, in a pass of the teacher over the
    training set. Here they are the means of all teacher features seen so far, this batch included: exact for the views
    seen, complete after one epoch. Where the networks' widths differ, a linear layer leads the student's features to
    the teacher's width, without the BatchNorm and the dropout that the published code puts before it. It is trained
    with the student and left out at inference.

    Args:
        kd_weight: weight of KD; 0 leaves it out. The published code warms this term alone up, over 20 epochs.
        temperature: T of KD.
        nd_weight: weight of the norm-and-direction term; 0 leaves it out.
    """

    needs = Needs(teacher="features", features=("pooled",))
    class_means: Tensor  # (C, D), of the teacher's pooled features
    class_counts: Tensor  # (C,), how many each rests on

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperature: Positive,
        nd_weight: NonNegative,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight, nd_weight=nd_weight)
        self.kd_weight, self.temperature, self.nd_weight = kd_weight, temperature, nd_weight
        student_width, teacher_width = (cast(Network, network).classifier.in_features for network in (student, teacher))
        same = student_width == teacher_width or nd_weight == 0
        self.embedding = nn.Identity() if same else nn.Linear(student_width, teacher_width)
        self.register_buffer("class_means", torch.zeros(data.num_classes, teacher_width))
        self.register_buffer("class_counts", torch.zeros(data.num_classes))

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``kd`` and ``nd``, whichever has a weight."""
        terms = {}
        if self.kd_weight:
            loss = kd_loss(signals.student_logits, signals.teacher_logits, temperature=self.temperature)
            terms["kd"] = self.kd_weight * loss
        if self.nd_weight:
            assert signals.student_features is not None  # what ``needs`` asks for
            dtype = signals.student_logits.dtype
            student = self.embedding(signals.student_features.pooled.to(dtype))
            means = self._means(signals)[0].to(dtype)
            terms["nd"] = self.nd_weight * nd_loss(student, _teacher_features(signals), means, signals.target)
        return terms

    def after_step(self, signals: Signals) -> None:
        """The class means take the batch in; computed anew, at the cost of one product (C, B) by (B, D)."""
        if self.nd_weight:
            means, counts = self._means(signals)
            self.class_means.copy_(means)
            self.class_counts.copy_(counts)

    def _means(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Class means (C, D) and counts (C,) with the batch of all processes; nothing in them has a gradient."""
        features, target = self.gather(_teacher_features(signals)), self.gather(signals.target)
        return running_means(self.class_means, self.class_counts, features, target)


def _teacher_features(signals: Signals) -> Tensor:
    assert signals.teacher_features is not None  # what ``needs`` asks for
    return signals.teacher_features.pooled.to(signals.student_logits.dtype)
