"""What the logits of a whole split say of its classes, for pictures. Letters: N images, C classes.

Pure functions; sums over batches (calibration, agreement, divergence) are in ``engine/fidelity.py``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
