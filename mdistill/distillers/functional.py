"""Maths that two or more methods use. Letters: B batch, C classes."""

import torch
from torch import Tensor
from torch.nn import functional as F


def standardize(logits: Tensor) -> Tensor:
    """Z-score over classes: (z - mean) / (1e-7 + std), std unbiased.

    Sun et al., "Logit Standardization in Knowledge Distillation", arXiv:2403.01427, Eq. (11), with the 1e-7 of the
    published code. Finite, with a finite gradient, for a constant row too.

    Shapes: (B, C) -> (B, C); a width of 0 passes through.
    """
    if logits.shape[1] == 0:
        return logits
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (1e-7 + _std(centred))


def kl_divergence(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """KL(teacher || student) summed over classes, averaged over the batch: (B, C), (B, C) -> ().

    Log-probabilities in, so that nothing underflows to log(0). A class whose two entries are 0 adds nothing.
    """
    return F.kl_div(student_log_probs, teacher_log_probs, log_target=True, reduction="batchmean")


def class_mask(classes: Tensor, num_classes: int) -> Tensor:
    """True at each row's class: (B,) int64 -> (B, C) bool. Unlike ``F.one_hot`` it never reads a value on the host."""
    return classes[:, None] == torch.arange(num_classes, device=classes.device)


def class_shares(target: Tensor, like: Tensor) -> Tensor:
    """Labels as shares of classes in the shape and type of the logits ``like``: (B,) int64 or (B, C) -> (B, C)."""
    return (class_mask(target, like.shape[1]) if target.ndim == 1 else target).to(like.dtype)


def binary_log_probs(log_probs: Tensor, classes: Tensor) -> Tensor:
    """log {p_c, 1 - p_c} of each row's class c in ``classes``: (B, C), (B,) -> (B, 2); needs C >= 2.

    The second is a log-sum over the other classes: 1 - p_c would round to 0 where the network is certain.
    """
    this = log_probs.gather(1, classes[:, None])  # (B, 1)
    others = log_probs.masked_fill(class_mask(classes, log_probs.shape[1]), -torch.inf)
    return torch.cat([this, others.logsumexp(dim=1, keepdim=True)], dim=1)


def masked_log_softmax(logits: Tensor, keep: Tensor) -> Tensor:
    """log-softmax over the classes that ``keep`` marks; 0 elsewhere: (B, C), (B, C) bool -> (B, C).

    A row that keeps nothing is 0 with gradient 0: it is left whole inside the softmax, whose result is then discarded.
    """
    dropped = ~keep & keep.any(dim=1, keepdim=True)
    return F.log_softmax(logits.masked_fill(dropped, -torch.inf), dim=1).masked_fill(~keep, 0.0)


def _std(centred: Tensor) -> Tensor:
    """Unbiased standard deviation of rows of mean 0, (B, C) -> (B, 1); the root's gradient at 0 is taken as 0."""
    variance = centred.square().sum(dim=1, keepdim=True) / max(centred.shape[1] - 1, 1)
    positive = variance > 0
    return variance.where(positive, variance.new_ones(())).sqrt().where(positive, variance.new_zeros(()))
