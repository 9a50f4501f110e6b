"""The batches of an epoch, put together on static device memory so that a training step can be captured.

Letters: N training samples of this process, B batch, S image size.
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdistill import distributed
from mdistill.data import mixing as mixed_images
from mdistill.data.batch import Batch
from mdistill.data.dataset import Dataset, StreamedDataset
from mdistill.data.mixing import Mixing
from mdistill.data.sampling import EpochPlan, epoch_plan, strong_views

Indices = npt.NDArray[np.int64]
READ_AHEAD = 3  # batches that are read from a streamed data set before they are trained on


class TeacherLogitSource(Protocol):
    """Where a loader gets the frozen teacher's logits of an epoch from; ``engine.teacher`` has the one in use."""

    def look_up(self, index: Indices, view: Indices, *, first: int = 0) -> Any:
        """Which logits of the epoch are known, from position ``first`` on. Host only; does not touch the device."""

    def begin(self, found: Any) -> None:
        """Go over to an epoch that was looked up; its (index, view) pairs are on the device by now."""

    def require(self, count: int) -> None:
        """Have the logits of the batch that ends before position ``count``."""

    def at(self, positions: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C), and pooled features (B, D) or None, at ``positions`` (B,), of classes ``target`` (B,).

        Static shapes.
        """

    def flush(self) -> None:
        """Store what was computed. The host waits for the device."""

    def close(self, *, wait: bool = True) -> None:
        """End the threads, if there are any; ``wait`` until they have."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the host has drawn and looked up of an epoch, from ``step`` on."""

    epoch: int
    step: int
    plan: EpochPlan
    extra: Indices  # (K, N): strong views, or the columns of mixed images
    teacher_logits: Any


