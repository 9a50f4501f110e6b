"""MCLD: Wang, Zhou, "Multi-perspective Contrastive Logit Distillation", arXiv:2411.10693v1.

The teacher's logits are keys and the student's are queries of three contrastive questions. Both are normalised over
the classes and compared by dot product at a temperature, as in momentum contrast (He et al., arXiv:1911.05722), whose
settings the paper takes over.

Letters: B batch, C classes, K positions of the queue.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import masked_log_softmax
from mdistill.errors import UserError
from mdistill.registry import Positive, PositiveInt

Mean = Literal["positives", "batch"]
Denominator = Literal["others", "negatives"]
QueueStart = Literal["empty", "random"]


def normalize(logits: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """z / sqrt(|z|^2 + epsilon), which has a gradient at z = 0 too: (B, C) -> (B, C)."""
    return logits * (logits.square().sum(dim=1, keepdim=True) + epsilon).rsqrt()


def similarity(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, epsilon: float = 1e-6) -> Tensor:
    """S_ij = q_i . k_j / tau, of all pairs: arXiv:2411.10693v1, Eq. (5).

    Args:
        student_logits: (B, C), whose normalised rows are q.
        teacher_logits: (B, C), whose normalised rows are k.
        temperature: tau.
        epsilon: of ``normalize``.

    Returns:
        (B, B), student row i against teacher row j.
    """
    queries, keys = (normalize(logits, epsilon=epsilon) for logits in (student_logits, teacher_logits))
    return queries @ keys.T / temperature


def instance_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    index: Tensor,
    queue: Tensor,
    queue_index: Tensor,
    queue_filled: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Instance-wise term: which of K + 1 teacher rows is mine? arXiv:2411.10693v1, Eqs. (2) to (4).

    Cross-entropy with the positive q_i . k_i / tau in front and the negatives q_i . queue / tau behind it. Positions of
    the queue that are not yet filled, or hold an older copy of sample i itself (the paper's dictionary excludes it),
    are -inf.

    Differs from the paper: our interpretation of v1, not checked against its authors' code. That rows are L2-normalised
    follows momentum contrast, whose settings the paper takes over.

    Args:
        student_logits: (B, C), whose normalised rows are q.
        teacher_logits: (B, C), whose normalised rows are k.
        index: (B,) int64, which sample each row belongs to.
        queue: (K, C), the queue's keys, normalised already.
        queue_index: (K,) int64, which sample each key belongs to.
        queue_filled: (), how many positions, from the first, count.
        temperature: tau.

    Returns:
        (), the mean over B.
    """
    queries, keys = normalize(student_logits), normalize(teacher_logits)
    positive = (queries * keys).sum(dim=1, keepdim=True) / temperature  # (B, 1)
    unfilled = torch.arange(len(queue), device=queue.device) >= queue_filled  # (K,)
    excluded = (queue_index == index[:, None]) | unfilled  # (B, K)
    negatives = (queries / temperature) @ queue.to(queries.dtype).T  # (B, K)
    scores = torch.cat([positive, negatives.masked_fill_(excluded, -torch.inf)], dim=1)  # (B, 1 + K)
    return F.cross_entropy(scores, torch.zeros_like(index))


