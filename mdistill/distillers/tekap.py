"""TeKAP: Hossain, Akhter, Hong, Huh, "Single Teacher, Multiple Perspectives: Teacher Knowledge Augmentation for
Enhanced Knowledge Distillation", ICLR 2025.

Noise on its logits makes further teachers of one. Letters: B batch, C classes, N further teachers.
"""

from typing import Any

from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import normal
from mdistill.distillers.kd import kd_loss
from mdistill.registry import Fraction, NonNegative, Positive, PositiveInt


def tekap_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    noise: Tensor,
    *,
    temperature: float,
    noise_weight: float,
    augmented_weight: float,
) -> Tensor:
    """KD(z^t) + lambda sum over n of KD((1 - w) z^t + w e_n): ICLR 2025, its logit level; KD as in ``kd_loss``.

    Differs from the released code: nothing; its 0.1 and 0.8 are ``noise_weight`` and ``augmented_weight``. The feature
    level, CRD on features with noise, is left out.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C), z^t.
        noise: (N, B, C), e, standard normal.
        temperature: T.
        noise_weight: w.
        augmented_weight: lambda.

    Returns:
        (), the mean over B.
    """
    loss = kd_loss(student_logits, teacher_logits, temperature=temperature)
    for draws in noise:
        further = (1 - noise_weight) * teacher_logits + noise_weight * draws
        loss = loss + augmented_weight * kd_loss(student_logits, further, temperature=temperature)
    return loss


@DISTILLERS.register("tekap")
class TeKAP(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD from the teacher and from further ones, which are itself with noise.

    The noise of a sample is drawn anew in each epoch.

    Args:
        kd_weight: weight of the distillation term; 0 leaves it out.
        temperature: T, which softens all networks.
        teachers: N, how many further teachers.
        noise_weight: w, the share of the noise in their logits.
        augmented_weight: lambda, the weight of each of them over that of the teacher.
    """

    needs = Needs(teacher="logits", labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperature: Positive,
        teachers: PositiveInt,
        noise_weight: Fraction,
        augmented_weight: NonNegative,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        self.kd_weight, self.temperature, self.teachers = kd_weight, temperature, teachers
        self.noise_weight, self.augmented_weight = noise_weight, augmented_weight

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        if self.kd_weight == 0:
            return {}
        loss = tekap_loss(
            signals.student_logits,
            signals.teacher_logits,
            self._noise(signals),
            temperature=self.temperature,
            noise_weight=self.noise_weight,
            augmented_weight=self.augmented_weight,
        )
        return {"kd": self.kd_weight * loss}

    def _noise(self, signals: Signals) -> Tensor:
        samples, classes = signals.teacher_logits.shape
        draws = normal(signals.seed, signals.epoch, signals.index, self.teachers * classes)  # (B, N * C)
        return draws.view(samples, self.teachers, classes).transpose(0, 1)
