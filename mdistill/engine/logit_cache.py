"""A teacher's outputs on disk: a folder of immutable chunk files, named after everything that fixes the numbers.

A chunk is a safetensors file of n entries: ``entries`` (n,) int64, ascending; ``logits`` (n, W), rows of W numbers as a
``LogitFormat`` makes them of logits and perhaps more; ``changed`` (n,) bool. Its header holds the whole identity and a
checksum. A chunk is written under another name, flushed to disk and renamed; after that nothing changes it. So any
number of processes and hosts may read and add chunks at the same time. One that is not whole, or not of this identity,
is reported in a line and ignored.
"""

import hashlib
import json
import shutil
import time
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from mdistill.engine.console import print_line
from mdistill.errors import RunFailed, UserError
from mdistill.file_schemas import ChunkHeader, checked
from mdistill.files import atomic_write

FORMAT = 2  # 1 was one file for all entries, with a table.json beside it
HEADROOM = 1 << 30  # bytes that a cache leaves free on its disk, so that checkpoints still fit
STALE = 24 * 3600  # seconds after which a temporary file belongs to a process that has died

Ids = NDArray[np.int64]


class LogitCache:
    """Outputs of one teacher for every (training sample, view): each entry is there for good or missing.

    Attributes:
        path: the folder of the chunks.
        entries: number of entries, there or missing.
        width, dtype: of the rows.
        filled: number of entries that are there.
    """

    def __init__(
        self, root: Path, identity: Mapping[str, Any], *, entries: int, width: int, dtype: torch.dtype
    ) -> None:
        """Open the cache of ``identity`` below ``root``; its folder is made where it is missing.

        Args:
            root: folder of all caches (the user's --cache-root).
            identity: everything that fixes the outputs; must have a JSON form.

        Raises:
            UserError: the folder cannot be made.
        """
        self._dtype = np.dtype(str(dtype).removeprefix("torch."))
        shape = {"entries": entries, "classes": width, "dtype": self._dtype.name}  # W = C once
        content = {"format": FORMAT, **shape, "identity": dict(identity)}
        self._identity = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        self.path = root / hashlib.sha256(self._identity.encode()).hexdigest()[:16]
        self.entries, self.width, self.dtype = entries, width, dtype
        self.filled = self._changed = 0
        self._positions = np.full(entries, -1, np.int32)  # of each entry in the concatenation of all chunks
        self._chunks: list[NDArray[Any]] = []  # the rows of each, mapped into memory
        self._starts: list[int] = [0]  # position of each chunk's first entry, and where the next chunk will start
        self._seen: set[str] = set()  # names of chunks, used or not
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache-root: {root} cannot be written: {error}") from None
        for old in sorted(root.glob("*/table.json")):
            print_line(f"teacher: {old.parent} holds logits of an earlier version, not read now; it can be deleted")
        for temporary in self.path.glob(".*.tmp"):
            with suppress(OSError):
                if time.time() - temporary.stat().st_mtime > STALE:
                    temporary.unlink()
        self.refresh()

    @property
    def changed(self) -> float:
        """Share (0 to 1) of the entries there whose rounding changed a decision; 0 where none is there."""
        return self._changed / max(1, self.filled)

    @staticmethod
    def size(entries: int, width: int, dtype: torch.dtype) -> int:
        """Bytes on disk of so many entries."""
        return entries * (width * dtype.itemsize + 9)

    def refresh(self) -> None:
        """Open the chunks that were added since the last time, by whomever."""
        problems = []
        for name in sorted({file.name for file in self.path.glob("[!.]*.safetensors")} - self._seen):
            self._seen.add(name)
            try:
                self._open(self.path / name)
            except Exception as error:  # whatever a damaged file makes its readers raise
                problems.append(f"{name}: {' '.join(str(error).split())[:200] or type(error).__name__}")
        if problems:
            print_line(f"teacher: {len(problems)} chunk files in {self.path} are not used, such as {problems[0]}")

    def missing(self, ids: Ids) -> NDArray[np.bool_]:
        """Which of the entries ``ids`` (n,) are missing: (n,), in the order given."""
        return self._positions_of(ids) < 0

    def read(self, ids: Ids) -> Tensor:
        """The rows (n, W) of the entries ``ids`` (n,), in the order given, on the CPU in memory of their own.

        Raises:
            ValueError: an entry is missing.
        """
        positions = self._positions_of(ids)
        if len(ids) and positions.min() < 0:
            raise ValueError(f"entry {ids[positions < 0][0]} of {self.path} is missing")
        order = np.argsort(positions)  # chunk by chunk, each from its beginning to its end
        positions = positions[order]
        bounds = np.searchsorted(positions, self._starts)
        ordered = np.empty((len(ids), self.width), self._dtype)
        for chunk, start, first, last in zip(self._chunks, self._starts, bounds, bounds[1:], strict=False):
            chunk.take(positions[first:last] - start, axis=0, out=ordered[first:last], mode="clip")
        places = np.empty_like(order)
        places[order] = np.arange(len(ids))
        return torch.from_numpy(ordered.take(places, axis=0))

    def write(self, ids: Ids, logits: Tensor, changed: NDArray[np.bool_]) -> None:
        """Add the entries ``ids`` (n,), as one chunk; those that are there already, or come again, are left out.

        Args:
            logits: (n, W) on the CPU, in the cache's dtype.
            changed: (n,), whether rounding changed a decision.

        Raises:
            RunFailed: the disk is full, or the folder is not writable; nothing is left behind.
        """
        if logits.shape != (len(ids), self.width) or logits.dtype != self.dtype:
            raise ValueError(f"logits are {tuple(logits.shape)} in {logits.dtype}, not {(len(ids), self.width)}")
        ids, first = np.unique(ids, return_index=True)
        missing = self.missing(ids)
        ids, first = ids[missing], first[missing]
        if not len(ids):
            return
        self.require_room(len(ids))
        chunk = {"entries": ids, "logits": logits.numpy().take(first, axis=0), "changed": changed[first]}
        with atomic_write(self.path / f"{uuid.uuid4().hex}.safetensors") as temporary:
            temporary.write_bytes(save(chunk, {"identity": self._identity, "checksum": _checksum(chunk)}))
        self.refresh()

    def require_room(self, count: int) -> None:
        """Raise RunFailed unless ``count`` more entries leave ``HEADROOM`` on the disk."""
        with suppress(OSError):  # a missing folder is reported by the write
            needed, free = self.size(count, self.width, self.dtype), shutil.disk_usage(self.path).free
            if free < needed + HEADROOM:
                raise RunFailed(
                    f"the teacher's outputs need {needed / 1e6:,.2f} MB on disk, and {HEADROOM / 1e6:,.0f} MB must stay"
                    f" free beside them, but {self.path} has {free / 1e6:,.0f} MB free"
                )

    def _positions_of(self, ids: Ids) -> NDArray[np.int32]:
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.entries:
            raise ValueError(f"entries {ids.min()} to {ids.max()} are not all within 0 to {self.entries - 1}")
        return self._positions.take(ids)

    def _open(self, path: Path) -> None:
        """Verify a chunk and make its entries known; of an entry that is there already, the first copy stays."""
        if not path.is_file():
            raise ValueError("it is no file")
        with safe_open(path, "pt") as file:
            header = checked(ChunkHeader, file.metadata() or {}, path)
            if header.identity != self._identity:
                raise ValueError("it is of another teacher, data set or version")
            chunk = {key: file.get_tensor(key).numpy() for key in ("entries", "logits", "changed")}  # maps, no copies
        ids, count, start = chunk["entries"], len(chunk["entries"]), self._starts[-1]
        layout = [(array.dtype, array.shape) for array in chunk.values()]
        if layout != [(np.int64, (count,)), (self._dtype, (count, self.width)), (np.bool_, (count,))]:
            raise ValueError(f"it holds {layout}")
        if header.checksum != _checksum(chunk):
            raise ValueError("its checksum is wrong")
        if not count or ids[0] < 0 or ids[-1] >= self.entries or (ids[1:] <= ids[:-1]).any():
            raise ValueError(f"its entries are not ascending numbers from 0 to {self.entries - 1}")
        if start + count > np.iinfo(np.int32).max:
            raise ValueError(f"it is too many: {start} entries are in use")
        new = self._positions[ids] < 0
        self._positions[ids[new]] = start + np.flatnonzero(new)
        self.filled += int(new.sum())
        self._changed += int(chunk["changed"][new].sum())
        self._chunks.append(chunk["logits"])
        self._starts.append(start + count)


def _checksum(chunk: Mapping[str, NDArray[Any]]) -> str:
    """CRC-32 of a chunk's arrays."""
    value = 0
    for key in ("entries", "logits", "changed"):
        value = zlib.crc32(chunk[key].data, value)
    return f"{value:08x}"
