"""Averages of a network's weights over the steps of its training."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

Statistics = Literal["averaged", "first"]


class AveragedNetwork(nn.Module):
    """A copy of a network that holds an average of its weights and buffers.

    After step n (from 1) the average moves to the network with weight max(1 - decay, 1 / n): the plain average of all
    steps so far while 1 / n is the larger, an exponential one with ``decay`` from then on, so that it never remembers
    how the network began. Without ``decay`` it stays the plain average, which Berezovskiy, Morozov, arXiv:2309.11446,
    train students with.

    Differs from the released code, vorobeevich/distillation-in-dg: by default BatchNorm's running statistics are
    averaged like weights, with no pass over the data at the end, and counters are copied. There all buffers stay those
    of the average's first step, which ``statistics`` "first" gives; but there BatchNorm is in eval mode, so that its
    statistics are those of every step, where a student in training mode outgrows them.

    Args:
        network: the network that is trained.
        decay: of the exponential average; None for the plain one.
        first_epoch: the average begins in this epoch (from 1); until then it is the network itself, up to rounding.
        statistics: what becomes of buffers, see above.
    """

    count: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        decay: float | None = None,
        first_epoch: int = 1,
        statistics: Statistics = "averaged",
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.statistics = statistics
        self.least = 0.0 if decay is None else 1 - decay
        self.first_epoch = first_epoch
        device = next(network.parameters()).device
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))  # steps in the average

    @torch.no_grad()
    def update(self, network: nn.Module, epoch: Tensor) -> None:
        """Add ``network`` as it is after a step of ``epoch`` (); in place, without a read by the host."""
        self.count.add_(epoch >= self.first_epoch)
        weight = (1.0 / self.count.clamp(min=1).double()).clamp(min=self.least)
        weight = torch.where(self.count > 0, weight, torch.ones_like(weight))
        ours, theirs = self.network.state_dict(), network.state_dict()
        if self.statistics == "first":
            for name in [name for name, _ in self.network.named_buffers(remove_duplicate=False) if name in ours]:
                kept = ours.pop(name)
                kept.copy_(torch.where(self.count <= 1, theirs[name], kept))
        names = [name for name, value in ours.items() if value.is_floating_point()]
        averages = [ours[name] for name in names]
        steps = torch._foreach_sub([theirs[name] for name in names], averages)
        torch._foreach_mul_(steps, weight.to(averages[0].dtype))
        torch._foreach_add_(averages, steps)
        for name in ours.keys() - set(names):
            ours[name].copy_(theirs[name])
