"""NormKD: Chi, Zheng, Li, Yang, Wu, Lin, Cai, "NormKD: Normalized Logits for Knowledge Distillation", arXiv:2308.00520.

Every sample has a temperature of its own in each network: T times the standard deviation of its logits. ``normkd`` is
KD with it, ``normkd_dkd`` is DKD. Letters: B batch, C classes.
"""

from typing import Any

from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.dkd import dkd_loss, nckd_loss, tckd_loss
from mdistill.distillers.functional import deviation
from mdistill.distillers.kd import kd_loss
from mdistill.registry import NonNegative, Positive

LEAST_DEVIATION = 1e-3


def normalize(logits: Tensor, *, temperature_norm: float) -> tuple[Tensor, Tensor]:
    """z / (T sigma) less a constant for each row, and T sigma: arXiv:2308.00520.

    sigma is the unbiased standard deviation of a row, and has a gradient; the constant changes no softmax.

    Differs from the released code, which divides a row of equal logits by 0: sigma is at least 1e-3 here. Such a row of
    the student is uniform, with a finite gradient; one of the teacher counts for next to nothing in the loss.

    Args:
        logits: (B, C), z.
        temperature_norm: T.

    Returns:
        (B, C), (B, 1).
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    temperatures = temperature_norm * deviation(centred).clamp(min=LEAST_DEVIATION)
    return centred / temperatures, temperatures


def normkd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature_norm: float) -> Tensor:
    """(T sigma^t)^2 KL(p^t || p^s), both softened by ``normalize``: arXiv:2308.00520.

    Differs from the released code: nothing beyond what ``normalize`` says; without cross-entropy.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature_norm: T.

    Returns:
        (), the mean over B.
    """
    student, teacher, weights = _softened(student_logits, teacher_logits, temperature_norm)
    return kd_loss(student, teacher, temperature=1.0, weights=weights)


def normkd_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature_norm: float,
) -> Tensor:
    """(T sigma^t)^2 (alpha TCKD + beta NCKD), both networks softened by ``normalize``: arXiv:2308.00520.

    Differs from the released code: nothing beyond what ``normalize`` says; without cross-entropy, and on
    log-probabilities.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        target: (B,) int64, the true class.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature_norm: T.

    Returns:
        (), the mean over B.
    """
    student, teacher, weights = _softened(student_logits, teacher_logits, temperature_norm)
    return dkd_loss(student, teacher, target, alpha=alpha, beta=beta, temperature=1.0, weights=weights)


@DISTILLERS.register("normkd")
class NormKD(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD at a temperature for each sample and network.

    Args:
        kd_weight: weight of the distillation term; 0 leaves it out.
        temperature_norm: T, the temperature over the standard deviation of a sample's logits.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperature_norm: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        self.kd_weight, self.temperature_norm = kd_weight, temperature_norm

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        if self.kd_weight == 0:
            return {}
        logits = signals.student_logits, signals.teacher_logits
        return {"kd": self.kd_weight * normkd_loss(*logits, temperature_norm=self.temperature_norm)}


@DISTILLERS.register("normkd_dkd")
class NormKDDKD(Distiller):
    """``ce_weight`` CE + ``alpha`` TCKD + ``beta`` NCKD, both at a temperature for each sample and network.

    The published code warms the last two up.

    Args:
        alpha: weight of the target-class term; 0 leaves it out.
        beta: weight of the non-target term; 0 leaves it out.
        temperature_norm: T, the temperature over the standard deviation of a sample's logits.
    """

    needs = Needs(teacher="logits")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        alpha: NonNegative,
        beta: NonNegative,
        temperature_norm: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(alpha=alpha, beta=beta)
        self.alpha, self.beta, self.temperature_norm = alpha, beta, temperature_norm

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``tckd`` and ``nckd``, whichever has a weight; together ``normkd_dkd_loss``."""
        logits = signals.student_logits, signals.teacher_logits
        student, teacher, weights = _softened(*logits, self.temperature_norm)
        inputs, terms = (student, teacher, signals.target), {}
        if self.alpha:
            terms["tckd"] = self.alpha * tckd_loss(*inputs, temperature=1.0, weights=weights)
        if self.beta:
            terms["nckd"] = self.beta * nckd_loss(*inputs, temperature=1.0, weights=weights)
        return terms


def _softened(student_logits: Tensor, teacher_logits: Tensor, temperature_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both normalised, (B, C) each, and the squares of the teacher's temperatures, (B,)."""
    student, _ = normalize(student_logits, temperature_norm=temperature_norm)
    teacher, temperatures = normalize(teacher_logits, temperature_norm=temperature_norm)
    return student, teacher, temperatures.squeeze(1).square()
