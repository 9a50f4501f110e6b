"""Image files in folders, one for each class: which there are, and their pixels.

    ROOT/train/<class>/*.jpg    trained on
    ROOT/val/<class>/*.jpg      evaluated (or ROOT/test)

Letters: N images, S image size.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mdistill import distributed
from mdistill.data.decoding import Pixels, decode
from mdistill.data.resizing import Filter, centre_crop
from mdistill.errors import UserError, printable, suggestion

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
MOST_WORKERS = 32  # threads that decode
MOST_IN_MEMORY = 2**34  # bytes of pixels that are held in memory, 16 GiB
COPYING, COPIED = "mdistill_copying.json", "mdistill_copy.json"  # in a smaller copy: until it is complete, and then
MOST_AHEAD = 1024  # images that are read before they are asked for

Indices = npt.NDArray[np.int64]
Item = TypeVar("Item")
Result = TypeVar("Result")


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


@contextmanager
def readable_folders() -> Iterator[None]:
    """Within, a folder that cannot be listed is the user's matter.

    Raises:
        UserError: there was one; says which and why.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def find_root(data_root: Path, root: Path) -> Path:
    """The folder ``root``, from the folder of all data sets or as it stands.

    Raises:
        UserError: there is none.
    """
    for place in (data_root / root, root):
        if place.is_dir():
            return place
        if place.is_file():
            raise UserError(f"data.root: {place} is a file; it should be a folder that holds train/ and val/")
    raise UserError(f"data.root: there is no folder {data_root / root}; it should hold train/ and val/")


def find_splits(root: Path) -> tuple[Path, Path]:
    """The folders that are trained on and evaluated.

    Raises:
        UserError: one is missing.
    """
    if (root / COPYING).exists():
        raise UserError(f"{root} is an interrupted copy of images; run `mdistill data shrink` again to complete it")
    with readable_folders():
        inside = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    train = root / "train"
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        found = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "")
        raise UserError(f"{root} should hold train/ and val/ (or test/), found {printable(found or 'nothing')}")
    return train, test


def common_classes(train: Path, test: Path) -> list[str]:
    """The class folders that both hold, sorted.

    Raises:
        UserError: there are fewer than two, or one of them has others.
    """
    classes, found = class_folders(train), class_folders(test)
    if found != classes:
        missing, more = sorted({*classes} - {*found}), sorted({*found} - {*classes})
        wrong, where = (missing[0], train) if missing else (more[0], test)
        near = suggestion(wrong, more if missing else classes)
        raise UserError(
            f"{train.parent}: the class folders of {train.name} and {test.name} differ: {len(missing)} are in"
            f" {train.name} alone, {len(more)} in {test.name} alone, such as {where / wrong}{near}"
        )
    return classes


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted.

    Raises:
        UserError: there are fewer than two.
    """
    with readable_folders():
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        names = sorted(entry.name for entry in entries if entry.is_dir())
    if len(names) < 2:
        loose = sum(entry.suffix.lower() in SUFFIXES for entry in entries)
        advice = f"; it holds {loose:,} images, which have to be sorted into folders by class" if loose else ""
        raise UserError(f"{folder} should hold a folder for each of at least 2 classes, found {len(names)}{advice}")
    return names


def scan(folder: Path, classes: Sequence[str]) -> Split:
    """The images in the class folders of ``folder``, by suffix; hidden files and others are left out.

    Raises:
        UserError: a class has no image, or its folder cannot be listed.
    """
    files: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for label, name in enumerate(classes):
        entries = sorted(images_below(folder / name, name))
        if not entries:
            raise UserError(f"{folder / name} holds no image ({', '.join(sorted(SUFFIXES))})")
        files += [path for path, _ in entries]
        sizes += [size for _, size in entries]
        labels += [label] * len(entries)
    return Split(folder, tuple(files), np.array(labels, np.int64), np.array(sizes, np.int64))


def images_below(folder: Path, name: str) -> Iterator[tuple[str, int]]:
    """Path, beginning with ``name``, and size in bytes of each image in ``folder``, at any depth.

    Raises:
        UserError: a folder cannot be listed.
    """
    with readable_folders(), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{name}/{entry.name}"
            if entry.is_dir():
                yield from images_below(Path(entry.path), path)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                yield path, entry.stat().st_size


def load_squares(splits: Sequence[Split], size: int, by: Filter = "bilinear") -> tuple[list[Pixels], int]:
    """All images of small splits in memory: (N, S, S, 3) uint8 of each, and how many of them had to be resized.

    An image of another size is resized so that its short side is S, and its centre is taken.

    Raises:
        UserError: an image cannot be read, or all of them are too large to be held in memory.
    """
    total = sum(len(split.files) for split in splits)
    if total * 3 * size**2 > MOST_IN_MEMORY:
        raise UserError(
            f"data.image_size: {total:,} images of {size} x {size} pixels take {total * 3 * size**2 / 1e9:.0f} GB, more"
            f" than the {MOST_IN_MEMORY >> 30} GiB that are held in memory; take smaller ones, or data.name folder with"
            " augment random_resized_crop, which reads them while training goes on"
        )
    arrays = [np.empty((len(split.files), size, size, 3), np.uint8) for split in splits]

    def load(place: tuple[int, int]) -> bool:
        which, number = place
        image = splits[which].read(number)
        fits = image.shape[:2] == (size, size)
        arrays[which][number] = image if fits else centre_crop(image, size, size, by)
        return not fits

    places = [(which, number) for which, split in enumerate(splits) for number in range(len(split.files))]
    resized = sum(in_threads(load, places, "reading images"))
    return arrays, resized


def decoding_threads() -> int:
    """One for each core of this process, at most ``MOST_WORKERS``."""
    return min(MOST_WORKERS, distributed.usable_cores())


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], label: str) -> Iterator[Result]:
    """``function`` of each item, in their order, computed by threads, behind a progress bar.

    The first error, in the order of the items, or a stop signal ends it; what has not begun by then is left.
    """
    ahead: deque[Future[Result]] = deque()
    bar = tqdm(desc=label, total=len(items), unit="image", dynamic_ncols=True, disable=None)
    with bar, ThreadPoolExecutor(decoding_threads(), "mdistill-images") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) == MOST_AHEAD:
                    yield ahead.popleft().result()
                    bar.update()
            while ahead:
                yield ahead.popleft().result()
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
