"""CC: Peng et al., "Correlation Congruence for Knowledge Distillation", arXiv:1904.01802.

Letters: B batch, D width of the embeddings.
"""

from typing import Any

from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_pooled
from mdistill.models import feature_shapes
from mdistill.registry import Positive, PositiveInt


def cc_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Mean over neighbours in the batch of sum_k d_bk d_(b+1)k, where d = |e^s - e^t|; arXiv:1904.01802.

    Differs from the paper, which compares the networks' correlations between all samples under a kernel: this is the
    published code of the compared figures, without a kernel, between each sample and the next. It depends on the order
    of the batch. 0 for a batch of 1.

    Args:
        student_embedding: (B, D), e^s.
        teacher_embedding: (B, D), e^t.

    Returns:
        (), the mean over the B - 1 pairs.
    """
    gap = (student_embedding - teacher_embedding).abs()
    return (gap[:-1] * gap[1:]).sum() / max(len(gap) - 1, 1)


@DISTILLERS.register("cc")
class CC(Distiller):
    """``ce_weight`` CE + ``cc_weight`` correlation congruence of the embedded pooled features.

    Both embeddings are linear and trained, the teacher's too, so both could shrink to 0; weight decay and the
    cross-entropy alone decide. They are left out at inference.

    The loss is quadratic in the embeddings' weights and not bounded, so that steps overshoot and overflow where pooled
    features are long. At a rate of 0.05, momentum 0.9 and the published weight, random ones of the teacher did between
    lengths of 40 and 60. A trained ResNet56's are 20 long; those of an untrained ResNet32x4 in evaluation mode 260.

    Args:
        cc_weight: weight of the congruence term.
        width: D of the embeddings.
    """

    needs = Needs(teacher="pooled", features=("pooled",), labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        cc_weight: Positive,
        width: PositiveInt,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        self.cc_weight = cc_weight
        self.student_embed, self.teacher_embed = (
            nn.Linear(feature_shapes(network, data.image_size).pooled[0], width) for network in (student, teacher)
        )

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``cc``."""
        student, teacher = both_pooled(signals)
        embedded = self.run_module(self.student_embed, student)
        target = self.run_module(self.teacher_embed, teacher)
        return {"cc": self.cc_weight * cc_loss(self.gather(embedded), self.gather(target))}
