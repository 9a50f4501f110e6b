"""A data set whose pixels are read while training goes on: what the contract asks of one, and no more."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from mdistill.data import DATASETS, Batch, Dataset, StreamedDataset
from mdistill.errors import UserError

from .conftest import tiny_arrays

PADDING = 4
Indices = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


class StreamedBlobs(StreamedDataset):
    """The blobs of the tiny data set: cropped on the host by bits of the view, flipped on the device by another bit;
    a strong view is another crop, in fewer colours.

    Args:
        views: V; None for all words.

    Attributes:
        log: the samples of each call of ``read``.
    """

    splits = ("test",)
    image_size = 32
    strong_views = True

    def __init__(self, images: int = 150, classes: int = 10, views: int | None = None) -> None:
        self.num_samples, self.num_classes, self.num_views = images, classes, views
        self.notes = []
        self._pixels, labels = tiny_arrays(images, classes)
        self._test_pixels, test_labels = tiny_arrays(60, classes, seed=1)
        self.labels, self._test_labels = torch.from_numpy(labels), torch.from_numpy(test_labels)
        self._device_labels = self.labels
        self._device = torch.device("cpu")
        self.log: list[Indices] = []

    def to(self, device: torch.device | str) -> Self:
        self._device_labels, self._device = self.labels.to(device), torch.device(device)
        return self

    def hold_out(self, count: int) -> Dataset:
        if count:
            raise UserError("data.holdout: the streamed blobs hold nothing out")
        return self

    def read(self, index: Indices, view: Indices) -> Pixels:
        self.log.append(index.copy())
        return self._crops(index, view)

    def read_both_into(
        self, out: Pixels, strong_out: Pixels, index: Indices, view: Indices, strong_view: Indices
    ) -> None:
        self.read_into(out, index, view)
        strong_out[...] = self._crops(index, strong_view)

    def _crops(self, index: Indices, view: Indices) -> Pixels:
        size = self.image_size
        padded = np.pad(self._pixels[index], ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        tops, lefts = (view >> 1) % (2 * PADDING + 1), (view >> 8) % (2 * PADDING + 1)
        crops = zip(padded, tops, lefts, strict=True)
        return np.stack([image[top : top + size, left : left + size] for image, top, left in crops])

    def finish_batch(self, pixels: Tensor, index: Tensor, view: Tensor) -> Batch:
        flips = (view & 1).bool()[:, None, None, None]
        image = self._normalise(torch.where(flips, pixels.flip(2), pixels))
        return Batch(image, self._device_labels.index_select(0, index), index, view)

    def finish_strong(self, pixels: Tensor, index: Tensor, strong_view: Tensor) -> Tensor:
        """Half of them in fewer colours."""
        coarse = (strong_view & 1).bool()[:, None, None, None]
        return self._normalise(torch.where(coarse, pixels // 64 * 64, pixels))

    def eval_batches(
        self, split: str, batch_size: int, *, first: int = 0, stride: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = torch.arange(first, len(self._test_labels), stride)
        for part in numbers.split(batch_size):
            pixels = torch.from_numpy(self._test_pixels)[part].to(self._device)
            yield self._normalise(pixels), self._test_labels[part].to(self._device)

    def size(self, split: str) -> int:
        return len(self._test_labels)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._pixels.tobytes() + self._test_pixels.tobytes()).hexdigest()

    @staticmethod
    def _normalise(pixels: Tensor) -> Tensor:
        return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


@DATASETS.register("streamed_blobs")
def streamed_blobs(
    root: Path, download: bool, *, images: int = 150, classes: int = 10, views: int | None = None
) -> StreamedBlobs:
    return StreamedBlobs(images, classes, views)
