"""Images in folders, one for each class, read while training goes on, or held in memory where they are small.

Letters: N images, B batch, S image size.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from mdistill.data import augment as augmentation
from mdistill.data import randaugment, resized_crop
from mdistill.data.batch import Batch
from mdistill.data.dataset import DATASETS, Dataset, InMemoryDataset, StreamedDataset, held_out
from mdistill.data.decoding import Pixels
from mdistill.data.image_files import (
    COPIED,
    Split,
    common_classes,
    decoding_threads,
    find_root,
    find_splits,
    load_squares,
    scan,
)
from mdistill.data.loader import upload
from mdistill.data.resizing import centre_crop, mirrored, resize
from mdistill.errors import UserError, printable, shown
from mdistill.files import read_text
from mdistill.registry import NonNegativeInt, PositiveInt

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Indices = npt.NDArray[np.int64]


class FolderDataset(StreamedDataset):
    """Photographs of any size: trained on as random resized crops, evaluated as the centre of the resized image.

    A training image is a function of its file's number in the split and of the view: neither workers nor steps enter.
    Its strong view is a crop of its own, by other words of ``resized_crop``, to which ``randaugment`` is applied.

    Args:
        train: the images that are trained on.
        test: those that are evaluated.
        class_names: the names of the class folders, sorted; the class is the position here.
        image_size: S, pixels.
        mean: of the three channels, on the scale 0 to 1.
        std: of the three channels, on the same scale.
        flip: mirror half of the views left to right.
        notes: what a run prints and records about the data.
        views: V, the views of an image; None for all 2^63.
        workers: threads that decode; None for one on each core, at most ``MOST_WORKERS``.
    """

    def __init__(
        self,
        train: Split,
        test: Split,
        class_names: Sequence[str],
        *,
        image_size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        flip: bool = True,
        notes: Sequence[str] = (),
        views: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.class_names, self.num_classes, self.image_size = tuple(class_names), len(class_names), image_size
        self.splits, self.num_samples, self.num_views = ("test",), len(train.files), views
        self._labels = self.labels = torch.from_numpy(train.labels)
        self.notes = [count_line(train, test, class_names), *notes]
        self._train, self._kept = train, np.arange(len(train.files))  # which of its files are trained on
        self._eval: dict[str, tuple[Split, Indices]] = {"test": (test, np.arange(len(test.files)))}
        self._settings = f"folder {image_size} {[*map(float, mean)]} {[*map(float, std)]} {resized_crop.SCHEME}"
        self._settings += "" if flip else " unflipped"
        self._flip = flip
        self.mean, self.std = tuple(mean), tuple(std)
        self._normalize = augmentation.Normalization(image_size, self.mean, self.std)
        self._device_labels, self._device = self._labels, torch.device("cpu")
        self.strong_views = image_size <= randaugment.MOST_PIXELS
        self._strengthen: randaugment.Strengthen | None = None  # made when it is first asked for
        self._workers = ThreadPoolExecutor(workers or decoding_threads(), thread_name_prefix="mdistill-decode")

    def to(self, device: torch.device | str) -> Self:
        self._device, self._strengthen = torch.device(device), None
        self._device_labels = self._labels.to(device)
        self._normalize = self._normalize.to(device)
        return self

    def hold_out(self, count: int) -> "FolderDataset":
        if count == 0:
            return self
        held, remaining = held_out(self._train.labels, count)
        other = copy.copy(self)
        other._kept, other.num_samples = remaining.numpy(), len(remaining)
        other._labels = other.labels = self._labels[remaining]
        other._device_labels = other._labels.to(self._device)
        other.splits = ("val", *self.splits)
        other._eval = {"val": (self._train, held.numpy()), **self._eval}
        return other

    def read(self, index: Indices, view: Indices) -> Pixels:
        pixels = np.empty((len(index), self.image_size, self.image_size, 3), np.uint8)
        self.read_into(pixels, index, view)
        return pixels

    def read_into(self, out: Pixels, index: Indices, view: Indices) -> None:
        self._read([out], index, [resized_crop.draw(self._kept[index], view)])

    def read_both_into(
        self, out: Pixels, strong_out: Pixels, index: Indices, view: Indices, strong_view: Indices
    ) -> None:
        files = self._kept[index]
        words = resized_crop.draw(files, view), resized_crop.draw(files, strong_view, resized_crop.STRONG_STREAM)
        self._read([out, strong_out], index, words)

    def _read(self, outs: Sequence[Pixels], index: Indices, words: Sequence[resized_crop.Words]) -> None:
        """Decode each image once and write one crop of it to each of ``outs``."""
        files = self._kept[index]

        def read_row(row: int) -> None:
            image = self._train.read(files[row])
            for out, drawn in zip(outs, words, strict=True):
                self._crop(image, drawn[row], out[row])

        self._all([self._workers.submit(read_row, row) for row in range(len(files))])

    def _crop(self, image: Pixels, words: npt.NDArray[Any], out: Pixels) -> None:
        """Write the crop of ``image`` (H, W, 3) that ``words`` decide to ``out`` (S, S, 3)."""
        top, left, height, width, flip = resized_crop.crop(words, *image.shape[:2])
        cut = resize(image[top : top + height, left : left + width], *out.shape[:2])
        out[:] = mirrored(cut) if flip and self._flip else cut

    def finish_batch(self, pixels: Tensor, index: Tensor, view: Tensor) -> Batch:
        return Batch(self._normalize(pixels), self._device_labels.index_select(0, index), index, view)

    def finish_strong(self, pixels: Tensor, index: Tensor, strong_view: Tensor) -> Tensor:
        if self._strengthen is None:
            self._strengthen = randaugment.Strengthen(self.image_size).to(self._device)
        return self._normalize(self._strengthen(pixels, randaugment.decode(strong_view, 1)))

    def eval_batches(
        self, split: str, batch_size: int, *, first: int = 0, stride: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        files, numbers = self._eval[split]
        for part, image in self._centres(files, numbers[first::stride], batch_size):
            yield image, upload(torch.from_numpy(files.labels[part]), self._device)

    def plain_batches(self, index: Indices, batch_size: int) -> Iterator[Tensor]:
        for _, image in self._centres(self._train, self._kept[index], batch_size):
            yield image

    def _centres(self, files: Split, numbers: Indices, batch_size: int) -> Iterator[tuple[Indices, Tensor]]:
        """The centres (B, 3, S, S) of these images in order, with the numbers (B,) of each batch."""

        def begin(start: int) -> tuple[Indices, Tensor, list[Future[None]]]:
            part = numbers[start : start + batch_size]
            shape = len(part), self.image_size, self.image_size, 3
            pinned = self._device.type == "cuda" and len(part) > 0  # so that the host does not wait for the upload
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
            out = pixels.numpy()

            def centre(row: int) -> None:
                out[row] = centre_crop(files.read(part[row]), self.image_size)

            return part, pixels, [self._workers.submit(centre, row) for row in range(len(part))]

        ahead = begin(0)
        for start in range(0, len(numbers), batch_size):
            part, pixels, pending = ahead
            self._all(pending)
            ahead = begin(start + batch_size)  # decoded while the device is at work
            yield part, self._normalize(pixels.to(self._device, non_blocking=True))

    def size(self, split: str) -> int:
        return len(self._eval[split][1])

    def fingerprint(self) -> str:
        """Of the files' names, classes and sizes; not of their content, which may be hundreds of gigabytes."""
        return fingerprint_of_files({"train": (self._train, self._kept), **self._eval}, self._settings)

    @staticmethod
    def _all(pending: Sequence[Future[None]]) -> None:
        """Wait for all, and raise the first error in their order."""
        errors = [future.exception() for future in pending]
        for error in errors:
            if error is not None:
                raise error


