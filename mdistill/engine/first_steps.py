"""What a run records of its first steps, so that they can be replayed and compared: ``mdistill audit``.

Nothing here is part of a step, and the host reads nothing before the first epoch ends: behind each of the first steps a
copy of the running sums is launched, and behind the last of them a digest of the weights. Letters: N steps recorded, T
terms of the loss.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mdistill import distributed
from mdistill.engine.metrics import RunningMetrics
from mdistill.file_schemas import Progress
from mdistill.models.weights import tensor_misfit

STEPS = 8
"""Steps that a run records, fewer where its epoch is shorter; a CUDA graph replays all but the first of them."""

BLOCK = 2**22  # words that are hashed at a time


class FirstSteps:
    """The first steps of a run.

    Args:
        device: where it trains.
        steps: in an epoch.
    """

    def __init__(self, device: torch.device, steps: int) -> None:
        self.count = min(STEPS, steps)  # N
        self._totals: list[Tensor] = []  # (2 T + 2,) each: the running sums behind each step
        self._weights = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def note(self, done: int, metrics: RunningMetrics, distiller: nn.Module) -> None:
        """Behind a step of the first epoch: keep what belongs to the record.

        Args:
            done: steps of the epoch so far. A step whose predecessors are not here is left out, and so there is no
                record where an earlier version began the run.
        """
        if done > self.count or len(self._totals) != done - 1:
            return
        self._totals.append(metrics.totals.clone())
        if done == self.count:
            self._weights.copy_(digest(_trained(distiller)))

    def read(self, metrics: RunningMetrics) -> dict[str, Any] | None:
        """For the first line of the metrics; None where not all of it was seen. The host waits for the device.

        ``terms`` has the weighted terms of the loss in each step, means over its images, in full precision; ``weights``
        is the digest of what is trained after the last one, 16 hexadecimal digits. Every rank must ask.
        """
        if len(self._totals) < self.count:
            return None
        rows = distributed.sum_(torch.stack(self._totals)).tolist()  # (N, 2 T + 2)
        terms, before = {name: list[float]() for name in metrics.names}, [0.0] * len(rows[0])
        for row in rows:
            for column, values in enumerate(terms.values()):
                values.append((row[column] - before[column]) / max(row[-1] - before[-1], 1.0))
            before = row
        return {"terms": terms, "weights": f"{int(self._weights) % 2**64:016x}"}

    def state_dict(self) -> dict[str, Tensor] | None:
        """To go on with in the middle of the first epoch; None where there is nothing. Every rank must ask."""
        if not self._totals:
            return None
        return {"totals": distributed.sum_(torch.stack(self._totals)), "weights": self._weights}

    def misfit(self, state: dict[str, Any], progress: Progress, terms: int) -> str | None:
        """Why ``state``, from a file, cannot be loaded at this place of a run with so many terms; None if it can."""
        if progress.epoch != 1:
            return f"first_steps are there in epoch {progress.epoch}"
        own = torch.zeros(min(progress.step, self.count), 2 * terms + 2, dtype=torch.float64)
        weights = torch.zeros((), dtype=torch.int64)
        return tensor_misfit("first_steps.totals", state["totals"], own) or tensor_misfit(
            "first_steps.weights", state["weights"], weights
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; rank 0 alone carries the sums on, as those of the metrics."""
        share = 1 if distributed.rank() == 0 else 0
        device = self._weights.device
        self._totals = [(row * share).to(device) for row in state["totals"]]
        self._weights.copy_(state["weights"])


def _trained(distiller: nn.Module) -> list[Tensor]:
    """The student's weights and statistics, and whatever else is trained, in a fixed order."""
    parameters = {name for name, _ in distiller.named_parameters() if not name.startswith("teacher.")}
    state = distiller.state_dict()
    return [value for name, value in state.items() if name in parameters or name.startswith("student.")]


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """64 bits that depend on every bit of ``tensors`` and on where it is: () int64 on their device.

    The sum, modulo 2^64, of the words of all tensors times an odd number for each place: no single changed word leaves
    it as it was. Made of whole numbers, it is the same on every device and in every order of summing; and unlike
    SHA-256 the device can compute it by itself.
    """
    words = torch.cat([_words(tensor) for tensor in tensors])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), BLOCK):
        block = words[start : start + BLOCK]
        places = torch.arange(start + 1, start + 1 + len(block), device=words.device)
        total += (block.long() * (_mixed(places) | 1)).sum()
    return total


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor in the order of its elements, whatever its memory format: (n,) int32."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.element_size() % 4 == 0:
        return flat.view(torch.int32)
    return flat.view(torch.uint8).int()


def _mixed(values: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), with shifts that keep the sign."""
    values = values * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number, as the two below
    values = (values ^ (values >> 30)) * -4658895280553007687
    values = (values ^ (values >> 27)) * -7723592293110705685
    return values ^ (values >> 31)
