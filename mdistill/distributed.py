"""Processes that train one run together, each on its part of every batch; in a single process all of this does nothing.

Every rank draws the same plan, and of a batch of G images rank r takes the r-th of R nearly equal parts, G_r images. A
loss of the whole batch is the sum over the ranks of G_r / G times what each computes:

- a mean over images, since the local mean times G_r / G sums to that of all;
- anything that is computed from the gathered rows of all ranks, since it is the same everywhere. ``gather`` hands the
  gradient to a rank's own rows alone, times G / G_r, so that the sum over the ranks is the whole gradient again.

So one rule serves all: ``sum_gradients`` adds up the gradients times the rank's share G_r / G, whatever a method does
in between, and the result is that of one process up to the order of sums. Letters: B images of this rank in a step.
"""

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.rendezvous import rendezvous

from mdistill.errors import RunFailed, UserError

Value = TypeVar("Value")

_store: Any = None  # a torch Store, the launcher's, where ``joined`` made the group


class PeerLost(RunFailed):
    """Another process of the run has ended."""


def rank() -> int:
    """This process's number, from 0; 0 when it is alone."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """How many processes train together; 1 when this one is alone."""
    return dist.get_world_size() if _grouped() else 1


def split(count: int, ranks: int) -> tuple[int, ...]:
    """How many of ``count`` images each of ``ranks`` takes: nearly equal parts in rank order, the larger ones first."""
    return tuple(count // ranks + (number < count % ranks) for number in range(ranks))


# --- within a step: no host sync ---


def gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks in rank order: (B, ...) -> (G, ...).

    The gradient reaches this rank's own rows alone, times G / B; see above.

    Args:
        rows: (B, ...).
        counts: (R,), the B of each rank; empty in a single process.
    """
    if not counts:
        return rows
    if len(rows) != counts[rank()]:
        raise ValueError(f"gather: found {len(rows)} rows, this process has {counts[rank()]} images in the step")
    gathered: Tensor = _Gather.apply(rows, tuple(counts))
    return gathered


class _Gather(torch.autograd.Function):
    """All-gather of parts that may differ in length by one: the shorter ones are padded on their way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        own, most = rank(), max(counts)
        ctx.first, ctx.factor = sum(counts[:own]), sum(counts) / counts[own]
        ctx.count = counts[own]
        padded = rows.contiguous()
        if len(rows) < most:
            padded = torch.cat([padded, padded.new_zeros(most - len(rows), *rows.shape[1:])])
        gathered = padded.new_empty(len(counts) * most, *rows.shape[1:])
        with _collective():
            dist.all_gather_into_tensor(gathered, padded)
        if min(counts) == most:
            return gathered
        return torch.cat([gathered[number * most :][:count] for number, count in enumerate(counts)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.first : ctx.first + ctx.count] * ctx.factor, None


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor], share: float) -> None:
    """Replace each gradient by the sum over the ranks of ``share`` times theirs, in one flat all-reduce for each dtype.

    None stays None.

    Args:
        share: of this rank's images among those of the step, B / G.
    """
    if not _grouped():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for group, flat in _flattened(gradients):
        flat.mul_(share)
        sum_(flat)
        _unflatten(flat, group)


def sum_(tensor: Tensor) -> Tensor:
    """``tensor`` with its sum over the ranks, in place."""
    if _grouped():
        with _collective():
            dist.all_reduce(tensor)
    return tensor


def least_(tensor: Tensor) -> Tensor:
    """``tensor`` with its least values over the ranks, in place."""
    if _grouped():
        with _collective():
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor


# --- between steps: the ranks' hosts agree ---


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by rank 0's, in place, by one flat broadcast for each dtype."""
    if not _grouped():
        return
    for group, flat in _flattened([*tensors]):
        with _collective():
            dist.broadcast(flat, src=0)
        _unflatten(flat, group)


def highest(number: int) -> int:
    """The largest ``number`` of any rank; every rank must ask. The device is not waited for."""
    if not _grouped():
        return number
    values = torch.tensor([number], dtype=torch.int64)
    with _collective():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return int(values)


def meet() -> None:
    """Go on when every rank's host has come this far; to be called before the device is waited for.

    By then all have launched the collectives of before, so that no device waits for a process that has ended.

    Raises:
        PeerLost: one has.
    """
    highest(0)


def of_rank_0(value: Value) -> Value:
    """Rank 0's ``value``, which is plain data, on every rank."""
    if not _grouped():
        return value
    values = [value]
    with _collective():
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


