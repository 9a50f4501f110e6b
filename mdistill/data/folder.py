"""Images in folders, one for each class, read while training goes on.

    ROOT/train/<class>/*.jpg    trained on
    ROOT/val/<class>/*.jpg      evaluated (or ROOT/test)

Letters: N images, B batch, S image size.
"""

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from mdistill import distributed
from mdistill.data import augment, resized_crop
from mdistill.data.batch import Batch
from mdistill.data.dataset import DATASETS, StreamedDataset, held_out
from mdistill.data.decoding import Pixels, decode
from mdistill.errors import UserError, printable, shown, suggestion
from mdistill.registry import PositiveInt

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
EVAL_RATIO = 256 / 224  # of the short side to the crop's, when evaluating
MOST_WORKERS = 32

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The files of a split, class by class, each class in the order of their names."""

    folder: Path
    files: tuple[str, ...]  # relative to ``folder``
    labels: Indices  # (N,)
    sizes: Indices  # (N,), bytes

    def read(self, number: int) -> Pixels:
        """The pixels (H, W, 3) uint8 of a file.

        Raises:
            UserError: it is gone, damaged, or no image.
        """
        path = self.folder / self.files[number]
        try:
            return decode(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path}: no image that can be read: {printable(str(error), 200)}") from error


class FolderDataset(StreamedDataset):
    """Photographs of any size: trained on as random resized crops, evaluated as the centre of the resized image.

    A training image is a function of its file's number in the split and of the view: neither workers nor steps enter.

    Args:
        train: the images that are trained on.
        test: those that are evaluated.
        class_names: the names of the class folders, sorted; the class is the position here.
        image_size: S, pixels.
        mean: of the three channels, on the scale 0 to 1.
        std: of the three channels, on the same scale.
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
        views: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.class_names, self.num_classes, self.image_size = tuple(class_names), len(class_names), image_size
        self.splits, self.num_samples, self.num_views = ("test",), len(train.files), views
        self._labels = self.labels = torch.from_numpy(train.labels)
        self.notes = [f"{len(train.files):,} images of {len(class_names)} classes, {len(test.files):,} to evaluate"]
        self._train, self._kept = train, np.arange(len(train.files))  # which of its files are trained on
        self._eval: dict[str, tuple[Split, Indices]] = {"test": (test, np.arange(len(test.files)))}
        self._settings = f"folder {image_size} {[*map(float, mean)]} {[*map(float, std)]} {resized_crop.SCHEME}"
        self.mean, self.std = tuple(mean), tuple(std)
        self._normalize = augment.Normalization(image_size, self.mean, self.std)
        self._device_labels, self._device = self._labels, torch.device("cpu")
        workers = workers or min(MOST_WORKERS, distributed.usable_cores())
        self._workers = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="mdistill-decode")

    def to(self, device: torch.device | str) -> Self:
        self._device = torch.device(device)
        self._device_labels = self._labels.to(device)
        self._normalize = self._normalize.to(device)
        return self

    def hold_out(self, count: int) -> "FolderDataset":
        if count == 0:
            return self
        if not 0 < count < self.num_samples:
            raise UserError(
                f"data.holdout must be from 0 to {self.num_samples - 1}, fewer than the training images; found {count}"
            )
        held, remaining = held_out(self._train.labels, count)
        other = copy.copy(self)
        other._kept, other.num_samples = remaining.numpy(), len(remaining)
        other._labels = other.labels = self._labels[remaining]
        other._device_labels = other._labels.to(self._device)
        other.splits = ("val", *self.splits)
        other._eval = {"val": (self._train, held.numpy()), **self._eval}
        return other

    def read(self, index: Indices, view: Indices) -> Pixels:
        files = self._kept[index]
        pixels = np.empty((len(files), self.image_size, self.image_size, 3), np.uint8)

        def crop(row: int) -> None:
            image = self._train.read(files[row])
            number, which = files[row : row + 1], view[row : row + 1]
            box = resized_crop.draw(number, which, np.array(image.shape[:1]), np.array(image.shape[1:2]))
            (top,), (left,), (height,), (width,) = box.top, box.left, box.height, box.width
            cut = resize(image[top : top + height, left : left + width], self.image_size, self.image_size)
            pixels[row] = cut[:, ::-1] if box.flip[0] else cut

        self._all([self._workers.submit(crop, row) for row in range(len(files))])
        return pixels

    def finish_batch(self, pixels: Tensor, index: Tensor, view: Tensor) -> Batch:
        return Batch(self._normalize(pixels), self._device_labels.index_select(0, index), index, view)

    def eval_batches(
        self, split: str, batch_size: int, *, first: int = 0, stride: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        files, numbers = self._eval[split]
        numbers = numbers[first::stride]

        def begin(start: int) -> tuple[Indices, Pixels, list[Future[None]]]:
            part = numbers[start : start + batch_size]
            pixels = np.empty((len(part), self.image_size, self.image_size, 3), np.uint8)

            def centre(row: int) -> None:
                pixels[row] = centre_crop(files.read(part[row]), self.image_size)

            return part, pixels, [self._workers.submit(centre, row) for row in range(len(part))]

        ahead = begin(0)
        for start in range(0, len(numbers), batch_size):
            part, pixels, pending = ahead
            self._all(pending)
            ahead = begin(start + batch_size)  # decoded while the device is at work
            target = torch.from_numpy(files.labels[part])
            yield self._normalize(torch.from_numpy(pixels).to(self._device)), target.to(self._device)

    def size(self, split: str) -> int:
        return len(self._eval[split][1])

    def fingerprint(self) -> str:
        """Of the files' names, classes and sizes; not of their content, which may be hundreds of gigabytes."""
        digest = hashlib.sha256(self._settings.encode())
        splits = {"train": (self._train, self._kept), **self._eval}
        for split, (files, numbers) in splits.items():
            digest.update(f"{split} {len(numbers)}".encode())
            for number in numbers:
                line = f"{files.files[number]}\0{files.labels[number]}\0{files.sizes[number]}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

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
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    views: PositiveInt | None = None,
) -> FolderDataset:
    """Images in folders, one a class, under ``root/train`` and ``root/val`` or ``root/test``.

    Args:
        root: where they are, from the folder of all data sets or as it stands.
        image_size: S, pixels, of the crops.
        mean: of the three channels, on the scale 0 to 1; ImageNet's unless given.
        std: the same.
        views: V, the crops of an image that there are, so that a teacher's logits can be stored; each comes in about
            one of V epochs. None: no crop comes twice.

    Raises:
        UserError: a folder is missing or empty, or train and val have different classes.
    """
    place = next((path for path in (data_root / root, root) if path.is_dir()), None)
    if place is None:
        raise UserError(f"data.root: there is no folder {data_root / root}; it should hold train/ and val/")
    train_folder = place / "train"
    test_folder = next((place / name for name in ("val", "test") if (place / name).is_dir()), None)
    if not train_folder.is_dir() or test_folder is None:
        inside = ", ".join(sorted(path.name for path in place.iterdir())[:8]) or "nothing"
        raise UserError(f"data.root: {place} should hold train/ and val/ (or test/), found {printable(inside)}")
    classes = _classes_in(train_folder)
    found = _classes_in(test_folder)
    if found != classes:
        missing, more = sorted({*classes} - {*found}), sorted({*found} - {*classes})
        wrong, where = (missing[0], train_folder) if missing else (more[0], test_folder)
        near = suggestion(wrong, more if missing else classes)
        raise UserError(
            f"{place}: the class folders of {train_folder.name} and {test_folder.name} differ: {len(missing)} are in"
            f" {train_folder.name} alone, {len(more)} in {test_folder.name} alone, such as {where / wrong}{near}"
        )
    if not all(value > 0 for value in std):
        raise UserError(f"data.std: should be 3 positive numbers, found {shown(list(std))}")
    train, test = (scan(folder, classes) for folder in (train_folder, test_folder))
    return FolderDataset(train, test, classes, image_size=image_size, mean=mean, std=std, views=views)


