"""A smaller copy of a folder of images: JPEG, of a given short side, which takes less time to decode.

A copy grows beside its place under the name ``OUT.partial``, which no data set reads, and gets its own when it is
complete. Files in it are whole or not there, so that an interrupted copy goes on where it stopped.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mdistill.data.decoding import decode
from mdistill.data.folder import fingerprint_of_files
from mdistill.data.image_files import COPIED, COPYING, Split, common_classes, find_splits, in_threads, scan
from mdistill.errors import UserError, printable
from mdistill.files import atomic_write, lock_folder, read_text, write_text

JPEG_SUFFIXES = {".jpg", ".jpeg"}


@dataclass(frozen=True)
class Copied:
    """What a copy came to."""

    images: int
    before: int  # bytes of all images
    after: int  # the same of the copies
    kept: int  # copies that an earlier, interrupted run had made


def shrink(
    root: Path, out: Path, *, short_side: int, quality: int, announce: Callable[[str], None] = lambda line: None
) -> Copied:
    """Copy the images of ``root`` that are trained on and evaluated to ``out``, with no short side over ``short_side``.

    Args:
        short_side: pixels; images are never enlarged.
        quality: of JPEG, from 1 to 100, with 4:2:0 subsampling.
        announce: called with a line before anything is written.

    Raises:
        UserError: ``out`` is there already, or cannot be the copy's place; an image cannot be read.
        RunFailed: the disk is full; what is copied stays, to go on from.
    """
    if not root.is_dir():
        raise UserError(f"{root} is {'a file' if root.is_file() else 'not there'}; it should hold train/ and val/")
    folders = find_splits(root)
    classes = common_classes(*folders)
    splits = [scan(folder, classes) for folder in folders]
    record = _record(splits, short_side, quality)
    partial = _place(root, out, record)
    images, before = sum(len(split.files) for split in splits), sum(int(split.sizes.sum()) for split in splits)
    names = " and ".join(folder.name for folder in folders)
    announce(f"{root}: {images:,} images of {len(classes):,} classes in {names}, {size_text(before)}")
    lock = lock_folder(partial, "copy")
    try:
        if not (partial / COPYING).exists():
            write_text(partial / COPYING, record)

        def copy(place: tuple[Split, int]) -> tuple[int, bool]:
            split, number = place
            name = copied_name(split.files[number])
            return _copy(split, number, partial / split.folder.name / name, short_side, quality)

        places = [(split, number) for split in splits for number in range(len(split.files))]
        done = list(in_threads(copy, places, "copying"))
        os.replace(partial / COPYING, partial / COPIED)
    finally:
        lock.release()
    (partial / ".lock").unlink(missing_ok=True)
    os.replace(partial, out)
    return Copied(images, before, sum(size for size, _ in done), sum(was_there for _, was_there in done))


def smaller(content: bytes, short_side: int, quality: int) -> bytes:
    """The JPEG file of an image file, its pixels as ``decode`` gives them, resized by Pillow's Lanczos filter.

    A JPEG file in grey or RGB that is small enough stays as it is. Metadata are left out of all others, and with them
    the turn that no reader here takes notice of.

    Raises:
        ValueError: it is no image, or one that JPEG cannot hold.
    """
    pixels = decode(content)
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short <= short_side:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "JPEG" and image.mode in {"L", "RGB"}:
                return content
    grey = (pixels == pixels[..., :1]).all()
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    if short > short_side:
        size = round(width * short_side / short), round(height * short_side / short)
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    except OSError as error:
        raise ValueError(f"{width} x {height} pixels cannot be saved as JPEG: {error}") from error
    return buffer.getvalue()


def copied_name(name: str) -> str:
    """What the copy of the file ``name`` is called: the same where that is a name of a JPEG file."""
    return name if os.path.splitext(name)[1].lower() in JPEG_SUFFIXES else f"{name}.jpg"


def size_text(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _copy(split: Split, number: int, target: Path, short_side: int, quality: int) -> tuple[int, bool]:
    """Size of the copy of a file in bytes, and whether it was there already."""
    if target.exists():
        return target.stat().st_size, True
    source = split.folder / split.files[number]
    try:
        content = smaller(source.read_bytes(), short_side, quality)
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"{source}: no image that can be read: {printable(str(error), 200)}; `mdistill data check`"
            " lists all such files: mend or remove them, and what is copied so far, and copy again"
        ) from error
    with atomic_write(target) as temporary:
        temporary.write_bytes(content)
    return len(content), False


def _record(splits: list[Split], short_side: int, quality: int) -> str:
    """One line that says what is copied and how."""
    names = [copied_name(f"{split.folder.name}/{name}") for split in splits for name in split.files]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"two images would both be copied to {printable(twice[0])}; rename one")
    source = fingerprint_of_files({split.folder.name: (split, np.arange(len(split.files))) for split in splits})
    return json.dumps({"short_side": short_side, "quality": quality, "images": len(names), "source": source}) + "\n"


def _place(root: Path, out: Path, record: str) -> Path:
    """Where the copy is made until it is complete.

    Raises:
        UserError: it would be inside of ``root``, or something else is there.
    """
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{out} lies in {root}, which it would be a copy of; choose a place outside")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} is there already; remove it or choose another place")
    partial = out.with_name(f"{out.name}.partial")
    if not partial.exists():
        return partial
    if not partial.is_dir():
        raise UserError(f"{partial} is there and is no folder; the copy is made under this name: remove it")
    found = next((read_text(partial / name) for name in (COPYING, COPIED) if (partial / name).exists()), None)
    if found != record and (found is not None or {path.name for path in partial.iterdir()} - {".lock"}):
        raise UserError(
            f"{partial} is there and is no interrupted copy of {root} as it is now with these settings; remove it or"
            " choose another place"
        )
    return partial
