"""MLKD: Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023.

Logits are softened at K temperatures, and aligned at each by sample, by pairs of samples and by pairs of classes, in a
weakly and a strongly augmented view of the images. Letters: B batch, C classes (at least 2), K temperatures.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Needs, Signals
from mdistill.distillers.kd import kd_loss
from mdistill.distillers.two_views import TwoViewDistiller
from mdistill.registry import NonNegative, Positive

OWN_VIEW = 3
"""How many temperatures of the published strong term are for the strong view; the others are for the weak one."""


def instance_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperatures: Sequence[float],
    weights: Tensor | None = None,
) -> Tensor:
    """Instance level: sum over k of T_k^2 KL(p^tea_k || p^stu_k).

    Paper: CVPR 2023, instance-level alignment; p_k is the softmax of the logits at T_k.

    Differs from the paper: the mean over samples in place of their sum, and the factor T_k^2, as in the published code.

    Args:
        student_logits: (B, C), of p^stu.
        teacher_logits: (B, C), of p^tea.
        temperatures: T_k.
        weights: of each sample, (B,), which the mean does not divide by; None for 1.

    Returns:
        (), the mean over B.
    """
    total = student_logits.new_zeros(())
    for temperature in temperatures:
        total = total + kd_loss(student_logits, teacher_logits, temperature=temperature, weights=weights)
    return total


def batch_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperatures: Sequence[float]) -> Tensor:
    """Batch level: (1 / B) sum over k of |G^tea_k - G^stu_k|^2, with G_k = p_k p_k^T, (B, B).

    Paper: CVPR 2023, batch-level alignment; p_k, (B, C), as in ``instance_loss``; | | is the Frobenius norm.

    Differs from the paper: nothing.

    Args:
        student_logits: (B, C), of p^stu.
        teacher_logits: (B, C), of p^tea.
        temperatures: T_k.

    Returns:
        ().
    """
    total = student_logits.new_zeros(())
    for temperature in temperatures:
        student, teacher = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
        total = total + (teacher @ teacher.T - student @ student.T).square().sum()
    return total / len(student_logits)


def class_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperatures: Sequence[float]) -> Tensor:
    """Class level: (1 / C) sum over k of |M^tea_k - M^stu_k|^2, with M_k = p_k^T p_k, (C, C).

    Paper: CVPR 2023, class-level alignment; p_k, (B, C), as in ``instance_loss``; | | is the Frobenius norm.

    Differs from the paper: nothing.

    Args:
        student_logits: (B, C), of p^stu.
        teacher_logits: (B, C), of p^tea.
        temperatures: T_k.

    Returns:
        ().
    """
    total = student_logits.new_zeros(())
    for temperature in temperatures:
        student, teacher = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
        total = total + (teacher.T @ teacher - student.T @ student).square().sum()
    return total / student_logits.shape[1]


def uncertain_fractions(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Which fraction of the samples, and of the classes, has a teacher's confidence of at most the median.

    A sample's confidence is its largest probability, a class's is the sum of its probabilities over the batch, both
    unsoftened. With an even number of them, and no ties at the median, the fraction is 1/2.

    Differs from the paper, which has no such factor: the published code means to keep the uncertain samples and
    classes, but masks terms that are averages already, so that the masks' means multiply these.

    Args:
        teacher_logits: (B, C).

    Returns:
        (), (): of the samples, of the classes.
    """
    probs = F.softmax(teacher_logits, dim=1)
    return _fraction_up_to_median(probs.amax(dim=1)), _fraction_up_to_median(probs.sum(dim=0))


