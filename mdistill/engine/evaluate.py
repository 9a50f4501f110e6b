"""Top-1, top-5 and cross-entropy of a network on a split. Letters: B batch, C classes."""

import time
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F

from mdistill.data import Dataset
from mdistill.precision import Precision, computing

BATCH = {"cpu": 100, "cuda": 2000}
"""Images a forward pass where nothing else is asked for: a CPU is fastest while activations stay in its caches."""


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


@torch.no_grad()
def evaluate(
    network: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    batch_size: int | None = None,
    precision: Precision | None = None,
) -> Evaluation:
    """Run ``network`` in eval mode over the whole ``split``; its mode is restored. One host sync, at the end.

    ``batch_size`` images a forward pass; None for what suits the network's device (``BATCH``).

    Ties count against the network: a class is in the top k when fewer than k others score at least as much.
    """
    was_training = network.training
    network.eval()
    started = time.perf_counter()
    totals: torch.Tensor | None = None
    device = next((parameter.device.type for parameter in network.parameters()), "cpu")
    for image, target in dataset.eval_batches(split, batch_size or BATCH[device]):
        with computing(precision, image.device):
            logits = network(image)
        logits = logits.float()
        true = logits.gather(1, target.unsqueeze(1))
        rank = (~(logits < true)).sum(dim=1)  # 1 when the true class is alone at the top; NaN never is
        loss = F.cross_entropy(logits, target, reduction="sum")
        sums = torch.stack([(rank <= 1).sum().double(), (rank <= 5).sum().double(), loss.double()])
        totals = sums if totals is None else totals + sums
    network.train(was_training)
    images = dataset.size(split)
    top1, top5, loss_sum = (totals if totals is not None else torch.zeros(3)).tolist()
    seconds = time.perf_counter() - started
    return Evaluation(
        top1=100.0 * top1 / images,
        top5=100.0 * top5 / images,
        loss=loss_sum / images,
        images=images,
        images_per_second=images / seconds,
    )
