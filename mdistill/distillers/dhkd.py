"""DHKD: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation", arXiv:2411.08937v2.

Letters: B batch, C classes, D pooled width.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_probs, standardize
from mdistill.errors import UserError
from mdistill.models.base import Network
from mdistill.registry import NonNegative, Positive


def binary_kl_norm_loss(auxiliary_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """tau^2 sum over classes of KL(1/2 || sigmoid((z_k - z^t_k) / tau)), between two binary distributions.

    Paper: arXiv:2411.08937v2, BinaryKL-Norm. It equals tau^2 sum of ln cosh((z_k - z^t_k) / (2 tau)): quadratic near
    z = z^t, linear far from it, with gradient at most tau / 2 in each logit.

    Differs from the paper: on log-probabilities, where the published code keeps the sigmoid off 0 and 1 by 1e-8 and so
    has no gradient where two logits are more than 18 tau apart.

    Args:
        auxiliary_logits: (B, C), z.
        teacher_logits: (B, C), z^t.
        temperature: tau.

    Returns:
        (), the mean over B.
    """
    gap = (auxiliary_logits - teacher_logits) / temperature
    per_class = -0.5 * (F.logsigmoid(gap) + F.logsigmoid(-gap)) - math.log(2)
    return temperature**2 * per_class.sum(dim=1).mean()


def main_gradient(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the main head's cross-entropy with respect to the pooled features: (p - y) W / B.

    Args:
        logits: (B, C), of p.
        target: (B,) int64, classes, or (B, C), class probabilities: y.
        weight: (C, D), W.

    Returns:
        (B, D).
    """
    error = logits.softmax(dim=1) - class_probs(target, logits)
    return error @ weight / len(logits)


class Align(torch.autograd.Function):
    """Passes features on; on the way back it takes from their gradient g what runs against a reference r.

    g - min(0, <g, r>) / <r, r> r, over the batch as one vector: gradient surgery (Yu et al., arXiv:2001.06782) on g
    alone. Features (B, D), r (B, D) -> (B, D).
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, reference: Tensor) -> Tensor:
        ctx.save_for_backward(reference)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (reference,) = ctx.saved_tensors
        unit = reference / reference.norm().clamp(min=torch.finfo(reference.dtype).tiny)
        return gradient - (gradient * unit).sum().clamp(max=0) * unit, None


@DISTILLERS.register("dhkd")
class DHKD(Distiller):
    """``ce_weight`` CE on the student's head + ``kd_weight`` BinaryKL-Norm on an auxiliary linear head.

    Both heads read the pooled features; the auxiliary one learns with the student and is not exported.

    Differs from the paper: its gradient alignment compares the two losses' gradients over all weights, after two
    backward passes. Here they are compared one step earlier, at the pooled features, where the auxiliary gradient
    enters the backbone. The projection is the same, the inner product is not. The auxiliary head is linear; the
    published code also has one with a hidden layer, for some of its CIFAR-100 pairs.

    Args:
        kd_weight: weight of the logit-level term; 0 leaves it out.
        temperature: tau of that term.
        align: whether its gradient, where it meets the features, gives up what runs against cross-entropy's.
    """

    needs = Needs(teacher="logits", student="features", labels="soft", features=("pooled",))

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperature: Positive,
        align: bool,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        if align and self.ce_weight == 0:
            raise UserError("distiller.align: true needs ce_weight above 0, whose gradient is the one to align with")
        if align and self.label_smoothing:
            raise UserError(
                "distiller.align: true aligns with the gradient of a cross-entropy without label smoothing; set"
                f" distiller.label_smoothing to 0, found {self.label_smoothing}"
            )
        self.kd_weight, self.temperature, self.align = kd_weight, temperature, align
        self.head = nn.Linear(self._main_head.in_features, data.num_classes)

    @property
    def _main_head(self) -> nn.Linear:
        return cast(Network, self.student).classifier

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        if self.kd_weight == 0:
            return {}
        assert signals.student_features is not None
        pooled = signals.student_features.pooled.to(self.head.weight.dtype)
        if self.align:  # over the batch as one vector
            pooled, signals = self.gather(pooled), self.whole_batch(signals)
            weight = self._main_head.weight.detach().to(pooled.dtype)
            logits = signals.raw_student_logits.detach().to(pooled.dtype)
            pooled = Align.apply(pooled, main_gradient(logits, signals.target, weight))
        logits = self.head(pooled)
        if self.standardize_logits:
            logits = standardize(logits)
        return {
            "kd": self.kd_weight * binary_kl_norm_loss(logits, signals.teacher_logits, temperature=self.temperature)
        }
