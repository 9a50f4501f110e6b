"""What the features of a frozen network are worth on other data: a linear classifier on them.

Letters: N images, B batch, D width of the features, C classes of the target.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mdistill.data import Dataset
from mdistill.data.sampling import random_words
from mdistill.engine.evaluate import BATCH, sums_of
from mdistill.errors import RunFailed, UserError
from mdistill.file_schemas import TransferSettings
from mdistill.models.base import Features, why_no_features
from mdistill.models.memory_format import to_layout
from mdistill.precision import Precision, computing

LAYER = "pooled"  # what features are: the input of the classifier, as ``Features`` has it


@dataclass(frozen=True)
class Transferred:
    """What came of it."""

    top1: float  # percent, on the target's test images, after the last epoch
    top5: float
    loss: float  # there: mean cross-entropy, nats
    train_top1: float  # on the features that it was trained on
    width: int  # D
    seconds: dict[str, float]  # of computing features, and of training on them


def transfer(
    network: nn.Module,
    dataset: Dataset,
    settings: TransferSettings,
    *,
    seed: int,
    name: str,
    precision: Precision,
    device: torch.device,
    batch_size: int | None = None,
) -> Transferred:
    """Train a linear classifier on the features of ``network``, of which nothing changes, and test it.

    Args:
        network: on ``device``, with ``forward_features``.
        dataset: the target, on ``device``.
        seed: of the order of the images.
        name: of the network, for messages.
        batch_size: images per forward pass; None for what suits the device.

    Raises:
        UserError: the network gives no features.
        RunFailed: features or the classifier's weights are not finite.
    """
    began = time.perf_counter()
    assert dataset.labels is not None
    size = batch_size or BATCH[device.type]
    index = np.arange(dataset.num_samples, dtype=np.int64)
    targets: list[Tensor] = []

    def tested() -> Iterator[Tensor]:
        for images, target in dataset.eval_batches("test", size):
            targets.append(target)
            yield images

    with tqdm(total=dataset.num_samples + dataset.size("test"), desc="features", unit="image", disable=None) as bar:
        features_of = partial(pooled_features, network, name=name, precision=precision, seen=bar.update)
        train = features_of(dataset.plain_batches(index, size), mirror=settings.mirror)
        test = features_of(tested())
    target = dataset.labels.to(device).repeat(2 if settings.mirror else 1)
    for features, what in ((train, "training"), (test, "test")):
        if not bool(features.isfinite().all()):
            raise RunFailed(f"{name}: its features of the {what} images are not finite")
    if settings.standardize:
        train, test = standardized(train, test)
    extracted = time.perf_counter()
    weight = train_classifier(train, target, dataset.num_classes, settings, seed=seed)
    if not bool(weight.isfinite().all()):
        raise RunFailed(
            f"{name}: the linear classifier's weights are not finite after {settings.epochs} epochs at a rate of"
            f" {settings.lr:g}: take a smaller lr, or standardize=true"
        )
    (top1, top5, loss), (train_top1, _, _) = (
        scores(weight, *each) for each in ((test, torch.cat(targets)), (train, target))
    )
    seconds = {"features": extracted - began, "classifier": time.perf_counter() - extracted}
    return Transferred(top1, top5, loss, train_top1, train.shape[1], seconds)


@torch.inference_mode()
def pooled_features(
    network: nn.Module,
    batches: Iterable[Tensor],
    *,
    name: str,
    precision: Precision,
    mirror: bool = False,
    seen: Callable[[int], object] = lambda images: None,
) -> Tensor:
    """The classifier's input for all images, in eval mode: (N, D) float32; the network's mode is restored.

    Args:
        batches: images (B, 3, H, W).
        name: of the network, for messages.
        mirror: after them the features of all their mirror images, (2N, D).
        seen: is told the number of images of each batch.

    Raises:
        UserError: the network gives no features.
    """
    if why := why_no_features(network):
        raise UserError(f"{name!r} gives no features before its classifier: {why}")
    was_training, found = network.training, tuple[list[Tensor], ...]([] for _ in range(2 if mirror else 1))
    network.eval()
    try:
        for images in batches:
            for flipped, parts in enumerate(found):
                turned = images.flip(3) if flipped else images
                with computing("fp32" if precision == "bf16" else precision, images.device):
                    features: Features = network.forward_features(to_layout(network, turned))  # type: ignore[operator]
                parts.append(features.pooled.float())
            seen(len(images))
    finally:
        network.train(was_training)
    return torch.cat([part for parts in found for part in parts])


def standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both (N, D), each feature less its mean over ``train`` and divided by its deviation there, if that is not 0."""
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    return (train - mean) / std, (test - mean) / std


@torch.inference_mode()
def train_classifier(
    features: Tensor, target: Tensor, classes: int, settings: TransferSettings, *, seed: int
) -> Tensor:
    """The weights of softmax regression after SGD on the mean cross-entropy of each batch, beginning with zeros.

    The gradient is written out: of one batch it is ``x^T (p - y) / B``, with p the predicted distributions and y the
    one-hot labels. Momentum, Nesterov's too, and weight decay, of the bias too, are those of ``torch.optim.SGD``.

    Args:
        features: (N, D) float32.
        target: (N,) int64.
        classes: C.
        seed: of the order of the images, which is drawn anew for every epoch; the last batch may be smaller.

    Returns:
        (D + 1, C) float32; the last row is the bias.
    """
    inputs = _with_one(features)
    weight = torch.zeros(inputs.shape[1], classes, device=features.device)
    velocity = torch.zeros_like(weight)
    for epoch in tqdm(range(settings.epochs), desc="linear classifier", unit="epoch", leave=False, disable=None):
        rate = settings.lr * settings.gamma ** sum(epoch >= milestone for milestone in settings.milestones)
        order = np.argsort(random_words(seed, "transfer", epoch, len(inputs)), kind="stable").astype(np.int64)
        rows = torch.from_numpy(order).to(features.device)
        batches = (torch.split(each, settings.batch_size) for each in (inputs[rows], target[rows, None]))
        for x, y in zip(*batches, strict=True):
            error = torch.softmax(x @ weight, dim=1)
            error.scatter_add_(1, y, error.new_full(y.shape, -1.0))
            gradient = torch.addmm(weight, x.T, error, beta=settings.weight_decay, alpha=1 / len(x))
            velocity.mul_(settings.momentum).add_(gradient)
            if settings.nesterov:
                weight.add_(gradient, alpha=-rate).add_(velocity, alpha=-rate * settings.momentum)
            else:
                weight.add_(velocity, alpha=-rate)
    return weight


@torch.inference_mode()
def scores(weight: Tensor, features: Tensor, target: Tensor) -> tuple[float, float, float]:
    """Top-1 and top-5 in percent, and mean cross-entropy, of a classifier's ``weight`` (D + 1, C)."""
    top1, top5, loss = sums_of(F.linear(_with_one(features), weight.T), target).tolist()
    count = len(target)
    return 100.0 * top1 / count, 100.0 * top5 / count, loss / count if math.isfinite(loss) else math.inf


def _with_one(features: Tensor) -> Tensor:
    """(N, D) to (N, D + 1), for the bias."""
    return F.pad(features, (0, 1), value=1.0)
