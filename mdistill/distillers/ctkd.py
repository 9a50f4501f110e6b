"""CTKD: Li et al., "Curriculum Temperature for Knowledge Distillation", arXiv:2211.16231.

The temperature is learned against the student: it climbs the distillation loss that the student descends, first
hardly, then more and more. Letters: B batch, C classes, H hidden units.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import kl_divergence_per_sample
from mdistill.errors import UserError
from mdistill.registry import NonNegative, Positive, PositiveInt

EPSILON = 1e-7  # added to every probability of the teacher where each sample has its temperature, as published


def ctkd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor) -> Tensor:
    """tau^2 KL(p^t || p^s) at one temperature for all samples or one for each: arXiv:2211.16231, Eq. (1).

    The gradient reaches tau too.

    Differs from the paper: the mean over the samples in place of their sum, as in the released code; and with one
    temperature a sample each probability of the teacher is larger by 1e-7, as in that code, so that they do not sum
    to 1.

    Args:
        student_logits: (B, C), q^s.
        teacher_logits: (B, C), q^t.
        temperature: () or (B,), tau.

    Returns:
        (), the mean over B.
    """
    tau = temperature.reshape(-1, 1)  # (1, 1) or (B, 1)
    teacher_log_probs = F.log_softmax(teacher_logits / tau, dim=1)
    if temperature.ndim:
        teacher_log_probs = (teacher_log_probs.exp() + EPSILON).log()
    student_log_probs = F.log_softmax(student_logits / tau, dim=1)
    return (tau.squeeze(1).square() * kl_divergence_per_sample(teacher_log_probs, student_log_probs)).mean()


def curriculum(epoch: Tensor, *, minimum: float, maximum: float, epochs: int) -> Tensor:
    """lambda = min + (max - min) (1 + cos((1 + way) pi)) / 2, way = min(E, E_loops) / E_loops: Eq. (11).

    Rises from near the minimum to the maximum, which it reaches in epoch E_loops.

    Differs from the paper: nothing. The published code falls from 0 to -1 instead and leaves out the minus sign of the
    reversal, which is the same.

    Args:
        epoch: (), E, counted from 1.
        minimum: lambda_min.
        maximum: lambda_max.
        epochs: E_loops.

    Returns:
        ().
    """
    way = (epoch / epochs).clamp(max=1.0)
    return minimum + (maximum - minimum) * (1 + torch.cos((1 + way) * math.pi)) / 2


class GradientReversal(torch.autograd.Function):
    """x forward, -strength times the gradient backward: Ganin, Lempitsky, arXiv:1409.7495, as the paper uses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: Tensor) -> Tensor:
        """``strength`` is a () tensor, read on the device."""
        ctx.save_for_backward(strength)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """A descending solver thus climbs."""
        (strength,) = ctx.saved_tensors
        return -strength.to(gradients[0].dtype) * gradients[0], None


class GlobalTemperature(nn.Module):
    """One number for all samples, which begins at 1: the paper's Global-T."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """tau_pred, (): whatever the logits are."""
        return self.value


class InstanceTemperature(nn.Module):
    """One number for each sample from both networks' predictions by two layers: the paper's Instance-T.

    It reads the probabilities of both networks, each row in the teacher's order from the likeliest class down, so that
    it sees the shapes of the distributions and not which class is which. It sends no gradient back to the logits: the
    student never learns to please it. The last layer begins at 0, hence with one temperature for all.

    Differs from the paper, which says no more than that two layers read both predictions: order and beginning follow a
    public copy of the code, not checked against the authors'; LayerNorm in place of its BatchNorm, which would mix the
    samples and keep statistics.
    """

    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * num_classes, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.last = nn.Linear(hidden, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """tau_pred: (B, C), (B, C) -> (B,)."""
        order = teacher_logits.argsort(dim=1, descending=True, stable=True)
        ordered = [logits.detach().gather(1, order).softmax(dim=1) for logits in (teacher_logits, student_logits)]
        hidden = F.relu(self.norm(self.first(torch.cat(ordered, dim=1))))
        prediction: Tensor = self.last(hidden).squeeze(1)
        return prediction


@DISTILLERS.register("ctkd")
class CTKD(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD at tau = ``temperature_init`` + ``temperature_range`` sigmoid(tau_pred).

    The student descends the loss, the temperature module climbs it, lambda times as fast: arXiv:2211.16231, Eqs. (3) to
    (8), here in one backward pass with the gradient of tau_pred times -lambda. The module is trained as the student is,
    weight decay included, as in the published code, and is not exported.

    Args:
        kd_weight: weight of the distillation term.
        module: "global" learns one temperature, "instance" one for each sample.
        hidden: H of the instance-wise module; None for the global one.
        temperature_init: tau_init, the lowest temperature.
        temperature_range: tau_range: the highest is tau_init + tau_range.
        lambda_min: lambda_min of ``curriculum``.
        lambda_max: lambda_max, reached in epoch ``lambda_epochs``.
        lambda_epochs: E_loops.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: Positive,
        module: Literal["global", "instance"],
        hidden: PositiveInt | None,
        temperature_init: Positive,
        temperature_range: Positive,
        lambda_min: NonNegative,
        lambda_max: NonNegative,
        lambda_epochs: PositiveInt,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        if (module == "instance") != (hidden is not None):
            raise UserError(
                f"distiller.hidden: found {hidden} with module {module!r};"
                " 'instance' needs a number of hidden units, 'global' needs null"
            )
        if lambda_min > lambda_max:
            raise UserError(f"distiller.lambda_min: {lambda_min} is above lambda_max {lambda_max}")
        self.kd_weight = kd_weight
        self.temperature_init, self.temperature_range = temperature_init, temperature_range
        self.lambda_min, self.lambda_max, self.lambda_epochs = lambda_min, lambda_max, lambda_epochs
        self.temperature = GlobalTemperature() if hidden is None else InstanceTemperature(data.num_classes, hidden)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        logits = signals.student_logits, signals.teacher_logits
        strength = curriculum(
            signals.epoch, minimum=self.lambda_min, maximum=self.lambda_max, epochs=self.lambda_epochs
        )
        prediction: Tensor = GradientReversal.apply(self.temperature(*logits), strength)
        temperature = self.temperature_init + self.temperature_range * prediction.sigmoid()
        return {"kd": self.kd_weight * ctkd_loss(*logits, temperature)}
