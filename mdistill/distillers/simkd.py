"""SimKD: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", arXiv:2203.14001.

Letters: B batch, C classes, D channels of the teacher's last map, K those of the student's last stage, H and W height
and width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features, classifier_of, pooled_to
from mdistill.errors import UserError
from mdistill.models import feature_shapes
from mdistill.models.base import Features
from mdistill.models.layers import LenientBatchNorm2d
from mdistill.precision import widen
from mdistill.registry import Positive, PositiveInt


def simkd_loss(projected_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean over all elements of (T(s) - t)^2; arXiv:2203.14001.

    Differs from the paper: nothing known; the mean over all elements is the published code's.

    Args:
        projected_map: (B, D, H, W), T(s), the student's last stage through the projector.
        teacher_map: (B, D, H, W), t, the teacher's last map.

    Returns:
        (), the mean over B, D, H and W.
    """
    return F.mse_loss(projected_map, teacher_map)


class Projector(nn.Module):
    """T: convolutions 1x1, 3x3 and 1x1 without bias, each with BatchNorm and ReLU: (B, K, H, W) -> (B, D, H, W)."""

    def __init__(self, inputs: int, outputs: int, *, factor: int) -> None:
        """Args: K, D, and by how much the two inner widths are below D."""
        super().__init__()
        inner = outputs // factor
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm1 = LenientBatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm2 = LenientBatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.norm3 = LenientBatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The map that stands in for the teacher's, (B, D, H, W), not negative.

        Args:
            x: (B, K, H, W).
        """
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.norm3(self.conv3(x)))


class Reusing(nn.Module):
    """The network at inference: the student's last stage, the projector and the teacher's classifier."""

    def __init__(self, network: nn.Module, projector: nn.Module, classifier: nn.Linear, size: tuple[int, int]) -> None:
        """Args: the parts, and the height and width that the student's last stage is pooled to."""
        super().__init__()
        self.network, self.projector, self.classifier, self.size = network, projector, classifier, size

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, C).

        Args:
            image: (B, 3, H, W).
        """
        return self.forward_features(image).logits

    def forward_features(self, image: Tensor) -> Features:
        """The student's, with the logits, the last map (the projected one) and the pooled features of the whole.

        Args:
            image: (B, 3, H, W).
        """
        features: Features = self.network.forward_features(image)  # type: ignore[operator]
        projected = self.projector(pooled_to(features.stages[-1], *self.size))
        logits, pooled = prediction(projected, self.classifier), widen(projected).mean(dim=(2, 3))
        return replace(features, logits=logits, last_map=projected, pooled=pooled)


def prediction(projected_map: Tensor, classifier: nn.Linear) -> Tensor:
    """Logits (B, C) of ``classifier`` for the map averaged over space, in float32 or wider.

    Args:
        projected_map: (B, D, H, W).
        classifier: D to C, the teacher's.
    """
    bias = None if classifier.bias is None else widen(classifier.bias)
    return F.linear(widen(projected_map).mean(dim=(2, 3)), widen(classifier.weight), bias)


@DISTILLERS.register("simkd")
class SimKD(Distiller):
    """``ce_weight`` CE + ``simkd_weight`` distance of the projected last stage to the teacher's last map.

    Published without cross-entropy. The network that is evaluated and exported is the student up to its last stage, the
    projector and the teacher's classifier; the logits of a step are its too. What the student has behind its last stage
    is not used. Of two maps of unequal size the larger one is average-pooled to the smaller.

    Differs from the published code, which runs the teacher at inference for the size of its map: here the size is fixed
    when the method is built.

    Args:
        simkd_weight: weight of the distance.
        factor: by how much the projector's inner width is below the teacher's; 2, 4 and 8 are published.
    """

    needs = Needs(teacher="features", features=("stages", "last_map"), labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        simkd_weight: Positive,
        factor: PositiveInt,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        classifier_of(teacher, "teacher")
        inputs, *own_size = feature_shapes(student, data.image_size).stages[-1]
        outputs, *size = feature_shapes(teacher, data.image_size).last_map
        if factor > outputs:
            raise UserError(f"distiller.factor: {factor} is more than the {outputs} channels of the teacher's last map")
        self.simkd_weight = simkd_weight
        self.height, self.width = min(own_size, size)
        self.projector = Projector(inputs, outputs, factor=factor)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``simkd``."""
        student, teacher = both_features(signals)
        target = pooled_to(teacher.last_map, self.height, self.width)
        return {"simkd": self.simkd_weight * simkd_loss(student.last_map, target)}

    def students(self) -> dict[str, nn.Module]:
        """The student with the projector and the teacher's classifier."""
        assert self.teacher is not None
        size = self.height, self.width
        return {"student": Reusing(self.student, self.projector, classifier_of(self.teacher), size)}

    def _run_student(self, image: Tensor) -> tuple[Tensor, Features | None]:
        """Of ``students()``: the last map is the projected one, the logits are of the teacher's classifier."""
        _, features = super()._run_student(image)
        assert features is not None
        assert self.teacher is not None
        with torch.autocast(image.device.type, enabled=False):  # as around a method's terms
            projected = self.run_module(self.projector, pooled_to(features.stages[-1], self.height, self.width))
            logits = prediction(projected, classifier_of(self.teacher))
        return logits, replace(features, logits=logits, last_map=projected, pooled=projected.mean(dim=(2, 3)))
