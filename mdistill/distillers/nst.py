"""NST: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", arXiv:1707.01219.

Letters: B batch, C channels, H and W height and width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features, of_one_size, stage_pairs, unit
from mdistill.registry import Positive


def polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Mean over samples and pairs of channels of (a_c . b_d)^2: the polynomial kernel of degree 2 without offset.

    Args:
        first: (B, C, P), a, channels of unit length over P positions.
        second: (B, D, P), b.

    Returns:
        ().
    """
    return (first @ second.transpose(1, 2)).square().mean()


def nst_loss(student_stages: Sequence[Tensor], teacher_stages: Sequence[Tensor]) -> Tensor:
    """Sum over the stages of the squared maximum mean discrepancy between the channels of both networks.

    K(t, t) + K(s, s) - 2 K(s, t), where each channel of a sample is a vector of unit length over the positions and K is
    ``polynomial_kernel``; arXiv:1707.01219. Of two maps of unequal size the larger one is average-pooled.

    Differs from the paper: nothing known. All stages after the stem are summed, as in the published code of the
    compared figures; they pair from the front and surplus ones are left out.

    Args:
        student_stages: maps (B, C, H, W), of each stage after the stem.
        teacher_stages: the same of the teacher, of any number of channels.

    Returns:
        (), the sum over stages of means over B and pairs of channels.
    """
    terms = []
    for pair in zip(student_stages, teacher_stages, strict=False):
        student, teacher = (unit(stage.flatten(2), dim=2) for stage in of_one_size(*pair))
        own = polynomial_kernel(student, student) + polynomial_kernel(teacher, teacher)
        terms.append(own - 2 * polynomial_kernel(student, teacher))
    return torch.stack(terms).sum()


@DISTILLERS.register("nst")
class NST(Distiller):
    """``ce_weight`` CE + ``nst_weight`` discrepancy between the channels of both networks, over all stages.

    Args:
        nst_weight: weight of the discrepancy.
    """

    needs = Needs(teacher="features", features=("stages",), labels="none")

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, data: DataInfo, *, nst_weight: Positive, **shared: Any
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        stage_pairs(self, data)
        self.nst_weight = nst_weight

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``nst``."""
        student, teacher = both_features(signals)
        return {"nst": self.nst_weight * nst_loss(student.stages[1:], teacher.stages[1:])}
