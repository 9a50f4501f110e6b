"""Top-1, top-5 and cross-entropy of a network on a split. Letters: B batch, C classes."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill import distributed
from mdistill.data import Dataset
from mdistill.errors import RunFailed
from mdistill.models.memory_format import to_layout
from mdistill.precision import Precision, computing

BATCH = {"cpu": 100, "cuda": 2000}
"""Images per forward pass where nothing else is asked for: a CPU is fastest while activations stay in its caches."""


@dataclass(frozen=True)
class Evaluation:
    """Results on one split."""

    top1: float  # percent
    top5: float  # percent; with fewer than five classes, of top-C
    loss: float  # mean cross-entropy, nats
    images: int
    images_per_second: float

    def as_dict(self) -> dict[str, float]:
        """Plain dictionary, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LaunchedEvaluation:
    """An evaluation that the device may still be busy with."""

    sums: Tensor  # (3,) float64 on the device: images in the top 1, in the top 5, cross-entropy
    images: int
    started: float
    network: str  # of which class
    split: str

    def read(self) -> Evaluation:
        """Its results; the host waits for the device. Every rank must ask.

        Raises:
            RunFailed: a logit is not finite.
        """
        distributed.meet()
        top1, top5, loss = self.sums.tolist()
        if not math.isfinite(loss):
            raise RunFailed(
                f"the cross-entropy on {self.split} is {loss}: {self.network} has logits that are not finite"
            )
        return Evaluation(
            top1=100.0 * top1 / self.images,
            top5=100.0 * top5 / self.images,
            loss=loss / self.images,
            images=self.images,
            images_per_second=self.images / (time.perf_counter() - self.started),
        )


@torch.no_grad()
def launch_evaluation(
    network: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    batch_size: int | None = None,
    precision: Precision | None = None,
    observe: Callable[[Tensor, Tensor, Tensor], object] | None = None,
) -> LaunchedEvaluation:
    """Run ``network`` in eval mode over the whole ``split``; its mode is restored. The host does not wait.

    Processes that train together share the images; every rank must call this, with the same weights.

    Ties count against the network: a class is in the top k when fewer than k others score at least as much.

    Args:
        batch_size: images per forward pass; None for what suits the network's device (``BATCH``).
        precision: of the network; bf16 is evaluated in float32, since its eight bits make ties of close logits, which
            count against the network. None leaves it as the caller has it.
        observe: is given the images (B, 3, H, W), logits (B, C) and labels (B,) of each batch.

    Raises:
        ValueError: ``split`` is not among those of ``dataset`` that are evaluated.
    """
    if split not in dataset.splits:
        raise ValueError(f"the split {split!r} is not evaluated here, but {', '.join(dataset.splits)}")
    started = time.perf_counter()
    was_training = network.training
    network.eval()
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    rank, ranks = distributed.rank(), distributed.world_size()
    for image, target in dataset.eval_batches(split, batch_size or BATCH[device.type], first=rank, stride=ranks):
        with computing("fp32" if precision == "bf16" else precision, image.device):
            logits = network(to_layout(network, image))
        logits = logits.float()
        sums += sums_of(logits, target)
        if observe is not None:
            observe(image, logits, target)
    network.train(was_training)
    return LaunchedEvaluation(distributed.sum_(sums), dataset.size(split), started, type(network).__name__, split)


def sums_of(logits: Tensor, target: Tensor) -> Tensor:
    """(3,) float64: images in the top 1, in the top 5, and the sum of cross-entropies; ties count against the network.

    Args:
        logits: (B, C).
        target: (B,) int64.
    """
    place = true_place(logits, target)
    loss = F.cross_entropy(logits, target, reduction="sum")
    return torch.stack([(place <= 1).sum().double(), (place <= 5).sum().double(), loss.double()])


def true_place(logits: Tensor, target: Tensor) -> Tensor:
    """Place of the true class among the logits, (B,): 1 when it is alone at the top; NaN never is, a tie is behind.

    Args:
        logits: (B, C).
        target: (B,) int64.
    """
    true = logits.gather(1, target.unsqueeze(1))
    return (~(logits < true)).sum(dim=1)


def evaluate(
    network: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    batch_size: int | None = None,
    precision: Precision | None = None,
    observe: Callable[[Tensor, Tensor, Tensor], object] | None = None,
) -> Evaluation:
    """The results of ``launch_evaluation``; one host sync, at the end."""
    launched = launch_evaluation(network, dataset, split, batch_size=batch_size, precision=precision, observe=observe)
    return launched.read()
