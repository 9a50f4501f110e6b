"""DIST: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536.

Letters: B batch, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.registry import NonNegative, Positive

EPSILON = 1e-8  # of the published code: a constant row correlates with nothing


def pearson_distance(left: Tensor, right: Tensor) -> Tensor:
    """1 - the mean over rows of Pearson's correlation of the two rows.

    A row that is constant in either counts as uncorrelated: it adds 1, with gradient 0.

    Args:
        left: (N, M).
        right: (N, M).

    Returns:
        ().
    """
    left = left - left.mean(dim=1, keepdim=True)
    right = right - right.mean(dim=1, keepdim=True)
    norms = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(right, dim=1)  # (N,)
    correlations: Tensor = (left * right).sum(dim=1) / (norms + EPSILON)
    return (1 - correlations).mean()


def inter_class_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Inter-class relation: tau^2 times the mean over samples of d_p(Y^s_i, Y^t_i). arXiv:2205.10536, Sec. 4.

    Y are the softened probabilities, d_p = 1 - Pearson's correlation, Y_i the C probabilities of sample i.

    Differs from the paper: the factor tau^2 and an epsilon under the fraction, as in the published code.

    Args:
        student_logits: (B, C), of Y^s.
        teacher_logits: (B, C), of Y^t.
        temperature: tau.

    Returns:
        ().
    """
    student, teacher = (student_logits / temperature).softmax(dim=1), (teacher_logits / temperature).softmax(dim=1)
    return temperature**2 * pearson_distance(student, teacher)


def intra_class_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Intra-class relation: tau^2 times the mean over classes of d_p(Y^s_:j, Y^t_:j). arXiv:2205.10536, Sec. 4.

    Y_:j are the B probabilities that a batch has for class j; the rest as in ``inter_class_loss``. In a batch of 1
    nothing correlates: the term is the constant tau^2.

    Differs from the paper: the factor tau^2 and an epsilon under the fraction, as in the published code.

    Args:
        student_logits: (B, C), of Y^s.
        teacher_logits: (B, C), of Y^t.
        temperature: tau.

    Returns:
        ().
    """
    student, teacher = (student_logits / temperature).softmax(dim=1), (teacher_logits / temperature).softmax(dim=1)
    return temperature**2 * pearson_distance(student.T, teacher.T)


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float, gamma: float, temperature: float
) -> Tensor:
    """beta L_inter + gamma L_intra: arXiv:2205.10536, Sec. 4, without its cross-entropy.

    Differs from the paper: nothing beyond what the two terms say.

    Args:
        student_logits: (B, C), of Y^s.
        teacher_logits: (B, C), of Y^t.
        beta: weight of the inter-class term.
        gamma: weight of the intra-class term.
        temperature: tau of both.

    Returns:
        ().
    """
    inter = inter_class_loss(student_logits, teacher_logits, temperature=temperature)
    return beta * inter + gamma * intra_class_loss(student_logits, teacher_logits, temperature=temperature)


@DISTILLERS.register("dist")
class DIST(Distiller):
    """``ce_weight`` CE + ``beta`` inter-class + ``gamma`` intra-class relation.

    Args:
        beta: weight of the inter-class term; 0 leaves it out.
        gamma: weight of the intra-class term; 0 leaves it out.
        temperature: tau of both terms.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        beta: NonNegative,
        gamma: NonNegative,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(beta=beta, gamma=gamma)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``inter`` and ``intra``, whichever has a weight."""
        signals = self.whole_batch(signals)  # the intra-class term relates images to each other
        logits, terms = (signals.student_logits, signals.teacher_logits), {}
        if self.beta:
            terms["inter"] = self.beta * inter_class_loss(*logits, temperature=self.temperature)
        if self.gamma:
            terms["intra"] = self.gamma * intra_class_loss(*logits, temperature=self.temperature)
        return terms
