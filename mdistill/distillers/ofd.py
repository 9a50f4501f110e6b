"""OFD: Heo et al., "A Comprehensive Overhaul of Feature Distillation", arXiv:1904.01866.

Letters: B batch, C channels of the teacher's map, K those of the student's, H and W height and width of the student's,
U and V those of the teacher's.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import pi
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features, pooled_to, stage_shapes
from mdistill.errors import UserError
from mdistill.models.base import Network
from mdistill.models.layers import LenientBatchNorm2d, conv, init_convolutions
from mdistill.precision import widen
from mdistill.registry import Positive

LEAST_MASS = 0.001  # of the normal distribution below 0, for its mean there to be the margin


def channel_margins(weight: Tensor, bias: Tensor) -> Tensor:
    """E[z | z < 0] of z ~ N(bias, weight^2), what a channel is below 0 on average: arXiv:1904.01866, margin ReLU.

    With sigma = |weight|, mu = bias, and phi and Phi of the standard normal distribution: mu - sigma phi(mu / sigma) /
    Phi(-mu / sigma) where Phi(-mu / sigma) > 0.001, else -3 sigma, as in the published code. Never above 0.

    Differs from the published code where a weight is exactly 0, by which that divides: here the margin is the limit,
    min(mu, 0).

    Args:
        weight: (C), of the BatchNorm before the ReLU; of either sign.
        bias: (C), of the same.

    Returns:
        (C), m.
    """
    sigma = weight.abs()
    ratio = bias / sigma  # 0 / 0 is not above the least mass either, and is a margin of 0
    mass = torch.special.ndtr(-ratio)
    density = (ratio.square() / -2).exp() / (2 * pi) ** 0.5
    return torch.where(mass > LEAST_MASS, bias - sigma * density / mass, -3 * sigma)


def partial_l2_loss(connected_map: Tensor, teacher_map: Tensor, margin: Tensor) -> Tensor:
    """Mean over B of the sum of (x - t)^2 where x > t or t > 0, t = max(p, m); arXiv:1904.01866, partial L2 distance.

    Where the teacher is silent, t <= 0, the student may be as far below as it likes.

    Differs from the paper: nothing known. p is average-pooled to the student's size, as in the published code; where
    the student's map is the larger one, that repeats values.

    Args:
        connected_map: (B, C, H, W), x, the student's map through the connector.
        teacher_map: (B, C, U, V), p, the teacher's before its last ReLU.
        margin: (C), m.

    Returns:
        (), the mean over B of sums over C, H and W.
    """
    target = pooled_to(teacher_map, *connected_map.shape[2:]).maximum(margin[:, None, None])
    counts = (connected_map > target) | (target > 0)
    return (connected_map - target).square().where(counts, 0.0).sum() / len(connected_map)


def ofd_loss(connected_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], margins: Sequence[Tensor]) -> Tensor:
    """Sum over the stages of partial L2 distances, halved for each stage before the last; arXiv:1904.01866.

    Differs from the paper: halving is the published code's.

    Args:
        connected_maps: maps (B, C, H, W), of each stage of the student through its connector.
        teacher_maps: the teacher's before their last ReLU, of as many channels.
        margins: of each stage, (C).

    Returns:
        (), the sum over stages of means over B.
    """
    terms = [partial_l2_loss(*each) for each in zip(connected_maps, teacher_maps, margins, strict=True)]
    return torch.stack([term / 2 ** (len(terms) - number) for number, term in enumerate(terms, start=1)]).sum()


class Connector(nn.Sequential):
    """From the student's channels to the teacher's: a 1x1 convolution without bias, and BatchNorm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Args: K and C."""
        super().__init__()
        self.add_module("conv", conv(inputs, outputs, 1))
        self.add_module("norm", LenientBatchNorm2d(outputs))
        init_convolutions(self)


@DISTILLERS.register("ofd")
class OFD(Distiller):
    """``ce_weight`` CE + ``ofd_weight`` partial distance of the stages before their last ReLU, above a margin.

    The student's maps go through connectors, which are trained with it and left out at inference. The margins come
    from the teacher's BatchNorm before these ReLUs. Stages pair from the last one back and surplus ones, the stem
    among them, are left out.

    Differs from the published code, which runs the teacher in training mode, so that its BatchNorm normalises by the
    batch and its running statistics drift. ``teacher_batch_statistics`` does the first; its statistics stay.

    Args:
        ofd_weight: weight of the distance, which is a sum over channels and positions.
        teacher_batch_statistics: whether the teacher's BatchNorm normalises by the batch, as published.
    """

    needs = Needs(teacher="features", features=("preacts",), labels="none", teacher_batch_statistics=True)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        ofd_weight: Positive,
        teacher_batch_statistics: bool,
        **shared: Any,
    ) -> None:
        self.needs = replace(self.needs, teacher_batch_statistics=teacher_batch_statistics)
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        self.ofd_weight = ofd_weight
        inputs, outputs = ([channels for channels, *_ in shapes] for shapes in stage_shapes(self, data))
        _check_norms(teacher, outputs)
        count = min(len(inputs), len(outputs))
        self.connectors = nn.ModuleList(map(Connector, inputs[-count:], outputs[-count:]))

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``ofd``."""
        student, teacher = both_features(signals)
        count = len(self.connectors)
        connected = [
            self.run_module(connector, preact)
            for connector, preact in zip(self.connectors, student.preacts[-count:], strict=True)
        ]
        loss = ofd_loss(connected, teacher.preacts[-count:], self.margins()[-count:])
        return {"ofd": self.ofd_weight * loss}

    def margins(self) -> Sequence[Tensor]:
        """Of each of the teacher's stages, (C); read anew, for its weights may be loaded after the method is built."""
        norms = _norms(self.teacher)
        weight, bias = (widen(torch.cat([getattr(norm, name) for norm in norms])) for name in ("weight", "bias"))
        return channel_margins(weight, bias).split_with_sizes([len(norm.weight) for norm in norms])


def _norms(teacher: nn.Module | None) -> list[nn.BatchNorm2d]:
    return cast(Network, teacher).bn_before_relu()


def _check_norms(teacher: nn.Module, widths: Sequence[int]) -> None:
    """Refuse a teacher without a BatchNorm over all the channels of each of its stages.

    Raises:
        UserError: says which one has none.
    """
    need = "OFD takes its margins from the BatchNorm before each of the teacher's stages' last ReLU"
    if not hasattr(teacher, "bn_before_relu"):
        raise UserError(f"{need}, and {type(teacher).__name__} has no bn_before_relu that names them")
    try:
        norms = _norms(teacher)
    except UserError as error:
        raise UserError(f"{need}: {error}") from error
    found = [None if norm.weight is None or norm.bias is None else len(norm.weight) for norm in norms]
    if found != [*widths]:
        raise UserError(
            f"{need}: {type(teacher).__name__}.bn_before_relu should name layers with weights of {widths} channels,"
            f" found {found}"
        )
