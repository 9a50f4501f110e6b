"""FSP: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
Learning", CVPR 2017.

Letters: B batch, C and K channels of two stages that follow each other, H and W height and width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features, of_one_size
from mdistill.errors import UserError
from mdistill.models import feature_shapes, trunk


def flow(first: Tensor, second: Tensor) -> Tensor:
    """G, the flow of solution procedure: the mean over positions of the products of two stages' channels.

    Of two maps of unequal size the larger one is average-pooled to the smaller.

    Args:
        first: (B, C, H, W).
        second: (B, K, H, W).

    Returns:
        (B, K, C).
    """
    columns, rows = (stage.flatten(2) for stage in of_one_size(first, second))
    return rows @ columns.mT / rows.shape[2]


def fsp_loss(student_stages: Sequence[Tensor], teacher_stages: Sequence[Tensor]) -> Tensor:
    """Sum over the pairs of stages that follow each other of the mean over B, K and C of (G^s - G^t)^2.

    Differs from the paper: nothing known; the mean over K and C, where it has a norm, is the published code's.

    Args:
        student_stages: maps (B, C, H, W) of each stage, the stem among them.
        teacher_stages: the same of the teacher, with as many channels each.

    Returns:
        (), the sum over pairs of means over B, K and C.
    """
    sides = [[flow(*pair) for pair in pairwise(stages)] for stages in (student_stages, teacher_stages)]
    return torch.stack([F.mse_loss(student, teacher) for student, teacher in zip(*sides, strict=True)]).sum()


@DISTILLERS.register("fsp")
class FSP(Distiller):
    """``ce_weight`` CE alone, after a first phase in which the student learns how the teacher's stages follow.

    In the first phase, ``flows``, the student up to its last stage is trained on the distance between the products of
    channels of neighbouring stages. Both networks need the same channels there.
    """

    needs = Needs(teacher="features", features=("stages",), labels="none")
    phases = ("flows",)
    needs_at_last = Needs(teacher="none", labels="none")

    def __init__(self, student: nn.Module, teacher: nn.Module | None, data: DataInfo, **shared: Any) -> None:
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        self.require_a_term()
        own, its = (
            [channels for channels, *_ in feature_shapes(network, data.image_size).stages]
            for network in (student, teacher)
        )
        if len(own) != len(its) or len(own) < 2:
            raise UserError(
                f"distiller.name: FSP pairs the stages of both networks; the student has {len(own)} with the stem, the"
                f" teacher {len(its)}; take networks of one family, with as many stages, or another method"
            )
        unequal = [
            f"stage {number} has {mine} in the student and {yours} in the teacher"
            for number, (mine, yours) in enumerate(zip(own, its, strict=True))
            if mine != yours
        ]
        if unequal:
            raise UserError(
                f"distiller.name: FSP needs the same channels in both networks; {', '.join(unequal)} (stage 0 is the"
                " stem); take another pair or another method"
            )
        self._trunk = trunk(student, data.image_size)

    def trained(self, phase: str | None) -> list[nn.Module]:
        """The student up to its last stage; then all of it."""
        return [self.student] if phase is None else self._trunk

    def first_phase(self, phase: str, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``flows``."""
        student, teacher = both_features(signals)
        return {"flows": fsp_loss(student.stages, teacher.stages)}

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """Nothing: the second phase is trained on the labels."""
        return {}