@contextmanager
def together() -> Iterator[None]:
    """All ranks go through what is within, or none goes on: a mistake that one finds ends all. No collectives within.

    Raises:
        UserError: the mistake, on every rank; one that not all have found is told with its rank.
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        if not _grouped():
            raise
        mine = error
    if not _grouped():
        return
    found: list[tuple[str, bool] | None] = [None] * world_size()
    with _collective():
        dist.all_gather_object(found, None if mine is None else (str(mine), isinstance(mine, RunFailed)))
    if mine is not None and all(each == found[rank()] for each in found):
        raise mine
    for number, each in enumerate(found):
        if each is not None:
            raise (RunFailed if each[1] else UserError)(f"process {number}: {each[0]}") from mine


# --- joining ---


@contextmanager
def joined(device: str | None) -> Iterator[str | None]:
    """The process group that a launcher such as torchrun asks for by its environment; nothing without one.

    Args:
        device: what the command line asks for: cpu, cuda or None.

    Yields:
        the device of this process: on CUDA one of its own.

    Raises:
        UserError: the processes cannot each have a CUDA device, or cannot talk to each other.
    """
    global _store
    size = _number("WORLD_SIZE", 1)
    if size == 1 or _grouped():
        yield device
        return
    local, neighbours = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    on_cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if on_cuda:
        device = _own_cuda_device(device, local, neighbours)
    else:
        device = "cpu"
        torch.set_num_threads(max(1, usable_cores()))  # the launcher allows 1
    try:
        store, number, size = next(iter(rendezvous("env://")))
        _store = dist.PrefixStore("mdistill", store)  # type: ignore[attr-defined]
        begin_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=store, rank=number, world_size=size)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["no reason is given"])[0]
        raise RunFailed(f"the {size} processes of this run cannot be joined: {reason}") from None
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for processes that have ended


def begin_group(backend: str, **given: Any) -> None:
    """``init_process_group`` of a group whose threads end when it is destroyed; gloo's would abort a process that ends.

    Functions in a module that torch may load later take the group of that moment as a default, and hold it for good.
    """
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(backend, **given)


def is_first_on_machine() -> bool:
    """Whether no other process of the run on this machine has a lower rank."""
    return _number("LOCAL_RANK", 0) == 0


def usable_cores() -> int:
    """Cores for this process: those that it may use, shared with its neighbours of the same run on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // _number("LOCAL_WORLD_SIZE", 1))


def use_device(device: torch.device) -> None:
    """Make a CUDA device of several this thread's current one: waiting for an event would else open the first one."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def begin_helper_thread(device: torch.device) -> None:
    """Prepare this thread, which works beside the one that trains on ``device``.

    It computes alone: with a team of OpenMP threads of its own there would be more of them than cores, and those of
    training would sleep between two kernels instead of waiting for each other, which takes a third of their speed.
    """
    use_device(device)
    torch.set_num_threads(1)


def is_told_elsewhere(message: str) -> bool:
    """Whether rank 0 prints this last ``message`` too, so that this process need not."""
    if _store is None:
        return False
    with suppress(RuntimeError):  # the launcher may have gone
        if rank() == 0:
            _store.set("last words", message)
            return False
        _store.wait(["last words"], timedelta(seconds=2))
        return bool(_store.get("last words").decode() == message)
    return False


def _own_cuda_device(device: str | None, local: int, neighbours: int) -> str:
    if device not in (None, "cuda"):
        raise UserError(f"--device: {device} is one device, and {neighbours} processes need one each; give cuda or cpu")
    count = torch.cuda.device_count()
    if neighbours > count:
        fewer = f"start {count} (torchrun --nproc-per-node {count}), or " if count else ""
        raise UserError(
            f"{neighbours} processes were started on this machine, which has {count} usable CUDA devices: {fewer}train"
            " on the CPU with --device cpu"
        )
    if not dist.is_nccl_available():
        raise UserError(
            "this build of torch has no NCCL, by which processes on CUDA devices talk to each other: install one that"
            " has, start one process, or train on the CPU with --device cpu"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what gloo and NCCL raise
        reason = (str(error).splitlines() or ["no reason is given"])[0]
        why = "" if "closed" in reason or "reset" in reason else f": {reason}"  # with an address, other on each rank
        raise PeerLost(f"another process of this run has ended, so this one ends too{why}") from error


def _flattened(tensors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The tensors of each dtype, and their values in one vector."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        yield group, torch.cat([tensor.reshape(-1) for tensor in group])


def _unflatten(flat: Tensor, group: Sequence[Tensor]) -> None:
    for tensor, values in zip(group, torch.split(flat, [tensor.numel() for tensor in group]), strict=True):
        tensor.copy_(values.view(tensor.shape))


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
