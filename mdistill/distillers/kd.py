"""KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531v1.

Two variants, off by default: another divergence in the place of KL(teacher || student), among them the balanced one of
Amara et al., arXiv:2212.12965; and the moving target of Shing et al., arXiv:2501.16937. Letters: B batch, C classes.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypedDict

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import kl_divergence
from mdistill.errors import UserError
from mdistill.registry import NonNegative, Positive, PositiveInt

Divergence = Literal["forward", "reverse", "js", "balanced"]
AtLeast1 = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    divergence: Divergence = "forward",
    balance: float = 1.0,
) -> Tensor:
    """T^2 D(p^t, p^s), both distributions softened: Hinton et al., arXiv:1503.02531v1, Eq. (1) and Sec. 2.

    D is KL(p^t || p^s) (``forward``, the method), KL(p^s || p^t) (``reverse``), ``js_divergence`` or
    ``balanced_divergence``.
    Symbols: z_i = ``student_logits``, v_i = ``teacher_logits``, T = ``temperature``; the factor T^2 as Sec. 2 asks;
    ``balance`` belongs to the balanced divergence alone.
    Shapes: (B, C), (B, C) -> (), the mean over B.

    Differs from the paper: KL in place of the cross-entropy with soft targets (the same gradient; 0 at its minimum).
    The paper has no other divergence.
    """
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=1)
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    if divergence == "forward":
        loss = kl_divergence(teacher_log_probs, student_log_probs)
    elif divergence == "reverse":
        loss = kl_divergence(student_log_probs, teacher_log_probs)
    elif divergence == "js":
        loss = js_divergence(teacher_log_probs, student_log_probs)
    else:
        loss = balanced_divergence(teacher_log_probs, student_log_probs, balance=balance)
    return temperature**2 * loss


def js_divergence(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """Jensen-Shannon: 1/2 KL(t || m) + 1/2 KL(s || m), m = (t + s) / 2, averaged over B: (B, C), (B, C) -> ()."""
    middle = torch.logaddexp(teacher_log_probs, student_log_probs) - math.log(2)
    return 0.5 * (kl_divergence(teacher_log_probs, middle) + kl_divergence(student_log_probs, middle))


def balanced_divergence(teacher_log_probs: Tensor, student_log_probs: Tensor, *, balance: float) -> Tensor:
    """w_f KL(t || s) + w_r KL(s || t), weighed sample by sample by which of the two entropies H is larger.

    Paper: Amara, Sepahvand, Meyer, Gross, Clark, "BD-KD: Balancing the Divergences for Online Knowledge Distillation",
    arXiv:2212.12965, the student's loss. Where H(t) > H(s), the student is too certain: (w_f, w_r) = (``balance``, 1),
    since KL(t || s) spreads the student over what the teacher holds likely. Elsewhere (1, ``balance``).
    Shapes: (B, C), (B, C) -> (), the mean over B.

    Differs from the paper: the teacher is frozen, there it learns too. A reading, not checked against the paper's
    formula: that the weights are two constants which the sign of the gap assigns (their size is ``balance``), and that
    the entropies are those of the softened distributions.
    """
    forward = F.kl_div(student_log_probs, teacher_log_probs, log_target=True, reduction="none").sum(dim=1)
    reverse = F.kl_div(teacher_log_probs, student_log_probs, log_target=True, reduction="none").sum(dim=1)
    too_certain = _entropy(teacher_log_probs) > _entropy(student_log_probs)  # (B,)
    return torch.where(too_certain, balance * forward + reverse, forward + balance * reverse).mean()


def interpolate(student_logits: Tensor, teacher_logits: Tensor, coefficient: Tensor) -> Tensor:
    """(1 - t) z^s + t z^t, without gradient to z^s: Shing et al., "TAID", arXiv:2501.16937, the intermediate teacher.

    Symbols: t = ``coefficient``. Shapes: (B, C), (B, C), () -> (B, C).
    """
    return (1 - coefficient) * student_logits.detach() + coefficient * teacher_logits


class Interpolation(TypedDict):
    """The moving target's settings."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # read by pydantic

    epochs: PositiveInt  # of the whole run: in the last one the target has arrived
    start: Share  # t in the first step
    end: Share  # the largest t, 1 for the teacher itself
    alpha: NonNegative  # step size of the adaptive update
    beta: Share  # momentum of the loss's relative change