def sample_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Sample-wise term: which teacher row of the batch is mine? arXiv:2411.10693v1, Eqs. (5) and (6).

    Cross-entropy of S_ij = q_i . k_j / tau with label i.

    Differs from the paper: the similarity is the normalised one of Eqs. (2) to (4), as interpreted there.

    Args:
        student_logits: (B, C), whose normalised rows are q; B is the paper's b.
        teacher_logits: (B, C), whose normalised rows are k.
        temperature: tau.

    Returns:
        (), the mean over B.
    """
    sim_BB = similarity(student_logits, teacher_logits, temperature=temperature)
    return F.cross_entropy(sim_BB, torch.arange(len(sim_BB), device=sim_BB.device))


def category_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float,
    mean: Mean = "positives",
    denominator: Denominator = "others",
) -> Tensor:
    """Category-wise term: which other rows of the batch are of my class? arXiv:2411.10693v1, Eqs. (7) and (8).

    The supervised contrastive loss on S without its diagonal: for each i that has other samples of its class, minus the
    mean over those j of log(exp S_ij / sum over a of exp S_ia), where a runs over every other row, or over j and the
    rows of other classes; 0 for an i that has none.

    Differs from the paper: our interpretation of v1, whose formulas name a positive, the negatives and how many there
    are of each, not checked against its authors' code. By default as in Khosla et al., arXiv:2004.11362, Eq. (2):
    positives and negatives alike in the denominator, averaged over the samples that have a positive. ``mean`` and
    ``denominator`` choose otherwise.

    Args:
        student_logits: (B, C), whose normalised rows are q.
        teacher_logits: (B, C), whose normalised rows are k.
        target: (B,) int64, the true class.
        temperature: tau.
        mean: over the samples that have a positive, or over the whole batch.
        denominator: every other row, or the positive itself and the rows of other classes.

    Returns:
        ().
    """
    sim_BB = similarity(student_logits, teacher_logits, temperature=temperature)
    others_BB = ~torch.eye(len(target), dtype=torch.bool, device=target.device)
    same_BB = target == target[:, None]
    positives_BB = same_BB & others_BB
    if denominator == "others":
        log_probs_BB = masked_log_softmax(sim_BB, others_BB)
    else:  # a row without negatives keeps a finite number, which exp takes to 0
        negatives = sim_BB.masked_fill(same_BB, torch.finfo(sim_BB.dtype).min).logsumexp(dim=1, keepdim=True)
        log_probs_BB = sim_BB - torch.logaddexp(sim_BB, negatives)
    count = positives_BB.sum(dim=1)  # (B,), how many
    per_sample = log_probs_BB.where(positives_BB, 0.0).sum(dim=1) / count.clamp(min=1)
    return -per_sample.mean() if mean == "batch" else -per_sample.sum() / (count > 0).sum().clamp(min=1)


def mcld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    index: Tensor,
    queue: Tensor,
    queue_index: Tensor,
    queue_filled: Tensor,
    *,
    temperature: float,
    mean: Mean = "positives",
    denominator: Denominator = "others",
) -> Tensor:
    """Instance-wise + sample-wise + category-wise, each with weight 1: arXiv:2411.10693v1, Eq. (9).

    Differs from the paper: nothing beyond what the three terms say; without cross-entropy.

    Args:
        student_logits: (B, C), whose normalised rows are q.
        teacher_logits: (B, C), whose normalised rows are k.
        target: (B,) int64, the true class.
        index: (B,) int64, which sample each row belongs to.
        queue: (K, C), the queue's keys, normalised already.
        queue_index: (K,) int64, which sample each key belongs to.
        queue_filled: (), how many positions, from the first, count.
        temperature: tau of all three.
        mean: of ``category_loss``.
        denominator: of ``category_loss``.

    Returns:
        ().
    """
    instance = instance_loss(
        student_logits, teacher_logits, index, queue, queue_index, queue_filled, temperature=temperature
    )
    category = category_loss(
        student_logits, teacher_logits, target, temperature=temperature, mean=mean, denominator=denominator
    )
    return instance + sample_loss(student_logits, teacher_logits, temperature=temperature) + category


class Queue(nn.Module):
    """The K most recent normalised teacher rows, first in, first out: a ring that is written in place.

    Args:
        size: K.
        num_classes: C.
        start: with no key, or full of random directions, which belong to no sample and go as batches come.
    """

    keys: Tensor
    index: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, num_classes: int, start: QueueStart = "empty") -> None:
        super().__init__()
        full = start == "random"
        keys = normalize(torch.randn(size, num_classes)) if full else torch.zeros(size, num_classes)
        self.register_buffer("keys", keys)  # (K, C)
        self.register_buffer("index", torch.full((size,), -1))  # (K,) int64, of which sample; -1: of none
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # the position to write next
        filled = torch.full((), size if full else 0, dtype=torch.int64)
        self.register_buffer("filled", filled)  # how many positions hold a key

    def push(self, keys: Tensor, index: Tensor) -> None:
        """Write ``keys`` (B, C) and their samples ``index`` (B,) over the oldest positions; B is at most K."""
        size = len(self.keys)
        positions = (self.pointer + torch.arange(len(index), device=index.device)) % size
        self.keys.index_copy_(0, positions, keys.to(self.keys.dtype))
        self.index.index_copy_(0, positions, index)
        self.pointer.add_(len(index)).remainder_(size)
        self.filled.add_(len(index)).clamp_(max=size)


@DISTILLERS.register("mcld")
class MCLD(Distiller):
    """``ce_weight`` CE + the instance-wise, sample-wise and category-wise terms, each with weight 1.

    Without cross-entropy the scale of the student's logits is free: its test loss and calibration mean nothing.

    Differs from the paper: it leaves three things open, and each is a setting: over which samples the category-wise
    term is averaged, what stands in its denominator, and what the queue holds before it is full.

    Args:
        temperature: tau of the three similarities.
        queue_size: K, positions of the queue, at least the batch size; None for the number of training samples.
        queue_start: ``"empty"``: positions count once they are filled; ``"random"``: random directions, as in momentum
            contrast, until then.
        category_mean: ``mean`` of ``category_loss``: the samples that have a positive, or the whole batch.
        category_denominator: ``denominator`` of ``category_loss``: every other row, or a positive and the negatives.
        instance: False switches the instance-wise term, and its queue, off.
        sample: False switches the sample-wise term off.
        category: False switches the category-wise term off.
    """

    needs = Needs(teacher="logits")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        temperature: Positive,
        queue_size: PositiveInt | None,
        queue_start: QueueStart,
        category_mean: Mean,
        category_denominator: Denominator,
        instance: bool,
        sample: bool,
        category: bool,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.require_a_term(instance=instance, sample=sample, category=category)
        self.temperature, self.sample, self.category = temperature, sample, category
        self.mean, self.denominator = category_mean, category_denominator
        self.queue = Queue(_checked_size(queue_size, data), data.num_classes, queue_start) if instance else None

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """``instance``, ``sample`` and ``category``, whichever is on."""
        signals = self.whole_batch(signals)
        logits, tau = (signals.student_logits, signals.teacher_logits), self.temperature
        terms = {}
        if self.queue is not None:
            queue = self.queue.keys, self.queue.index, self.queue.filled
            terms["instance"] = instance_loss(*logits, signals.index, *queue, temperature=tau)
        if self.sample:
            terms["sample"] = sample_loss(*logits, temperature=tau)
        if self.category:
            terms["category"] = category_loss(
                *logits, signals.target, temperature=tau, mean=self.mean, denominator=self.denominator
            )
        return terms

    def after_step(self, signals: Signals) -> None:
        """The batch, of all processes, joins the queue."""
        if self.queue is not None:
            self.queue.push(normalize(self.gather(signals.teacher_logits)), self.gather(signals.index))


def _checked_size(queue_size: int | None, data: DataInfo) -> int:
    size = data.num_samples if queue_size is None else queue_size
    if size < data.batch_size:
        origin = " (null: the number of training samples)" if queue_size is None else ""
        raise UserError(
            f"distiller.queue_size: {size}{origin} is smaller than the batch size {data.batch_size};"
            f" give at least {data.batch_size}"
        )
    return size
