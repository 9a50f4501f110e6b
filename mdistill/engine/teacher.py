"""The frozen teacher's outputs for a list of (index, view) pairs: from the cache where it has them, else computed.

These are its logits and, for a method that needs them, its pooled features.

Letters: N pairs, B images per teacher batch, C classes, D pooled features or 0, V views of a sample, W numbers in a
stored row.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mdistill.data import Dataset, StreamedDataset
from mdistill.data.loader import Reader, upload
from mdistill.data.sampling import EpochPlan, epoch_plan
from mdistill.engine.console import print_line
from mdistill.engine.cuda_graph import WARM_UP, CapturedStep
from mdistill.engine.logit_cache import Ids, LogitCache
from mdistill.engine.logit_formats import LogitFormat
from mdistill.errors import RunFailed, UserError
from mdistill.models.base import Features
from mdistill.models.fold_bn import fold_batchnorm
from mdistill.models.memory_format import move, to_layout
from mdistill.precision import Precision, computing, cpu_kernels

BATCH = {"cpu": 64, "cuda": 512}
"""Images per teacher batch. One size, padded when fewer are left, so that an image's logits are always the same."""

BLOCK_BYTES = 2**26
"""Stored logits that a trial holds on the device at a time; an epoch of CIFAR-100 has 10 MB of them."""

CHUNK = 16_384  # entries of a chunk that is filled ahead of any run

MOST_ENTRIES = 2**30  # of a cache; each takes 4 bytes of the host's memory

ROUNDING_SHARE = 0.005  # of a cache's entries that may change a decision before another format is advised


