"""LA: Wen, Lai, Qian, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", arXiv:1911.07471.

Letters: B batch, C classes.
"""

from typing import Any

from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import class_mask, of_class
from mdistill.distillers.kd import kd_loss
from mdistill.registry import NonNegative, Positive


def swap(logits: Tensor, target: Tensor) -> Tensor:
    """Each row's largest entry and that of its true class change places.

    A row whose true class is the largest already stays as it is; of equal maxima the first counts.

    Args:
        logits: (B, C).
        target: (B,) int64, the true class.

    Returns:
        (B, C).
    """
    predicted = logits.argmax(dim=1)  # (B,)
    first, second = (class_mask(classes, logits.shape[1]) for classes in (predicted, target))
    return logits.where(~first, of_class(logits, target)).where(~second, of_class(logits, predicted))


def la_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(p^t || p^s), where p^t comes from the swapped teacher, which is then right on every sample.

    Paper: arXiv:1911.07471, the probability shift of its knowledge adjustment. Swapping logits and swapping softened
    probabilities is the same.

    Differs from the paper: without its second idea, a temperature for each sample; KL with the factor T^2, as in KD.
    This is what Sun et al., arXiv:2408.07703v2, compare with under the name LA.

    Args:
        student_logits: (B, C), of p^s.
        teacher_logits: (B, C), of p^t before the swap.
        target: (B,) int64, the true class.
        temperature: T.

    Returns:
        (), the mean over B.
    """
    return kd_loss(student_logits, swap(teacher_logits, target), temperature=temperature)


@DISTILLERS.register("la")
class LA(Distiller):
    """``ce_weight`` CE + ``kd_weight`` KD from the swapped teacher; published without cross-entropy.

    Args:
        kd_weight: weight of the distillation term; 0 leaves it out.
        temperature: T, which softens both networks.
    """

    needs = Needs(teacher="logits", sparse_logits=("temperature",))

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        self.kd_weight, self.temperature = kd_weight, temperature

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        if self.kd_weight == 0:
            return {}
        logits = signals.student_logits, signals.teacher_logits
        return {"kd": self.kd_weight * la_loss(*logits, signals.target, temperature=self.temperature)}
