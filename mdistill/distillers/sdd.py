"""SDD: Wei, Luo, Luo, "Scale Decoupled Distillation", arXiv:2403.13512.

A method of logits is applied to the logits of regions of the image: its three variants differ in which one.

Letters: B batch, C classes, D channels of the last map, H and W its height and width, N regions. t: the true class.
"""

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.dkd import dkd_loss
from mdistill.distillers.functional import soft_target_loss, standardize
from mdistill.distillers.kd import kd_loss
from mdistill.distillers.maps import both_features, classifier_of, pooled_to
from mdistill.distillers.nkd import target_loss
from mdistill.errors import UserError, shown
from mdistill.precision import widen
from mdistill.registry import NonNegative, Positive

FINEST = 4  # cells in a row and in a column, to which a map is pooled first


def regional_logits(last_map: Tensor, weight: Tensor, bias: Tensor | None, scales: tuple[int, ...]) -> Tensor:
    """The classifier on the map's cells at every scale: arXiv:2403.13512, the scale pooling.

    The map is pooled to 4 x 4, and that to s x s for each scale s.

    Args:
        last_map: (B, D, H, W).
        weight: (C, D), of the classifier.
        bias: (C,).
        scales: s, each a divisor of 4; the first one is 1, so that the first region is the whole map.

    Returns:
        (B, N, C), N the sum of s^2.
    """
    cells = pooled_to(last_map, FINEST, FINEST)
    pooled = [pooled_to(cells, scale, scale).flatten(2) for scale in scales]
    return F.linear(torch.cat(pooled, dim=2).transpose(1, 2), weight, bias)


def complementary(teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Where the teacher is right about a region and wrong about the whole, or the other way round.

    Differs from the paper: there a region is complementary when its class is not that of the whole. Here, as in the
    published code, two different wrong classes are not.

    Args:
        teacher_logits: (B, N, C), the first region the whole map.
        target: (B,) int64, t.

    Returns:
        (B, N) bool.
    """
    right = teacher_logits.argmax(dim=2) == target[:, None]
    return right != right[:, :1]


def sdd_kd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """KD of every region, the complementary ones twice: arXiv:2403.13512, SD-KD.

    Differs from the paper: the mean over the regions, as in the published code, where the paper sums.

    Args:
        student_logits: (B, N, C), of the regions, the whole map first.
        teacher_logits: (B, N, C), the same.
        target: (B,) int64, t.
        temperature: T.

    Returns:
        (), the mean over B and N.
    """
    student, teacher, _ = _rows(student_logits, teacher_logits, target)
    return kd_loss(student, teacher, temperature=temperature, weights=_weights(teacher_logits, target))


def sdd_dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """DKD of every region, the complementary ones twice: arXiv:2403.13512, SD-DKD.

    Differs from the paper: the mean over the regions, as in the published code, where the paper sums.

    Args:
        student_logits: (B, N, C), of the regions, the whole map first.
        teacher_logits: (B, N, C), the same.
        target: (B,) int64, t.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T of both.

    Returns:
        (), the mean over B and N.
    """
    rows = _rows(student_logits, teacher_logits, target)
    weights = _weights(teacher_logits, target)
    return dkd_loss(*rows, alpha=alpha, beta=beta, temperature=temperature, weights=weights)


def sdd_nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, gamma: float, temperature: float
) -> Tensor:
    """NKD of every region, the complementary ones twice: arXiv:2403.13512, SD-NKD.

    Differs from the paper: the mean over the regions, as in the published code, where the paper sums. As in that code
    the non-target term of NKD includes the true class.

    Args:
        student_logits: (B, N, C), of the regions, the whole map first.
        teacher_logits: (B, N, C), the same.
        target: (B,) int64, t.
        gamma: weight of the non-target term.
        temperature: T of the non-target term.

    Returns:
        (), the mean over B and N.
    """
    rows, weights = _rows(student_logits, teacher_logits, target), _weights(teacher_logits, target)
    loss = target_loss(*rows, weights=weights)
    if gamma:  # over all classes
        loss = loss + gamma * temperature**2 * soft_target_loss(*rows[:2], temperature=temperature, weights=weights)
    return loss


def _rows(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each region as a sample of its own: (B N, C), (B N, C), (B N,)."""
    regions = student_logits.shape[1]
    return student_logits.flatten(0, 1), teacher_logits.flatten(0, 1), target.repeat_interleave(regions)


def _weights(teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Of each region, (B N,): 2 of the complementary ones, 1 of the others."""
    return (1.0 + complementary(teacher_logits, target)).flatten()


class SDD(Distiller):
    """What the three variants share: the logits of the regions.

    The gradient reaches the student's classifier too.

    Args:
        scales: regions in a row and in a column, 1 first; published are [1, 2] and [1, 2, 4].
    """

    needs = Needs(teacher="features", features=("last_map",))

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        scales: list[Literal[1, 2, 4]],
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        if scales[:1] != [1] or len(set(scales)) < len(scales):
            raise UserError(
                f"distiller.scales: should begin with 1, the whole map, and name no scale twice; found {shown(scales)}"
            )
        self.scales: tuple[int, ...] = tuple(scales)
        for side in ("student", "teacher"):
            classifier_of(getattr(self, side), side)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, named after what is applied to the regions."""
        assert self.teacher is not None
        student, teacher = (
            self._logits(classifier_of(network), features.last_map)
            for network, features in zip((self.student, self.teacher), both_features(signals), strict=True)
        )
        return self.of_regions(student, teacher, signals.target)

    @abstractmethod
    def of_regions(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The weighted term, from (B, N, C) twice and (B,)."""

    def _logits(self, classifier: nn.Linear, last_map: Tensor) -> Tensor:
        bias = None if classifier.bias is None else widen(classifier.bias)
        logits = regional_logits(last_map, widen(classifier.weight), bias, self.scales)
        return standardize(logits.flatten(0, 1)).view_as(logits) if self.standardize_logits else logits


@DISTILLERS.register("sdd_kd")
class SDDKD(SDD):
    """``ce_weight`` CE + ``kd_weight`` KD of regions of the image, those that contradict the whole image twice.

    Args:
        kd_weight: weight of the distillation term.
        temperature: T, which softens both networks.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: Positive,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.kd_weight, self.temperature = kd_weight, temperature

    def of_regions(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        loss = sdd_kd_loss(student_logits, teacher_logits, target, temperature=self.temperature)
        return {"sdd_kd": self.kd_weight * loss}


@DISTILLERS.register("sdd_dkd")
class SDDDKD(SDD):
    """``ce_weight`` CE + DKD of regions of the image, those that contradict the whole image twice.

    Args:
        alpha: weight of the target-class term; 0 leaves it out.
        beta: weight of the non-target term; 0 leaves it out.
        temperature: T of both terms.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        alpha: NonNegative,
        beta: NonNegative,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(alpha=alpha, beta=beta)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def of_regions(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        if not (self.alpha or self.beta):
            return {}
        settings = {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}
        return {"sdd_dkd": sdd_dkd_loss(student_logits, teacher_logits, target, **settings)}


@DISTILLERS.register("sdd_nkd")
class SDDNKD(SDD):
    """``ce_weight`` CE + NKD of regions of the image, those that contradict the whole image twice.

    Args:
        gamma: weight of the non-target term; 0 leaves it out.
        temperature: T, which softens the non-target term.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        gamma: NonNegative,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.gamma, self.temperature = gamma, temperature

    def of_regions(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        settings = {"gamma": self.gamma, "temperature": self.temperature}
        return {"sdd_nkd": sdd_nkd_loss(student_logits, teacher_logits, target, **settings)}
