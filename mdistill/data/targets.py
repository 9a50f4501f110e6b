"""Data sets that the features of a trained network are tried on, as small squares in memory.

Letters: N images, S image size.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdistill.data import stl10, tiny_imagenet
from mdistill.data.dataset import InMemoryDataset, Split
from mdistill.data.folder import IMAGENET_MEAN, IMAGENET_STD, copy_notes
from mdistill.data.image_files import Split as Files
from mdistill.data.image_files import common_classes, find_splits, in_threads, load_squares, scan
from mdistill.data.resizing import Filter, resize
from mdistill.errors import UserError, printable, suggestion

KINDS = ("stl10", "tiny_imagenet", "folder")
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of the three channels, on the scale 0 to 1."""

FIXED: dict[str, Statistics] = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": ((0.5,) * 3, (0.5,) * 3)}
"""Statistics that belong neither to the student's data set nor to the target's."""


@dataclass(frozen=True)
class Target:
    """Where a target is; ``name`` is what its results are called."""

    kind: str  # one of ``KINDS``
    place: Path | None = None  # of its files, from the folder of all data sets or as it stands

    @property
    def name(self) -> str:
        """The kind; of a folder of images with the name of the folder."""
        if self.kind != "folder":
            return self.kind
        assert self.place is not None
        return "folder-" + (re.sub(r"[^A-Za-z0-9_.\-]", "_", self.place.resolve().name)[:80] or "_")


@dataclass(frozen=True)
class Images:
    """A target's images before they are normalised."""

    train: Split  # (N, S, S, 3) uint8 and labels (N,)
    test: Split
    class_names: tuple[str, ...]
    num_classes: int
    notes: tuple[str, ...]
    statistics: Statistics  # of the training images, as they are published, else as they are here

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> InMemoryDataset:
        """As a data set without augmentation."""
        return InMemoryDataset(
            self.train,
            self.test,
            num_classes=self.num_classes,
            mean=mean,
            std=std,
            padding=0,
            flip=False,
            notes=self.notes,
            class_names=self.class_names,
        )


def parse_target(text: str) -> Target:
    """``stl10``, ``tiny_imagenet`` or ``folder:PATH``; the first two may have a ``:PATH`` too.

    Raises:
        UserError: it is none of them.
    """
    kind, colon, place = text.partition(":")
    if kind not in KINDS:
        raise UserError(
            f"--target: unknown {printable(text, 80)!r}{suggestion(kind, KINDS)} (allowed: stl10, tiny_imagenet,"
            " folder:PATH)"
        )
    if (colon or kind == "folder") and not place.strip():
        raise UserError(f"--target: {text!r} names no folder; write {kind}:PATH")
    return Target(kind, Path(place) if place else None)


def load_target(target: Target, data_root: Path, *, download: bool, size: int, by: Filter) -> Images:
    """The images of ``target``, S by S pixels: those of another size are resized, and of what is no square the centre.

    Args:
        data_root: folder of all data sets.
        download: fetch it where it is not there; of STL-10 alone.
        size: S.
        by: how it is resized.

    Raises:
        UserError: it is not there, or something in it does not fit; says what.
    """
    notes: list[str] = []
    if target.kind == "stl10":
        root = data_root if target.place is None else _either(data_root, target.place)
        (train, labels), (test, test_labels), names = stl10.read_stl10(root, download, notes)
        splits = [(_squares(train, size, by), labels), (_squares(test, size, by), test_labels)]
        return Images(splits[0], splits[1], names, stl10.CLASSES, tuple(notes), (stl10.MEAN, stl10.STD))
    place = _folder(target, data_root)
    if target.kind == "tiny_imagenet":
        train_files, test_files, classes = tiny_imagenet.read_layout(place, notes)
    else:
        folders = find_splits(place)
        classes = common_classes(*folders)
        train_files, test_files = (scan(folder, classes) for folder in folders)
        notes += copy_notes(place)
    return _from_files(train_files, test_files, tuple(classes), notes, size, by, target.kind)


def _from_files(
    train: Files, test: Files, names: tuple[str, ...], notes: list[str], size: int, by: Filter, kind: str
) -> Images:
    (pixels, test_pixels), _ = load_squares([train, test], size, by)
    own = (tiny_imagenet.MEAN, tiny_imagenet.STD) if kind == "tiny_imagenet" else _statistics(pixels)
    return Images((pixels, train.labels), (test_pixels, test.labels), names, len(names), tuple(notes), own)


def _squares(images: np.ndarray, size: int, by: Filter) -> np.ndarray:
    """Squares (N, H, H, 3) uint8 as (N, S, S, 3)."""
    if images.shape[1] == size:
        return images
    return np.stack(list(in_threads(lambda image: resize(image, size, size, by), list(images), "resizing")))


def _statistics(images: np.ndarray) -> Statistics:
    """Of the channels of images (N, S, S, 3) uint8, exactly; no channel's deviation is below one level of 255."""
    counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)]
    levels = np.arange(256) / 255
    means = [float((count * levels).sum() / count.sum()) for count in counts]
    squares = [
        float((count * (levels - mean) ** 2).sum() / count.sum()) for count, mean in zip(counts, means, strict=True)
    ]
    return tuple(means), tuple(max(square**0.5, 1 / 255) for square in squares)


def _folder(target: Target, data_root: Path) -> Path:
    """The folder that holds the files of ``target``.

    Raises:
        UserError: there is none, or it has not been unpacked.
    """
    place = Path(tiny_imagenet.FOLDER) if target.place is None else target.place
    found = _either(data_root, place)
    if found.is_dir():
        return found
    packed = [found] if found.is_file() else [found.with_name(found.name + ending) for ending in (".zip", ".tar")]
    for file in packed:
        if file.is_file():
            raise UserError(f"--target {target.kind}: {file} has to be unpacked first, into a folder that holds train/")
    what = "as it is published" if target.kind == "tiny_imagenet" else "with train/ and val/ (or test/)"
    raise UserError(f"--target {target.kind}: there is no folder {found}; it should hold the images, {what}")


def _either(data_root: Path, place: Path) -> Path:
    """``place`` below ``data_root``, or as it stands where that alone is there."""
    return place if place.exists() and not (data_root / place).exists() else data_root / place
