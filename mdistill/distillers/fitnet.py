"""FitNet: Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550.

Letters: B batch, C channels of the teacher's hint, H and W its height and width.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features
from mdistill.errors import UserError
from mdistill.models import feature_shapes
from mdistill.models.base import Shape
from mdistill.models.layers import LenientBatchNorm2d
from mdistill.registry import NonNegativeInt, Positive


def fitnet_loss(regressed_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean over all elements of (r - h)^2; arXiv:1412.6550, the hint-based training.

    Differs from the paper, which has 1/2 of the sum over a sample's elements.

    Args:
        regressed_map: (B, C, H, W), r, the student's map through the regressor.
        teacher_map: (B, C, H, W), h, the hint.

    Returns:
        (), the mean over B, C, H and W.
    """
    return F.mse_loss(regressed_map, teacher_map)


class Regressor(nn.Sequential):
    """From the student's map to the shape of the teacher's: a convolution, BatchNorm and, as a rule, ReLU.

    The convolution is 3x3 of stride 2 where the student's map is twice as high, a transposed 4x4 of stride 2 where it
    is half as high, else one without padding whose kernel takes up the difference: 1x1 between equal sizes.
    """

    def __init__(self, student: Shape, teacher: Shape, *, relu: bool = True, where: str = "distiller.hint") -> None:
        """Args: the two shapes (C, H, W), whether ReLU comes last, and what to name in a message.

        Raises:
            UserError: no such convolution leads from one shape to the other.
        """
        super().__init__()
        (inputs, height, width), (outputs, teacher_height, teacher_width) = student, teacher
        if height == 2 * teacher_height and width == 2 * teacher_width:
            conv: nn.Module = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        elif 2 * height == teacher_height and 2 * width == teacher_width:
            conv = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
        elif height >= teacher_height and width >= teacher_width:
            conv = nn.Conv2d(inputs, outputs, (1 + height - teacher_height, 1 + width - teacher_width))
        else:
            raise UserError(
                f"{where}: the student's map is {height}x{width} and the teacher's {teacher_height}x"
                f"{teacher_width}; the regressor needs one at least as large, or exactly half as large"
            )
        self.add_module("conv", conv)
        self.add_module("norm", LenientBatchNorm2d(outputs))
        if relu:
            self.add_module("relu", nn.ReLU())


@DISTILLERS.register("fitnet")
class FitNet(Distiller):
    """``ce_weight`` CE + ``fitnet_weight`` distance of a regressed stage of the student to the teacher's.

    Differs from the paper, whose hint is a first phase of its own, with a regressor without BatchNorm. Here both terms
    are trained jointly, as in the published code of the compared figures.

    Args:
        fitnet_weight: weight of the hint.
        hint: which stage of both networks; the stem is 0.
    """

    needs = Needs(teacher="features", features=("stages",), labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        fitnet_weight: Positive,
        hint: NonNegativeInt,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        self.fitnet_weight, self.hint = fitnet_weight, hint
        shapes = [feature_shapes(network, data.image_size).stages for network in (student, teacher)]
        for side, stages in zip(("student", "teacher"), shapes, strict=True):
            if hint >= len(stages):
                raise UserError(f"distiller.hint: {hint} is no stage of the {side}, which has 0 to {len(stages) - 1}")
        self.regressor = Regressor(shapes[0][hint], shapes[1][hint])

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``fitnet``."""
        student, teacher = both_features(signals)
        regressed = self.run_module(self.regressor, student.stages[self.hint])
        return {"fitnet": self.fitnet_weight * fitnet_loss(regressed, teacher.stages[self.hint])}
