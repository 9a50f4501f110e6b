"""Mixed images: mixup, CutMix and CutMixPick. Letters: N samples of an epoch, B batch, C classes, S image size.

mixup: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412.
CutMix: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
arXiv:1905.04899.
CutMixPick: Wang, Lohit, Jones, Fu, "What Makes a 'Good' Data Augmentation in Knowledge Distillation", arXiv:2012.02909.

Who is mixed with whom, and how, is drawn on the host from (seed, epoch) like order and views, so a mixed image too is a
pure function of what a batch says of it. By default each image has a share (lam) and a box of its own and any sample of
the epoch as its partner, each of them once; the published codes draw one share and box for a batch and take partners
from it, which ``Mixing.share`` and ``Mixing.partner`` give.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from mdistill.data.batch import Batch, Pick
from mdistill.data.sampling import EpochPlan, random_words

Columns = npt.NDArray[np.int64]
DRAWS = 7  # words for each image and candidate: partner, its view, two for lam, place of the box (2), whether


@dataclass(frozen=True)
class Mixing:
    """How images are mixed.

    In mode "replace" mixed images take the place of the plain ones and have soft labels; in mode "beside" a batch holds
    both, and the mixed ones have no label of their own.

    Differs from the papers: by default lam, box and partner are drawn image by image, see above.
    """

    name: Literal["mixup", "cutmix", "cutmix_pick"]
    alpha: float  # of Beta(alpha, alpha), which lam is drawn from; 1 is uniform
    probability: float = 1.0  # that an image is mixed at all
    candidates: int = 1  # mixed images for each that is trained on: those that ``pick`` is least certain of
    pick: Pick = "teacher"
    mode: Literal["replace", "beside"] = "replace"
    share: Literal["image", "batch"] = "image"  # what has lam and a box of its own
    partner: Literal["epoch", "batch", "next"] = "epoch"  # any sample, one of the batch but itself, the next one there
    larger_share: bool = False  # max(lam, 1 - lam) in the place of lam

    @property
    def num_columns(self) -> int:
        """How many numbers ``plan`` gives for each image."""
        return self.candidates * len(COLUMNS)


COLUMNS = ("partner", "view", "lam", "top", "bottom", "left", "right")
"""What is planned for each candidate: partner and its view, lam's bits, the box (pixel rows top to bottom - 1)."""


def plan(
    mixing: Mixing,
    seed: int,
    epoch: int,
    order: EpochPlan,
    *,
    num_views: int | None,
    image_size: int,
    batch_size: int,
) -> Columns:
    """The mixing of an epoch, for its images in order: (candidates * 7, N) int64, the ``COLUMNS`` of each candidate."""
    samples = len(order.index)
    words = random_words(seed, "mixing", epoch, mixing.candidates * DRAWS * samples)
    drawn = words.reshape(mixing.candidates, DRAWS, samples)
    first = np.arange(samples) // batch_size * batch_size  # of each position, where its batch begins
    planned = []
    for each in drawn:
        partner, view = _partners(mixing, each, order, num_views, first)
        shared = each if mixing.share == "image" else each[:, first]
        planned.append(np.concatenate([[partner, view], _shares(mixing, shared, image_size)]))
    return np.concatenate(planned)


def _partners(
    mixing: Mixing, words: npt.NDArray[np.uint64], order: EpochPlan, num_views: int | None, first: Columns
) -> tuple[Columns, Columns]:
    """Who each image is mixed with, and in which view: (N,), (N,).

    Within a batch partners form a cycle, so that none is its own, but where a batch has a single image.

    Differs from the released code of CutMixPick: a random cycle in the place of any permutation without a fixed point.
    """
    if mixing.partner == "epoch":
        view = words[1] % np.uint64(num_views) if num_views is not None else words[1] >> np.uint64(1)
        return np.argsort(words[0], kind="stable"), view.astype(np.int64)
    places = np.arange(len(first))
    cycle = places if mixing.partner == "next" else np.lexsort((words[0], first))  # batch by batch
    last = np.append(first[1:] != first[:-1], True)
    partner = np.empty_like(places)
    partner[cycle] = cycle[np.where(last, first, places + 1)]
    return order.index[partner], order.view[partner]


