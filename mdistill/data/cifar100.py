"""CIFAR-100: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

60,000 colour photographs of 32 by 32 pixels in 100 classes: 50,000 to train on, 10,000 to test with. Read from the
published folder ``cifar-100-python`` (files ``train``, ``test`` and ``meta``, all pickles).

The MD5 sums are those of the published archive and its files (torchvision checks the same). Mean and standard deviation
are the ones that the published distillation results were trained with: within 0.0003 of those of the training pixels.
"""

import functools
import hashlib
import http.client
import io
import os
import pickle
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mdistill import pickles
from mdistill.data.dataset import DATASETS, InMemoryDataset, Split
from mdistill.errors import RunFailed, UserError, printable

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
FILE_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
SAMPLES = {"train": 50_000, "test": 10_000}
FOLDER = "cifar-100-python"
NUM_CLASSES = 100
IMAGE_SIZE = 32  # pixels, height and width
MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
MAX_SHARED = 100  # test images that may also be training images; the published set has 10
TIMEOUT = 30  # seconds without an answer from the server


@DATASETS.register("cifar100")
def cifar100(root: Path, download: bool) -> InMemoryDataset:
    """CIFAR-100 from ``root/cifar-100-python``, or from ``root`` itself where that holds the files.

    Args:
        root: the folder to look in.
        download: fetch the published archive into ``root`` where the files are missing.

    Raises:
        UserError: files missing, damaged, not CIFAR-100, or with a test set that is part of the training set.
        RunFailed: the archive could not be fetched or is not the published one.
    """
    folder = _find(root)
    missing = [name for name in FILE_MD5 if not (folder / name).is_file()]
    if missing and download:
        _download(root, folder)
    elif missing:
        raise UserError(
            f"CIFAR-100 is not complete in {folder}: no {' and no '.join(missing)};"
            f" give --download, or unpack {URL} so that they are there"
        )
    notes: list[str] = []
    class_names = _read_class_names(folder / "meta", notes)
    train = _read_split(folder / "train", notes)
    test = _read_split(folder / "test", notes)
    shared = _shared_images(train[0], test[0])
    if shared > MAX_SHARED:
        raise UserError(
            f"{folder}: {shared} of the test images are also training images, at most {MAX_SHARED} may be"
            " (the published set has 10); test and train are not kept apart in this copy"
        )
    if shared:
        notes.append(f"cifar100: {shared} test images are also training images, pixel for pixel")
    return InMemoryDataset(
        train, test, num_classes=NUM_CLASSES, mean=MEAN, std=STD, notes=notes, class_names=class_names
    )


def _find(root: Path) -> Path:
    """The folder that the files are in, or should be put in."""
    inside = root / FOLDER
    if not inside.is_dir() and (root.name == FOLDER or any((root / name).is_file() for name in SAMPLES)):
        return root
    return inside


# Reading


def _read_split(path: Path, notes: list[str]) -> Split:
    """Images (N, 32, 32, 3) uint8 and fine labels (N,) int64 of ``train`` or ``test``."""
    entry = _load(path, notes)
    data, labels = entry.get("data"), entry.get("fine_labels")
    shape = (SAMPLES[path.name], 3 * IMAGE_SIZE**2)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != shape:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else f"{type(data).__name__}"
        raise UserError(f"{path}: 'data' must be uint8 {shape}, found {found}")
    if not isinstance(labels, list | np.ndarray) or len(labels) != len(data):
        found = f"{len(labels)}" if isinstance(labels, list | np.ndarray) else f"{type(labels).__name__}"
        raise UserError(f"{path}: 'fine_labels' must be {len(data)} integers, found {found}")
    wrong = [label for label in labels if not isinstance(label, int | np.integer) or not 0 <= label < NUM_CLASSES]
    if wrong:
        raise UserError(f"{path}: 'fine_labels' must be from 0 to {NUM_CLASSES - 1}, found {wrong[0]!r}")
    planes = data.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)  # as stored: red, green, blue
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.asarray(labels, dtype=np.int64)


def _read_class_names(path: Path, notes: list[str]) -> list[str]:
    """The names of the 100 classes, which ``meta`` holds."""
    names = _load(path, notes).get("fine_label_names")
    if not isinstance(names, list) or len(names) != NUM_CLASSES:
        found = f"{len(names)}" if isinstance(names, list) else f"{type(names).__name__}"
        raise UserError(f"{path}: 'fine_label_names' must be a list of {NUM_CLASSES} names, found {found}")
    return [str(name) for name in names]


