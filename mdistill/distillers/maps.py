"""Maths on feature maps that two or more methods use. Letters: B batch, C channels, H and W height and width."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import Distiller, Signals
from mdistill.errors import UserError
from mdistill.models import feature_shapes
from mdistill.models.base import Features, Shape

EPSILON = 1e-12


def unit(vectors: Tensor, dim: int) -> Tensor:
    """``vectors`` scaled to length 1 along ``dim``; 0, with a gradient of 0, where they are no longer than 1e-12.

    The published codes divide by max(length, 1e-12), whose gradient at 0 is 1e12 times what comes in.

    Args:
        vectors: of any shape.
        dim: along which they lie.

    Returns:
        the same shape.
    """
    square = vectors.square().sum(dim=dim, keepdim=True)
    positive = square > EPSILON**2
    return vectors * (square.where(positive, 1.0).rsqrt() * positive)


def pooled_to(maps: Tensor, height: int, width: int) -> Tensor:
    """Adaptive average pooling: (B, C, H, W) -> (B, C, height, width).

    By windows of one size, or by repeating, where these fit: the gradient of torch's adaptive pooling has no
    deterministic CUDA kernel.

    Args:
        maps: (B, C, H, W).
        height: of the result.
        width: of the result.
    """
    own_height, own_width = maps.shape[2:]
    if (own_height, own_width) == (height, width):
        return maps
    if own_height % height == 0 and own_width % width == 0:
        return F.avg_pool2d(maps, (own_height // height, own_width // width))
    if height % own_height == 0 and width % own_width == 0:  # each cell of the result lies in a single one
        return maps.repeat_interleave(height // own_height, dim=2).repeat_interleave(width // own_width, dim=3)
    return F.adaptive_avg_pool2d(maps, (height, width))


def of_one_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps in the size of the lower one, to which the higher one is average-pooled.

    Args:
        first: (B, C, H, W).
        second: (B, C', H', W').
    """
    if first.shape[2] > second.shape[2]:
        return pooled_to(first, *second.shape[2:]), second
    return first, pooled_to(second, *first.shape[2:])


def both_features(signals: Signals) -> tuple[Features, Features]:
    """The student's and the teacher's, of a method whose ``needs`` asks for both."""
    assert signals.student_features is not None
    assert signals.teacher_features is not None
    return signals.student_features, signals.teacher_features


def both_pooled(signals: Signals) -> tuple[Tensor, Tensor]:
    """The student's (B, D) and the teacher's (B, E) pooled features, of a method that ``needs`` the teacher's."""
    assert signals.student_features is not None
    assert signals.teacher_pooled is not None
    return signals.student_features.pooled, signals.teacher_pooled


def stage_shapes(distiller: Distiller, data: DataInfo) -> tuple[Sequence[Shape], Sequence[Shape]]:
    """The shapes (C, H, W) of the student's and of the teacher's stages after the stem; preacts have the same.

    Raises:
        UserError: a network has no stage after its stem.
    """
    shapes = []
    for side in ("student", "teacher"):
        stages = feature_shapes(cast(nn.Module, getattr(distiller, side)), data.image_size).stages
        if len(stages) < 2:
            raise UserError(f"{type(distiller).__name__} compares the stages after the stem; the {side} has none")
        shapes.append(stages[1:])
    return shapes[0], shapes[1]


def stage_pairs(distiller: Distiller, data: DataInfo) -> list[tuple[Shape, Shape]]:
    """``stage_shapes``, paired from the front; surplus ones are left out."""
    return list(zip(*stage_shapes(distiller, data), strict=False))


def classifier_of(network: nn.Module, side: str = "network") -> nn.Linear:
    """The linear layer on the pooled features.

    Raises:
        UserError: there is none under the name ``classifier``.
    """
    classifier = getattr(network, "classifier", None)
    if not isinstance(classifier, nn.Linear):
        raise UserError(f"the {side}, a {type(network).__name__}, has no linear layer called classifier")
    return classifier
