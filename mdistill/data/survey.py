"""What a folder of images holds, file by file: whether training on it would work, and what is odd about it."""

import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mdistill.data.decoding import decode
from mdistill.data.image_files import COPYING, class_folders, images_below, in_threads
from mdistill.data.tiny_imagenet import ANNOTATIONS, annotated_split
from mdistill.errors import UserError, printable

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
FORMATS = {  # of a suffix, as Pillow calls them
    ".jpg": {"JPEG", "MPO"},
    ".jpeg": {"JPEG", "MPO"},
    ".png": {"PNG"},
    ".bmp": {"BMP"},
    ".webp": {"WEBP"},
    ".ppm": {"PPM"},
    ".pgm": {"PPM"},
    ".tif": {"TIFF"},
    ".tiff": {"TIFF"},
}
MOST_SHOWN = 10  # examples of what is odd but not broken


@dataclass(frozen=True)
class Listing:
    """The image files of a split."""

    name: str
    classes: Mapping[str, int]  # how many images each has
    files: Sequence[str]  # relative to the root
    size: int  # bytes


@dataclass(frozen=True)
class Finding:
    """What one file is."""

    digest: bytes  # SHA-256 of its bytes
    height: int = 0
    width: int = 0
    odd: tuple[str, ...] = ()
    error: str = ""


def survey(root: Path) -> Iterator[str]:
    """Lines that describe ``root``; reads every image, behind a progress bar.

    Raises:
        UserError: something in it would stop a run; what it is was in the lines.
    """
    listings, problems = list_splits(root)
    for listing in listings:
        yield _counts(listing)
    names = [name for listing in listings for name in listing.files]
    heights, widths = array("l"), array("l")
    odd: dict[str, list[str]] = {}
    broken: list[str] = []
    first: dict[bytes, str] = {}  # a file of train for each digest
    twice: list[tuple[str, str]] = []
    for name, found in zip(names, in_threads(lambda name: examine(root / name), names, "checking"), strict=True):
        if found.error:
            broken.append(f"{root / name}: {printable(found.error, 200)}")
            continue
        heights.append(found.height)
        widths.append(found.width)
        for what in found.odd:
            odd.setdefault(what, []).append(name)
        if name.startswith("train/"):
            first.setdefault(found.digest, name)
        elif found.digest in first:
            twice.append((name, first[found.digest]))
    if heights:
        yield _sizes(np.array(heights), np.array(widths))
    for what, where in sorted(odd.items()):
        yield f"{what}: {len(where):,}, such as {printable(where[0])}"
    if twice:
        yield f"evaluated and trained on, the same bytes by SHA-256: {len(twice):,}"
        yield from (f"  {printable(one)} is {printable(other)}" for one, other in twice[:MOST_SHOWN])
        if len(twice) > MOST_SHOWN:
            yield f"  and {len(twice) - MOST_SHOWN:,} more"
    yield from problems
    if broken:
        yield f"files that cannot be read: {len(broken):,}"
        yield from (f"  {line}" for line in broken)
    if problems or broken:
        count = len(problems) + len(broken)
        raise UserError(f"{root}: {count:,} {'thing is' if count == 1 else 'things are'} wrong, told above")
    yield "all images can be read"


def list_splits(root: Path) -> tuple[list[Listing], list[str]]:
    """The splits below ``root``, and a line for each thing that is wrong with their folders."""
    if not root.is_dir():
        raise UserError(f"{root} is {'a file' if root.is_file() else 'not there'}; it should hold train/ and val/")
    listings: list[Listing] = []
    problems = [f"{root} is an interrupted copy of other images"] if (root / COPYING).exists() else []
    for name in ("train", "val", "test"):
        folder = root / name
        if not folder.is_dir():
            continue
        try:
            annotated = name == "val" and (folder / ANNOTATIONS).exists()
            listings.append(_annotated(folder, listings) if annotated else _listing(folder))
        except UserError as error:
            if name == "test" and len(listings) == 2:  # beside val it is not read; often it has no classes
                continue
            problems.append(str(error))
            continue
        empty = [each for each, count in listings[-1].classes.items() if not count]
        problems += [f"{folder / each} holds no image" for each in empty]
    found = {listing.name: listing for listing in listings}
    if not (root / "train").is_dir() or not ((root / "val").is_dir() or (root / "test").is_dir()):
        inside = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        problems.append(f"{root} should hold train/ and val/ (or test/), found {printable(inside)}")
    evaluated = found.get("val", found.get("test"))
    if "train" in found and evaluated is not None:
        for one, other in ((found["train"], evaluated), (evaluated, found["train"])):
            alone = sorted({*one.classes} - {*other.classes})
            if alone:
                problems.append(f"classes in {one.name} and not in {other.name}: {len(alone)}, such as {alone[0]}")
    return listings, problems


def examine(path: Path) -> Finding:
    """What the file at ``path`` is; an error is noted, not raised."""
    try:
        content = path.read_bytes()
        height, width = decode(content).shape[:2]
    except OSError as error:
        return Finding(b"", error=error.strerror or str(error))
    except ValueError as error:
        return Finding(b"", error=str(error))
    odd = []
    with Image.open(io.BytesIO(content)) as image:
        mode, form, turn = image.mode, image.format, image.getexif().get(ORIENTATION, 1)
    if mode in {"1", "L", "LA", "I", "F"} or mode.startswith("I;16"):
        odd.append("grey, of which three equal channels are made")
    if mode.startswith("I"):
        odd.append("of 16 bits, whose upper 8 are used")
    if mode == "CMYK":
        odd.append("in CMYK, converted to RGB")
    if form not in FORMATS[path.suffix.lower()]:
        odd.append("in another format than the name says, read by their content")
    if turn != 1:
        odd.append("turned by an EXIF tag, which is left out")
    return Finding(hashlib.sha256(content).digest(), height, width, tuple(odd))


def _listing(folder: Path) -> Listing:
    """A split with a folder for each class."""
    files: list[str] = []
    size = 0
    classes: Counter[str] = Counter()
    for name in class_folders(folder):
        found = sorted(images_below(folder / name, name))
        classes[name] = len(found)
        files += [f"{folder.name}/{path}" for path, _ in found]
        size += sum(length for _, length in found)
    return Listing(folder.name, classes, files, size)


def _annotated(folder: Path, listings: Sequence[Listing]) -> Listing:
    """The ``val`` of Tiny ImageNet, whose classes are in a file."""
    classes = [*listings[0].classes] if listings else []
    split = annotated_split(folder, classes)
    counts = np.bincount(split.labels, minlength=len(classes)).tolist()
    files = [f"{folder.name}/{name}" for name in split.files]
    return Listing(folder.name, dict(zip(classes, counts, strict=True)), files, int(split.sizes.sum()))


def _counts(listing: Listing) -> str:
    counts = [*listing.classes.values()]
    each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    return (
        f"{listing.name}: {len(listing.files):,} images of {len(counts):,} classes, {each} of each,"
        f" {listing.size / 1e6:,.1f} MB"
    )


def _sizes(heights: npt.NDArray[np.int64], widths: npt.NDArray[np.int64]) -> str:
    def spread(values: npt.NDArray[np.int64]) -> str:
        return f"{values.min()} / {np.median(values):g} / {values.max()}"

    short = np.minimum(heights, widths)
    return (
        f"pixels (least / median / most): height {spread(heights)}, width {spread(widths)}, short side {spread(short)}"
    )