def _load(path: Path, notes: list[str]) -> dict[str, Any]:
    """The dictionary in a pickle, its keys as text; says in ``notes`` where the file is not the published one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror}") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != FILE_MD5[path.name]:
        notes.append(f"cifar100: {path.name} has MD5 {found}, the published file {FILE_MD5[path.name]}")
    try:
        if found != FILE_MD5[path.name]:
            pickles.inspect(io.BytesIO(content))
        entry = _SafeUnpickler(io.BytesIO(content), encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except pickles.HostilePickle as error:
        raise UserError(f"{path} was refused and nothing of it was run: it {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {printable(str(error))}"
        raise UserError(
            f"{path} is damaged or not a pickle ({len(content)} bytes; {reason}); delete it and fetch it again"
        ) from error
    if not isinstance(entry, dict):
        raise UserError(f"{path} must hold a dictionary, found {type(entry).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in entry.items()}


def _as_bytes(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the oldest pickle protocols: as Latin-1 text, to be encoded on reading."""
    if encoding != "latin1":
        raise UserError(f"holds bytes in encoding {encoding!r}, only 'latin1' is read")
    return text.encode("latin1")


def _numpy_callables() -> dict[tuple[str, str], Any]:
    """What the pickle of a NumPy array calls, by every name that it goes by in NumPy 1 and 2 and in old pickles."""
    array = np.empty(0, dtype=np.uint8)
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _as_bytes,
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray", "_reconstruct"] = array.__reduce__()[0]
        allowed[f"{core}.numeric", "_frombuffer"] = array.__reduce_ex__(5)[0]
    return allowed


class _SafeUnpickler(pickle.Unpickler):
    """Reads plain Python values and NumPy arrays; a pickle that asks for anything else is refused before it runs."""

    allowed = _numpy_callables()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            wanted = printable(f"{module}.{name}")
            raise UserError(f"asks for {wanted}, which no CIFAR-100 file needs; refused, nothing was executed")
        return self.allowed[module, name]


def _shared_images(train: npt.NDArray[np.uint8], test: npt.NDArray[np.uint8]) -> int:
    """How many test images are, pixel for pixel, also training images."""
    known = {image.tobytes() for image in test}
    seen = known.intersection(image.tobytes() for image in train)
    return sum(image.tobytes() in seen for image in test) if seen else 0


# Fetching


def _download(root: Path, folder: Path) -> None:
    """Fetch the archive and put its files into ``folder``: a new folder all at once, else file by file, each whole."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER}.", dir=root) as temporary:
            archive = Path(temporary, "archive.tar.gz")
            _fetch(archive)
            unpacked = Path(temporary, FOLDER)
            _unpack(archive, unpacked)
            if folder.is_dir():  # some of the files are there
                for name in FILE_MD5:
                    os.replace(unpacked / name, folder / name)
            else:
                os.replace(unpacked, folder)
    except OSError as error:
        raise RunFailed(f"could not put CIFAR-100 into {folder}: {error}") from error


def _fetch(archive: Path) -> None:
    """Download ``URL`` to ``archive`` and check its MD5 sum."""
    advice = f"fetch it by other means and unpack it under the data root as {FOLDER}/"
    digest = hashlib.md5(usedforsecurity=False)
    size = 0
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer, open(archive, "wb") as file:
            total = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc="CIFAR-100", disable=None) as progress:
                for block in iter(functools.partial(answer.read, 1 << 20), b""):
                    file.write(block)
                    digest.update(block)
                    size += len(block)
                    progress.update(len(block))
    except (OSError, http.client.HTTPException) as error:
        raise RunFailed(f"could not download {URL}: {error}; {advice}") from error
    if digest.hexdigest() != ARCHIVE_MD5:
        raise RunFailed(
            f"{URL} gave {size} bytes with MD5 {digest.hexdigest()}, the published archive has {ARCHIVE_MD5};"
            f" nothing was kept; try again, or {advice}"
        )


def _unpack(archive: Path, folder: Path) -> None:
    """Write the three files of the archive, and nothing else, into ``folder``."""
    folder.mkdir()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in FILE_MD5:
                content: IO[bytes] | None = tar.extractfile(f"{FOLDER}/{name}")
                if content is None:
                    raise RunFailed(f"{URL}: {FOLDER}/{name} is not a plain file")
                with content, open(folder / name, "wb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, KeyError) as error:
        raise RunFailed(f"could not unpack {URL}: {error}") from error
