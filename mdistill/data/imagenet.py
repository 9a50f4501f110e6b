"""ImageNet: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", arXiv:1409.0575; the 2012 set.

    imagenet/train/<wnid>/<wnid>_<number>.JPEG
    imagenet/val/<wnid>/ILSVRC2012_val_<number>.JPEG

1,281,167 images of 1,000 classes to train on, 50,000 to evaluate. The classes are numbered in the order of their sorted
wnids, as all published networks number them: n01440764 (tench) is 0, n15075141 (toilet tissue) is 999. Crops, resizing
and statistics are those of the published results (``folder.py``, ``resized_crop.py``); no colour jitter.

A part of the classes, such as ImageNet-100, is numbered in the order of its own folders.
"""

import re
from pathlib import Path

from mdistill.data.dataset import DATASETS
from mdistill.data.folder import FolderDataset, copy_notes
from mdistill.data.image_files import class_folders, common_classes, find_root, find_splits, readable_folders, scan
from mdistill.errors import UserError, printable
from mdistill.registry import PositiveInt

CLASSES = 1000
FIRST, LAST = "n01440764", "n15075141"
IMAGES = {"train": 1_281_167, "val": 50_000}
WNID = re.compile(r"n\d{8}")


@DATASETS.register("imagenet")
def imagenet(
    data_root: Path,
    download: bool,
    *,
    root: Path = Path("imagenet"),
    image_size: PositiveInt = 224,
    views: PositiveInt | None = None,
) -> FolderDataset:
    """ImageNet, or some of its classes, in a folder for each class.

    Args:
        root: its folder, from the folder of all data sets or as it stands.
        image_size: S, pixels, of the crops.
        views: V, the crops of an image that there are; see ``folder``.

    Raises:
        UserError: a folder is missing, is no class of ImageNet, or train and val have different ones.
    """
    place = find_root(data_root, root)
    train_folder, val_folder = find_splits(place)
    with readable_folders():
        unsorted = sum(path.suffix == ".JPEG" for path in val_folder.iterdir())
    if unsorted:
        raise UserError(
            f"{val_folder} holds {unsorted:,} images that are not sorted by class; move each into"
            f" {val_folder.name}/<wnid>/ (ILSVRC2012_validation_ground_truth.txt of the development kit, or"
            " LOC_val_solution.csv, says which)"
        )
    wrong = [name for name in class_folders(train_folder) if not WNID.fullmatch(name)]
    if wrong:
        raise UserError(
            f"{train_folder} should hold a folder for each wnid (n and 8 digits), found {printable(wrong[0])!r};"
            " for images of your own, take data.name folder"
        )
    classes = common_classes(train_folder, val_folder)
    train, val = scan(train_folder, classes), scan(val_folder, classes)
    notes = copy_notes(place)
    if len(classes) != CLASSES or (classes[0], classes[-1]) != (FIRST, LAST):
        notes.append(
            f"imagenet: {len(classes):,} of the {CLASSES:,} classes, numbered in the order of their own folders"
        )
    for split, found in (("train", len(train.files)), ("val", len(val.files))):
        if len(classes) == CLASSES and found != IMAGES[split]:
            notes.append(f"imagenet: {split} has {found:,} images, the published set {IMAGES[split]:,}")
    return FolderDataset(train, val, classes, image_size=image_size, notes=notes, views=views)