class MovingTarget(nn.Module):
    """The coefficient t of ``interpolate``, which goes from ``start`` to ``end`` and never back.

    Paper: Shing, Misaki, Bao, Yokoi, Akiba, "TAID: Temporally Adaptive Interpolated Distillation for Efficient
    Knowledge Transfer in Language Models", arXiv:2501.16937, the adaptive update. With the loss J of each step:
    delta = (J_before - J) / (J_before + 1e-15), m <- beta m + (1 - beta) delta,
    t <- min(end, max(line, t + alpha sigmoid(m) (1 - t))), so that t runs ahead of its line while the loss falls.

    Differs from the paper: the line rises once an epoch, (epoch - 1) / (epochs - 1) of the way, where there it rises
    with every step; within each epoch both take the same range. The first step, which has no J before it, moves
    neither m nor t, as in the published code. J is the distillation term before its weight, whatever divergence it is.
    """

    coefficient: Tensor
    momentum: Tensor
    previous: Tensor

    def __init__(self, settings: Interpolation) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("coefficient", torch.tensor(float(settings["start"])))
        self.register_buffer("momentum", torch.zeros(()))
        self.register_buffer("previous", torch.tensor(-1.0))  # the last step's loss; -1 before the first

    def at(self, epoch: Tensor) -> Tensor:
        """t in this epoch, (): what the updates have made of it, on the line at least."""
        start, end, epochs = self.settings["start"], self.settings["end"], self.settings["epochs"]
        way = ((epoch - 1).to(self.coefficient.dtype) / max(epochs - 1, 1)).clamp(max=1.0)
        return torch.maximum(self.coefficient, start + (end - start) * way)

    @torch.no_grad()
    def update(self, loss: Tensor, epoch: Tensor) -> None:
        """Move on, given the step's loss () and its epoch ()."""
        loss = loss.to(self.previous.dtype).clamp(min=0.0)  # rounding may take a divergence below 0
        first = self.previous < 0
        change = (self.previous - loss) / (self.previous + 1e-15)
        beta, now = self.settings["beta"], self.at(epoch)
        momentum = torch.where(first, self.momentum, beta * self.momentum + (1 - beta) * change)
        ahead = now + self.settings["alpha"] * momentum.sigmoid() * (1 - now)
        self.coefficient.copy_(torch.where(first, now, ahead.clamp(max=self.settings["end"])))
        self.momentum.copy_(momentum)
        self.previous.copy_(loss)


@DISTILLERS.register("kd")
class KD(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD.

    Args:
        kd_weight: weight of the distillation term; 0 leaves it out.
        temperature: T, which softens both networks.
        divergence: between teacher and student; "forward" is the method.
        balance: weight, at least 1, of the favoured half of the "balanced" divergence, which needs it.
        target: "teacher" is the method; "interpolated" aims between student and teacher and needs ``interpolation``.
        interpolation: how that target moves: epochs, start, end, alpha, beta.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperature: Positive,
        divergence: Divergence = "forward",
        balance: AtLeast1 | None = None,
        target: Literal["teacher", "interpolated"] = "teacher",
        interpolation: Interpolation | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        _require_both("divergence", "balanced", divergence, "balance", balance)
        _require_both("target", "interpolated", target, "interpolation", interpolation)
        if interpolation is not None and interpolation["start"] > interpolation["end"]:
            raise UserError(
                f"distiller.interpolation: start {interpolation['start']} is above end {interpolation['end']}"
            )
        self.kd_weight, self.temperature, self.divergence = kd_weight, temperature, divergence
        self.balance = 1.0 if balance is None else balance
        self.target = None if interpolation is None else MovingTarget(interpolation)
        self._step: tuple[Tensor, Tensor] | None = None  # this step's loss () and epoch ()

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        if self.kd_weight == 0:
            return {}
        student_logits, target_logits = signals.student_logits, signals.teacher_logits
        if self.target is not None:
            target_logits = interpolate(student_logits, target_logits, self.target.at(signals.epoch))
        loss = kd_loss(
            student_logits,
            target_logits,
            temperature=self.temperature,
            divergence=self.divergence,
            balance=self.balance,
        )
        if self.target is not None and self.training and torch.is_grad_enabled():
            self._step = loss.detach(), signals.epoch
        return {"kd": self.kd_weight * loss}

    def after_step(self) -> None:
        """The target moves on, when there is one that moves."""
        if self.target is not None and self._step is not None:
            self.target.update(*self._step)
            self._step = None


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(dim=1)


def _require_both(key: str, variant: str, found: str, setting: str, value: object) -> None:
    if (found == variant) != (value is not None):
        missing = "is missing" if value is None else f"is given, and {key} is {found!r}"
        raise UserError(f"distiller.{setting}: {key} {variant!r} and {setting} go together; {setting} {missing}")
