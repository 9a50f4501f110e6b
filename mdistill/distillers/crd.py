"""CRD: Tian, Krishnan, Isola, "Contrastive Representation Distillation", arXiv:1910.10699.

Letters: B batch, D width of the embeddings, N training samples, K negatives, C classes.
"""

from math import log
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import random_words
from mdistill.distillers.maps import both_pooled, unit
from mdistill.errors import UserError
from mdistill.models import feature_shapes
from mdistill.registry import Fraction, Positive, PositiveInt

EPSILON = 1e-7  # of the published code, beside a probability

DRAWS = {"cpu": 2**18, "cuda": 2**25}
"""Words (8 bytes) that are drawn at a time: on a CPU those that stay in its cache."""

PRODUCTS = 2**25
"""Inner products (4 bytes) that are there at a time."""


def contrast_lists(
    seed: int, epoch: Tensor, index: Tensor, labels: Tensor, *, negatives: int, relaxed: bool = False
) -> Tensor:
    """For each sample its positive and then K samples of other classes, in no order.

    Each of the N samples gets a word by (seed, epoch, index); the K samples of other classes with the least words are
    the negatives. So every K of them are equally likely, drawn without replacement and anew for each visit, and which
    they are does not depend on the batch or the device. Static shapes, no read by the host.

    Differs from the paper: which negatives are drawn is not in it; in the published code, where a loader draws them by
    the same distribution.

    Args:
        seed: of the run.
        epoch: ().
        index: (B,) int64, the samples.
        labels: (N,) int64, the class of every sample.
        negatives: K; every class must have as many samples beside it.
        relaxed: whether the positive is any sample of the class, equally likely, and not the sample itself.

    Returns:
        (B, K + 1) int64.
    """
    at_once = DRAWS.get(index.device.type, DRAWS["cpu"])
    lists = []
    for some in index.chunk(-(-len(index) * len(labels) // at_once)):
        words = random_words(seed, epoch, some, len(labels))  # (b, N), of a sample all different
        own = labels == labels.index_select(0, some)[:, None]
        others = words.masked_fill(own, torch.iinfo(words.dtype).max)
        chosen = others.topk(negatives, dim=1, largest=False, sorted=False).indices
        positive = some
        if relaxed:
            positive = words.masked_fill(~own, torch.iinfo(words.dtype).min).argmax(dim=1)
        lists.append(torch.cat([positive[:, None], chosen], dim=1))
    return torch.cat(lists)


def similarities(anchors: Tensor, memory: Tensor, lists: Tensor) -> Tensor:
    """Inner products of each anchor with the rows of its list: (B, D), (N, D), (B, L) -> (B, L).

    Taken out of the products with all rows: much less work than to copy the listed rows, B L D numbers, where the lists
    hold more than about a hundredth of them.

    Args:
        anchors: (B, D).
        memory: (N, D), no gradient.
        lists: (B, L) int64.
    """
    taken, parts = [], -(-len(anchors) * len(memory) // PRODUCTS)
    for some, chosen in zip(anchors.chunk(parts), lists.chunk(parts), strict=True):
        products = some @ memory.T  # (b, N)
        start = torch.arange(len(chosen), device=chosen.device) * len(memory)
        # Flat, for kernels that are deterministic in the backward pass.
        taken.append(products.flatten().index_select(0, (start[:, None] + chosen).flatten()).view_as(chosen))
    return torch.cat(taken)


def log_mean_exp(values: Tensor) -> Tensor:
    """Logarithm of the mean of exp over the last dimension: (..., M) -> (...)."""
    return values.logsumexp(dim=-1) - log(values.shape[-1])


def crd_loss(positive: Tensor, negatives: Tensor, log_constant: Tensor, *, samples: int) -> Tensor:
    """-log h of the positive and -sum of log(1 - h) of the negatives; arXiv:1910.10699, Eqs. (18), (19).

    h = x / (x + K/N), where x = exp(score) / Z estimates the probability of a row. From logarithms, so that nothing
    overflows.

    Differs from the paper: 1e-7 beside K/N in both denominators. As in the published code.

    Args:
        positive: (B,), scores: similarities over tau.
        negatives: (B, K), the same.
        log_constant: (), log Z.
        samples: N.

    Returns:
        (), the mean over the batch.
    """
    count = negatives.shape[1]
    noise = count / samples
    log_scale = log_constant + log(noise + EPSILON)  # x / (K/N + 1e-7) = exp(score - log_scale)
    of_negatives = F.logsigmoid(log_scale - negatives).sum(dim=1) - count * log(1 + EPSILON / noise)
    return -(F.logsigmoid(positive - log_scale) + of_negatives).mean()


def renewed(rows: Tensor, new: Tensor, *, momentum: float) -> Tensor:
    """Rows of a memory after a visit, of length 1: (B, D), (B, D) -> (B, D).

    Args:
        rows: (B, D), as they were.
        new: (B, D), the embeddings of the visit.
        momentum: the share of the old ones.
    """
    return unit(momentum * rows + (1 - momentum) * new.to(rows.dtype), dim=1)


@DISTILLERS.register("crd")
class CRD(Distiller):
    """``ce_weight`` CE + ``crd_weight`` contrast of the embedded pooled features with memories of all samples.

    Each network's embedding is to tell the other one's of the same sample from those of K samples of other classes. The
    embeddings are linear, of length 1 and trained, the teacher's too, and left out at inference. The memories hold the
    embeddings of every training sample, each an average over its visits: 8 N D bytes on the device and in every
    checkpoint, 51 MB for CIFAR-100 and 1.3 GB for ImageNet. By estimate a step needs up to 1 GB more, for draws and
    products with all rows; on CIFAR-100 0.2 GB.

    The constants Z of both directions are those of the first batch, from then on fixed; they are state as well.

    Args:
        crd_weight: weight of the contrast, the sum of both directions.
        negatives: K.
        temperature: tau.
        momentum: the share of the old row in a memory's new one.
        width: D.
        mode: "exact": the positive is the sample itself. "relax": any sample of its class.
    """

    needs = Needs(teacher="pooled", features=("pooled",), labels="hard")
    labels: Tensor
    student_memory: Tensor
    teacher_memory: Tensor
    log_constants: Tensor
    fixed: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        crd_weight: Positive,
        negatives: PositiveInt,
        temperature: Positive,
        momentum: Fraction,
        width: PositiveInt,
        mode: Literal["exact", "relax"],
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        if data.labels is None:
            raise UserError(
                "distiller.name: 'crd' draws samples of other classes, and this data set does not say the classes of"
                " its training samples (labels)"
            )
        others = data.num_samples - int(data.labels.bincount().max())
        if negatives > others:
            raise UserError(
                f"distiller.negatives: {negatives} samples of other classes are more than the {others} that this data"
                " set has beside its largest class"
            )
        self.crd_weight, self.negatives, self.temperature = crd_weight, negatives, temperature
        self.momentum, self.relaxed = momentum, mode == "relax"
        self.student_embed, self.teacher_embed = (
            nn.Linear(feature_shapes(network, data.image_size).pooled[0], width) for network in (student, teacher)
        )
        self.register_buffer("labels", data.labels.clone(), persistent=False)
        for side in ("student", "teacher"):
            bound = (3 / width) ** 0.5
            self.register_buffer(f"{side}_memory", torch.empty(data.num_samples, width).uniform_(-bound, bound))
        self.register_buffer("log_constants", torch.zeros(2))  # of the student's and of the teacher's embeddings
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))  # whether these are known

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``crd``."""
        student, teacher = both_pooled(signals)
        embedded = unit(self.run_module(self.student_embed, student), dim=1)
        target = unit(self.run_module(self.teacher_embed, teacher), dim=1)
        lists = contrast_lists(
            *(signals.seed, signals.epoch, signals.index, self.labels),
            negatives=self.negatives,
            relaxed=self.relaxed,
        )
        pairs = (embedded, self.teacher_memory), (target, self.student_memory)
        scores = [similarities(anchors, memory, lists) / self.temperature for anchors, memory in pairs]
        samples = len(self.labels)
        first = torch.stack([self._first_constant(each.detach()) for each in scores])
        constants = torch.where(self.fixed, self.log_constants, first)
        signals.computed.update(student=embedded.detach(), teacher=target.detach(), log_constants=constants)
        terms = [
            crd_loss(each[:, 0], each[:, 1:], constant, samples=samples)
            for each, constant in zip(scores, constants, strict=True)
        ]
        return {"crd": self.crd_weight * (terms[0] + terms[1])}

    def after_step(self, signals: Signals) -> None:
        """The embeddings of the batch, of all processes, go into the memories; the constants stay as they are now."""
        index = self.gather(signals.index)
        for side, memory in (("student", self.student_memory), ("teacher", self.teacher_memory)):
            new = self.gather(signals.computed[side])
            memory.index_copy_(0, index, renewed(memory.index_select(0, index), new, momentum=self.momentum))
        self.log_constants.copy_(signals.computed["log_constants"])
        self.fixed.fill_(True)

    def _first_constant(self, scores: Tensor) -> Tensor:
        """log Z, where Z is N times the mean of exp(score) over the lists of all processes: (B, K + 1) -> ()."""
        return log_mean_exp(self.gather(log_mean_exp(scores))) + log(len(self.labels))
