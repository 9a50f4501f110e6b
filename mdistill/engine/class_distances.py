"""How far classes lie apart for a frozen teacher: computed once from its outputs for their images, and kept in a file.

Letters: C classes, n rows of a class, D width of a row, B images of a teacher batch, P positions of an image.
"""

import hashlib
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mdistill import distributed
from mdistill.data import Dataset
from mdistill.engine.console import print_line
from mdistill.engine.teacher import FrozenTeacher
from mdistill.errors import RunFailed, UserError
from mdistill.file_schemas import ChunkHeader, checked
from mdistill.files import atomic_write
from mdistill.models.base import Features
from mdistill.models.memory_format import to_layout
from mdistill.precision import computing, widen

By = Literal["last_map", "logits"]

FORMAT = 1
FOLDER = "class_distances"  # below the folder of all caches
BYTES = 2**32  # of rows that are held on the device at a time, at most; all of CIFAR-100's of resnet32x4 are 3.3 GB
TILE_BYTES = 2**28  # of inner products of rows that are held beside them


def cka_distances(
    load: Callable[[range], Tensor], classes: int, *, group: int, advance: Callable[[], object] = lambda: None
) -> Tensor:
    """1 - CKA between every two classes, 0 for a class and itself; 1 where the rows of one do not vary.

    CKA of X_a and X_b, whose columns are centred, is |X_b' X_a|^2 / (|X_a' X_a| |X_b' X_b|) in Frobenius norms: row i
    of one class belongs to row i of the other (Kornblith et al., arXiv:1905.00414). |X_b' X_a|^2 is the inner product
    of the Gram matrices X_a X_a' and X_b X_b', which are made and compared tile by tile for many classes at once:
    about C n^2 (C + D) operations, in memory that does not grow with n^2.

    Args:
        load: the rows (c, n, D) of c classes, which are overwritten; asked for again where not all fit at once.
        classes: C.
        group: classes whose rows are held at once; where that is fewer than all, those of two groups are.
        advance: called after each tile.

    Returns:
        (C, C) float64, symmetric, on the CPU.
    """
    groups = [range(start, min(start + group, classes)) for start in range(0, classes, group)]
    products = torch.zeros(classes, classes, dtype=torch.float64)
    for number, left in enumerate(groups):
        first = _centre(load(left))
        for right in groups[number:]:
            second = first if right == left else _centre(load(right))
            block = _inner_products(first, second, advance).cpu()
            products[left.start : left.stop, right.start : right.stop] = block
            products[right.start : right.stop, left.start : left.stop] = block.T
    norms = products.diagonal().sqrt()
    scale = norms[:, None] * norms
    distances = 1 - torch.where(scale > 0, products / scale, 0.0)
    return ((distances + distances.T) / 2).fill_diagonal_(0.0)


def _centre(rows: Tensor) -> Tensor:
    return rows.sub_(rows.mean(dim=1, keepdim=True))


