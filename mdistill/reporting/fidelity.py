"""How near a student is to its teacher, and how sure networks are. Letters: N images, C classes, K bins.

Pure functions of logits; nothing here knows of runs or pictures.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Predictions by how sure the network was of them, in bins of equal width from 0 to 1."""

    confidence: list[float]  # (K,) mean probability of the predicted class; 0 for an empty bin
    accuracy: list[float]  # (K,) part of the predictions that are right; 0 for an empty bin
    images: list[int]  # (K,)

    @property
    def ece(self) -> float:
        """Expected calibration error, from 0 to 1: the mean gap of the bins, each weighted by its images."""
        bins = zip(self.confidence, self.accuracy, self.images, strict=True)
        return sum(count * abs(sure - right) for sure, right, count in bins) / max(sum(self.images), 1)


def calibration(logits: "Tensor", target: "Tensor", bins: int = 15) -> Calibration:
    """Reliability by confidence: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, Sec. 2.

    Args:
        logits: (N, C).
        target: (N,) int64, the true classes.
        bins: K; bin k holds confidences in (k / K, (k + 1) / K].

    Returns:
        the K bins.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    right = (predicted == target).double()
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    images = place.bincount(minlength=bins)
    each = images.clamp(min=1)
    return Calibration(
        (place.bincount(confidence, minlength=bins) / each).tolist(),
        (place.bincount(right, minlength=bins) / each).tolist(),
        images.tolist(),
    )


def agreement(student_logits: "Tensor", teacher_logits: "Tensor") -> float:
    """Images for which both networks predict the same class, percent.

    Args:
        student_logits: (N, C).
        teacher_logits: (N, C).

    Returns:
        from 0 to 100.
    """
    same = student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)
    return 100.0 * float(same.double().mean())


def mean_kl(student_logits: "Tensor", teacher_logits: "Tensor", temperature: float = 1.0) -> float:
    """KL(teacher || student) of the class probabilities, both softened, mean over the images.

    Args:
        student_logits: (N, C).
        teacher_logits: (N, C).
        temperature: divides both.

    Returns:
        nats, not multiplied by the temperature.
    """
    log_p_student = (student_logits.double() / temperature).log_softmax(dim=1)
    log_p_teacher = (teacher_logits.double() / temperature).log_softmax(dim=1)
    return float((log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(dim=1).mean())


def logit_correlation(logits: "Tensor") -> "Tensor":
    """Pearson's correlation between the logits of every two classes, over the images; 0 for a constant logit.

    Args:
        logits: (N, C).

    Returns:
        (C, C) float64.
    """
    centred = logits.double() - logits.double().mean(dim=0)
    length: Tensor = centred.norm(dim=0)
    unit = centred / length.where(length > 0, 1.0)
    return unit.T @ unit


def class_means(logits: "Tensor", target: "Tensor") -> "Tensor":
    """The mean logits of the images of each class, as mdistiller's notebook draws for its correlation matrices.

    Args:
        logits: (N, C).
        target: (N,) int64, the true classes.

    Returns:
        (C, C) float64, row c for the images of class c; zeros for a class without images.
    """
    classes = logits.shape[1]
    sums = logits.new_zeros((classes, classes)).double().index_add_(0, target, logits.double())
    return sums / target.bincount(minlength=classes).clamp(min=1).unsqueeze(1)


def matrix_difference(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """The absolute difference of two matrices, (C, C), without their diagonals, which are set to 0."""
    difference = (student - teacher).abs()
    return difference.fill_diagonal_(0.0)


def class_difference(student_logits: "Tensor", teacher_logits: "Tensor") -> "Tensor":
    """The absolute difference of the logits of each class, mean over the images (RLD, arXiv:2408.07703, Fig. 5).

    Args:
        student_logits: (N, C).
        teacher_logits: (N, C).

    Returns:
        (C,) float64.
    """
    return (student_logits.double() - teacher_logits.double()).abs().mean(dim=0)


def nearest_classes(logits: "Tensor", target: "Tensor", label: int, most: int) -> list[tuple[int, float]]:
    """The classes with the highest mean logits for the images of class ``label`` (RLD, arXiv:2408.07703, Fig. 7).

    Args:
        logits: (N, C).
        target: (N,) int64, the true classes.
        label: of which images.
        most: how many classes.

    Returns:
        class and mean logit, the highest first.
    """
    value, index = class_means(logits, target)[label].topk(min(most, logits.shape[1]))
    return list(zip(index.tolist(), value.tolist(), strict=True))
