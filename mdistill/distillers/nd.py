"""ND: Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", arXiv:2305.17007.

With KD beside it this is what the paper calls KD++.

Letters: B batch, C classes, D width of the teacher's pooled features.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_mask, dropout_factors
from mdistill.distillers.kd import kd_loss
from mdistill.distillers.maps import both_pooled
from mdistill.models import feature_shapes
from mdistill.models.layers import BatchNorm1d
from mdistill.registry import NonNegative, NonNegativeInt, Positive

EPSILON = 1e-6  # no norm is taken for smaller, so that features of 0 have a finite gradient
DROPOUT = 0.5  # probability, of the released embedding


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
    own: Tensor = torch.linalg.vector_norm(student_features, dim=1)
    theirs: Tensor = torch.linalg.vector_norm(teacher_features, dim=1)
    norms = own.where(own >= theirs, theirs)  # equal: as the student's, like the released code
    projected = (student_features * directions).sum(dim=1)
    return torch.mean(1 - projected / norms.clamp(min=EPSILON))


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


class Embedding(nn.Module):
    """From the student's pooled width to the teacher's: BatchNorm, dropout and a linear layer.

    Args:
        inputs: the student's width.
        outputs: D.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.linear = BatchNorm1d(inputs), nn.Linear(inputs, outputs)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, factors: Tensor | None = None) -> Tensor:
        """(B, inputs) -> (B, D).

        Args:
            features: (B, inputs).
            factors: (B, inputs), what dropout multiplies by; None for no dropout.
        """
        x = self.norm(features)
        embedded: Tensor = self.linear(x if factors is None else x * factors)
        return embedded


@DISTILLERS.register("nd")
class ND(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD + ``nd_weight`` ND on the pooled features.

    Where the networks' widths differ, an embedding leads the student's features to the teacher's width. It is trained
    with the student and left out at inference.

    Differs from the paper: its class means are computed before the training, in a pass of the teacher over the
    training set, and rounded to 4 digits in the released code. Here they are the means of all teacher features seen so
    far, this batch included: exact for the views seen, complete after one epoch.

    Args:
        kd_weight: weight of KD; 0 leaves it out.
        kd_warmup_epochs: W of min((epoch - 1) / W, 1), which multiplies KD alone, as published, where ``warmup_epochs``
            would ND too; 0 for no warm-up.
        temperature: T of KD.
        nd_weight: weight of the norm-and-direction term; 0 leaves it out.
        embedding: "released": BatchNorm, dropout of 0.5 and a linear layer; "linear": the last alone.
    """

    needs = Needs(teacher="pooled", features=("pooled",))
    class_means: Tensor  # (C, D), of the teacher's pooled features
    class_counts: Tensor  # (C,), how many each rests on

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        kd_warmup_epochs: NonNegativeInt,
        temperature: Positive,
        nd_weight: NonNegative,
        embedding: Literal["released", "linear"],
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight, nd_weight=nd_weight)
        assert teacher is not None
        self.kd_weight, self.kd_warmup_epochs, self.nd_weight = kd_weight, kd_warmup_epochs, nd_weight
        self.temperature = temperature
        own, theirs = (feature_shapes(network, data.image_size).pooled[0] for network in (student, teacher))
        self.embedding: nn.Module = nn.Identity()
        if nd_weight and own != theirs:
            self.embedding = Embedding(own, theirs) if embedding == "released" else nn.Linear(own, theirs)
        self.register_buffer("class_means", torch.zeros(data.num_classes, theirs))
        self.register_buffer("class_counts", torch.zeros(data.num_classes))

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``kd`` and ``nd``, whichever has a weight."""
        terms = {}
        if self.kd_weight:
            loss = kd_loss(signals.student_logits, signals.teacher_logits, temperature=self.temperature)
            if self.kd_warmup_epochs:
                loss = ((signals.epoch - 1) / self.kd_warmup_epochs).clamp(max=1.0) * loss
            terms["kd"] = self.kd_weight * loss
        if self.nd_weight:
            student, teacher = both_pooled(signals)
            means = self._means(signals)[0].to(teacher.dtype)
            terms["nd"] = self.nd_weight * nd_loss(self._embedded(signals, student), teacher, means, signals.target)
        return terms

    def after_step(self, signals: Signals) -> None:
        """The class means take the batch in; computed anew, at the cost of one product (C, B) by (B, D)."""
        if self.nd_weight:
            means, counts = self._means(signals)
            self.class_means.copy_(means)
            self.class_counts.copy_(counts)

    def _embedded(self, signals: Signals, pooled: Tensor) -> Tensor:
        """The student's ``pooled`` features in the teacher's width, (B, D)."""
        inputs = [pooled]
        if self.training and isinstance(self.embedding, Embedding):
            draws = signals.seed, signals.epoch, signals.index, pooled.shape[1]
            inputs.append(dropout_factors(*draws, probability=DROPOUT).to(pooled.dtype))
        return self.run_module(self.embedding, *inputs)

    def _means(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Class means (C, D) and counts (C,) with the batch of all processes; nothing in them has a gradient."""
        _, teacher = both_pooled(signals)
        features, target = self.gather(teacher), self.gather(signals.target)
        return running_means(self.class_means, self.class_counts, features, target)
