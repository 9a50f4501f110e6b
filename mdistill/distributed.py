"""Collectives of the processes that train one run together; in a single process they return their input.

The process group is torch.distributed's, set up by whoever calls ``fit``; no command does so yet. Letters: B batch, R
ranks.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, from 0; 0 when it is alone."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """How many processes train together; 1 when this one is alone."""
    return dist.get_world_size() if _grouped() else 1


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks in rank order: (B, ...) -> (R B, ...); B is the same on every rank.

    The gradient reaches this rank's own rows alone: where every rank computes the same loss of all rows, R times that
    loss has, averaged over the ranks, the gradient that one process would compute.
    """
    if not _grouped():
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank()] = rows
    return torch.cat(parts)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over the ranks, in one flat all-reduce; None stays None."""
    if _grouped():
        average_([parameter.grad for parameter in parameters if parameter.grad is not None])


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each floating-point tensor by its mean over the ranks, in place, by one flat all-reduce per dtype."""
    if not _grouped():
        return
    tensors = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        flat.div_(world_size())
        start = 0
        for tensor in group:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()


def barrier() -> None:
    """Wait until every rank is here."""
    if _grouped():
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on any rank; every rank must ask."""
    if not _grouped():
        return flag
    return bool(sum_(torch.tensor([float(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")).item())


def sum_(tensor: Tensor) -> Tensor:
    """``tensor`` with its sum over the ranks, in place."""
    if _grouped():
        dist.all_reduce(tensor)
    return tensor


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
