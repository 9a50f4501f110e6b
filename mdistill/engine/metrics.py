"""Training metrics of an epoch, summed on the device and read once. Letters: T terms of the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdistill import distributed
from mdistill.distillers.base import StepOutput
from mdistill.errors import RunFailed, UserError, shown
from mdistill.models.weights import tensor_misfit


@dataclass(frozen=True)
class EpochMetrics:
    """Means over the images of an epoch."""

    loss: float  # sum of the terms
    terms: dict[str, float]  # each weighted term by name
    top1: float  # percent, in training mode, on the images as augmented
    images: int


class RunningMetrics:
    """Running sums of one epoch; ``update`` neither syncs nor depends on values, and writes in place.

    One float64 vector holds, for each term, its sum over images and in how many steps that sum was finite, then the
    correct predictions and the images. A sum that is once not finite stays so, which tells the first such step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.totals = torch.zeros(
            2, dtype=torch.float64, device=device
        )  # (2 T + 2,): sums, finite steps, correct, images

    def update(self, output: StepOutput) -> None:
        """Add one step: its terms, logits and labels; a mixed image counts as of the class with the largest share.

        Raises:
            UserError: the terms have other names than those of the steps before.
        """
        terms, target = output.terms, output.target
        if not self.names:
            self.names = list(terms)
            self.totals = self.totals.new_zeros(2 * len(terms) + 2)
        elif terms.keys() != set(self.names):
            raise UserError(
                f"the loss terms of this step are {', '.join(terms)}; they were {', '.join(self.names)}: a method"
                " returns the same terms in every step"
            )
        count = len(self.names)
        values = torch.stack([terms[name].detach() for name in self.names]).double() * len(target)
        finite = (self.totals[:count] + values).isfinite()
        classes = target if target.ndim == 1 else target.argmax(dim=1)
        correct = (output.logits.detach().argmax(dim=1) == classes).sum()
        images = torch.full_like(correct, len(target))
        self.totals.add_(torch.cat([values, finite.double(), torch.stack([correct, images]).double()]))

    def reset(self) -> None:
        """Start an epoch in the same memory, which a captured step writes to."""
        self.totals.zero_()

    def read(self, epoch: int) -> EpochMetrics:
        """Transfer the sums to the host, over all processes, and average them.

        Raises:
            RunFailed: a term was NaN or infinite; names the first such term and its step.
        """
        count = len(self.names)
        totals = self._over_ranks().tolist()
        sums, finite, (correct, images) = totals[:count], totals[count : 2 * count], totals[2 * count :]
        means = {name: value / max(images, 1) for name, value in zip(self.names, sums, strict=True)}
        loss = sum(means.values())
        bad = min(zip(finite, self.names, sums, strict=True), key=lambda term: term[0], default=None)
        if bad is not None and bad[2] - bad[2] != 0:
            raise RunFailed(f"loss term {bad[1]!r} is not finite from step {int(bad[0]) + 1} of epoch {epoch} on")
        return EpochMetrics(loss=loss, terms=means, top1=100.0 * correct / max(images, 1), images=int(images))

    def state_dict(self) -> dict[str, Any]:
        """The sums over all processes, to go on with in the middle of an epoch; every rank must ask."""
        return {"names": self.names, "totals": self._over_ranks()}

    def misfit(self, state: dict[str, Any], terms: Sequence[str]) -> str | None:
        """Why ``state``, from a file, cannot be loaded in a run with these ``terms``; None if it can."""
        if state["names"] and state["names"] != list(terms):
            return f"metrics.names are {shown(state['names'])}, not {list(terms)}"
        own = torch.zeros(2 * len(state["names"]) + 2, dtype=torch.float64)
        return tensor_misfit("metrics.totals", state["totals"], own)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.names = list(state["names"])
        self.totals = state["totals"].clone().to(self.device)
        if distributed.rank() > 0:  # rank 0 alone carries the sums on, and all carry on the numbers of finite steps
            count = len(self.names)
            self.totals[:count] = 0
            self.totals[2 * count :] = 0

    def _over_ranks(self) -> Tensor:
        """``totals`` of all processes; a step is finite where it is so on all."""
        count = len(self.names)
        totals, finite = self.totals.clone(), self.totals[count : 2 * count].clone()
        distributed.sum_(totals)
        totals[count : 2 * count] = distributed.least_(finite)
        return totals
