"""The frozen teacher's logits for a list of (index, view) pairs: from the table where it has them, else computed.

Letters: N pairs, B images a teacher batch, C classes, V views of a sample.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mdistill.data import Dataset
from mdistill.data.sampling import epoch_plan
from mdistill.engine.console import say
from mdistill.engine.cuda_graph import WARM_UP, Launcher, Record, cuda_graph, upload
from mdistill.engine.teacher_cache import NoRoom, TeacherTable
from mdistill.errors import RunFailed, UserError
from mdistill.models.fold_bn import fold_batchnorm
from mdistill.precision import Precision, computing

BATCH = {"cpu": 64, "cuda": 512}
"""Images a teacher batch. One fixed size, padded when fewer are left, so that an image's logits are always the same."""

KEPT = {"float16": torch.float16, "float32": torch.float32}
"""What logits are kept in: rounding to float16 moves one by at most 2^-11 of itself (2^-25 below 2^-14)."""

ROUNDING_SHARE = 0.005  # of a table's rows that may change a decision before float32 is advised


class FrozenTeacher:
    """The engine's own copy of a teacher: BatchNorm folded into its convolutions, channels last, in one precision."""

    def __init__(self, teacher: nn.Module, device: torch.device, precision: Precision) -> None:
        network, self.folded = fold_batchnorm(teacher)  # how many BatchNorm layers
        self.network = network.to(device).to(memory_format=torch.channels_last).requires_grad_(False)
        self.device = device
        self.precision: Precision = "fp32" if (device.type, precision) == ("cpu", "tf32") else precision  # the same
        self.batch_size = BATCH[device.type]

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, C), float32."""
        with computing(self.precision, self.device):
            logits: Tensor = self.network(image)
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
            "memory_format": "channels_last",
            "batch_size": self.batch_size,
            "torch": str(torch.__version__),
        }


@dataclass(frozen=True)
class Request:
    """A list of pairs as the host sees it, before anything is on the device."""

    ids: npt.NDArray[np.int64]  # (N,), index * V + view; the row of each pair in the table
    missing: npt.NDArray[np.int64]  # which of the N have to be computed, ascending
    found: Tensor  # (N - len(missing), C) on the CPU, the others, in order


class TeacherRows:
    """Logits of the pairs that a list names, computed in full teacher batches shortly before they are needed.

    Each is rounded to ``kept`` whether it comes from the table or not, so that a table changes nothing but time.

    Args:
        teacher: the network.
        dataset: where the images come from.
        pairs: (2, N + 1) int64 on the device, index and view, filled by the caller; the last column pads a batch.
        kept: float16 or float32.
        table: where rows are looked up and written; None computes them all.
        record: how a function of static tensors is captured; None runs it as it is.
        insist: whether a table that cannot be written any more ends the work; else it goes on without.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        dataset: Dataset,
        pairs: Tensor,
        *,
        kept: torch.dtype,
        table: TeacherTable | None,
        record: Record | None = None,
        insist: bool = False,
    ) -> None:
        self.teacher, self.dataset, self.pairs, self.table, self.insist = teacher, dataset, pairs, table, insist
        device, slots, size = pairs.device, pairs.shape[1], teacher.batch_size
        self.logits = torch.zeros(slots, dataset.num_classes, dtype=kept, device=device)  # (N + 1, C), in list order
        self.changed = torch.zeros(slots, dtype=torch.bool, device=device)  # whether rounding changed a decision
        self._largest = torch.zeros((), device=device)  # of all |logits| computed so far
        self._todo = torch.zeros(-(-slots // size) * size, dtype=torch.int64, device=device)  # slots to compute, padded
        self._at = torch.zeros((), dtype=torch.int64, device=device)
        self._offsets = torch.arange(size, device=device)
        self._launch = Launcher(self._compute, record=record, on_failure=_not_captured)
        self._request = Request(np.zeros(0, np.int64), np.zeros(0, np.int64), torch.zeros(0, dataset.num_classes))
        self._done = self._flushed = 0  # of the missing ones: computed, and of these written

    def look_up(self, index: npt.NDArray[np.int64], view: npt.NDArray[np.int64], *, first: int = 0) -> Request:
        """Find out, on the host alone, which of the pairs from ``first`` on are missing, and read the others."""
        if self.table is None:
            return Request(index, np.arange(first, len(index)), torch.zeros(0, self.logits.shape[1]))
        assert self.dataset.num_views is not None
        ids = index * self.dataset.num_views + view
        lacking = self.table.missing(ids)
        lacking[:first] = False  # steps already done
        return Request(ids, np.flatnonzero(lacking), self.table.read(ids[first:][~lacking[first:]]))

    def begin(self, request: Request, *, first: int = 0) -> None:
        """Put the rows that were found in place; ``pairs`` must hold the list by now."""
        self._request, self._done, self._flushed = request, 0, 0
        padding = len(self.logits) - 1
        todo = np.full(len(self._todo), padding, dtype=np.int64)
        todo[: len(request.missing)] = request.missing
        self._todo.copy_(upload(todo, self.pairs.device))
        self._at.zero_()
        if len(request.found):
            there = np.setdiff1d(np.arange(first, len(request.ids)), request.missing, assume_unique=True)
            self.logits.index_copy_(0, upload(there, self.pairs.device), upload(request.found, self.pairs.device))

    def load(self, index: npt.NDArray[np.int64], view: npt.NDArray[np.int64]) -> None:
        """Start on a list of at most N pairs, which is put into ``pairs`` here."""
        self.pairs[:, : len(index)].copy_(upload(np.stack([index, view]), self.pairs.device))
        self.begin(self.look_up(index, view))

    def require(self, count: int) -> None:
        """Make sure that the first ``count`` pairs have their rows."""
        missing, size = self._request.missing, self.teacher.batch_size
        while self._done < len(missing) and missing[self._done] < count:
            self._launch()
            self._done = min(self._done + size, len(missing))
            if self.pairs.device.type == "cpu":  # nothing to wait for: a kill loses one batch
                self.flush()

    def flush(self) -> None:
        """Write what was computed to the table. The host waits for the device.

        Raises:
            RunFailed: a logit is not finite, or too large for float16 (nothing of it is written); or ``insist``.
        """
        slots = self._request.missing[self._flushed : self._done]
        if not len(slots):
            return
        largest = float(self._largest)
        if not largest <= torch.finfo(self.logits.dtype).max:  # NaN is refused too
            raise RunFailed(
                f"the teacher's logits reach {largest:.4g}, float16 holds 65504: set run.teacher_logits=float32"
                if np.isfinite(largest)
                else "the teacher's logits are not finite: wrong weights?"
            )
        if self.table is not None:
            at = upload(slots, self.pairs.device)
            rows, changed = self.logits.index_select(0, at).cpu(), self.changed.index_select(0, at).cpu()
            try:
                self.table.write(self._request.ids[slots], rows, changed.numpy())
            except (NoRoom, UserError) as error:  # the disk is full, or the folder is gone
                if self.insist:
                    raise RunFailed(str(error)) from None
                self.table = None
                say(f"teacher: goes on without its table: {error}")
        self._flushed = self._done

    @torch.no_grad()
    def _compute(self) -> None:
        """One teacher batch: the next B of the slots to do. Static shapes, no read by the host."""
        slots = self._todo.index_select(0, self._at + self._offsets)
        index, view = self.pairs.index_select(1, slots).unbind()
        batch = self.dataset.train_batch(index, view)
        exact = self.teacher(batch.image)
        kept = exact.to(self.logits.dtype)
        self._largest.copy_(torch.maximum(self._largest, exact.abs().max()))
        self.logits.index_copy_(0, slots, kept)
        self.changed.index_copy_(0, slots, decisions_differ(exact, kept.float(), batch.target))
        self._at.add_(len(slots))


def _not_captured(reason: str) -> None:
    say(f"teacher: its batches could not be captured ({reason}); they run as they are, with the same results")


def decisions_differ(exact: Tensor, kept: Tensor, target: Tensor) -> Tensor:
    """Whether rounding changed the predicted class, or which classes score at least as much as the true one.

    Shapes: (B, C), (B, C), (B,) int64 -> (B,) bool.
    """
    predicted = exact.argmax(dim=1) != kept.argmax(dim=1)
    at_least = [logits >= logits.gather(1, target[:, None]) for logits in (exact, kept)]
    return predicted | (at_least[0] != at_least[1]).any(dim=1)


def rows_of_epochs(dataset: Dataset, epochs: int | None, seeds: Sequence[int]) -> npt.NDArray[np.int64]:
    """The rows of a table that the first epochs of some seeds read, ascending; all rows when ``epochs`` is None.

    Raises:
        UserError: the views of the data set cannot be enumerated, so there is no table.
    """
    views = dataset.num_views
    if views is None:
        raise UserError("the views of this data set cannot be enumerated: there is no table of them")
    read = np.full(dataset.num_samples * views, epochs is None)
    for seed in seeds:
        for epoch in range(1, (epochs or 0) + 1):
            plan = epoch_plan(seed, epoch, dataset.num_samples, views)
            read[plan.index * views + plan.view] = True
    return np.flatnonzero(read)


class Filler:
    """Computes rows of a table ahead of any run.

    Args:
        teacher: the network.
        dataset: where the images come from; its views can be enumerated.
        kept: what the logits are rounded to.
    """

    BLOCK = 32  # teacher batches between two writes

    def __init__(self, teacher: FrozenTeacher, dataset: Dataset, *, kept: torch.dtype) -> None:
        assert dataset.num_views is not None
        self.views, self.block = dataset.num_views, self.BLOCK * teacher.batch_size
        record = cuda_graph() if teacher.device.type == "cuda" else None
        pairs = torch.zeros(2, self.block + 1, dtype=torch.int64, device=teacher.device)
        self.rows = TeacherRows(teacher, dataset, pairs, kept=kept, table=None, record=record, insist=True)

    def seconds_per_row(self) -> float:
        """Time of a row, measured on a few batches after as many to warm up; writes nothing."""
        size, spent = self.rows.teacher.batch_size, 0.0
        for count in (WARM_UP + 1, 4):
            started = time.perf_counter()
            self.rows.load(np.zeros(count * size, np.int64), np.zeros(count * size, np.int64))
            self.rows.require(count * size)
            self.rows.flush()
            spent = (time.perf_counter() - started) / (count * size)
        return spent

    def fill(self, table: TeacherTable, ids: npt.NDArray[np.int64]) -> Iterator[int]:
        """Compute the rows ``ids`` that are missing in ``table``; yields how many after each write."""
        self.rows.table = table
        ids = ids[table.missing(ids)]
        for start in range(0, len(ids), self.block):
            part = ids[start : start + self.block]
            self.rows.load(part // self.views, part % self.views)
            self.rows.require(len(part))
            self.rows.flush()
            yield len(part)


def describe(table: TeacherTable) -> str:
    """How much of ``table`` is there, and what rounding to its type does to it."""
    line = f"teacher table: {table.filled:,} of {table.rows:,} rows"
    if table.dtype == torch.float16:
        line += (
            f"; rounding to float16 changes the predicted class or those at or above the true one in"
            f" {100 * table.changed:.3f} % of them"
        )
        if table.changed > ROUNDING_SHARE:
            line += f", more than {100 * ROUNDING_SHARE:g} %: run.teacher_logits=float32 is exact"
    return line
