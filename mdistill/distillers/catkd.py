"""CATKD: Guo et al., "Class Attention Transfer Based Knowledge Distillation", arXiv:2304.12777.

Letters: B batch, C classes, D channels of the last map, H and W its height and width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features, classifier_of, pooled_to, unit
from mdistill.errors import UserError
from mdistill.models import feature_shapes
from mdistill.precision import widen
from mdistill.registry import Positive, PositiveInt


def class_maps(last_map: Tensor, weight: Tensor) -> Tensor:
    """The classifier at every position, without its bias; averaged over space these are the logits less the bias.

    Args:
        last_map: (B, D, H, W).
        weight: (C, D), of the classifier.

    Returns:
        (B, C, H, W).
    """
    return torch.einsum("bdhw,cd->bchw", last_map, weight)


def catkd_loss(student_maps: Tensor, teacher_maps: Tensor, *, resolution: int, normalize: bool) -> Tensor:
    """Mean over all elements of (A^s - A^t)^2, A the class maps, pooled; arXiv:2304.12777.

    Differs from the paper: nothing known. Whether the maps are normalised is published for each pair.

    Args:
        student_maps: (B, C, H, W), class maps.
        teacher_maps: (B, C, H, W), of any height and width.
        resolution: r; both are average-pooled to r x r.
        normalize: scale each class map of a sample to length 1 over its positions.

    Returns:
        (), the mean over B, C and r^2 positions.
    """
    student, teacher = (pooled_to(maps, resolution, resolution).flatten(2) for maps in (student_maps, teacher_maps))
    if normalize:
        student, teacher = unit(student, dim=2), unit(teacher, dim=2)
    return F.mse_loss(student, teacher)


@DISTILLERS.register("catkd")
class CATKD(Distiller):
    """``ce_weight`` CE + ``catkd_weight`` distance of the class maps, from the last map and the classifier.

    The gradient reaches the student's classifier too.

    Differs from the published code, in which both classifiers lose their bias, the teacher's after its training, and
    the student's starts from other random weights. Here both stay as they are: a bias is in the logits alone.

    Args:
        catkd_weight: beta, the weight of the class maps; published for each pair.
        resolution: r, to which the maps are pooled.
        normalize: scale each class map to length 1.
    """

    needs = Needs(teacher="features", features=("last_map",), labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        catkd_weight: Positive,
        resolution: PositiveInt,
        normalize: bool,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        self.catkd_weight, self.resolution, self.normalize = catkd_weight, resolution, normalize
        for side, network in (("student", student), ("teacher", teacher)):
            classifier_of(network, side)
            _, height, width = feature_shapes(network, data.image_size).last_map
            if resolution > min(height, width):
                raise UserError(
                    f"distiller.resolution: {resolution} is more than the {side}'s last map of {height}x{width} has"
                )

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``catkd``."""
        assert self.teacher is not None
        student, teacher = (
            class_maps(features.last_map, widen(classifier_of(network).weight))
            for features, network in zip(both_features(signals), (self.student, self.teacher), strict=True)
        )
        loss = catkd_loss(student, teacher, resolution=self.resolution, normalize=self.normalize)
        return {"catkd": self.catkd_weight * loss}
