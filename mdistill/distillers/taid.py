"""TAID: Shing, Misaki, Bao, Yokoi, Akiba, "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
Transfer in Language Models", arXiv:2501.16937.

The student learns from a target that moves from itself to the teacher. Letters: B batch, C classes.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import soft_target_loss
from mdistill.distillers.kd import kd_loss
from mdistill.errors import UserError
from mdistill.registry import Fraction, NonNegative, Positive, PositiveInt

Variant = Literal["released", "paper"]


def interpolate(student_logits: Tensor, teacher_logits: Tensor, coefficient: Tensor) -> Tensor:
    """(1 - t) z^s + t z^t, without gradient to z^s: arXiv:2501.16937, the intermediate teacher.

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        coefficient: (), t.

    Returns:
        (B, C).
    """
    return (1 - coefficient) * student_logits.detach() + coefficient * teacher_logits


def taid_loss(
    student_logits: Tensor, teacher_logits: Tensor, coefficient: Tensor, *, temperature: float, variant: Variant
) -> Tensor:
    """T^2 times the cross-entropy between p_t, of the intermediate teacher, and p^s: arXiv:2501.16937, TAID objective.

    Differs from the paper: "released" takes the cross-entropy, as the released code does, where "paper" has KL(p_t ||
    p^s), Eq. (3). Their gradients are the same; the entropy of p_t between them moves the target (``MovingTarget``).

    Differs from the released code: at temperatures other than 1, which softening and the factor T^2, those of KD, add.

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        coefficient: (), t of ``interpolate``.
        temperature: T.
        variant: see above.

    Returns:
        (), the mean over B.
    """
    target = interpolate(student_logits, teacher_logits, coefficient)
    if variant == "paper":
        return kd_loss(student_logits, target, temperature=temperature)
    return temperature**2 * soft_target_loss(student_logits, target, temperature=temperature)


class MovingTarget(nn.Module):
    """The coefficient t of ``interpolate``, which goes from ``start`` to ``end`` and never back.

    Paper: arXiv:2501.16937, Algorithm 1. With the loss J of step k = 0, 1, ...:
    delta = (J_before - J) / (J_before + 1e-15), m <- beta m + (1 - beta) delta,
    t <- min(end, max(line, t + alpha sigmoid(m) (1 - t))), line = start + (end - start) k / steps, so that t runs ahead
    of its line while the loss falls. The first step, which has no J before it, moves neither m nor t, as in the
    released code. J is the distillation term before its weight.

    Args:
        steps: of the whole run.
        start: t in the first step.
        end: the largest t, 1 for the teacher itself.
        alpha: step size of the adaptive update.
        beta: momentum of the loss's relative change.
    """

    coefficient: Tensor
    momentum: Tensor
    previous: Tensor
    step: Tensor

    def __init__(self, *, steps: int, start: float, end: float, alpha: float, beta: float) -> None:
        super().__init__()
        self.steps, self.start, self.end, self.alpha, self.beta = steps, start, end, alpha, beta
        self.register_buffer("coefficient", torch.tensor(float(start)))
        self.register_buffer("momentum", torch.zeros(()))
        self.register_buffer("previous", torch.tensor(-1.0))  # the last step's loss; -1 before the first
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # k

    def update(self, loss: Tensor) -> None:
        """Move on, given the step's ``loss`` ()."""
        loss = loss.to(self.previous.dtype).clamp(min=0.0)  # rounding may take a divergence below 0
        first = self.previous < 0
        change = (self.previous - loss) / (self.previous + 1e-15)
        momentum = torch.where(first, self.momentum, self.beta * self.momentum + (1 - self.beta) * change)
        way = (self.step.to(loss.dtype) / self.steps).clamp(max=1.0)
        line = self.start + (self.end - self.start) * way
        ahead = self.coefficient + self.alpha * momentum.sigmoid() * (1 - self.coefficient)
        moved = torch.maximum(line, ahead).clamp(max=self.end)
        self.coefficient.copy_(torch.where(first, self.coefficient, moved))
        self.momentum.copy_(momentum)
        self.previous.copy_(loss)
        self.step.add_(1)


@DISTILLERS.register("taid")
class TAID(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD from a target that moves from the student to the teacher.

    Args:
        kd_weight: weight of the distillation term.
        temperature: T, which softens student and target.
        epochs: of the whole run, at whose end the target has arrived.
        start: t in the first step, 0 for the student itself.
        end: the largest t, 1 for the teacher itself.
        alpha: step size of the adaptive update; 0 leaves the line alone.
        beta: momentum of the loss's relative change.
        variant: of ``taid_loss``: the released code's, or the paper's.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: Positive,
        temperature: Positive,
        epochs: PositiveInt,
        start: Fraction,
        end: Fraction,
        alpha: NonNegative,
        beta: Fraction,
        variant: Variant,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        if start > end:
            raise UserError(f"distiller.start: {start} is above end {end}")
        self.kd_weight, self.temperature, self.variant = kd_weight, temperature, variant
        steps = epochs * -(-data.num_samples // data.batch_size)
        self.target = MovingTarget(steps=steps, start=start, end=end, alpha=alpha, beta=beta)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        return {"kd": self.kd_weight * self._loss(signals)}

    def after_step(self, signals: Signals) -> None:
        """The target moves on by the step's loss, over the images of all processes; computed anew, which is cheap."""
        self.target.update(self._loss(self.whole_batch(signals)))

    def _loss(self, signals: Signals) -> Tensor:
        return taid_loss(
            signals.student_logits,
            signals.teacher_logits,
            self.target.coefficient,
            temperature=self.temperature,
            variant=self.variant,
        )
