"""Maths that two or more methods use. Letters: B batch, C classes."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

GAMMA = 0x9E3779B97F4A7C15  # the odd step between the states of SplitMix64
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of its output function, between shifts by 30, 27 and 31


def standardize(logits: Tensor) -> Tensor:
    """Z-score over classes: (z - mean) / (1e-7 + std), std unbiased.

    Sun et al., "Logit Standardization in Knowledge Distillation", arXiv:2403.01427, Eq. (11), with the 1e-7 of the
    published code. Finite, with a finite gradient, for a constant row too.

    Args:
        logits: (B, C); a width of 0 passes through.

    Returns:
        (B, C).
    """
    if logits.shape[1] == 0:
        return logits
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (1e-7 + deviation(centred))


def deviation(centred: Tensor) -> Tensor:
    """Unbiased standard deviation of rows of mean 0, (B, C) -> (B, 1); the root's gradient at 0 is taken as 0."""
    variance = centred.square().sum(dim=1, keepdim=True) / max(centred.shape[1] - 1, 1)
    positive = variance > 0
    return variance.where(positive, variance.new_ones(())).sqrt().where(positive, variance.new_zeros(()))


def kl_divergence(teacher_log_probs: Tensor, student_log_probs: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """KL(teacher || student) summed over classes, averaged over the batch.

    Log-probabilities in, so that nothing underflows to log(0). A class whose two entries are 0 adds nothing.

    Args:
        teacher_log_probs: (B, C).
        student_log_probs: (B, C).
        weights: of each sample, (B,), which the mean does not divide by; None for 1.

    Returns:
        ().
    """
    if weights is not None:
        return (weights * kl_divergence_per_sample(teacher_log_probs, student_log_probs)).mean()
    return F.kl_div(student_log_probs, teacher_log_probs, log_target=True, reduction="batchmean")


def kl_divergence_per_sample(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """``kl_divergence`` of each sample: (B, C), (B, C) -> (B,)."""
    return F.kl_div(student_log_probs, teacher_log_probs, log_target=True, reduction="none").sum(dim=1)


def soft_target_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor, weights: Tensor | None = None
) -> Tensor:
    """-sum p^t log p^s, both softened by T: cross-entropy with soft targets, without the factor T^2 of KD.

    Args:
        student_logits: (B, C), of p^s.
        teacher_logits: (B, C), of p^t.
        temperature: T, a number or ().
        weights: of each sample, (B,), which the mean does not divide by; None for 1.

    Returns:
        (), the mean over B.
    """
    student, targets = student_logits / temperature, (teacher_logits / temperature).softmax(dim=1)
    if weights is not None:
        return (weights * F.cross_entropy(student, targets, reduction="none")).mean()
    return F.cross_entropy(student, targets)


def class_mask(classes: Tensor, num_classes: int) -> Tensor:
    """True at each row's class: (B,) int64 -> (B, C) bool. Unlike ``F.one_hot`` it never reads a value on the host."""
    return classes[:, None] == torch.arange(num_classes, device=classes.device)


def of_class(values: Tensor, classes: Tensor) -> Tensor:
    """Each row's value at its class, as ``values.gather(1, classes[:, None])`` gives it.

    For the backward pass of that, deterministic kernels of torch 2.9 copy from the host, which no capture allows.

    Args:
        values: (B, C).
        classes: (B,) int64.

    Returns:
        (B, 1).
    """
    rows = torch.arange(len(values), device=values.device)
    return values.flatten().index_select(0, rows * values.shape[1] + classes)[:, None]


def class_probs(target: Tensor, like: Tensor) -> Tensor:
    """Labels as class probabilities, in the shape and type of the logits ``like``: (B,) int64 or (B, C) -> (B, C)."""
    return (class_mask(target, like.shape[1]) if target.ndim == 1 else target).to(like.dtype)


def binary_log_probs(log_probs: Tensor, classes: Tensor) -> Tensor:
    """log {p_c, 1 - p_c} of each row's class c.

    The second is a log-sum over the other classes: 1 - p_c would round to 0 where the network is certain.

    Args:
        log_probs: (B, C), C at least 2.
        classes: (B,) int64, c.

    Returns:
        (B, 2).
    """
    this = of_class(log_probs, classes)  # (B, 1)
    others = log_probs.masked_fill(class_mask(classes, log_probs.shape[1]), -torch.inf)
    return torch.cat([this, others.logsumexp(dim=1, keepdim=True)], dim=1)


def masked_log_softmax(logits: Tensor, keep: Tensor) -> Tensor:
    """log-softmax over the classes that ``keep`` marks; 0 elsewhere.

    A row that keeps nothing is 0 with gradient 0: it is left whole inside the softmax, whose result is then discarded.

    Args:
        logits: (B, C).
        keep: (B, C) bool.

    Returns:
        (B, C).
    """
    dropped = ~keep & keep.any(dim=1, keepdim=True)
    return F.log_softmax(logits.masked_fill(dropped, -torch.inf), dim=1).masked_fill(~keep, 0.0)


def random_words(seed: int, epoch: Tensor, index: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """Words for draws within a step, each a pure function of (seed, stream, epoch, index, position).

    A counter-based hash in place of a generator: no state, no read on the host, the same bits on every device, however
    samples are batched, ordered or sharded. Every part of the key goes through the output function of SplitMix64
    (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), one after the other.

    Args:
        seed: of the run, ``signals.seed``.
        epoch: () integer, ``signals.epoch``.
        index: (B,) int64, which training sample, ``signals.index``.
        count: how many words for each sample.
        stream: tells the draws of one method apart: equal keys in other streams give other words.

    Returns:
        (B, count) int64, of either sign, on the device of ``index``; those of a sample all differ.
    """
    key = _mix_int(_mix_int(seed) + GAMMA * stream)
    word = _mix(_step(epoch.to(index.device, torch.int64)) + _signed(key))  # ()
    word = _mix(_step(index) + word)  # (B,)
    position = torch.arange(1, count + 1, device=index.device)
    return _mix(word[:, None] + _step(position))  # (B, count)


def uniform(seed: int, epoch: Tensor, index: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """Numbers for draws within a step: the 24 highest bits of ``random_words``, whose arguments they take.

    Returns:
        (B, count) float32 in [0, 1), on the device of ``index``.
    """
    return _shift(random_words(seed, epoch, index, count, stream=stream), 40).to(torch.float32) * 2.0**-24


def normal(seed: int, epoch: Tensor, index: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """``uniform``'s numbers as draws from the standard normal distribution, by its inverse.

    Args:
        seed: of the run, ``signals.seed``.
        epoch: () integer, ``signals.epoch``.
        index: (B,) int64, which training sample, ``signals.index``.
        count: how many numbers for each sample.
        stream: tells the draws of one method apart.

    Returns:
        (B, count) float32, at most 5.4 in size.
    """
    centred = 2 * uniform(seed, epoch, index, count, stream=stream) - (1 - 2.0**-24)  # odd multiples of 2^-24: exact
    return math.sqrt(2) * torch.erfinv(centred)


def dropout_factors(
    seed: int, epoch: Tensor, index: Tensor, width: int, *, probability: float, stream: int = 0
) -> Tensor:
    """What dropout multiplies activations by: 0 with ``probability``, else 1 / (1 - probability), drawn by ``uniform``.

    Args:
        seed: of the run, ``signals.seed``.
        epoch: () integer, ``signals.epoch``.
        index: (B,) int64, which training sample, ``signals.index``.
        width: D, how many activations each sample has.
        probability: below 1.
        stream: as of ``uniform``.

    Returns:
        (B, D) float32.
    """
    return (uniform(seed, epoch, index, width, stream=stream) >= probability) / (1 - probability)


def _step(counter: Tensor) -> Tensor:
    return counter * _signed(GAMMA)  # int64 products and sums wrap around, as the hash asks


def _mix(word: Tensor) -> Tensor:
    """The output function of SplitMix64 on int64 words."""
    word = (word ^ _shift(word, 30)) * _signed(MULTIPLIERS[0])
    word = (word ^ _shift(word, 27)) * _signed(MULTIPLIERS[1])
    return word ^ _shift(word, 31)


def _shift(word: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in, where int64's own shift copies the sign."""
    return torch.bitwise_and(word >> bits, 2 ** (64 - bits) - 1)


def _mix_int(word: int) -> int:
    """``_mix`` of a Python integer, modulo 2**64."""
    word %= 2**64
    word = (word ^ (word >> 30)) * MULTIPLIERS[0] % 2**64
    word = (word ^ (word >> 27)) * MULTIPLIERS[1] % 2**64
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit ``word``."""
    return word - 2**64 if word >= 2**63 else word