def scan(folder: Path, classes: Sequence[str]) -> Split:
    """The images in the class folders of ``folder``, by suffix; hidden files and others are left out.

    Raises:
        UserError: a class has no image.
    """
    files: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for label, name in enumerate(classes):
        entries = sorted(_images_below(folder / name, name))
        if not entries:
            raise UserError(f"{folder / name} holds no image ({', '.join(sorted(SUFFIXES))})")
        files += [path for path, _ in entries]
        sizes += [size for _, size in entries]
        labels += [label] * len(entries)
    return Split(folder, tuple(files), np.array(labels, np.int64), np.array(sizes, np.int64))


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """(H, W, 3) uint8 to (height, width, 3), bilinear with antialiasing, by torch: the same bits on every machine."""
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(tensor, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def centre_crop(image: Pixels, size: int) -> Pixels:
    """The central ``size`` x ``size`` pixels of ``image`` (H, W, 3), its short side resized to 256 / 224 of that."""
    height, width = image.shape[:2]
    short = round(size * EVAL_RATIO)
    larger = int(short * max(height, width) / min(height, width))
    height, width = (larger, short) if height > width else (short, larger)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(image, height, width)[top : top + size, left : left + size]


def _classes_in(folder: Path) -> list[str]:
    """Names of the class folders, sorted.

    Raises:
        UserError: there are none.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        loose = sum(entry.suffix.lower() in SUFFIXES for entry in folder.iterdir())
        advice = f"; it holds {loose:,} images, which have to be sorted into folders by class" if loose else ""
        raise UserError(f"{folder} should hold a folder for each of at least 2 classes, found {len(names)}{advice}")
    return names


def _images_below(folder: Path, name: str) -> Iterator[tuple[str, int]]:
    """Path below the split's folder and size in bytes of each image in ``folder``, at any depth."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{name}/{entry.name}"
            if entry.is_dir():
                yield from _images_below(Path(entry.path), path)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                yield path, entry.stat().st_size