def _shares(mixing: Mixing, words: npt.NDArray[np.uint64], size: int) -> Columns:
    """lam's bits and the box, the last five of ``COLUMNS``: (5, N)."""
    lam = symmetric_beta(mixing.alpha, uniform(words[2]), uniform(words[3]))  # (N,)
    lam = np.maximum(lam, 1 - lam) if mixing.larger_share else lam
    mixed = uniform(words[6]) < mixing.probability
    if mixing.name == "mixup":
        lam = np.where(mixed, lam, 1.0)
        box = np.zeros((4, len(lam)), dtype=np.int64)
    else:
        side = np.where(mixed, (size * np.sqrt(1 - lam)).astype(np.int64), 0)
        middle = (words[4:6] % np.uint64(size)).astype(np.int64)  # (2, N)
        low, high = np.clip(middle - side // 2, 0, size), np.clip(middle + side // 2, 0, size)
        lam = 1 - (high - low).prod(axis=0) / size**2
        box = np.stack([low[0], high[0], low[1], high[1]])
    return np.concatenate([lam.view(np.int64)[None], box])


def uniform(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """64-bit words as numbers strictly between 0 and 1."""
    return np.asarray(((words >> np.uint64(12)) + 0.5) / 2.0**52)


def symmetric_beta(
    alpha: float, first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Beta(alpha, alpha) from two uniform numbers each: (N,), (N,) -> (N,).

    Bailey, "Polar Generation of Random Variates with the t-Distribution", 1994: with r = U^(-1/alpha) - 1 and
    c = cos(2 pi V), sqrt(2 alpha r) c has Student's t distribution with 2 alpha degrees of freedom; and
    1/2 + t / (2 sqrt(2 alpha + t^2)) is then Beta(alpha, alpha).
    """
    with np.errstate(over="ignore"):
        radius = np.minimum(np.expm1(-np.log(first) / alpha), 1e300)  # where alpha is small it overflows
    cosine = np.cos(2 * np.pi * second)
    return np.asarray(0.5 + 0.5 * cosine / np.sqrt(cosine**2 + 1 / radius))


def labels(target: Tensor, partner_target: Tensor, lam: Tensor, num_classes: int) -> Tensor:
    """lam of the one class and the rest of the other: (B,), (B,) int64, (B,) float32 -> (B, C) float32."""
    classes = torch.arange(num_classes, device=target.device)
    own, other = (target[:, None] == classes), (partner_target[:, None] == classes)
    return own * lam[:, None] + other * (1 - lam)[:, None]


def mix(mixing: Mixing, batch: Batch, partner: Batch, columns: Tensor, num_classes: int) -> Batch:
    """``batch`` mixed with ``partner``, image by image; beside plain images with the classes of ``batch``.

    Shapes: columns (7, B) int64, the ``COLUMNS`` of one candidate; the images (B, 3, S, S).
    """
    lam = columns[2].view(torch.float64).float()
    if mixing.name == "mixup":
        weight = lam[:, None, None, None]
        image = weight * batch.image + (1 - weight) * partner.image
    else:
        image = torch.where(inside(columns[3:], batch.image.shape[-1]), partner.image, batch.image)
    beside = mixing.mode == "beside"
    target = batch.target if beside else labels(batch.target, partner.target, lam, num_classes)
    return Batch(image, target, batch.index, batch.view, partner=partner.index, lam=lam)


def inside(box: Tensor, size: int) -> Tensor:
    """Which pixels lie in each image's box: (4, B) int64, top, bottom, left, right -> (B, 1, S, S) bool."""
    at = torch.arange(size, device=box.device)
    rows = (at >= box[0][:, None]) & (at < box[1][:, None])  # (B, S)
    columns = (at >= box[2][:, None]) & (at < box[3][:, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def concatenate(candidates: list[Batch], keep: int, pick: Pick) -> Batch:
    """Several batches as one, of which the ``keep`` images that ``pick`` is least certain of are trained on."""

    def joined(field: str) -> Tensor:
        return torch.cat([getattr(each, field) for each in candidates])

    names = ("image", "target", "index", "view", "partner", "lam")
    columns: dict[str, Any] = {name: joined(name) for name in names}
    return Batch(**columns, keep=keep, pick=pick)


def least_certain(logits: Tensor, keep: int) -> Tensor:
    """The ``keep`` rows of ``logits`` (B, C) whose probabilities have the highest entropy, in their order: (keep,)."""
    log_probs = F.log_softmax(logits, dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    return entropy.topk(keep).indices.sort().values