def _inner_products(first: Tensor, second: Tensor, advance: Callable[[], object]) -> Tensor:
    """<X_a X_a', X_b X_b'> of every two classes: (F, n, D), (S, n, D) -> (F, S) float64."""
    held = len(first) + (len(second) if second is not first else 0)
    tile = max(1, math.isqrt(TILE_BYTES // (held * first.element_size())))
    total = torch.zeros(len(first), len(second), dtype=torch.float64, device=first.device)
    for start in range(0, first.shape[1], tile):
        for other in range(0, start + 1, tile):  # the matrices are symmetric
            rows, columns = slice(start, start + tile), slice(other, other + tile)
            gram = (first[:, rows] @ first[:, columns].mT).flatten(1)
            others = gram if second is first else (second[:, rows] @ second[:, columns].mT).flatten(1)
            total += (1 if other == start else 2) * (gram @ others.T)
            advance()
    return total


class ClassDistances:
    """The distances of one teacher: read from their file, or computed and written to it.

    A class is compared by its first training images, as many as the smallest class has, as they are evaluated; of a map
    every position is a row.

    Args:
        teacher: the network.
        dataset: where the images come from, on the teacher's device.
        by: what is compared, the teacher's last map or its logits.
        fingerprints: those of the weights of the "teacher" and of the "data".
        root: folder of all caches; None keeps nothing.

    Raises:
        UserError: the data set does not say its labels, has a class without images, or gives no images as they are.
    """

    def __init__(
        self, teacher: FrozenTeacher, dataset: Dataset, by: By, *, fingerprints: Mapping[str, str], root: Path | None
    ) -> None:
        self._teacher, self._dataset, self._by = teacher, dataset, by
        self._classes = dataset.num_classes
        if type(dataset).plain_batches is Dataset.plain_batches:
            raise UserError(
                f"distances between classes need training images without augmentation, and {type(dataset).__name__} has"
                " no plain_batches, which gives them"
            )
        if dataset.labels is None:
            raise UserError(
                "distances between classes need the labels of all training images, which the data set lacks"
            )
        labels = dataset.labels.numpy()
        counts = np.bincount(labels, minlength=self._classes)
        if not counts.all():
            raise UserError(
                f"distances between classes need training images of each: class {int(counts.argmin())} has none"
            )
        self._images = int(counts.min())  # of each class
        order = np.argsort(labels, kind="stable")
        starts = np.cumsum(counts) - counts
        self._members = np.stack([order[start : start + self._images] for start in starts])  # (C, images)
        identity = {
            "format": FORMAT,
            "weights": fingerprints["teacher"],
            "data": fingerprints["data"],
            "by": by,
            **teacher.identity(),
        }
        self._identity = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        name = hashlib.sha256(self._identity.encode()).hexdigest()[:16]
        self.path = None if root is None else root / FOLDER / f"{name}.safetensors"

    def provide(self, *, stopped: Callable[[], None] = lambda: None, must_write: bool = False) -> Tensor:
        """The distances (C, C) float32, on the CPU.

        Args:
            stopped: called every now and then while they are computed; raises to end that.
            must_write: whether a file that cannot be written ends the work; else it goes on without.

        Raises:
            RunFailed: an output of the teacher is not finite; or ``must_write``.
        """
        found = self._read()
        if found is not None:
            print_line(f"class distances: read from {self.path}")
            return found
        started = time.monotonic()
        distances = self._compute(stopped).float()
        if not distances.isfinite().all():
            raise RunFailed("distances between classes are not finite: wrong weights of the teacher?")
        kept = self._write(distances, must_write)
        print_line(f"class distances: computed in {time.monotonic() - started:.0f} s, {kept}")
        return distances

    @torch.no_grad()
    def _compute(self, stopped: Callable[[], None]) -> Tensor:
        from tqdm import tqdm

        images, classes = self._members.shape[1], self._classes
        (one,) = self._outputs(self._members[0, :1])
        size = one.numel() * one.element_size() * images  # bytes of a class
        group = classes if size * classes <= BYTES else max(1, BYTES // (2 * size))
        groups = -(-classes // group)
        loads = [min(group, classes - group * number) * (number + 1) for number in range(groups)]
        print_line(
            f"class distances: computed once, by {self._by} of {images} images of each of {classes} classes, rows of"
            f" {one.shape[-1]} numbers, {min(size * classes, 2 * size * group) / 1e9:.2f} GB at a time"
        )
        hidden = True if distributed.rank() != 0 else None  # None: where there is no terminal
        bar = tqdm(
            total=sum(loads) * images,
            desc="class distances",
            unit="image",
            leave=False,
            dynamic_ncols=True,
            disable=hidden,
        )

        def load(part: range) -> Tensor:
            rows = one.new_empty(len(part) * images, *one.shape[1:])
            start = 0
            for outputs in self._outputs(self._members[part.start : part.stop].reshape(-1)):
                rows[start : start + len(outputs)] = outputs
                start += len(outputs)
                bar.update(len(outputs))
                stopped()
            return rows.view(len(part), -1, one.shape[-1])

        with bar:
            return cka_distances(load, classes, group=group, advance=stopped)

    def _outputs(self, index: NDArray[np.int64]) -> Iterator[Tensor]:
        """What is compared of these images, batch by batch: (B, P, D)."""
        teacher = self._teacher
        for image in self._dataset.plain_batches(index, teacher.batch_size):
            if self._by == "logits":
                yield teacher(image)[:, None, : self._classes]  # without pooled features, where it gives them too
                continue
            with computing(teacher.precision, teacher.device):
                features: Features = teacher.network.forward_features(to_layout(teacher.network, image))  # type: ignore[operator]
            yield widen(features.last_map).flatten(2).mT

    def _read(self) -> Tensor | None:
        """What the file holds; None without one, or with one that is not whole or of something else."""
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = checked(ChunkHeader, file.metadata() or {}, self.path)
                if header.identity != self._identity:
                    raise ValueError("it is of another teacher, data set or version")
                distances: Tensor = file.get_tensor("distances").clone()
            if (distances.dtype, distances.shape) != (torch.float32, (self._classes, self._classes)):
                raise ValueError(f"it holds {tuple(distances.shape)} in {distances.dtype}")
            if header.checksum != _checksum(distances):
                raise ValueError("its checksum is wrong")
        except Exception as error:  # whatever a damaged file makes its readers raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print_line(f"class distances: {self.path} is not used: {reason}")
            return None
        return distances

    def _write(self, distances: Tensor, must_write: bool) -> str:
        """Keep ``distances``, on rank 0; what became of that, in words."""
        if self.path is None:
            return "kept in checkpoints alone: no cache was asked for"
        if distributed.rank() != 0:
            return ""
        content = save({"distances": distances}, {"identity": self._identity, "checksum": _checksum(distances)})
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(content)
        except RunFailed as error:  # the disk is full, or the folder is read-only
            if must_write:
                raise
            return f"and not kept: {error}"
        return f"kept in {self.path}"


def _checksum(distances: Tensor) -> str:
    """CRC-32 of a matrix."""
    return f"{zlib.crc32(distances.numpy().data):08x}"
