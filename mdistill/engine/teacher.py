"""The frozen teacher's logits for a list of (index, view) pairs: from the cache where it has them, else computed.

Letters: N pairs, B images per teacher batch, C classes, V views of a sample.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mdistill.data import Dataset
from mdistill.data.loader import upload
from mdistill.data.sampling import epoch_plan
from mdistill.engine.console import print_line
from mdistill.engine.cuda_graph import WARM_UP, CapturedStep
from mdistill.engine.logit_cache import Ids, LogitCache
from mdistill.errors import RunFailed, UserError
from mdistill.models.fold_bn import fold_batchnorm
from mdistill.models.memory_format import move, to_layout
from mdistill.precision import Precision, computing

BATCH = {"cpu": 64, "cuda": 512}
"""Images per teacher batch. One size, padded when fewer are left, so that an image's logits are always the same."""

CACHE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
"""What logits are stored in: rounding to float16 moves one by at most 2^-11 of itself (2^-25 below 2^-14)."""

CHUNK = 16_384  # entries of a chunk that is filled ahead of any run

ROUNDING_SHARE = 0.005  # of a cache's entries that may change a decision before float32 is advised


class FrozenTeacher:
    """The engine's own copy of a teacher, in one precision and memory format: BatchNorm is folded into convolutions."""

    def __init__(self, teacher: nn.Module, device: torch.device, precision: Precision) -> None:
        network, self.folded = fold_batchnorm(teacher)  # how many BatchNorm layers
        self.network, self.device = network.requires_grad_(False), device
        self.precision: Precision = "fp32" if (device.type, precision) == ("cpu", "tf32") else precision  # the same
        self.memory_format, _ = move(network, device, self.precision)
        self.batch_size = BATCH[device.type]

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, C), float32."""
        with computing(self.precision, self.device):
            logits: Tensor = self.network(to_layout(self.network, image))
        return logits.float()

    def identity(self) -> dict[str, object]:
        """Everything here, beside the weights and the images, that fixes the logits to the last bit."""
        if self.device.type == "cpu":  # kernels differ by instruction set, and a few sums by the number of threads
            units = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
            device = f"cpu, {torch.backends.cpu.get_cpu_capability()}{units}, {torch.get_num_threads()} threads"
        else:
            kernels = "deterministic kernels" if torch.are_deterministic_algorithms_enabled() else "tuned kernels"
            device = f"{self.device.type}, {torch.cuda.get_device_name(self.device)}, {kernels}"
        return {
            "device": device,
            "precision": self.precision,
            "folded": self.folded,
            "memory_format": self.memory_format,
            "batch_size": self.batch_size,
            "torch": str(torch.__version__),
        }


@dataclass(frozen=True)
class LookUp:
    """A list of pairs as the host sees it, before anything is on the device."""

    ids: Ids  # (N,), index * V + view; the entry of each pair in the cache
    missing: Ids  # which of the N positions have to be computed, ascending
    cached: Tensor  # (N - len(missing), C) on the CPU, the others, in order


class TeacherLogits:
    """Logits of the pairs that a list names, computed in full teacher batches shortly before they are needed.

    Each is rounded to ``cache_dtype`` whether it comes from the cache or not, so a cache changes nothing but time.

    Args:
        teacher: the network.
        dataset: where the images come from.
        pairs: (2, N + 1) int64 on the device, index and view, filled by the caller; the last column pads a batch.
        cache_dtype: float16 or float32.
        cache: where entries are looked up and written; None computes them all.
        capture: whether teacher batches are captured.
        must_write: whether a cache that cannot be written ends the work; else it is read on and no longer written.

    Attributes:
        logits: (N + 1, C) on the device, in the order of the list, there up to what ``require`` was asked for.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        dataset: Dataset,
        pairs: Tensor,
        *,
        cache_dtype: torch.dtype,
        cache: LogitCache | None,
        capture: bool,
        must_write: bool = False,
    ) -> None:
        self.teacher, self.dataset, self.pairs, self.cache, self.must_write = teacher, dataset, pairs, cache, must_write
        device, columns, size = pairs.device, pairs.shape[1], teacher.batch_size
        self.logits = torch.zeros(columns, dataset.num_classes, dtype=cache_dtype, device=device)
        self._changed = torch.zeros(columns, dtype=torch.bool, device=device)  # whether rounding changed a decision
        self._largest = torch.zeros((), device=device)  # of all |logits| computed so far
        self._missing = torch.zeros(-(-columns // size) * size, dtype=torch.int64, device=device)  # positions, padded
        self._next = torch.zeros((), dtype=torch.int64, device=device)  # of ``_missing``
        self._offsets = torch.arange(size, device=device)
        self._step = CapturedStep(self._compute, size, capture=capture, name="teacher batch")
        self._current = LookUp(np.zeros(0, np.int64), np.zeros(0, np.int64), torch.zeros(0, dataset.num_classes))
        self._computed = self._flushed = 0  # of the missing ones
        self._writable = True

    def look_up(self, index: npt.NDArray[np.int64], view: npt.NDArray[np.int64], *, first: int = 0) -> LookUp:
        """Find out, on the host alone, which of the pairs from ``first`` on are missing, and read the others.

        Args:
            index: (N,) training samples.
            view: (N,) views of these.
        """
        if self.cache is None:
            return LookUp(index, np.arange(first, len(index)), torch.zeros(0, self.logits.shape[1]))
        assert self.dataset.num_views is not None
        self.cache.refresh()
        ids = index * self.dataset.num_views + view
        missing = self.cache.missing(ids)
        missing[:first] = False  # steps already done
        return LookUp(ids, np.flatnonzero(missing), self.cache.read(ids[first:][~missing[first:]]))

    def begin(self, found: LookUp, *, first: int = 0) -> None:
        """Put the cached logits in place; ``pairs`` must hold the list by now."""
        self._current, self._computed, self._flushed = found, 0, 0
        padding, device = len(self.logits) - 1, self.pairs.device
        missing = np.full(len(self._missing), padding, dtype=np.int64)
        missing[: len(found.missing)] = found.missing
        self._missing.copy_(upload(missing, device))
        self._next.zero_()
        if len(found.cached):
            cached = np.setdiff1d(np.arange(first, len(found.ids)), found.missing, assume_unique=True)
            self.logits.index_copy_(0, upload(cached, device), upload(found.cached, device))

    def require(self, count: int) -> None:
        """Make sure that the first ``count`` pairs have their logits; the host does not wait."""
        missing, size = self._current.missing, self.teacher.batch_size
        while self._computed < len(missing) and missing[self._computed] < count:
            self._step(size)
            self._computed = min(self._computed + size, len(missing))

    def flush(self) -> None:
        """Write what was computed since the last time, as one chunk. The host waits for the device.

        Raises:
            RunFailed: a logit is not finite, or too large for float16 (nothing of it is written); or ``must_write``.
        """
        positions = self._current.missing[self._flushed : self._computed]
        if not len(positions):
            return
        largest = float(self._largest)
        if not largest <= torch.finfo(self.logits.dtype).max:  # NaN is refused too
            raise RunFailed(
                f"the teacher's logits reach {largest:.4g}, float16 holds 65504: set run.teacher_logits=float32"
                if np.isfinite(largest)
                else "the teacher's logits are not finite: wrong weights?"
            )
        if self.cache is not None and self._writable:
            at = upload(positions, self.pairs.device)
            logits, changed = self.logits.index_select(0, at).cpu(), self._changed.index_select(0, at).cpu()
            try:
                self.cache.write(self._current.ids[positions], logits, changed.numpy())
            except RunFailed as error:  # the disk is full, or the folder is read-only
                if self.must_write:
                    raise
                self._writable = False
                print_line(f"teacher: continuing without adding to the cache: {error}")
        self._flushed = self._computed

    @torch.no_grad()
    def _compute(self, size: int) -> None:
        """One teacher batch: the next ``size`` of the missing positions. Static shapes, no read by the host."""
        positions = self._missing.index_select(0, self._next + self._offsets[:size])
        index, view = self.pairs.index_select(1, positions).unbind()
        batch = self.dataset.train_batch(index, view)
        exact = self.teacher(batch.image)
        rounded = exact.to(self.logits.dtype)
        self._largest.copy_(torch.maximum(self._largest, exact.abs().max()))
        self.logits.index_copy_(0, positions, rounded)
        self._changed.index_copy_(0, positions, decisions_differ(exact, rounded.float(), batch.target))
        self._next.add_(size)


def decisions_differ(exact: Tensor, rounded: Tensor, target: Tensor) -> Tensor:
    """Whether rounding changed the predicted class, or which classes score at least as much as the true one: (B,) bool.

    Args:
        exact: (B, C) logits.
        rounded: (B, C), the same after rounding.
        target: (B,) int64.
    """
    predicted = exact.argmax(dim=1) != rounded.argmax(dim=1)
    at_least = [logits >= logits.gather(1, target[:, None]) for logits in (exact, rounded)]
    return predicted | (at_least[0] != at_least[1]).any(dim=1)


def open_cache(
    teacher: FrozenTeacher,
    dataset: Dataset,
    root: Path,
    *,
    fingerprints: Mapping[str, str],
    cache_dtype: torch.dtype,
) -> LogitCache:
    """The cache of ``teacher``'s logits below ``root``; its folder is made where it is missing.

    Args:
        dataset: its views can be enumerated.
        fingerprints: those of the weights of the "teacher" and of the "data".

    Raises:
        UserError: the folder cannot be made.
    """
    assert dataset.num_views is not None
    identity = {"weights": fingerprints["teacher"], "data": fingerprints["data"], **teacher.identity()}
    entries = dataset.num_samples * dataset.num_views
    return LogitCache(root, identity, entries=entries, classes=dataset.num_classes, dtype=cache_dtype)


def entries_of_epochs(dataset: Dataset, epochs: int | None, seeds: Sequence[int]) -> Ids:
    """The entries that the first epochs of some seeds read, ascending; all entries when ``epochs`` is None.

    Raises:
        UserError: the views of the data set cannot be enumerated, so there is no cache.
    """
    views = dataset.num_views
    if views is None:
        raise UserError("the views of this data set cannot be enumerated: there is no cache of them")
    read = np.full(dataset.num_samples * views, epochs is None)
    for seed in seeds:
        for epoch in range(1, (epochs or 0) + 1):
            plan = epoch_plan(seed, epoch, dataset.num_samples, views)
            read[plan.index * views + plan.view] = True
    return np.flatnonzero(read)


class Filler:
    """Computes entries of a cache ahead of any run.

    Args:
        teacher: the network.
        dataset: where the images come from; its views can be enumerated.
        cache_dtype: what the logits are rounded to.
    """

    def __init__(self, teacher: FrozenTeacher, dataset: Dataset, *, cache_dtype: torch.dtype) -> None:
        assert dataset.num_views is not None
        self.views, self.batch_size = dataset.num_views, teacher.batch_size
        pairs = torch.zeros(2, CHUNK + 1, dtype=torch.int64, device=teacher.device)
        capture = teacher.device.type == "cuda"
        self._logits = TeacherLogits(
            teacher, dataset, pairs, cache_dtype=cache_dtype, cache=None, capture=capture, must_write=True
        )

    def seconds_per_entry(self) -> float:
        """Time of an entry, measured on a few batches after as many to warm up; writes nothing."""
        spent = 0.0
        for count in (WARM_UP + 1, 4):
            started = time.perf_counter()
            self._begin(np.zeros(count * self.batch_size, np.int64))
            self._logits.require(count * self.batch_size)
            self._logits.flush()
            spent = (time.perf_counter() - started) / (count * self.batch_size)
        return spent

    def fill(self, cache: LogitCache, ids: Ids, *, advance: Callable[[int], object]) -> None:
        """Compute the entries ``ids`` (n,) that ``cache`` lacks, and write a chunk every ``CHUNK`` of them.

        Whatever is computed is written, even on an error. ``advance`` is told the size of each batch.

        Raises:
            RunFailed: there is no room for them, or the folder cannot be written, or a logit is not fit to be stored.
        """
        self._logits.cache = cache
        ids = ids[cache.missing(ids)]
        cache.require_room(len(ids))
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            self._begin(part)
            try:
                for first in range(0, len(part), self.batch_size):
                    count = min(self.batch_size, len(part) - first)
                    self._logits.require(first + count)
                    advance(count)
            finally:
                self._logits.flush()

    def _begin(self, ids: Ids) -> None:
        index, view = ids // self.views, ids % self.views
        self._logits.pairs[:, : len(ids)].copy_(upload(np.stack([index, view]), self._logits.pairs.device))
        self._logits.begin(self._logits.look_up(index, view))


def describe(cache: LogitCache) -> str:
    """How much of ``cache`` is there, and what rounding to its type does to it."""
    line = f"teacher cache: {cache.filled:,} of {cache.entries:,} entries"
    if cache.dtype == torch.float16:
        line += (
            f"; rounding to float16 changes the predicted class or those at or above the true one in"
            f" {100 * cache.changed:.3f} % of them"
        )
        if cache.changed > ROUNDING_SHARE:
            line += f", more than {100 * ROUNDING_SHARE:g} %: run.teacher_logits=float32 is exact"
    return line
