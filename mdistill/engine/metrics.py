"""Training metrics of an epoch, summed on the device and read once. Letters: B batch, C classes."""

from dataclasses import dataclass
from typing import Any

import torch

from mdistill.distillers.base import StepOutput
from mdistill.errors import RunFailed


class NonFiniteLoss(RunFailed):
    """A loss term became NaN or infinite."""


@dataclass(frozen=True)
class EpochMetrics:
    """Means over the images of an epoch."""

    loss: float  # sum of the terms
    terms: dict[str, float]  # each weighted term by name
    top1: float  # percent, in training mode, on the images as augmented
    images: int


class EpochSums:
    """Running sums of one epoch; ``update`` neither syncs nor depends on values, and writes in place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # steps, images, correct
        self.terms = torch.zeros(0, dtype=torch.float64, device=device)
        self.first_bad = torch.zeros(0, dtype=torch.int64, device=device)  # step of the first non-finite value, or 0

    def update(self, output: StepOutput) -> None:
        """Add one step: its terms, logits and labels; a mixed image counts as of the class with the largest share."""
        terms, target = output.terms, output.target
        if not self.names:
            self.names = list(terms)
            self.terms = self.terms.new_zeros(len(terms))
            self.first_bad = self.first_bad.new_zeros(len(terms))
        size = len(target)
        values = torch.stack([terms[name].detach() for name in self.names]).double()
        classes = target if target.ndim == 1 else target.argmax(dim=1)
        correct = (output.logits.detach().argmax(dim=1) == classes).sum()
        self.terms += size * values
        self.counts += torch.stack([correct.new_ones(()), torch.full_like(correct, size), correct])
        fresh = ~values.isfinite() & (self.first_bad == 0)
        self.first_bad.copy_(torch.where(fresh, self.counts[0], self.first_bad))

    def reset(self) -> None:
        """Start an epoch in the same memory, which a captured step writes to."""
        for tensor in (self.counts, self.terms, self.first_bad):
            tensor.zero_()

    def read(self, epoch: int) -> EpochMetrics:
        """Transfer the sums to the host and average them.

        Raises:
            NonFiniteLoss: a term was NaN or infinite; names the first such term and its step.
        """
        _steps, images, correct = self.counts.tolist()
        sums, first_bad = self.terms.tolist(), self.first_bad.tolist()
        bad = sorted((step, name) for step, name in zip(first_bad, self.names, strict=True) if step)
        if bad:
            step, name = bad[0]
            raise NonFiniteLoss(f"loss term {name!r} is not finite from step {step} of epoch {epoch} on")
        means = {name: value / max(images, 1) for name, value in zip(self.names, sums, strict=True)}
        return EpochMetrics(loss=sum(means.values()), terms=means, top1=100.0 * correct / max(images, 1), images=images)

    def state_dict(self) -> dict[str, Any]:
        """The sums, to go on with in the middle of an epoch."""
        return {"names": self.names, "counts": self.counts, "terms": self.terms, "first_bad": self.first_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.names = list(state["names"])
        self.counts, self.terms, self.first_bad = (
            state[key].to(self.device) for key in ("counts", "terms", "first_bad")
        )