class FrozenTeacher:
    """The engine's own copy of a teacher, in one precision and memory format: BatchNorm is folded into convolutions.

    Args:
        pooled: whether its pooled features are wanted too.
    """

    def __init__(self, teacher: nn.Module, device: torch.device, precision: Precision, *, pooled: bool = False) -> None:
        network, self.folded = fold_batchnorm(teacher)  # how many BatchNorm layers
        self.network, self.device, self.pooled = network.requires_grad_(False), device, pooled
        self.precision: Precision = "fp32" if (device.type, precision) == ("cpu", "tf32") else precision  # the same
        self.memory_format, _ = move(network, device, self.precision)
        self.batch_size = BATCH[device.type]

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to logits and then pooled features, (B, C + D), float32."""
        image = to_layout(self.network, image)
        with computing(self.precision, self.device):
            if not self.pooled:
                logits: Tensor = self.network(image)
                return logits.float()
            features: Features = self.network.forward_features(image)  # type: ignore[operator]
        return torch.cat([features.logits.float(), features.pooled.float()], dim=1)

    def identity(self) -> dict[str, object]:
        """Everything here, beside the weights and the images, that fixes the outputs to the last bit."""
        if self.device.type == "cpu":  # kernels differ by instruction set, and a few sums by the number of threads
            device = f"cpu, {cpu_kernels()}, {torch.get_num_threads()} threads"
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

    index: Ids  # (N,)
    view: Ids  # (N,)
    first: int  # position of the first pair that is wanted
    missing: Ids  # positions that have to be computed, ascending
    cached: Tensor  # on the CPU, the rows of the others in the first block, in order


class TeacherLogits:
    """Outputs for the pairs that a list names, computed in full teacher batches shortly before they are needed.

    Each is stored as ``form`` has it whether it comes from the cache or not, so a cache changes nothing but time.

    The device holds the rows of a block at a time: whole training batches, ``BLOCK_BYTES`` of them or all there are.
    Going on to the next block, the host waits for the device if rows were computed that the cache has not got yet.
    Images of a streamed data set are read for the teacher alone, ahead of its batches.

    Args:
        teacher: the network.
        dataset: where the images come from.
        pairs: (2, N + 1) int64 on the device, index and view, filled by the caller; the last column pads a batch.
        batch_size: pairs that are asked about together, counted from the first.
        form: what outputs are stored as.
        cache: where entries are looked up and written; None computes them all.
        capture: whether teacher batches are captured.
        must_write: whether a cache that cannot be written ends the work; else it is read on and no longer written.

    Attributes:
        rows: (R + 1, W) on the device, of the R pairs of a block, there up to what ``require`` was asked for.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        dataset: Dataset,
        pairs: Tensor,
        batch_size: int,
        *,
        form: LogitFormat,
        cache: LogitCache | None,
        capture: bool,
        must_write: bool = False,
    ) -> None:
        self.teacher, self.dataset, self.pairs, self.cache, self.must_write = teacher, dataset, pairs, cache, must_write
        self.form, device, size = form, pairs.device, teacher.batch_size
        self._count = pairs.shape[1] - 1  # N
        batches = BLOCK_BYTES // (batch_size * form.width * form.dtype.itemsize)
        self._block = min(self._count, batch_size * max(1, batches))  # R
        self.rows = torch.zeros(self._block + 1, form.width, dtype=form.dtype, device=device)
        self._changed = torch.zeros(self._block + 1, dtype=torch.bool, device=device)  # a decision, by storing it
        self._start = torch.zeros((), dtype=torch.int64, device=device)  # position of the block
        self._largest = torch.zeros((), device=device)  # of all |outputs| computed so far
        self._missing = torch.zeros(-(-self._block // size) * size, dtype=torch.int64, device=device)  # padded
        self._next = torch.zeros((), dtype=torch.int64, device=device)  # of ``_missing``
        self._offsets = torch.arange(size, device=device)
        self._step = CapturedStep(self._compute, size, capture=capture, name="teacher batch")
        self._reader: Reader | None = None  # made when it is first needed
        none = np.zeros(0, np.int64)
        self._found, self._current = LookUp(none, none, 0, none, self.rows[:0]), none  # missing ones of the block
        self._end = 0  # position behind the block
        self._computed = self._flushed = 0  # of ``_current``
        self._unchecked = False  # whether ``_largest`` has changed
        self._writable = True

    def look_up(self, index: Ids, view: Ids, *, first: int = 0) -> LookUp:
        """Find out, on the host alone, which of the pairs from ``first`` on are missing, and begin to read the others.

        Args:
            index: (N,) training samples.
            view: (N,) views of these.
        """
        missing = np.ones(len(index), np.bool_)
        if self.cache is not None:
            self.cache.refresh()
            missing = self.cache.missing(self._ids(index, view))
        missing[:first] = False  # steps already done
        found = LookUp(index, view, first, np.flatnonzero(missing), torch.zeros(0))
        return replace(found, cached=self._read(found, self._cached(found, first - first % self._block)))

    def begin(self, found: LookUp) -> None:
        """Put the first cached logits in place; ``pairs`` must hold the list by now."""
        self._found = found
        self._enter(found.first - found.first % self._block, found.cached)

    def require(self, count: int) -> None:
        """Make sure that the ``batch_size`` pairs up to ``count`` have their logits; ``count`` only ever grows."""
        while True:
            while self._computed < len(self._current) and self._current[self._computed] < count:
                if self._reader is not None:
                    self._reader.fetch()
                self._step(self.teacher.batch_size)
                self._computed = min(self._computed + self.teacher.batch_size, len(self._current))
                self._unchecked = True
            if count <= self._end:
                return
            if self.cache is not None and self._writable:
                self.flush()
            self._enter(self._end, self._read(self._found, self._cached(self._found, self._end)))

    def at(self, positions: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C) and pooled features (B, D) of the pairs at ``positions`` (B,), of classes ``target`` (B,).

        Static shapes.
        """
        outputs = self.form.decode(self.rows.index_select(0, positions - self._start), target)
        if not self.form.pooled:
            return outputs, None
        return outputs[:, : self.form.classes], outputs[:, self.form.classes :]

    def flush(self) -> None:
        """Write what was computed since the last time, as one chunk. The host waits for the device.

        Raises:
            RunFailed: an output is not finite, or too large for float16 (nothing of it is written); or ``must_write``.
        """
        if not self._unchecked:
            return
        largest = float(self._largest)
        if not largest <= self.form.largest:  # NaN is refused too
            what = "logits or pooled features" if self.form.pooled else "logits"
            raise RunFailed(
                f"the teacher's {what} reach {largest:.4g}, float16 holds 65504: set run.teacher_logits=float32"
                if np.isfinite(largest)
                else f"the teacher's {what} are not finite: wrong weights?"
            )
        positions = self._current[self._flushed : self._computed]
        if self.cache is not None and self._writable:
            at = upload(positions - (self._end - self._block), self.pairs.device)
            rows, changed = self.rows.index_select(0, at).cpu(), self._changed.index_select(0, at).cpu()
            ids = self._ids(self._found.index[positions], self._found.view[positions])
            try:
                self.cache.write(ids, rows, changed.numpy())
            except RunFailed as error:  # the disk is full, or the folder is read-only
                if self.must_write:
                    raise
                self._writable = False
                print_line(f"teacher: continuing without adding to the cache: {error}")
        self._flushed, self._unchecked = self._computed, False

    def close(self, *, wait: bool = True) -> None:
        """End the thread that reads images, if there is one; ``wait`` until it has."""
        if self._reader is not None:
            self._reader.close(wait=wait)

    def _ids(self, index: Ids, view: Ids) -> Ids:
        """The cache's entries of pairs."""
        assert self.dataset.num_views is not None
        return index * self.dataset.num_views + view

    def _cached(self, found: LookUp, start: int) -> Ids:
        """The positions in the block from ``start`` on that the cache has."""
        wanted = np.arange(max(start, found.first), min(start + self._block, len(found.index)))
        return np.setdiff1d(wanted, found.missing, assume_unique=True)

    def _read(self, found: LookUp, positions: Ids) -> Tensor:
        """The rows (n, W) that the cache has of pairs, on the CPU."""
        if self.cache is None:
            return torch.zeros(0, self.form.width, dtype=self.form.dtype)
        return self.cache.read(self._ids(found.index[positions], found.view[positions]))

    def _enter(self, start: int, cached: Tensor) -> None:
        """Go over to the block at ``start``, whose cached rows are given."""
        found, device = self._found, self.pairs.device
        self._end, self._computed, self._flushed = start + self._block, 0, 0
        bounds = np.searchsorted(found.missing, [start, self._end])
        self._current = found.missing[bounds[0] : bounds[1]]
        missing = np.full(len(self._missing), self._count, dtype=np.int64)
        missing[: len(self._current)] = self._current
        self._missing.copy_(upload(missing, device))
        self._next.zero_()
        self._start.fill_(start)
        if len(cached):
            at = self._cached(found, start) - start
            self.rows.index_copy_(0, upload(at, device), upload(cached, device))
        if len(self._current) and isinstance(self.dataset, StreamedDataset):
            self._reader = self._reader or Reader(self.dataset, self.teacher.batch_size, device)
            self._reader.begin(EpochPlan(found.index[self._current], found.view[self._current]), 0)

    @torch.no_grad()
    def _compute(self, size: int) -> None:
        """One teacher batch: the next ``size`` of the missing positions. Static shapes, no read by the host."""
        positions = self._missing.index_select(0, self._next + self._offsets[:size])
        index, view = self.pairs.index_select(1, positions).unbind()
        if self._reader is not None:  # its pixels beyond the last missing one are those of an earlier batch
            batch = self._reader.dataset.finish_batch(self._reader.pixels, index, view)
        else:
            batch = self.dataset.train_batch(index, view)
        exact = self.teacher(batch.image)
        rows = self.form.encode(exact, batch.target)
        stored = self.form.decode(rows, batch.target).float()
        places = (positions - self._start).clamp(max=self._block)  # what pads a batch goes behind the last row
        self._largest.copy_(torch.maximum(self._largest, exact.abs().max()))
        self.rows.index_copy_(0, places, rows)
        logits = slice(None, self.form.classes)
        self._changed.index_copy_(0, places, decisions_differ(exact[:, logits], stored[:, logits], batch.target))
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
    form: LogitFormat,
) -> LogitCache:
    """The cache of ``teacher``'s outputs below ``root``; its folder is made where it is missing.

    Args:
        dataset: its views can be enumerated.
        fingerprints: those of the weights of the "teacher" and of the "data".

    Raises:
        UserError: the folder cannot be made.
    """
    identity = {"weights": fingerprints["teacher"], "data": fingerprints["data"], **teacher.identity(), **form.identity}
    return LogitCache(root, identity, entries=count_entries(dataset), width=form.width, dtype=form.dtype)


def count_entries(dataset: Dataset) -> int:
    """N V, the entries of a cache.

    Raises:
        UserError: there are more than a cache can have.
    """
    assert dataset.num_views is not None
    entries = dataset.num_samples * dataset.num_views
    if entries > MOST_ENTRIES:
        raise UserError(
            f"data.views: {dataset.num_views:,} views of {dataset.num_samples:,} images are more than the"
            f" {MOST_ENTRIES:,} entries that a cache can have; take at most {MOST_ENTRIES // dataset.num_samples:,}"
        )
    return entries


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
        form: what its outputs are stored as.
    """

    def __init__(self, teacher: FrozenTeacher, dataset: Dataset, *, form: LogitFormat) -> None:
        assert dataset.num_views is not None
        self.views, self.batch_size, self._entries = dataset.num_views, teacher.batch_size, count_entries(dataset)
        pairs = torch.zeros(2, CHUNK + 1, dtype=torch.int64, device=teacher.device)
        capture = teacher.device.type == "cuda"
        self._logits = TeacherLogits(
            teacher, dataset, pairs, self.batch_size, form=form, cache=None, capture=capture, must_write=True
        )

    def seconds_per_entry(self) -> float:
        """Time of an entry, measured on a few batches from all over after as many to warm up; writes nothing."""
        spent = 0.0
        for count in (WARM_UP + 1, 4):
            started = time.perf_counter()
            self._begin(np.linspace(0, self._entries - 1, count * self.batch_size).astype(np.int64))
            self._logits.require(count * self.batch_size)
            self._logits.flush()
            spent = (time.perf_counter() - started) / (count * self.batch_size)
        return spent

    def fill(self, cache: LogitCache, ids: Ids, *, advance: Callable[[int], object]) -> None:
        """Compute the entries ``ids`` (n,) that ``cache`` lacks, and write a chunk every ``CHUNK`` of them.

        Whatever is computed is written, even on an error. ``advance`` is told the size of each batch.

        Raises:
            RunFailed: there is no room for them, or the folder cannot be written, or one is not fit to be stored.
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

    def close(self) -> None:
        """End the thread that reads images, if there is one."""
        self._logits.close()

    def _begin(self, ids: Ids) -> None:
        index, view = ids // self.views, ids % self.views
        self._logits.pairs[:, : len(ids)].copy_(upload(np.stack([index, view]), self._logits.pairs.device))
        self._logits.begin(self._logits.look_up(index, view))


def describe(cache: LogitCache, form: LogitFormat) -> str:
    """How much of ``cache`` is there, and what storing outputs as ``form`` has it does to the logits."""
    line = f"teacher cache: {cache.filled:,} of {cache.entries:,} entries"
    if form.loss:
        line += (
            f"; {form.loss} changes the predicted class or those at or above the true one in"
            f" {100 * cache.changed:.3f} % of them"
        )
        if cache.changed > ROUNDING_SHARE:
            line += f", more than {100 * ROUNDING_SHARE:g} %: {form.advice}"
    return line
