"""IKL: Cui et al., "Decoupled Kullback-Leibler Divergence Loss", arXiv:2305.13948.

Improved KL; DKL in its code. Letters: B batch, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_mask, soft_target_loss
from mdistill.registry import NonNegative, Positive


def difference_per_sample(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    """sum over classes j, k of q_j q_k (d_j - d_k)^2 / 4, where d = z^t - z^s: arXiv:2305.13948, the wMSE component.

    With Q the sum of q and m the mean of d under q / Q this is Q sum_j q_j (d_j - m)^2 / 2, in O(C).

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        weights: (B, C), q, not all 0 in a row.

    Returns:
        (B,).
    """
    difference = teacher_logits - student_logits
    total = weights.sum(dim=1, keepdim=True)
    mean = (weights * difference).sum(dim=1, keepdim=True) / total
    return (total.squeeze(1) * (weights * (difference - mean).square()).sum(dim=1)) / 2


def difference_loss(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    """The wMSE component of arXiv:2305.13948: differences of logits between every two classes, weighted by both.

    The gradient reaches the student through z^t - z^s alone: "breaking the asymmetry" there.

    Differs from the paper: nothing; its logits are not softened, as in the published code.

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        weights: (B, C), q, not all 0 in a row.

    Returns:
        (), the mean over B.
    """
    return difference_per_sample(student_logits, teacher_logits, weights).mean()


def ikl_loss(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """beta wMSE + alpha cross-entropy with soft labels: arXiv:2305.13948, the IKL loss.

    Differs from the paper in names alone: there alpha weighs the wMSE and beta the cross-entropy; here they are as in
    its code, which has no T^2 either.

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        weights: (B, C), q, not all 0 in a row.
        alpha: weight of the cross-entropy with soft labels.
        beta: weight of the wMSE.
        temperature: T of the cross-entropy.

    Returns:
        (), the mean over B.
    """
    soft = soft_target_loss(student_logits, teacher_logits, temperature=temperature)
    return beta * difference_loss(student_logits, teacher_logits, weights) + alpha * soft


@DISTILLERS.register("ikl")
class IKL(Distiller):
    """``ce_weight`` CE + ``beta`` wMSE + ``alpha`` cross-entropy with soft labels, which is not multiplied by T^2.

    The weights q of the classes are the teacher's prediction of the sample, or what it predicted on average for samples
    of the same class in the epoch before, as they were augmented then; 1 / C in the first epoch, and for a class that
    has not been seen.

    Differs from the paper in names alone: alpha and beta are exchanged there, and as here in its code.

    Args:
        alpha: weight of the cross-entropy with soft labels; 0 leaves it out.
        beta: weight of the wMSE; 0 leaves it out.
        temperature: T of the cross-entropy.
        weight_temperature: T of the predictions that weigh the classes.
        class_prior: weigh by the class's average prediction of the epoch before.
    """

    needs = Needs(teacher="logits")
    prior: Tensor  # (C, C), row c: the mean prediction of class c in the epoch before ``epoch_counted``
    prior_sums: Tensor  # (C, C), row c: the predictions of class c in the epoch ``epoch_counted`` so far, added up
    prior_counts: Tensor  # (C,), of how many samples
    epoch_counted: Tensor  # (), 0 before the first step

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        alpha: NonNegative,
        beta: NonNegative,
        temperature: Positive,
        weight_temperature: Positive,
        class_prior: bool,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(alpha=alpha, beta=beta)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.weight_temperature, self.keeps_prior = weight_temperature, class_prior and beta > 0
        if self.keeps_prior:
            classes = data.num_classes
            self.register_buffer("prior", torch.full((classes, classes), 1 / classes))
            self.register_buffer("prior_sums", torch.zeros(classes, classes))
            self.register_buffer("prior_counts", torch.zeros(classes))
            self.register_buffer("epoch_counted", torch.zeros((), dtype=torch.int64))

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``wmse`` and ``soft_ce``, whichever has a weight."""
        terms = {}
        if self.beta:
            terms["wmse"] = self.beta * self.difference(signals)
        if self.alpha:
            logits = signals.student_logits, signals.teacher_logits
            terms["soft_ce"] = self.alpha * soft_target_loss(*logits, temperature=self.temperature)
        return terms

    def difference(self, signals: Signals) -> Tensor:
        """The wMSE, ()."""
        return difference_loss(signals.student_logits, signals.teacher_logits, self.class_weights(signals))

    def class_weights(self, signals: Signals) -> Tensor:
        """q of each sample, (B, C)."""
        if not self.keeps_prior:
            return self._predictions(signals)
        tables = self.prior, self.prior_sums, self.prior_counts
        prior, sums, counts = (table.index_select(0, signals.target) for table in tables)
        return _prior_of(prior, sums, counts, signals.epoch > self.epoch_counted).to(signals.teacher_logits.dtype)

    def after_step(self, signals: Signals) -> None:
        """The predictions of the batch, of all processes, are counted for the epoch to come."""
        if not self.keeps_prior:
            return
        predictions, target = self.gather(self._predictions(signals)), self.gather(signals.target)
        member = class_mask(target, len(self.prior)).to(self.prior.dtype)  # (B, C)
        begins = signals.epoch > self.epoch_counted
        self.prior.copy_(_prior_of(self.prior, self.prior_sums, self.prior_counts, begins))
        for total, arrived in (
            (self.prior_sums, member.T @ predictions.to(member.dtype)),
            (self.prior_counts, member.sum(dim=0)),
        ):
            total.copy_(torch.where(begins, 0.0, total) + arrived)
        self.epoch_counted.copy_(signals.epoch)

    def _predictions(self, signals: Signals) -> Tensor:
        return F.softmax(signals.teacher_logits / self.weight_temperature, dim=1)


def _prior_of(prior: Tensor, sums: Tensor, counts: Tensor, begins: Tensor) -> Tensor:
    """Rows (R, C) of the prior: those that hold or, where an epoch ``begins``, the means of what was counted."""
    means = sums / counts.clamp(min=1)[:, None]
    return torch.where(begins & (counts > 0)[:, None], means, prior)
