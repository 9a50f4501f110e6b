"""TAID: Shing, Misaki, Bao, Yokoi, Akiba, "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
Transfer in Language Models", arXiv:2501.16937.

The student learns from a target that moves from itself to the teacher. Letters: B batch, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.kd import kd_loss
from mdistill.errors import UserError
from mdistill.registry import Fraction, NonNegative, Positive, PositiveInt


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


def taid_loss(student_logits: Tensor, teacher_logits: Tensor, coefficient: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(p_t || p^s), where p_t comes from the intermediate teacher: arXiv:2501.16937, the TAID objective.

    Differs from the paper: nothing at temperature 1; softening and the factor T^2 are those of KD.

    Args:
        student_logits: (B, C), z^s.
        teacher_logits: (B, C), z^t.
        coefficient: (), t of ``interpolate``.
        temperature: T.

    Returns:
        (), the mean over B.
    """
    return kd_loss(student_logits, interpolate(student_logits, teacher_logits, coefficient), temperature=temperature)


class MovingTarget(nn.Module):
    """The coefficient t of ``interpolate``, which goes from ``start`` to ``end`` and never back.

    Paper: arXiv:2501.16937, the adaptive update. With the loss J of each step:
    delta = (J_before - J) / (J_before + 1e-15), m <- beta m + (1 - beta) delta,
    t <- min(end, max(line, t + alpha sigmoid(m) (1 - t))), so that t runs ahead of its line while the loss falls.

    Differs from the paper: the line rises once an epoch, (epoch - 1) / (epochs - 1) of the way, where there it rises
    with every step; within each epoch both take the same range. The first step, which has no J before it, moves
    neither m nor t, as in the published code. J is the distillation term before its weight.

    Args:
        epochs: of the whole run: in the last one the target has arrived.
        start: t in the first step.
        end: the largest t, 1 for the teacher itself.
        alpha: step size of the adaptive update.
        beta: momentum of the loss's relative change.
    """

    coefficient: Tensor
    momentum: Tensor
    previous: Tensor

    def __init__(self, *, epochs: int, start: float, end: float, alpha: float, beta: float) -> None:
        super().__init__()
        self.epochs, self.start, self.end, self.alpha, self.beta = epochs, start, end, alpha, beta
        self.register_buffer("coefficient", torch.tensor(float(start)))
        self.register_buffer("momentum", torch.zeros(()))
        self.register_buffer("previous", torch.tensor(-1.0))  # the last step's loss; -1 before the first

    def at(self, epoch: Tensor) -> Tensor:
        """t in ``epoch`` (), (): where the updates have brought it, on the line at least."""
        way = ((epoch - 1).to(self.coefficient.dtype) / max(self.epochs - 1, 1)).clamp(max=1.0)
        return torch.maximum(self.coefficient, self.start + (self.end - self.start) * way)

    def update(self, loss: Tensor, epoch: Tensor) -> None:
        """Move on, given the step's ``loss`` () and its ``epoch`` ()."""
        loss = loss.to(self.previous.dtype).clamp(min=0.0)  # rounding may take a divergence below 0
        first = self.previous < 0
        change = (self.previous - loss) / (self.previous + 1e-15)
        now = self.at(epoch)
        momentum = torch.where(first, self.momentum, self.beta * self.momentum + (1 - self.beta) * change)
        ahead = now + self.alpha * momentum.sigmoid() * (1 - now)
        self.coefficient.copy_(torch.where(first, now, ahead.clamp(max=self.end)))
        self.momentum.copy_(momentum)
        self.previous.copy_(loss)


@DISTILLERS.register("taid")
class TAID(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD from a target that moves from the student to the teacher.

    Args:
        kd_weight: weight of the distillation term.
        temperature: T, which softens student and target.
        epochs: of the whole run: in the last one the target has arrived.
        start: t in the first step, 0 for the student itself.
        end: the largest t, 1 for the teacher itself.
        alpha: step size of the adaptive update; 0 leaves the line alone.
        beta: momentum of the loss's relative change.
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
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        if start > end:
            raise UserError(f"distiller.start: {start} is above end {end}")
        self.kd_weight, self.temperature = kd_weight, temperature
        self.target = MovingTarget(epochs=epochs, start=start, end=end, alpha=alpha, beta=beta)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        return {"kd": self.kd_weight * self._loss(signals)}

    def after_step(self, signals: Signals) -> None:
        """The target moves on by the step's loss, over the images of all processes; computed anew, which is cheap."""
        self.target.update(self._loss(self.whole_batch(signals)), signals.epoch)

    def _loss(self, signals: Signals) -> Tensor:
        coefficient = self.target.at(signals.epoch)
        return taid_loss(signals.student_logits, signals.teacher_logits, coefficient, temperature=self.temperature)
