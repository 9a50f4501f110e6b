"""WKDL: Lv, Yang, Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation",
arXiv:2412.08139.

WKD-L, its method on the logits. Letters: B batch, C classes (at least 2). t: the true class.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_mask
from mdistill.distillers.nkd import target_loss
from mdistill.registry import NonNegative, NonNegativeInt, Positive, PositiveInt

EPSILON = 1e-8  # of the published code: added to costs, and to what is divided by


def transport_costs(distances: Tensor, *, sharpen: float) -> Tensor:
    """max(1 - exp(-sharpen d), 0) + 1e-8, or max(d, 0) + 1e-8 where ``sharpen`` is 0.

    Args:
        distances: (C, C), d, between every two classes.
        sharpen: kappa.

    Returns:
        (C, C).
    """
    sharpened = -torch.expm1(-sharpen * distances) if sharpen else distances
    return sharpened.clamp(min=0) + EPSILON


def wasserstein_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    distances: Tensor,
    *,
    temperature: float,
    sharpen: float,
    regularization: float,
    iterations: int,
) -> Tensor:
    """Entropy-regularised transport cost between both networks' predictions of all classes but the true one.

    Paper: arXiv:2412.08139, WKD-L, by Sinkhorn's iteration, through which the gradient goes. The true class gets no
    mass: its scaling stays 0, so that one kernel serves all samples.

    Differs from the paper: nothing; as in the published code 1e-8 is added to what is divided by.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        target: (B,) int64, t.
        distances: (C, C), between every two classes.
        temperature: T of both networks.
        sharpen: kappa; see ``transport_costs``.
        regularization: eta, of the kernel exp(-cost / eta).
        iterations: of Sinkhorn.

    Returns:
        (), the mean over B.
    """
    classes = student_logits.shape[1]
    true = class_mask(target, classes)
    student, teacher = (
        F.softmax((logits / temperature).masked_fill(true, -torch.inf), dim=1)  # (B, C), 0 at the true class
        for logits in (student_logits, teacher_logits)
    )
    costs = transport_costs(distances.to(student.dtype), sharpen=sharpen)
    kernel = torch.exp(-costs / regularization)
    left = (~true).to(student.dtype) / (classes - 1)  # (B, C), u of each sample
    right = left  # v
    for _ in range(iterations):
        right = teacher / (left @ kernel + EPSILON)
        left = student / (right @ kernel.T + EPSILON)
    return (left * (right @ (kernel * costs).T)).sum(dim=1).mean()


def wkd_l_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    distances: Tensor,
    *,
    wkd_weight: float,
    temperature: float,
    sharpen: float,
    regularization: float,
    iterations: int,
) -> Tensor:
    """Target term + ``wkd_weight`` Wasserstein term: arXiv:2412.08139, WKD-L with the target apart.

    Differs from the paper: nothing beyond what ``wasserstein_loss`` says. The target term is that of NKD.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        target: (B,) int64, t.
        distances: (C, C), between every two classes.
        wkd_weight: weight of the Wasserstein term.
        temperature: T of the Wasserstein term.
        sharpen: kappa; see ``transport_costs``.
        regularization: eta, of the kernel exp(-cost / eta).
        iterations: of Sinkhorn.

    Returns:
        (), the mean over B.
    """
    transport = wasserstein_loss(
        student_logits,
        teacher_logits,
        target,
        distances,
        temperature=temperature,
        sharpen=sharpen,
        regularization=regularization,
        iterations=iterations,
    )
    return target_loss(student_logits, teacher_logits, target) + wkd_weight * transport


def cosine_decay(epoch: Tensor, *, decay_epoch: int, epochs: int) -> Tensor:
    """1 up to ``decay_epoch``, then half a cosine down to 0 in the last epoch.

    Args:
        epoch: (), counted from 1.
        decay_epoch: the last one of weight 1.
        epochs: of the whole run.

    Returns:
        ().
    """
    share = ((epoch - decay_epoch) / max(epochs - decay_epoch, 1)).clamp(0, 1)
    return (1 + torch.cos(math.pi * share)) / 2


@DISTILLERS.register("wkd_l")
class WKDL(Distiller):
    """``ce_weight`` CE + target term + ``wkd_weight`` Wasserstein distance of the predictions of the other classes.

    Moving mass between two classes costs the more, the less the teacher's features of them are alike: 1 - CKA, computed
    before the first step from the training images as they are evaluated.

    Differs from the paper: nothing known where classes have equally many images. Else each is compared by as many as
    the smallest has; how the rows of two classes are paired there is not published. WKD-F, on features, is not here.

    Args:
        wkd_weight: weight of the Wasserstein term.
        temperature: T of the Wasserstein term.
        sharpen: kappa of the cost 1 - exp(-kappa distance); 0 takes the distance itself.
        regularization: eta of the entropic regularisation.
        iterations: of Sinkhorn.
        distances: what classes are compared by: the teacher's "last_map", each of its positions, or its "logits".
        decay_epoch: after it the Wasserstein term's weight falls as half a cosine, to 0 in the last epoch.
        epochs: of the whole run.
    """

    needs = Needs(teacher="logits", class_distances="distances")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        wkd_weight: NonNegative,
        temperature: Positive,
        sharpen: NonNegative,
        regularization: Positive,
        iterations: PositiveInt,
        distances: Literal["last_map", "logits"],
        decay_epoch: NonNegativeInt,
        epochs: PositiveInt,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.wkd_weight, self.temperature, self.sharpen = wkd_weight, temperature, sharpen
        self.regularization, self.iterations = regularization, iterations
        self.decay_epoch, self.epochs = decay_epoch, epochs

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``target`` and, when it has a weight, ``wasserstein``."""
        given = signals.student_logits, signals.teacher_logits, signals.target
        terms = {"target": target_loss(*given)}
        if self.wkd_weight:
            loss = wasserstein_loss(
                *given,
                self.class_distances,
                temperature=self.temperature,
                sharpen=self.sharpen,
                regularization=self.regularization,
                iterations=self.iterations,
            )
            weight = cosine_decay(signals.epoch, decay_epoch=self.decay_epoch, epochs=self.epochs)
            terms["wasserstein"] = self.wkd_weight * weight * loss
        return terms
