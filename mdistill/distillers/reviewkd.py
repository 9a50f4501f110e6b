"""ReviewKD: Chen et al., "Distilling Knowledge via Knowledge Review", arXiv:2104.09044.

Letters: B batch, C channels, H and W height and width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features, pooled_to
from mdistill.errors import UserError
from mdistill.models import feature_shapes
from mdistill.models.layers import LenientBatchNorm2d
from mdistill.registry import Positive, PositiveInt

PYRAMID = (4, 2, 1)


def hcl_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """HCL, the hierarchical context loss: the mean square error of the maps and of their pooled versions, averaged.

    Both are average-pooled to 4 x 4, 2 x 2 and 1 x 1, where that is smaller; these weigh 1/2, 1/4 and 1/8 in turn, the
    maps themselves 1. Paper: arXiv:2104.09044.

    Differs from the paper: nothing known; the weights are the published code's.

    Args:
        student_map: (B, C, H, W).
        teacher_map: (B, C, H, W).

    Returns:
        ().
    """
    total, weight, weights = F.mse_loss(student_map, teacher_map), 1.0, 1.0
    for size in PYRAMID:
        if size < student_map.shape[2]:
            weight /= 2
            student, teacher = (pooled_to(each, size, size) for each in (student_map, teacher_map))
            total = total + weight * F.mse_loss(student, teacher)
            weights += weight
    return total / weights


def reviewkd_loss(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Sum of HCL over the levels; arXiv:2104.09044.

    Differs from the paper: nothing known.

    Args:
        outputs: maps (B, C, H, W), of each level of the student.
        targets: the teacher's of the same shapes.

    Returns:
        ().
    """
    return torch.stack([hcl_loss(*pair) for pair in zip(outputs, targets, strict=True)]).sum()


class Fusion(nn.Module):
    """ABF, attention-based fusion: a level of the student with the deeper ones, in the size of the teacher's."""

    def __init__(self, inputs: int, width: int, size: tuple[int, int], *, deepest: bool) -> None:
        """Args: channels of the level, those within, height and width of the result, whether no level is deeper."""
        super().__init__()
        self.reduce = nn.Conv2d(inputs, width, 1, bias=False)
        nn.init.kaiming_uniform_(self.reduce.weight, a=1)
        self.reduce_norm = LenientBatchNorm2d(width)
        self.attention = None if deepest else nn.Conv2d(2 * width, 2, 1)
        self.size = size

    def forward(self, x: Tensor, *deeper: Tensor) -> Tensor:
        """The fused map, (B, width, *size).

        Args:
            x: (B, C, H, W), of the student.
            deeper: the deeper level's result, (B, width, H', W'); none at the deepest.
        """
        x = self.reduce_norm(self.reduce(x))
        if self.attention is not None:
            residual = F.interpolate(deeper[0], x.shape[2:], mode="nearest")
            weights = self.attention(torch.cat([x, residual.to(x.dtype)], dim=1)).sigmoid()  # (B, 2, H, W)
            x = x * weights[:, :1] + residual * weights[:, 1:]
        return x if x.shape[2:] == self.size else F.interpolate(x, self.size, mode="nearest")


class Output(nn.Sequential):
    """From a fused map to the teacher's channels."""

    def __init__(self, width: int, outputs: int) -> None:
        """Args: channels of the fused map and of the teacher's level."""
        super().__init__()
        self.add_module("output", conv := nn.Conv2d(width, outputs, 3, padding=1, bias=False))
        nn.init.kaiming_uniform_(conv.weight, a=1)
        self.add_module("output_norm", LenientBatchNorm2d(outputs))


@DISTILLERS.register("reviewkd")
class ReviewKD(Distiller):
    """``ce_weight`` CE + ``reviewkd_weight`` HCL of the student's fused levels and the teacher's stages.

    The levels are the stages after the stem and, deepest, the pooled features as a map of 1 x 1; the teacher's stages
    are read before their last ReLU. The fusion is trained with the student and left out at inference. Published with
    ``warmup_epochs`` of 20.

    Differs from the published code: epochs of the warm-up count from 1, so that none is without the term, and the
    teacher stays in evaluation mode. The inner width is a setting: of the two published codes one ignores its own.

    Args:
        reviewkd_weight: weight of the distance; published for some pairs.
        max_width: the fusion is as wide as the student's pooled features, but no wider than this; 512 on CIFAR-100.
        student_preacts: whether the student's stages too are read before their last ReLU, as published for ImageNet.
    """

    needs = Needs(teacher="features", features=("stages", "preacts", "pooled"), labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        reviewkd_weight: Positive,
        max_width: PositiveInt,
        student_preacts: bool,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        self.reviewkd_weight, self.student_preacts = reviewkd_weight, student_preacts
        own, theirs = (feature_shapes(network, data.image_size) for network in (student, teacher))
        if len(own.stages) != len(theirs.preacts):
            raise UserError(
                f"ReviewKD needs as many stages after the stem in both networks; the student has {len(own.stages) - 1}"
                f" and the teacher {len(theirs.preacts) - 1}"
            )
        width = min(max_width, own.pooled[0])
        inputs = [*(channels for channels, *_ in own.stages[1:]), own.pooled[0]]
        shapes = [*theirs.preacts[1:], (*theirs.pooled, 1, 1)]
        self.fusions, self.outputs = nn.ModuleList(), nn.ModuleList()
        for number, (channels, (outputs, *size)) in enumerate(zip(inputs, shapes, strict=True), start=1):
            self.fusions.append(Fusion(channels, width, (size[0], size[1]), deepest=number == len(inputs)))
            self.outputs.append(Output(width, outputs))

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``reviewkd``."""
        student, teacher = both_features(signals)
        levels = student.preacts if self.student_preacts else student.stages
        outputs = self.review([*levels[1:], student.pooled[:, :, None, None]])
        targets = [*teacher.preacts[1:], teacher.pooled[:, :, None, None]]
        return {"reviewkd": self.reviewkd_weight * reviewkd_loss(outputs, targets)}

    def review(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """What the student's ``levels`` (B, C, H, W) give for the teacher's, in the same order, from the deepest up."""
        outputs: list[Tensor] = []
        deeper: list[Tensor] = []
        for level, fusion, output in zip(
            *(reversed(each) for each in (levels, self.fusions, self.outputs)), strict=True
        ):
            deeper = [self.run_module(fusion, level, *deeper)]
            outputs.insert(0, self.run_module(output, *deeper))
        return outputs
