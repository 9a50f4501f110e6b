"""SinKD: Cui et al., "Sinkhorn Distance Minimization for Knowledge Distillation", arXiv:2402.17110.

Letters: B batch, C classes.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import soft_target_loss
from mdistill.distillers.kd import kd_loss
from mdistill.errors import UserError
from mdistill.registry import NonNegative, Positive, PositiveInt

FACTOR = 1e-3
"""Of the Sinkhorn term in the released code; its T0 and GPT-Neo parts have 8e-4."""


def transport_plan(cost: Tensor, *, regularization: float, iterations: int) -> Tensor:
    """Sinkhorn's plan for ``cost`` and uniform marginals, of total mass 1.

    Starts from exp(-cost / regularization) and scales rows, then columns, to sum 1 / N, ``iterations`` times; in logs,
    so that no kernel underflows. Columns are exact at the end, rows nearly.

    Args:
        cost: (N, N).
        regularization: lambda.
        iterations: how often rows and columns are scaled.

    Returns:
        (N, N).
    """
    log_plan = -cost / regularization
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(dim=0, keepdim=True)
    return log_plan.exp() / len(cost)


def sinkhorn_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, regularization: float, iterations: int
) -> Tensor:
    """Batch-wise Sinkhorn distance <P, D> between the softened outputs: arXiv:2402.17110, the batch-wise reformulation.

    D_ij = |p^s_i - p^t_j|_1, student sample i against teacher sample j; P = Sinkhorn's plan between them. The gradient
    flows through D and through P. Memory and time: B^2 C for the gradient of D.

    Differs from the paper: P has mass 1, not B, so that the loss is a mean over B: B times this is the paper's sum.

    Args:
        student_logits: (B, C), of p^s.
        teacher_logits: (B, C), of p^t.
        temperature: tau, which softens both.
        regularization: lambda.
        iterations: how often rows and columns of the plan are scaled.

    Returns:
        ().
    """
    student, teacher = (student_logits / temperature).softmax(dim=1), (teacher_logits / temperature).softmax(dim=1)
    cost = torch.cdist(student, teacher, p=1.0)  # (B, B)
    return (transport_plan(cost, regularization=regularization, iterations=iterations) * cost).sum()


def annealed(temperature: float, epoch: Tensor, epochs: int) -> Tensor:
    """T + (1 - T) (epoch - 1) / (epochs - 1): from ``temperature`` in epoch 1 straight to 1 in the last of ``epochs``.

    Args:
        temperature: T.
        epoch: (), counted from 1.
        epochs: of the whole run.

    Returns:
        ().
    """
    return temperature + (1 - temperature) * ((epoch - 1) / max(epochs - 1, 1)).clamp(max=1.0)


@DISTILLERS.register("sinkd")
class SinKD(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD + ``sinkhorn_weight`` Sinkhorn distance.

    Differs from the paper: "released" sums the Sinkhorn distance over the batch and multiplies it by 0.001, and its KD
    is the cross-entropy with soft targets, ``soft_target_loss``, without T^2, as in the released code; "paper" is the
    mean over the batch, and KD with its T^2.

    Args:
        kd_weight: weight of KD, alpha of the paper (its cross-entropy has 1 - alpha); 0 leaves it out.
        kd_temperature: T of KD.
        kd_anneal_epochs: of the whole run, over which T falls to 1, see ``annealed``; null: T stays.
        sinkhorn_weight: weight of the Sinkhorn distance, beta of the paper; 0 leaves it out.
        temperature: tau of the Sinkhorn distance.
        regularization: lambda of the Sinkhorn distance.
        iterations: how often rows and columns are scaled.
        variant: "released" or "paper".
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        kd_temperature: Positive,
        kd_anneal_epochs: PositiveInt | None,
        sinkhorn_weight: NonNegative,
        temperature: Positive,
        regularization: Positive,
        iterations: PositiveInt,
        variant: Literal["released", "paper"],
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight, sinkhorn_weight=sinkhorn_weight)
        if kd_anneal_epochs is not None and variant == "paper":
            raise UserError(
                "distiller.kd_anneal_epochs: the annealed temperature belongs to distiller.variant 'released', found"
                f" {kd_anneal_epochs} with 'paper'; set it to null"
            )
        self.kd_weight, self.kd_temperature, self.kd_anneal_epochs = kd_weight, kd_temperature, kd_anneal_epochs
        self.sinkhorn_weight, self.temperature = sinkhorn_weight, temperature
        self.regularization, self.iterations, self.variant = regularization, iterations, variant

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``kd`` and ``sinkhorn``, whichever has a weight."""
        signals = self.whole_batch(signals)
        logits, terms = (signals.student_logits, signals.teacher_logits), {}
        released = self.variant == "released"
        if self.kd_weight:
            temperature: float | Tensor = self.kd_temperature
            if self.kd_anneal_epochs is not None:
                temperature = annealed(self.kd_temperature, signals.epoch, self.kd_anneal_epochs)
            loss = (
                soft_target_loss(*logits, temperature=temperature)
                if released
                else kd_loss(*logits, temperature=self.kd_temperature)
            )
            terms["kd"] = self.kd_weight * loss
        if self.sinkhorn_weight:
            distance = sinkhorn_loss(
                *logits,
                temperature=self.temperature,
                regularization=self.regularization,
                iterations=self.iterations,
            )
            factor = FACTOR * len(signals.student_logits) if released else 1.0
            terms["sinkhorn"] = self.sinkhorn_weight * factor * distance
        return terms