@DATASETS.register("folder")
def folder(
    data_root: Path,
    download: bool,
    *,
    root: Path,
    image_size: PositiveInt = 224,
    augment: Literal["random_resized_crop", "crop"] = "random_resized_crop",
    padding: NonNegativeInt | None = None,
    flip: bool = True,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    views: PositiveInt | None = None,
) -> Dataset:
    """Images in folders, one a class, under ``root/train`` and ``root/val`` or ``root/test``.

    Args:
        root: where they are, from the folder of all data sets or as it stands.
        image_size: S, pixels, of the images that networks see.
        augment: random_resized_crop reads images of any size while training goes on; crop holds small ones in memory,
            S by S pixels, padded with zeros and cropped.
        padding: of ``crop``, pixels on each side; None takes an eighth of S, rounded.
        flip: mirror half of the views left to right.
        mean: of the three channels, on the scale 0 to 1; ImageNet's unless given.
        std: the same.
        views: V, the crops of an image that there are, so that a teacher's logits can be stored; each comes in about
            one of V epochs. None: no crop comes twice.

    Raises:
        UserError: a folder is missing or empty, train and val have different classes, or a setting goes with the other
            ``augment``.
    """
    place = find_root(data_root, root)
    splits = find_splits(place)
    if not all(value > 0 for value in std):
        raise UserError(f"data.std: should be 3 positive numbers, found {shown(list(std))}")
    if augment != "crop" and padding is not None:
        raise UserError(f"data.padding: {padding} goes with data.augment crop, found {augment}; remove it")
    if augment == "crop" and views is not None:
        raise UserError(f"data.views: {views} goes with data.augment random_resized_crop, found crop; remove it")
    classes = common_classes(*splits)
    train, test = (scan(folder, classes) for folder in splits)
    if augment == "crop":
        return in_memory(
            train, test, classes, image_size, padding=padding, flip=flip, mean=mean, std=std, notes=copy_notes(place)
        )
    return FolderDataset(
        train,
        test,
        classes,
        image_size=image_size,
        mean=mean,
        std=std,
        flip=flip,
        notes=copy_notes(place),
        views=views,
    )


