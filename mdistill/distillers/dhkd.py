"""DHKD: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation", arXiv:2411.08937v2.

Letters: B batch, C classes, D pooled width.
"""

import math
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import dropout_factors, standardize
from mdistill.models import feature_shapes
from mdistill.models.layers import BatchNorm1d
from mdistill.registry import NonNegative, Positive

HIDDEN = 200  # units of the auxiliary head with a hidden layer
DROPOUT = 0.1  # probability, in that layer


def binary_kl_norm_loss(auxiliary_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """tau^2 sum over classes of KL(1/2 || sigmoid((z_k - z^t_k) / tau)), between two binary distributions.

    Paper: arXiv:2411.08937v2, BinaryKL-Norm. It equals tau^2 sum of ln cosh((z_k - z^t_k) / (2 tau)): quadratic near
    z = z^t, linear far from it, with gradient at most tau / 2 in each logit.

    Differs from the paper: on log-probabilities, where the published code keeps the sigmoid off 0 and 1 by 1e-8 and so
    has no gradient where two logits are more than 18 tau apart.

    Args:
        auxiliary_logits: (B, C), z.
        teacher_logits: (B, C), z^t.
        temperature: tau.

    Returns:
        (), the mean over B.
    """
    gap = (auxiliary_logits - teacher_logits) / temperature
    per_class = -0.5 * (F.logsigmoid(gap) + F.logsigmoid(-gap)) - math.log(2)
    return temperature**2 * per_class.sum(dim=1).mean()


class HiddenHead(nn.Module):
    """Linear to 200, dropout of 0.1, BatchNorm, ReLU, linear: the released code's auxiliary head with a hidden layer.

    Args:
        inputs: D.
        outputs: C.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down, self.norm, self.up = nn.Linear(inputs, HIDDEN), BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, outputs)

    def forward(self, pooled: Tensor, factors: Tensor | None = None) -> Tensor:
        """(B, D) -> (B, C).

        Args:
            pooled: (B, D).
            factors: (B, 200), what dropout multiplies by; None for no dropout.
        """
        hidden = self.down(pooled)
        logits: Tensor = self.up(F.relu(self.norm(hidden if factors is None else hidden * factors)))
        return logits


@DISTILLERS.register("dhkd")
class DHKD(Distiller):
    """``ce_weight`` CE on the student's head + ``kd_weight`` BinaryKL-Norm on an auxiliary head.

    Both heads read the pooled features; the auxiliary one learns with the student and is not exported. The paper's
    gradient alignment is ``solver.name: aligned_sgd``, which the published settings name.

    Args:
        kd_weight: weight of the logit-level term; 0 leaves it out.
        temperature: tau of that term.
        head: the auxiliary one, "linear" or "hidden", with a hidden layer of 200 units; published are both.
    """

    needs = Needs(teacher="logits", student="features", labels="none", features=("pooled",))

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperature: Positive,
        head: Literal["linear", "hidden"],
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        self.kd_weight, self.temperature = kd_weight, temperature
        width = feature_shapes(student, data.image_size).pooled[0]
        self.head: nn.Module = (HiddenHead if head == "hidden" else nn.Linear)(width, data.num_classes)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``kd``."""
        if self.kd_weight == 0:
            return {}
        logits = self._auxiliary_logits(signals)
        if self.standardize_logits:
            logits = standardize(logits)
        return {
            "kd": self.kd_weight * binary_kl_norm_loss(logits, signals.teacher_logits, temperature=self.temperature)
        }

    def _auxiliary_logits(self, signals: Signals) -> Tensor:
        """(B, C)."""
        assert signals.student_features is not None  # what ``needs`` asks for
        inputs = [signals.student_features.pooled]
        if self.training and isinstance(self.head, HiddenHead):
            draws = signals.seed, signals.epoch, signals.index, HIDDEN
            inputs.append(dropout_factors(*draws, probability=DROPOUT).to(inputs[0].dtype))
        logits: Tensor = self.head(*inputs)  # in float32, as the student's own logits
        return logits
