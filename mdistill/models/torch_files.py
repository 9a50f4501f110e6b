"""Reading what ``torch.save`` wrote, and telling damage and foreign content.

Nothing of a file is ever executed: its pickle is inspected first, then read with ``weights_only=True``, and what is
neither tensor nor plain data is dropped or refused. Damage is found by the checksums of a zip archive. The format
before torch 1.6 has none: there only truncation shows, and a file is known to be whole by its SHA-256 alone.
"""

import io
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mdistill import pickles
from mdistill.errors import UserError, printable
from mdistill.files import sha256_of

SAFETENSORS = ".safetensors"
MAX_PICKLE = 64 << 20  # bytes of a zip archive's pickle, which holds names and shapes, no values

RELEASES = {
    "0d7818eb35f95925455f13e548a72cfd79faf9174e293faefba0dd56cef1e164": "cifar100_resnet20",
    "e36a0629e178095b7747a0ae937c1ca19a2a1adf4a74f3a93eb7c18a4a3e9c90": "cifar100_resnet32",
    "466747de93dfc24d12769917f83c645d6c17182481c3b51e464d4baef352d1c6": "cifar100_resnet44",
    "f7e590a0e2fe80795aaeb7c5c75f53bd1050a2161c8e53e523ce2835fffd52e2": "cifar100_resnet56",
}
"""Files by SHA-256: networks of chenyaofo/pytorch-cifar-models, as kept in robtad/DANS."""


@dataclass(frozen=True)
class FileRecord:
    """Which file was read, for whoever wants to check a number."""

    sha256: str
    checksums: bool  # whether the file has some, so that damage shows
    release: str | None = None  # what is published under this hash
    safetensors: bool = False  # that format, which has none
    notes: tuple[str, ...] = ()  # what was done to fit it

    @property
    def note(self) -> str | None:
        """What a user should know of the file: that it cannot be verified, and what was done to fit it."""
        notes = list(self.notes)
        if not (self.checksums or self.release):
            form = "in the format safetensors" if self.safetensors else "in torch's format before 1.6"
            notes.append(
                f"is {form}, which has no checksums: damage in it does not show; compare its SHA-256"
                f" with the publisher's: {self.sha256}"
            )
        return "; ".join(notes) or None


def file_record(file: Path) -> FileRecord:
    """The record of a file that has been read.

    A release is known by ``RELEASES``, or where the file's name ends in the first digits of its SHA-256, as
    ``resnet34-333f7ec4.pth``, which is how torch's and torchvision's own are called.
    """
    with open(file, "rb") as opened:
        start = opened.read(2)
    sha256 = sha256_of(file)
    named = re.search(r"-([0-9a-f]{8,64})\.(pth|pt|safetensors)$", file.name)
    release = RELEASES.get(sha256) or (file.stem if named and sha256.startswith(named[1]) else None)
    return FileRecord(sha256, start == b"PK", release, file.suffix == SAFETENSORS)