def in_memory(
    train: Split,
    test: Split,
    class_names: Sequence[str],
    size: int,
    *,
    padding: int | None,
    flip: bool,
    mean: Sequence[float],
    std: Sequence[float],
    notes: Sequence[str] = (),
) -> InMemoryDataset:
    """Small images of files, held in memory as S by S pixels; see ``folder`` and ``load_squares``."""
    (train_pixels, test_pixels), resized = load_squares([train, test], size)
    images = len(train_pixels) + len(test_pixels)
    changed = [f"{resized:,} of {images:,} images were resized to {size} x {size} pixels"] if resized else []
    return InMemoryDataset(
        (train_pixels, train.labels),
        (test_pixels, test.labels),
        num_classes=len(class_names),
        mean=mean,
        std=std,
        padding=round(size / 8) if padding is None else padding,
        flip=flip,
        notes=[count_line(train, test, class_names), *changed, *notes],
        class_names=class_names,
    )


def fingerprint_of_files(splits: Mapping[str, tuple[Split, Indices]], settings: str = "") -> str:
    """SHA-256, in hexadecimal, of the names, classes and sizes of these files of each split."""
    digest = hashlib.sha256(settings.encode())
    for name, (split, numbers) in splits.items():
        digest.update(f"{name} {len(numbers)}".encode())
        for number in numbers.tolist():
            line = f"{split.files[number]}\0{split.labels[number]}\0{split.sizes[number]}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def copy_notes(root: Path) -> list[str]:
    """What to say of the images in ``root`` if they are a smaller copy of others."""
    path = root / COPIED
    if not path.exists():
        return []
    text = read_text(path).strip()
    try:
        record = json.loads(text)
        how = f"short side {record['short_side']:d}, JPEG quality {record['quality']:d}"
    except (ValueError, KeyError, TypeError):  # nothing depends on it
        how = printable(text, 200)
    return [f"a smaller copy of other images ({path.name}): {how}"]


def count_line(train: Split, test: Split, class_names: Sequence[str]) -> str:
    """What a run says first of its images."""
    return f"{len(train.files):,} images of {len(class_names):,} classes, {len(test.files):,} to evaluate"
