"""VID: Ahn et al., "Variational Information Distillation for Knowledge Transfer", arXiv:1904.05835.

Letters: B batch, C channels of the teacher's stage, H and W height and width.
"""

from math import expm1, log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features, of_one_size, stage_pairs
from mdistill.errors import UserError
from mdistill.registry import Positive

EPSILON = 1e-5  # the least variance


def vid_loss(means: Tensor, teacher_stage: Tensor, log_scale: Tensor) -> Tensor:
    """Mean of ((mu - t)^2 / sigma^2 + log sigma^2) / 2, where sigma^2 = softplus(rho) + 1e-5; arXiv:1904.05835.

    The negative log-likelihood of the teacher's stage under a normal distribution around what the student predicts,
    without its constant.

    Differs from the paper: a mean over channels and positions where the paper has a sum; as in the published code.

    Args:
        means: (B, C, H, W), mu.
        teacher_stage: (B, C, H, W), t.
        log_scale: (C), rho of each channel.

    Returns:
        (), the mean over B, C, H and W; it can be negative.
    """
    variance = (F.softplus(log_scale) + EPSILON)[:, None, None]
    return ((means - teacher_stage).square() / variance + variance.log()).mean() / 2


class Predictor(nn.Sequential):
    """The mean of the teacher's stage from the student's, by three 1x1 convolutions; a variance for each channel."""

    def __init__(self, inputs: int, outputs: int, initial_variance: float) -> None:
        """Args: the channels of both stages, and what the variances start from, above 1e-5."""
        super().__init__()
        self.add_module("conv1", nn.Conv2d(inputs, outputs, 1, bias=False))
        self.add_module("relu1", nn.ReLU())
        self.add_module("conv2", nn.Conv2d(outputs, outputs, 1, bias=False))
        self.add_module("relu2", nn.ReLU())
        self.add_module("conv3", nn.Conv2d(outputs, outputs, 1, bias=False))
        above = initial_variance - EPSILON
        rho = above + log(-expm1(-above))  # log(exp(above) - 1), the inverse of softplus
        self.log_scale = nn.Parameter(torch.full((outputs,), rho))


@DISTILLERS.register("vid")
class VID(Distiller):
    """``ce_weight`` CE + ``vid_weight`` negative log-likelihood of the teacher's stages, predicted from the student's.

    The predictors and the variances are trained with the student and left out at inference. Of two maps of unequal size
    the larger one is average-pooled to the smaller; stages pair from the front and surplus ones are left out.

    Differs from the published code of megvii-research/mdistiller, which never trains the variances; that of
    HobbitLong/RepDistiller, whose figures are compared, does.

    Args:
        vid_weight: weight of the likelihood term.
        initial_variance: of every channel; 5 is published.
    """

    needs = Needs(teacher="features", features=("stages",), labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        vid_weight: Positive,
        initial_variance: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        if initial_variance <= EPSILON:
            raise UserError(
                f"distiller.initial_variance: {initial_variance:g} should be above {EPSILON:g}, the least variance"
            )
        self.vid_weight = vid_weight
        pairs = stage_pairs(self, data)
        self.predictors = nn.ModuleList(
            Predictor(inputs, outputs, initial_variance) for (inputs, *_), (outputs, *_) in pairs
        )

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``vid``."""
        student, teacher = both_features(signals)
        terms = []
        for predictor, *pair in zip(self.predictors, student.stages[1:], teacher.stages[1:], strict=False):
            assert isinstance(predictor, Predictor)
            inputs, target = of_one_size(*pair)
            terms.append(vid_loss(self.run_module(predictor, inputs), target, predictor.log_scale))
        return {"vid": self.vid_weight * torch.stack(terms).sum()}