def levels(
    student_logits: Tensor,
    teacher_logits: Tensor,
    raw_student_logits: Tensor,
    raw_teacher_logits: Tensor,
    *,
    temperatures: Sequence[float],
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """``instance``, ``class`` and ``batch`` of one view; the first of standardised logits, where there are any.

    Args:
        student_logits: (B, C), standardised where that is asked for.
        teacher_logits: (B, C), the same.
        raw_student_logits: (B, C).
        raw_teacher_logits: (B, C).
        temperatures: T_k.
        weights: of each sample at the instance level, (B,); None for 1.

    Returns:
        () each.
    """
    raw = raw_student_logits, raw_teacher_logits
    return {
        "instance": instance_loss(student_logits, teacher_logits, temperatures=temperatures, weights=weights),
        "class": class_loss(*raw, temperatures=temperatures),
        "batch": batch_loss(*raw, temperatures=temperatures),
    }


def weak_view_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    raw_student_logits: Tensor,
    raw_teacher_logits: Tensor,
    *,
    temperatures: Sequence[float],
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """``instance``, ``class`` and ``batch`` of one view, each times its ``uncertain_fractions``, before the weight.

    Standardised logits, where there are any, go to the instance level alone (Sun et al., arXiv:2403.01427, in its
    published code); the other levels and the fractions are of the raw ones.

    Args:
        student_logits: (B, C), standardised where that is asked for.
        teacher_logits: (B, C), the same.
        raw_student_logits: (B, C).
        raw_teacher_logits: (B, C).
        temperatures: T_k.
        weights: of each sample at the instance level, (B,); None for 1.

    Returns:
        () each.
    """
    samples, classes = uncertain_fractions(raw_teacher_logits)
    fractions = {"instance": samples, "class": classes, "batch": samples}
    logits = student_logits, teacher_logits, raw_student_logits, raw_teacher_logits
    terms = levels(*logits, temperatures=temperatures, weights=weights)
    return {name: fractions[name] * term for name, term in terms.items()}


def strong_view_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    strong_student_logits: Tensor,
    strong_teacher_logits: Tensor,
    *,
    temperatures: Sequence[float],
    weights: Tensor | None = None,
    strong_weights: Tensor | None = None,
) -> Tensor:
    """The instance level of the strong view at the first three temperatures, and of the weak view at the others.

    Differs from the paper, which knows no such exchange of views: it is in the published code, as is that the class and
    batch levels of the strong view are computed and not added.

    Args:
        student_logits: (B, C), of the weak view.
        teacher_logits: (B, C), of the weak view.
        strong_student_logits: (B, C), of the strong view.
        strong_teacher_logits: (B, C), of the strong view.
        temperatures: T_k.
        weights: of each sample in the weak view, (B,); None for 1.
        strong_weights: of each sample in the strong view, (B,); None for 1.

    Returns:
        (), the mean over B.
    """
    own, others = temperatures[:OWN_VIEW], temperatures[OWN_VIEW:]
    return instance_loss(
        strong_student_logits, strong_teacher_logits, temperatures=own, weights=strong_weights
    ) + instance_loss(student_logits, teacher_logits, temperatures=others, weights=weights)


@DISTILLERS.register("mlkd")
class MLKD(TwoViewDistiller):
    """``ce_weight`` CE + ``kd_weight`` (instance + class + batch level), of a weak and a strong view of the images.

    The strong view is cropped and mirrored, goes through two operations of RandAugment's pool and loses a rectangle.
    Standardised logits, if asked for, reach the instance level alone.

    Differs from the paper: "published" is the effective loss of the published code: ``weak_view_terms`` and
    ``strong_view_loss``. "paper" is our interpretation of the equations, which name no views: every level at every
    temperature of both views, each of its own, without factors.

    Args:
        kd_weight: weight of all levels; 0 leaves them out.
        temperature: the first of the K temperatures.
        extra_temperatures: the others.
        variant: "published" or "paper".
    """

    needs = Needs(teacher="logits", views=2, labels="none")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: NonNegative,
        temperature: Positive,
        extra_temperatures: list[Positive],
        variant: Literal["published", "paper"],
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(kd_weight=kd_weight)
        self.kd_weight, self.temperatures, self.variant = kd_weight, (temperature, *extra_temperatures), variant

    def sample_weights(self, signals: Signals) -> Tensor | None:
        """Of each sample, (B,); None for 1. For variants of the method."""
        return None

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """Published: ``instance``, ``class``, ``batch`` and ``strong``; of the paper: the first three for each view."""
        if self.kd_weight == 0:
            return {}
        signals = self.whole_batch(signals)
        strong = signals.strong
        assert strong is not None
        weak_logits, strong_logits = (
            (view.student_logits, view.teacher_logits, view.raw_student_logits, view.raw_teacher_logits)
            for view in (signals, strong)
        )
        weights, strong_weights = self.sample_weights(signals), self.sample_weights(strong)
        if self.variant == "published":
            terms = weak_view_terms(*weak_logits, temperatures=self.temperatures, weights=weights)
            instances = *weak_logits[:2], *strong_logits[:2]
            terms["strong"] = strong_view_loss(
                *instances, temperatures=self.temperatures, weights=weights, strong_weights=strong_weights
            )
        else:
            terms = levels(*weak_logits, temperatures=self.temperatures, weights=weights)
            of_strong = levels(*strong_logits, temperatures=self.temperatures, weights=strong_weights)
            terms |= {f"{name}_strong": term for name, term in of_strong.items()}
        return {name: self.kd_weight * term for name, term in terms.items()}


def _fraction_up_to_median(confidence: Tensor) -> Tensor:
    """The median is the mean of the middle two where there are two: (N,) -> ()."""
    ordered = confidence.sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return (confidence <= middle).to(confidence.dtype).mean()
