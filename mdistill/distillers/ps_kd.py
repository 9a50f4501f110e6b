"""PSKD: Kim, Ji, Yoon, Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", arXiv:2006.12000.

PS-KD. Letters: B batch, C classes, N training samples.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_probs
from mdistill.registry import Fraction, PositiveInt


def trust(epoch: Tensor, *, alpha: float, epochs: int) -> Tensor:
    """alpha_t = alpha_T t / T: arXiv:2006.12000, its linear growth.

    At most alpha_T, however long a run.

    Differs from the paper: nothing.

    Args:
        epoch: (), t, counted from 1.
        alpha: alpha_T.
        epochs: T.

    Returns:
        ().
    """
    return alpha * (epoch / epochs).clamp(max=1.0)


def refined_targets(target: Tensor, past: Tensor, trust: Tensor) -> Tensor:
    """(1 - alpha_t) one-hot + alpha_t P_{t-1}; a sample without a past prediction keeps its hard label.

    Paper: arXiv:2006.12000, the soft target at epoch t.

    Differs from the paper: nothing; the first epoch, which has no past, is on hard labels in the published code too.

    Args:
        target: (B,) int64, the labels.
        past: (B, C), P_{t-1}, the student's prediction of the epoch before, zeros where there is none.
        trust: (), alpha_t.

    Returns:
        (B, C), each row a distribution.
    """
    hard = class_probs(target, past)
    return torch.where(past.sum(dim=1, keepdim=True) > 0, (1 - trust) * hard + trust * past, hard)


@DISTILLERS.register("ps_kd")
class PSKD(Distiller):
    """``ce_weight`` CE with labels that the student's own predictions of the epoch before refine; no teacher.

    The predictions lie on the device and in every checkpoint: N x C numbers of float16, 10 MB for CIFAR-100 and 2.6 GB
    for ImageNet. Rounding to float16 moves a probability by at most 2^-11 of itself, or 2^-25. An epoch shows each
    sample once, so the prediction that a step overwrites is needed again in the next epoch only, and after any step the
    predictions and the place in the epoch are all there is to resume from.

    Args:
        alpha: alpha_T, the weight of the student's own prediction in the last epoch's labels.
        epochs: T, of the whole run.
    """

    needs = Needs(teacher="none")
    past: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        alpha: Fraction,
        epochs: PositiveInt,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term()
        self.alpha, self.epochs = alpha, epochs
        self.register_buffer("past", torch.zeros(data.num_samples, data.num_classes, dtype=torch.float16))  # (N, C)

    def task(self, signals: Signals) -> dict[str, Tensor]:
        """Cross-entropy with the refined labels, on the raw logits."""
        logits = signals.raw_student_logits
        past = self.past.index_select(0, signals.index).to(logits.dtype)
        labels = refined_targets(signals.target, past, trust(signals.epoch, alpha=self.alpha, epochs=self.epochs))
        return {"ce": self.ce_weight * F.cross_entropy(logits, labels)}

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """Nothing beside the refined labels."""
        return {}

    def after_step(self, signals: Signals) -> None:
        """The predictions of the batch, of all processes, wait for the next epoch."""
        predictions = self.gather(signals.raw_student_logits.softmax(dim=1))
        self.past.index_copy_(0, self.gather(signals.index), predictions.to(self.past.dtype))
