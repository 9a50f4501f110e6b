"""How a network's probabilities stand to the labels and to a teacher's: calibration, classes, agreement, divergence.

Each function is of one batch and of sums, so that batches add up. Letters: B batch, C classes, K bins of confidence.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistill.engine.evaluate import true_place
from mdistill.errors import RunFailed

BINS = 15
"""Bins of confidence, as in the paper of ``calibration_error``."""


def is_top1(logits: Tensor, target: Tensor) -> Tensor:
    """Whether the true class scores more than every other, (B,) bool: a tie counts against the network.

    Args:
        logits: (B, C).
        target: (B,) int64.
    """
    return true_place(logits, target) == 1


def calibration_sums(logits: Tensor, target: Tensor, bins: int = BINS) -> Tensor:
    """Images by how sure the network is of its prediction: (3, K) float64, in bins of equal width.

    The rows are the number of images, the sum of their confidence (the largest probability), and how many of them are
    right. Bin k has confidences in (k / K, (k + 1) / K].

    Args:
        logits: (B, C).
        target: (B,) int64.
        bins: K.
    """
    confidence = logits.double().softmax(dim=1).amax(dim=1)
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, is_top1(logits, target).double()])
    return values.new_zeros(3, bins).index_add_(1, place, values)


def calibration_error(sums: Tensor) -> float:
    """The expected calibration error, from 0 to 1: the mean over images of |accuracy - confidence| of their bin.

    Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", arXiv:1706.04599, Eq. (3).

    Args:
        sums: (3, K), of ``calibration_sums``.
    """
    images, confidence, right = sums
    return float((right - confidence).abs().sum() / images.sum())


def class_counts(logits: Tensor, target: Tensor) -> Tensor:
    """Images of each class and how many of them are right: (2, C) float64.

    Args:
        logits: (B, C).
        target: (B,) int64.
    """
    values = torch.stack([torch.ones_like(target), is_top1(logits, target)]).double()
    return values.new_zeros(2, logits.shape[1]).index_add_(1, target, values)


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Whether both predict the same class, the first of those that score most: (B,) bool.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
    """
    return student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the class probabilities: (B,) float64, nats, not multiplied by the temperature.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: divides both.
    """
    both = (student_logits, teacher_logits)
    student, teacher = ((logits.double() / temperature).log_softmax(dim=1) for logits in both)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


@dataclass(frozen=True)
class TeacherFidelity:
    """How far a network does what its teacher does."""

    agreement: float  # percent of the images for which both predict the same class
    divergence: float  # mean KL(teacher || student), nats
    top1: float  # of the teacher, percent


class Observer:
    """Sums what is asked for of each batch of an evaluation; the host reads no sum before it is asked for.

    Args:
        classes: C.
        device: of the batches.
        teacher: from images to logits; None: there is nothing to compare with.
        keep: whether logits and labels are kept, on the host.
    """

    def __init__(
        self, classes: int, device: torch.device, *, teacher: Callable[[Tensor], Tensor] | None, keep: bool
    ) -> None:
        self.calibration = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        self.classes = torch.zeros(2, classes, dtype=torch.float64, device=device)
        self._teacher, self._keep = teacher, keep
        self._against = torch.zeros(3, dtype=torch.float64, device=device)  # agreements, divergence, teacher right
        self._kept: dict[str, list[Tensor]] = {}

    def __call__(self, image: Tensor, logits: Tensor, target: Tensor) -> None:
        """One batch: (B, 3, H, W), (B, C) and (B,)."""
        self.calibration += calibration_sums(logits, target)
        self.classes += class_counts(logits, target)
        kept = {"logits": logits, "labels": target}
        if self._teacher is not None:
            kept["teacher_logits"] = teacher_logits = self._teacher(image).float()
            right = is_top1(teacher_logits, target)
            sums = [agreement(logits, teacher_logits).sum(), divergence(logits, teacher_logits).sum(), right.sum()]
            self._against += torch.stack([each.double() for each in sums])
        if self._keep:
            for name, values in kept.items():
                self._kept.setdefault(name, []).append(values.cpu())

    def against_teacher(self) -> TeacherFidelity | None:
        """Of all images so far; None without a teacher.

        Raises:
            RunFailed: a logit of the teacher is not finite.
        """
        if self._teacher is None:
            return None
        images = float(self.classes[0].sum())
        same, divergence_sum, right = self._against.tolist()
        if not math.isfinite(divergence_sum):
            raise RunFailed("the teacher's logits are not finite, so there is nothing to compare with")
        return TeacherFidelity(100.0 * same / images, divergence_sum / images, 100.0 * right / images)

    def arrays(self) -> dict[str, Any]:
        """What was kept: ``logits`` (N, C) float32, ``labels`` (N,) int64 and, with a teacher, ``teacher_logits``."""
        return {name: torch.cat(parts).numpy() for name, parts in self._kept.items()}