class _Ignored:
    """Stands for what lies beside the weights: takes any arguments and stores nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


# All that a file may name beyond torch's own tensors and containers. NumPy 1 and 2 pickle a scalar under two names.
_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (_Ignored, "numpy.dtype"),
    (_Ignored, "argparse.Namespace"),
]


def read_file(file: Path) -> Any:
    """What ``torch.save`` wrote: tensors and plain data, on the CPU; nothing in the file is run.

    Raises:
        UserError: unreadable, truncated, damaged, or it names code.
    """
    try:
        with open(file, "rb") as opened:
            head = opened.read(512)
    except OSError as error:
        raise UserError(f"checkpoint {file} cannot be read: {error.strerror}") from error
    if not head:
        raise UserError(f"checkpoint {file} is empty (0 bytes)")
    if file.suffix == SAFETENSORS:
        return _read_safetensors(file)
    try:
        _inspect(file, head)
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on odd pickles end up in the error
            content = _plain(torch.load(file, map_location="cpu", weights_only=True))
    except MemoryError:
        raise
    except pickles.HostilePickle as error:
        raise UserError(f"checkpoint {file} was refused and nothing of it was run: it {error}") from None
    except Exception as error:  # a file that is no checkpoint can fail in any way
        raise UserError(f"checkpoint {file} {_why_unreadable(file, head, str(error))}") from error
    damage = _zip_damage(file) if head.startswith(b"PK") else None
    if damage:
        raise UserError(f"checkpoint {file} is damaged: {damage}")
    return content


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"checkpoint {file} is truncated or damaged: {printable(str(error), 200)}") from error


def _inspect(file: Path, head: bytes) -> None:
    """Refuse pickles that would hang or crash the interpreter, and archives that unfold.

    Raises:
        HostilePickle: says what is wrong; what is merely damaged fails when it is read.
    """
    if not head.startswith(b"PK"):
        with open(file, "rb") as opened:
            for _ in range(5):  # magic number, version, system, content, names of what follows
                pickles.inspect(opened)
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename.rpartition("/")[2] for member in members]
        if "data.pkl" not in names or "constants.pkl" in names:  # no checkpoint: told when it is read
            return
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise pickles.HostilePickle("is compressed, which torch.save never does")
        if len({member.filename for member in members}) < len(members):
            raise pickles.HostilePickle("holds two members of one name")
        for member in members:
            if member.filename.endswith(".pkl"):
                if member.file_size > MAX_PICKLE:
                    raise pickles.HostilePickle(f"has a pickle of {member.file_size:,} bytes")
                with suppress(zipfile.BadZipFile):  # a wrong checksum is told below
                    pickles.inspect(io.BytesIO(archive.read(member)))


def _plain(value: Any) -> Any:
    """``value`` with plain dictionaries and lists for those that a file has dressed up."""
    if isinstance(value, OrderedDict):
        return {key: _plain(item) for key, item in OrderedDict.items(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in dict.items(value)}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


def _zip_damage(file: Path) -> str | None:
    """What is wrong with a zip archive, by its checksums, which torch itself does not compare; None if nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            member = archive.testzip()
    except Exception as error:  # damage can fail in any way
        return printable(f"{type(error).__name__}: {error}", 200)
    return f"the checksum of {printable(member)} in it does not fit" if member else None


_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # starts what torch wrote before it wrote zip archives


def _why_unreadable(file: Path, head: bytes, error: str) -> str:
    refused = _refused_global(file, error)
    if refused:
        return f"was refused and nothing of it was run: it names '{printable(refused)}', which is code, not weights"
    size = f"{file.stat().st_size:,} bytes"
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(file):
            return f"is truncated: its {size} lack the end of the archive"
        damage = _zip_damage(file)
        if damage:
            return f"is damaged: {damage}"
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if not name.endswith("/")]
        if any(member.endswith("constants.pkl") for member in members):
            return "is a TorchScript program, not a state dict"
        if not any(member.endswith("data.pkl") for member in members):
            inside = ", ".join(map(printable, members[:4])) or "nothing"
            return f"is a zip archive, not a torch checkpoint: unpack it and name a file in it (it holds: {inside})"
        return f"cannot be read: {printable((error.splitlines() or ['it holds no state'])[0])}"
    if head.startswith(_LEGACY_MAGIC):
        return f"is truncated or damaged ({size})"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it and name a file in it, such as resnet32x4_vanilla/ckpt_epoch_240.pth"
    return f"is not a torch checkpoint: it starts with {head[:16]!r}"


def _refused_global(file: Path, error: str) -> str | None:
    """The function or class that made torch refuse a pickle: from its message, else the first that looks foreign."""
    named = re.search(r"GLOBAL ([A-Za-z_][\w.]*)(?: |$)", error)
    if named:
        return named.group(1)
    found: list[bytes] = []
    with suppress(Exception), zipfile.ZipFile(file) as archive:  # no archive, or a damaged one
        found = [archive.read(member) for member in archive.namelist() if member.endswith("data.pkl")]
    with open(file, "rb") as opened:
        found = found or [opened.read(1_000_000)]
    harmless = ("torch.", "collections.OrderedDict", "numpy.", "_codecs.encode", "argparse.Namespace")
    names = (name for data in found for name in _globals(data) if not name.startswith(harmless))
    return next((name for name in names if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name)), None)


def _globals(data: bytes) -> Iterator[str]:
    """What a pickle names, read off without running it."""
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif isinstance(argument, str):
                texts.append(argument)
    except Exception:  # damaged, or no pickle: the names so far are all there are
        return
