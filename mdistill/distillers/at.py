"""AT: Zagoruyko, Komodakis, "Paying More Attention to Attention", arXiv:1612.03928.

Attention transfer by activation. Letters: B batch, C channels, H and W height and width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features, of_one_size, stage_pairs, unit
from mdistill.registry import Positive, PositiveInt


def attention(stage: Tensor, *, power: int) -> Tensor:
    """Q / |Q|_2, where Q is the mean over the channels of F^p: arXiv:1612.03928.

    Args:
        stage: (B, C, H, W), F.
        power: p.

    Returns:
        (B, H W).
    """
    return unit(stage.pow(power).mean(dim=1).flatten(1), dim=1)


def at_loss(student_stages: Sequence[Tensor], teacher_stages: Sequence[Tensor], *, power: int) -> Tensor:
    """Sum over the stages of the mean of (Q^s / |Q^s| - Q^t / |Q^t|)^2 over batch and positions.

    Paper: arXiv:1612.03928, Eq. (2). Of two maps of unequal size the larger one is average-pooled to the smaller.

    Differs from the paper: a mean over positions where the paper has a norm, and F^p without its absolute value, which
    is the same for an even p; as in the authors' code. Stages pair from the front and surplus ones are left out.

    Args:
        student_stages: maps (B, C, H, W), F^s of each stage after the stem.
        teacher_stages: the same of the teacher, F^t, of any number of channels.
        power: p.

    Returns:
        (), the sum over stages of means over B and positions.
    """
    terms = []
    for student, teacher in zip(student_stages, teacher_stages, strict=False):
        maps = (attention(stage, power=power) for stage in of_one_size(student, teacher))
        terms.append((next(maps) - next(maps)).square().mean())
    return torch.stack(terms).sum()


@DISTILLERS.register("at")
class AT(Distiller):
    """``ce_weight`` CE + ``at_weight`` distance of the attention maps, over all stages.

    Args:
        at_weight: beta, the weight of the attention term.
        power: p of the attention maps; 2 is published.
    """

    needs = Needs(teacher="features", features=("stages",), labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        at_weight: Positive,
        power: PositiveInt,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        stage_pairs(self, data)
        self.at_weight, self.power = at_weight, power

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``at``."""
        student, teacher = both_features(signals)
        return {"at": self.at_weight * at_loss(student.stages[1:], teacher.stages[1:], power=self.power)}
