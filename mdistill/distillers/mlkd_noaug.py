"""MLKDNoAug: Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023, without its strong augmentation.

Compared with as "MLKD without augmentation" by Sun et al., arXiv:2408.07703v2. Letters: B batch, C classes.
"""

from typing import Any

from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.mlkd import weak_view_terms
from mdistill.registry import NonNegative, Positive


@DISTILLERS.register("mlkd_noaug")
class MLKDNoAug(Distiller):
    """``ce_weight`` CE + ``kd_weight`` (instance + class + batch level), all of one view of the images.

    Differs from the paper: the second, strongly augmented view and its instance term are left out;
    ``uncertain_fractions`` multiply the three levels, as in the published code; standardised logits, if asked for,
    reach the instance level alone.

    Args:
        kd_weight: weight of all three levels; 0 leaves them out.
        temperature: the first of the K temperatures.
        extra_temperatures: the others.
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
        extra_temperatures: list[Positive],
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        self.kd_weight, self.temperatures = kd_weight, (temperature, *extra_temperatures)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``instance``, ``class`` and ``batch``."""
        if self.kd_weight == 0:
            return {}
        signals = self.whole_batch(signals)
        terms = weak_view_terms(
            signals.student_logits,
            signals.teacher_logits,
            signals.raw_student_logits,
            signals.raw_teacher_logits,
            temperatures=self.temperatures,
        )
        return {name: self.kd_weight * term for name, term in terms.items()}
