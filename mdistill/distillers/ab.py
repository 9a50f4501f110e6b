"""AB: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
arXiv:1811.03233.

Letters: B batch, C channels of the teacher's stage, n stages after the stem, H and W height and width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.fitnet import Regressor
from mdistill.distillers.maps import both_features, stage_pairs
from mdistill.models import trunk
from mdistill.registry import Positive

SCALE = 3 / 1000  # of every stage


def ab_loss(connected_preacts: Sequence[Tensor], teacher_preacts: Sequence[Tensor], *, margin: float) -> Tensor:
    """Sum over the stages i of 0.003 2^(i - n) / B sum of max(m - x, 0)^2 where t > 0, of max(m + x, 0)^2 elsewhere.

    The squared hinge loss of which of the teacher's neurons fire, arXiv:1811.03233.

    Differs from the paper, whose loss of a stage is the plain sum: its factors are the authors' code's.

    Args:
        connected_preacts: maps (B, C, H, W), x of each stage after the stem, the student's through its connector.
        teacher_preacts: the same of the teacher, t, before the activation.
        margin: m.

    Returns:
        (), the sum over stages, of sums over C, H and W, of means over B.
    """
    terms = []
    for number, (x, t) in enumerate(zip(connected_preacts, teacher_preacts, strict=True), start=1):
        below = torch.where(t > 0, margin - x, margin + x).clamp(min=0)
        terms.append(SCALE * 2.0 ** (number - len(teacher_preacts)) * below.square().sum() / len(x))
    return torch.stack(terms).sum()


@DISTILLERS.register("ab")
class AB(Distiller):
    """``ce_weight`` CE alone, after a first phase in which the student learns where the teacher's neurons fire.

    In the first phase, ``boundaries``, the student up to its last stage and the connectors are trained. A connector is
    the identity where channels and height agree, else FitNet's convolution and BatchNorm. Stages pair from the front
    and surplus ones are left out; what stands for a stage before its activation is listed at ``Features.preacts``.

    Args:
        margin: m, how far from the boundary a neuron should be; 1 is published.
    """

    needs = Needs(teacher="features", features=("preacts",), labels="none")
    phases = ("boundaries",)
    needs_at_last = Needs(teacher="none", labels="none")

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, data: DataInfo, *, margin: Positive, **shared: Any
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term()
        self.margin = margin
        self.connectors = nn.ModuleList(
            nn.Identity()
            if inputs[:2] == outputs[:2]
            else Regressor(inputs, outputs, relu=False, where=f"distiller.name: of stage {number}")
            for number, (inputs, outputs) in enumerate(stage_pairs(self, data), start=1)
        )
        self._trunk = trunk(student, data.image_size)

    def trained(self, phase: str | None) -> list[nn.Module]:
        """The student up to its last stage and the connectors; then the student."""
        return [self.student] if phase is None else [*self._trunk, self.connectors]

    def first_phase(self, phase: str, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``boundaries``."""
        student, teacher = both_features(signals)
        pairs = zip(self.connectors, student.preacts[1:], strict=False)
        connected = [self.run_module(connector, preact) for connector, preact in pairs]
        return {"boundaries": ab_loss(connected, teacher.preacts[1 : len(connected) + 1], margin=self.margin)}

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """Nothing: the second phase is trained on the labels."""
        return {}
