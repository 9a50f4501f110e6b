"""Tiny ImageNet: Le, Yang, "Tiny ImageNet Visual Recognition Challenge", 2015.

200 classes of ImageNet, 64 by 64 pixels:

    tiny-imagenet-200/wnids.txt                        the classes, one a line
    tiny-imagenet-200/words.txt                        their names, with a tab between
    tiny-imagenet-200/train/<wnid>/images/*.JPEG       500 of each
    tiny-imagenet-200/val/images/*.JPEG                50 of each, evaluated
    tiny-imagenet-200/val/val_annotations.txt          the class of each of them: file, tab, wnid, tab, a box

The images of its ``test`` folder have no published labels and are not read. Classes are numbered in the order of their
sorted wnids, as image folders are. Mean and standard deviation are those of the published distillation results.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mdistill.data.dataset import DATASETS, InMemoryDataset
from mdistill.data.folder import in_memory
from mdistill.data.image_files import Split, class_folders, find_root, images_below, scan
from mdistill.errors import UserError, printable, suggestion
from mdistill.files import read_text
from mdistill.registry import NonNegativeInt

FOLDER = "tiny-imagenet-200"
ANNOTATIONS = "val_annotations.txt"
IMAGE_SIZE = 64  # pixels, height and width
CLASSES, TRAIN_IMAGES, VAL_IMAGES = 200, 100_000, 10_000
MEAN = (0.4802, 0.4481, 0.3975)
STD = (0.2302, 0.2265, 0.2262)


@DATASETS.register("tiny_imagenet")
def tiny_imagenet(
    data_root: Path,
    download: bool,
    *,
    root: Path = Path(FOLDER),
    padding: NonNegativeInt = 8,
    flip: bool = True,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
) -> InMemoryDataset:
    """Tiny ImageNet as it is published, held in memory: padded with zeros, cropped and flipped.

    A part of it is used as it is, with a note. A ``val`` that was sorted into class folders is read as well.

    Args:
        root: its folder, from the folder of all data sets or as it stands.
        padding: pixels on each side.
        flip: mirror half of the views left to right.
        mean: of the three channels, on the scale 0 to 1.
        std: the same.

    Raises:
        UserError: something is missing or does not fit; says what.
    """
    place = find_root(data_root, root)
    notes: list[str] = []
    train, val, names = read_layout(place, notes)
    return in_memory(train, val, names, IMAGE_SIZE, padding=padding, flip=flip, mean=mean, std=std, notes=notes)


def read_layout(place: Path, notes: list[str]) -> tuple[Split, Split, Sequence[str]]:
    """The files of ``train`` and ``val`` in ``place``, and the names of their classes; ``notes`` gets what is unusual.

    Raises:
        UserError: something is missing or does not fit; says what.
    """
    missing = [name for name in ("wnids.txt", "train", "val") if not (place / name).exists()]
    if missing:
        raise UserError(
            f"Tiny ImageNet is not complete in {place}: no {' and no '.join(missing)}; unpack tiny-imagenet-200.zip"
            " (cs231n.stanford.edu) so that they are there"
        )
    classes = _classes(place, notes)
    train = scan(place / "train", classes)
    annotated = (place / "val" / ANNOTATIONS).exists()
    val = annotated_split(place / "val", classes) if annotated else _sorted_by_class(place / "val", classes)
    for split, images, published in ((train, len(train.files), TRAIN_IMAGES), (val, len(val.files), VAL_IMAGES)):
        if images != published:
            notes.append(f"tiny_imagenet: {split.folder.name} has {images:,} images, the published set {published:,}")
    return train, val, _names(place / "words.txt", classes, notes)


def _classes(place: Path, notes: list[str]) -> list[str]:
    """The wnids, sorted."""
    listed = sorted({line.strip() for line in read_text(place / "wnids.txt").splitlines() if line.strip()})
    found = class_folders(place / "train")
    if found != listed:
        missing, more = sorted({*listed} - {*found}), sorted({*found} - {*listed})
        wrong = (missing or more)[0]
        raise UserError(
            f"{place}: wnids.txt and the folders of train differ: {len(missing)} are in wnids.txt alone, {len(more)} in"
            f" train alone, such as {printable(wrong)}{suggestion(wrong, more if missing else listed)}"
        )
    if len(listed) != CLASSES:
        notes.append(f"tiny_imagenet: {len(listed)} classes, the published set has {CLASSES}")
    return listed


def annotated_split(folder: Path, classes: Sequence[str]) -> Split:
    """The images of ``folder/images`` that ``val_annotations.txt`` names, class by class."""
    path = folder / ANNOTATIONS
    number = {name: label for label, name in enumerate(classes)}
    images = dict(images_below(folder / "images", "images")) if (folder / "images").is_dir() else {}
    if not images:
        raise UserError(f"{folder / 'images'} holds no images; {path.name} beside it says of which class each is")
    label_of: dict[str, int] = {}
    for line_number, line in enumerate(read_text(path).splitlines(), start=1):
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0].strip()
        if wnid not in number:
            raise UserError(
                f"{path}, line {line_number}: {printable(wnid)!r} is none of the {len(classes)} classes of wnids.txt"
            )
        label_of[f"images/{name}"] = number[wnid]
    unknown = sorted({*images} - {*label_of})
    if unknown:
        raise UserError(
            f"{path} gives no class for {len(unknown):,} of the {len(images):,} images, such as {folder / unknown[0]}"
        )
    files = sorted(images, key=lambda name: (label_of[name], name))
    labels, sizes = ([table[name] for name in files] for table in (label_of, images))
    return Split(folder, tuple(files), np.array(labels, np.int64), np.array(sizes, np.int64))


def _sorted_by_class(folder: Path, classes: Sequence[str]) -> Split:
    """The images of a ``val`` that has a folder for each class."""
    if not (folder / classes[0]).is_dir():
        raise UserError(f"{folder / ANNOTATIONS} is missing: it says of which class each image of val is")
    return scan(folder, classes)


def _names(path: Path, classes: Sequence[str], notes: list[str]) -> Sequence[str]:
    """What the classes are called; their wnids where that is not known."""
    if not path.exists():
        notes.append(f"tiny_imagenet: no {path.name}, so classes are known by their wnids")
        return classes
    words = dict(line.split("\t", 1) for line in read_text(path).splitlines() if "\t" in line)
    return [words.get(name, name).strip() for name in classes]
