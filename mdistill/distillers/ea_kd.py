"""EAKD: Su, Tseng, Pu, Zhao, Yang, Chen, Lee, "EA-KD: Entropy-based Adaptive Knowledge Distillation", arXiv:2311.13621.

Each sample's divergence is weighed by the entropies of both networks: ``ea_kd`` is KD so weighed, ``ea_dkd`` DKD,
``ea_mld`` MLKD at its instance level. Letters: B batch, C classes.
"""

from math import log
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.dkd import DKD
from mdistill.distillers.kd import KD
from mdistill.distillers.mlkd import MLKD
from mdistill.registry import Positive

LEAST = 1e-10
"""What keeps log(0) off in the released code, in two ways."""


def entropy(logits: Tensor, *, temperature: float, offset: float = 0.0) -> Tensor:
    """-sum of p log max(p + offset, 1e-10) over classes, with p softened: (B, C) -> (B,)."""
    probs = F.softmax(logits / temperature, dim=1)
    return -(probs * (probs + offset).clamp(min=LEAST).log()).sum(dim=1)


def entropy_weights(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, bound: float, offset: float = 0.0
) -> Tensor:
    """w = H^t (1 + H^s / bound) / 2, without gradient: arXiv:2311.13621. The less certain a sample, the more it counts.

    Differs from the paper, whose bound is log C: the released code has 100 in its KD and DKD for CIFAR-100. As there,
    the weights of a batch are not normalised.

    Args:
        student_logits: (B, C), of the entropy H^s.
        teacher_logits: (B, C), of the entropy H^t.
        temperature: which softens both.
        bound: of the student's entropy.
        offset: of ``entropy``.

    Returns:
        (B,).
    """
    student, teacher = (
        entropy(logits.detach(), temperature=temperature, offset=offset) for logits in (student_logits, teacher_logits)
    )
    return teacher * (1 + student / bound) / 2


class EntropyWeighted(Distiller):
    """What the three methods add to their base methods: a weight for each sample.

    Differs from the released code where logits are standardised: its DKD takes the entropies from the standardised
    ones and its MLKD from the raw ones, as here; its KD standardises none, here it does as DKD.

    Args:
        entropy_temperature: which softens both networks for their entropies alone.
        bound: of the student's entropy; None for log C.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        entropy_temperature: Positive,
        bound: Positive | None,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.entropy_temperature = entropy_temperature
        self.bound = log(data.num_classes) if bound is None else bound

    def entropy_weights(self, student_logits: Tensor, teacher_logits: Tensor, *, offset: float) -> Tensor:
        """``entropy_weights`` by these settings: (B, C), (B, C) -> (B,)."""
        logits = student_logits, teacher_logits
        return entropy_weights(*logits, temperature=self.entropy_temperature, bound=self.bound, offset=offset)


@DISTILLERS.register("ea_kd")
class EAKD(EntropyWeighted, KD):
    """``ce_weight`` CE + ``kd_weight`` KD, each sample weighed by the entropies of both networks.

    Its settings are those of KD and of ``EntropyWeighted``.
    """

    needs = Needs(teacher="logits", labels="none")

    def sample_weights(self, signals: Signals) -> Tensor:
        """Of the logits that KD sees."""
        return self.entropy_weights(signals.student_logits, signals.teacher_logits, offset=LEAST)


@DISTILLERS.register("ea_dkd")
class EADKD(EntropyWeighted, DKD):
    """``ce_weight`` CE + ``alpha`` TCKD + ``beta`` NCKD, each sample weighed by the entropies of both networks.

    Its settings are those of DKD and of ``EntropyWeighted``.
    """

    needs = Needs(teacher="logits")

    def sample_weights(self, signals: Signals) -> Tensor:
        """Of the logits that DKD sees."""
        return self.entropy_weights(signals.student_logits, signals.teacher_logits, offset=0.0)


@DISTILLERS.register("ea_mld")
class EAMLD(EntropyWeighted, MLKD):
    """``ce_weight`` CE + ``kd_weight`` (instance + class + batch level), the first weighed by the networks' entropies.

    Each view's instances are weighed by its own entropies. Its settings are those of MLKD and of ``EntropyWeighted``.
    """

    def sample_weights(self, signals: Signals) -> Tensor:
        """Of the view's raw logits."""
        return self.entropy_weights(signals.raw_student_logits, signals.raw_teacher_logits, offset=LEAST)
