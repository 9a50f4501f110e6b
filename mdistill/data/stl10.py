"""STL-10: Coates, Lee, Ng, "An Analysis of Single Layer Networks in Unsupervised Feature Learning", 2011.

Photographs of 96 by 96 pixels in 10 classes: 5,000 to train on, 8,000 to test with. torchvision reads and fetches them:

    stl10_binary/{train,test}_X.bin   uint8, image by image, plane by plane, column by column
    stl10_binary/{train,test}_y.bin   uint8, the class of each, from 1 to 10
    stl10_binary/class_names.txt      one a line

The further images without classes, which are most of the published archive, are not read and need not be there. Mean
and standard deviation are those of the training images as published code for transfer has them
(giakoumoglou/distillers dataset/stl10.py).
"""

import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mdistill.data.dataset import Split
from mdistill.errors import RunFailed, UserError
from mdistill.files import read_text

FOLDER = "stl10_binary"
CLASSES, IMAGE_SIZE = 10, 96  # pixels, height and width
IMAGES = {"train": 5_000, "test": 8_000}
MEAN = (0.4467, 0.4398, 0.4066)
STD = (0.2603, 0.2566, 0.2712)
NAMES = "class_names.txt"


def read_stl10(root: Path, download: bool, notes: list[str]) -> tuple[Split, Split, tuple[str, ...]]:
    """Images (N, 96, 96, 3) uint8 and labels (N,) of train and of test, and the names of the classes, () if not known.

    Args:
        root: holds ``stl10_binary``, or is that folder.
        download: fetch the published archive into ``root`` where files are missing.
        notes: gets what is unusual.

    Raises:
        UserError: files are missing or damaged.
        RunFailed: the archive could not be fetched, or is not the published one.
    """
    folder = root if (root / "train_X.bin").is_file() or root.name == FOLDER else root / FOLDER
    wanted = [f"{split}_{what}.bin" for split in IMAGES for what in "Xy"]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing and download:
        _download(folder)
    elif missing:
        raise UserError(
            f"STL-10 is not complete in {folder}: no {' and no '.join(missing)}; give --download (2.6 GB), or unpack"
            " stl10_binary.tar.gz (ai.stanford.edu/~acoates/stl10) so that they are there"
        )
    train, test = (_read(folder, split, notes) for split in IMAGES)
    return train, test, _names(folder / NAMES)


def _read(folder: Path, split: str, notes: list[str]) -> Split:
    images, labels = folder / f"{split}_X.bin", folder / f"{split}_y.bin"
    advice = "it is damaged or cut short: delete it, and fetch it again"
    try:
        size, count = images.stat().st_size, labels.stat().st_size
        if not size or size % (3 * IMAGE_SIZE**2):
            raise UserError(
                f"{images} has {size:,} bytes, no multiple of the {3 * IMAGE_SIZE**2:,} of an image; {advice}"
            )
        if size != count * 3 * IMAGE_SIZE**2:
            raise UserError(
                f"{images} has {size // (3 * IMAGE_SIZE**2):,} images and {labels.name} {count:,} labels; one of them"
                " is damaged or cut short: delete both, and fetch them again"
            )
        content = _torchvision_reader()(folder.resolve(), split)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UserError(f"{folder / 'class_names.txt'}: is no text; delete it, and fetch it again") from None
    found = np.asarray(content.labels).astype(np.int64)  # from 0; what was 0 is 255
    if found.max() >= CLASSES:
        raise UserError(f"{labels}: classes should be from 1 to {CLASSES}, found {(int(found.max()) + 1) % 256}")
    if count != IMAGES[split]:
        notes.append(f"stl10: {split} has {count:,} images, the published set {IMAGES[split]:,}")
    else:
        notes += [f"stl10: {name} is not the published file" for name in _other_files(folder, split)]
    return np.ascontiguousarray(content.data.transpose(0, 2, 3, 1)), found


def _torchvision_reader() -> Any:
    """torchvision's data set, without its look at the MD5 sums of all files, which wants those without classes too."""
    from torchvision.datasets import STL10

    class Reader(STL10):
        def __init__(self, folder: Path, split: str) -> None:
            self.base_folder = folder.name
            super().__init__(folder.parent, split)

        def _check_integrity(self) -> bool:
            return True

    return Reader


def _other_files(folder: Path, split: str) -> list[str]:
    """Names of the files of ``split`` whose MD5 sum is not that of the published ones, as torchvision has them."""
    from torchvision.datasets import STL10

    published = dict([*STL10.train_list, *STL10.test_list])
    names = [f"{split}_X.bin", f"{split}_y.bin"]
    return [name for name in names if _md5(folder / name) != published[name]]


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        for block in iter(functools.partial(file.read, 1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _names(path: Path) -> tuple[str, ...]:
    names = tuple(read_text(path).split()) if path.is_file() else ()
    return names if len(names) == CLASSES else ()


def _download(folder: Path) -> None:
    """Fetch the archive beside ``folder``, where it stays, and put its files into it."""
    from torchvision.datasets import STL10, utils

    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER}.", dir=root) as temporary:
            utils.download_and_extract_archive(STL10.url, str(root), temporary, STL10.filename, STL10.tgz_md5)
            folder.mkdir(exist_ok=True)
            for file in sorted(Path(temporary, FOLDER).iterdir()):
                os.replace(file, folder / file.name)
    except (OSError, RuntimeError, EOFError, ValueError, shutil.Error) as error:
        raise RunFailed(
            f"could not fetch {STL10.url} into {root}: {error}; fetch and unpack it by other means"
        ) from error
