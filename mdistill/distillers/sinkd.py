"""SinKD: Cui et al., "Sinkhorn Distance Minimization for Knowledge Distillation", arXiv:2402.17110.

Letters: B batch, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.kd import kd_loss
from mdistill.registry import NonNegative, Positive, PositiveInt


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

    Differs from the paper: P has mass 1, not B, so that the loss is a mean over B like every other here and does not
    grow with the batch: B times this is the paper's.

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


@DISTILLERS.register("sinkd")
class SinKD(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD + ``sinkhorn_weight`` Sinkhorn distance.

    Args:
        kd_weight: weight of the KL term, alpha of the paper (its cross-entropy has 1 - alpha); 0 leaves it out.
        sinkhorn_weight: weight of the Sinkhorn distance, beta of the paper; 0 leaves it out.
        temperature: tau of both terms.
        regularization: lambda of the Sinkhorn distance.
        iterations: how often rows and columns are scaled.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        sinkhorn_weight: NonNegative,
        temperature: Positive,
        regularization: Positive,
        iterations: PositiveInt,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight, sinkhorn_weight=sinkhorn_weight)
        self.kd_weight, self.sinkhorn_weight, self.temperature = kd_weight, sinkhorn_weight, temperature
        self.regularization, self.iterations = regularization, iterations

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``kd`` and ``sinkhorn``, whichever has a weight."""
        signals = self.whole_batch(signals)
        logits, terms = (signals.student_logits, signals.teacher_logits), {}
        if self.kd_weight:
            terms["kd"] = self.kd_weight * kd_loss(*logits, temperature=self.temperature)
        if self.sinkhorn_weight:
            terms["sinkhorn"] = self.sinkhorn_weight * sinkhorn_loss(
                *logits,
                temperature=self.temperature,
                regularization=self.regularization,
                iterations=self.iterations,
            )
        return terms