class BatchLoader:
    """Walks through epochs batch by batch; which images, in which order and view, is fixed by (seed, epoch) alone.

    The host calls ``begin`` for an epoch and ``fetch`` before each step; ``batch`` then reads static tensors alone (the
    position within the epoch among them), so that a captured step can replay it. Nothing here waits for the device,
    but where a teacher's logits are too many to be there all at once (``engine.teacher``).

    Args:
        dataset: on ``device``.
        seed: fixes order, views and mixing.
        batch_size: images per training step, over all processes; the last batch of an epoch may be smaller.
        device: where batches are wanted.
        strong: whether batches carry a second, strongly augmented view.
        mixing: how images are mixed; None: not at all.
        teacher_logits: makes the source of teacher logits from the (2, N + 1) pairs of the epoch, whose last column
            is padding, and B; None leaves the teacher to the method.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        batch_size: int,
        device: torch.device,
        strong: bool = False,
        mixing: Mixing | None = None,
        teacher_logits: Callable[[Tensor, int], TeacherLogitSource] | None = None,
    ) -> None:
        assert not (strong and mixing is not None)
        self.dataset, self.seed, self.device = dataset, seed, device
        self.batch_size = min(batch_size, dataset.num_samples)
        self.steps = -(-dataset.num_samples // self.batch_size)  # in an epoch
        self.own_batch_size = self.own_count(self.batch_size)
        self._own = shard(dataset.num_samples, self.batch_size, distributed.rank(), distributed.world_size())
        self.samples = len(self._own)  # N
        self._strong, self._mixing = strong, mixing
        self._pairs = torch.zeros(2, self.samples + 1, dtype=torch.int64, device=device)  # index, view
        columns = 1 if strong else mixing.num_columns if mixing is not None else 0
        self._extra = torch.zeros(columns, self.samples, dtype=torch.int64, device=device)
        self._position = torch.zeros((), dtype=torch.int64, device=device)  # images of the epoch already seen
        self._offsets = torch.arange(self.own_batch_size, device=device)
        self._teacher = teacher_logits(self._pairs, self.own_batch_size) if teacher_logits is not None else None
        self._reader: Reader | None = None
        if isinstance(dataset, StreamedDataset):
            self._reader = Reader(dataset, self.own_batch_size, device, strong=strong)
        self._prepared: Prepared | None = None

    @staticmethod
    def own_count(size: int) -> int:
        """How many images of a step of ``size`` this process trains on."""
        return distributed.split(size, distributed.world_size())[distributed.rank()]

    # ---- on the host, between steps ----

    def prepare(self, epoch: int, step: int = 0) -> None:
        """Draw an epoch and look up its teacher logits, while the device may still be busy with another one."""
        data, own = self.dataset, self._own
        plan = epoch_plan(self.seed, epoch, data.num_samples, data.num_views)
        extra = np.zeros((0, data.num_samples), dtype=np.int64)
        if self._strong:
            extra = strong_views(self.seed, epoch, data.num_samples)[None]
        elif self._mixing is not None:
            extra = mixed_images.plan(
                self._mixing,
                self.seed,
                epoch,
                plan,
                num_views=data.num_views,
                image_size=data.image_size,
                batch_size=self.batch_size,
            )
        plan = EpochPlan(index=plan.index[own], view=plan.view[own])
        first = step * self.own_batch_size
        logits = self._teacher.look_up(plan.index, plan.view, first=first) if self._teacher is not None else None
        self._prepared = Prepared(epoch, step, plan, extra[:, own], logits)

    def begin(self, epoch: int, step: int) -> None:
        """Go to ``step`` (from 0) of ``epoch`` (from 1)."""
        ready = self._prepared
        if ready is None or (ready.epoch, ready.step) != (epoch, step):
            self.prepare(epoch, step)
            ready = self._prepared
        assert ready is not None
        self._prepared = None
        first = step * self.own_batch_size
        self._pairs[:, :-1].copy_(upload(np.stack([ready.plan.index, ready.plan.view]), self.device))
        if len(ready.extra):
            self._extra.copy_(upload(ready.extra, self.device))
        self._position.fill_(first)
        if self._teacher is not None:
            self._teacher.begin(ready.teacher_logits)
        if self._reader is not None:
            self._reader.begin(ready.plan, first, ready.extra[0] if self._strong else None)

    def fetch(self, step: int) -> int:
        """Have everything of step ``step`` on the device that a batch cannot compute there.

        Returns:
            the images of the step, over all processes.
        """
        size = min(self.batch_size, self.dataset.num_samples - step * self.batch_size)
        if self._teacher is not None:
            self._teacher.require(step * self.own_batch_size + self.own_count(size))
        if self._reader is not None:
            self._reader.fetch()
        return size

    def finish(self) -> None:
        """Store the teacher logits that were computed. The host waits for the device."""
        if self._teacher is not None:
            self._teacher.flush()

    def close(self, *, wait: bool = True) -> None:
        """End the threads that read images, if there are any; ``wait`` until they have."""
        if self._reader is not None:
            self._reader.close(wait=wait)
        if self._teacher is not None:
            self._teacher.close(wait=wait)

    # ---- within the step ----

    def batch(self, size: int) -> Batch:
        """This process's part of the next ``size`` images of the epoch, whose order all processes share.

        Static shapes, no read by the host; moves the position on.
        """
        count = self.own_count(size)
        positions = self._position + self._offsets[:count]
        index, view = self._pairs.index_select(1, positions).unbind()
        if self._reader is not None:
            batch = self._reader.dataset.finish_batch(self._reader.pixels[:count], index, view)
        else:
            batch = self.dataset.train_batch(index, view)
        if self._strong:
            strong_view = self._extra[0].index_select(0, positions)
            if self._reader is not None:
                strong_pixels = self._reader.strong_pixels[:count]
                strong_image = self._reader.dataset.finish_strong(strong_pixels, index, strong_view)
            else:
                strong_image = self.dataset.strong_image(index, strong_view)
            batch = dataclasses.replace(batch, strong_image=strong_image, strong_view=strong_view)
        elif self._mixing is not None:
            batch = self._mixed(batch, self._extra.index_select(1, positions))
        if self._teacher is not None:
            logits, pooled = self._teacher.at(positions, batch.target)
            batch = dataclasses.replace(batch, teacher_logits=logits, teacher_pooled=pooled)
        self._position.add_(count)
        if distributed.world_size() > 1:
            batch = dataclasses.replace(batch, rank_counts=distributed.split(size, distributed.world_size()))
        return batch

    def _mixed(self, batch: Batch, columns: Tensor) -> Batch:
        assert self._mixing is not None
        candidates = []
        for each in columns.chunk(self._mixing.candidates):
            partner = self.dataset.train_batch(each[0], each[1])
            candidates.append(mixed_images.mix(self._mixing, batch, partner, each, self.dataset.num_classes))
        mixed = candidates[0]
        if len(candidates) > 1:
            mixed = mixed_images.concatenate(candidates, keep=len(batch.index), pick=self._mixing.pick)
        return dataclasses.replace(batch, mixed=mixed) if self._mixing.mode == "beside" else mixed


class Reader:
    """Reads the pixels of a streamed data set ahead of the steps, in a thread, and uploads them to one static buffer.

    On CUDA the host's buffers are pinned. A batch is copied from one of them to one of two staging buffers on a stream
    of its own, while the device is busy with the steps before, and from there to the static one on the step's stream.
    Each waits for the other by events, the host for neither; a pinned buffer is filled again when its copy has ended.

    Args:
        strong: whether to read a strong view of each image too.
    """

    def __init__(
        self, dataset: StreamedDataset, batch_size: int, device: torch.device, *, strong: bool = False
    ) -> None:
        self.dataset, self.batch_size, self.device = dataset, batch_size, device
        shape = (1 + strong, batch_size, dataset.image_size, dataset.image_size, 3)
        static = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.pixels, self.strong_pixels = static[0], static[-1]  # of the step at hand
        pinned = device.type == "cuda"
        self._buffers = [torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(READ_AHEAD + 1)]
        self._upload = PinnedUpload(static, len(self._buffers)) if pinned else None
        self._static = static
        self._pending: deque[Future[tuple[int, int]]] = deque()  # number of the buffer and of its images
        self._plan = EpochPlan(np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._strong_view: Indices | None = None
        self._next = self._buffer = 0  # position of the next batch to read, and the buffer for it
        self._thread = ThreadPoolExecutor(1, "mdistill-read", distributed.begin_helper_thread, (device,))

    def begin(self, plan: EpochPlan, first: int, strong_view: Indices | None = None) -> None:
        """Read from position ``first`` of ``plan`` on, and of the strong views (N,) in its order."""
        while self._pending:  # of an epoch that was left early
            self._pending.popleft().exception()
        self._plan, self._strong_view, self._next = plan, strong_view, first
        for _ in range(READ_AHEAD):
            self._read_next()

    def fetch(self) -> None:
        """Upload the next batch into ``pixels``, and have one more read; waits for its pixels, not for the device."""
        buffer, size = self._pending.popleft().result()
        if self._upload is not None:
            self._upload(self._buffers[buffer], buffer, size)
        else:
            self._static[:, :size] = self._buffers[buffer][:, :size]
        self._read_next()

    def close(self, *, wait: bool = True) -> None:
        """End the thread; ``wait`` until it has, and the device with what the thread waits for."""
        self._thread.shutdown(wait=wait, cancel_futures=True)

    def _read_next(self) -> None:
        size = min(self.batch_size, len(self._plan.index) - self._next)
        if size <= 0:
            return
        part = slice(self._next, self._next + size)
        strong = self._strong_view[part] if self._strong_view is not None else None
        self._pending.append(
            self._thread.submit(self._read, self._buffer, self._plan.index[part], self._plan.view[part], strong)
        )
        self._next, self._buffer = self._next + size, (self._buffer + 1) % len(self._buffers)

    def _read(self, buffer: int, index: Indices, view: Indices, strong_view: Indices | None) -> tuple[int, int]:
        if self._upload is not None:
            self._upload.wait(buffer)
        out = self._buffers[buffer].numpy()[:, : len(index)]
        if strong_view is None:
            self.dataset.read_into(out[0], index, view)
        else:
            self.dataset.read_both_into(out[0], out[1], index, view, strong_view)
        return buffer, len(index)


class PinnedUpload:
    """Copies pinned buffers to ``static`` on the device, (views, B, S, S, 3), behind the steps that still read it.

    Args:
        buffers: how many pinned buffers there are.
    """

    def __init__(self, static: Tensor, buffers: int) -> None:
        self._static = static
        self._staging = [torch.zeros_like(static) for _ in range(2)]
        self._taken = [torch.cuda.Event() for _ in self._staging]  # type: ignore[no-untyped-call]
        self._uploaded = [torch.cuda.Event() for _ in range(buffers)]  # type: ignore[no-untyped-call]
        self.stream = torch.cuda.Stream(static.device)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(static.device))  # which has made the buffers
        self._turn = 0

    def __call__(self, pinned: Tensor, buffer: int, size: int) -> None:
        """Have the first ``size`` images of ``pinned``, the buffer of this number, in ``static`` for the next step."""
        staging, taken, uploaded = self._staging[self._turn], self._taken[self._turn], self._uploaded[buffer]
        step = torch.cuda.current_stream(self._static.device)
        self.stream.wait_event(taken)
        with torch.cuda.stream(self.stream):
            for view in range(len(staging)):  # each in one piece: what has gaps would be copied by the host first
                staging[view, :size].copy_(pinned[view, :size], non_blocking=True)
        uploaded.record(self.stream)
        step.wait_event(uploaded)
        self._static[:, :size].copy_(staging[:, :size])
        taken.record(step)
        self._turn = 1 - self._turn

    def wait(self, buffer: int) -> None:
        """Wait, on the host, until the pinned buffer of this number is copied."""
        self._uploaded[buffer].synchronize()


def shard(samples: int, batch_size: int, rank: int, ranks: int) -> Indices:
    """The positions of an epoch that one of several processes trains on: its part of each batch, in order."""
    parts = []
    for start in range(0, samples, batch_size):
        counts = distributed.split(min(batch_size, samples - start), ranks)
        first = start + sum(counts[:rank])
        parts.append(np.arange(first, first + counts[rank]))
    return np.concatenate(parts)


def upload(values: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Host to device; the host does not wait."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
