"""Writing files so that a crash, a kill or a full disk never costs the old one, and locking a folder."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mdistill.errors import RunFailed, UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

IN_USE = "is in use by another running process"  # ends what is told of a locked folder
MAX_TEXT = 1 << 28  # bytes; no text file that is read is nearly as large


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it over ``path``.

    On any error the temporary file is removed and ``path`` keeps its old content.

    Raises:
        RunFailed: the disk is full or the folder is not writable; names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # what lies there may be a link to another place
        yield temporary
        with open(temporary, "r+b") as written:  # Windows flushes no file that is open for reading alone
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        note = "; the previous file is kept" if os.path.exists(path) else ""
        raise RunFailed(f"could not write {path}: {error}{note}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def final_name(path: Path) -> str | None:
    """The name under which ``atomic_write`` would have put ``path`` if it is one of its temporary files, else None."""
    match = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
    return match[1] if match else None


def signature_of(path: Path) -> tuple[int, int] | None:
    """Time and size of a file, which change when it does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of the bytes of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """The text of ``path``; bytes that are not UTF-8 become a replacement character.

    Raises:
        UserError: it cannot be read, or is far too large to be what it should be.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TEXT + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_TEXT:
        raise UserError(f"{path} is larger than {MAX_TEXT >> 20} MiB, which no such file is")
    return content.decode("utf-8", errors="replace")


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` with ``text`` (UTF-8), all or nothing."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lock_folder(folder: Path, what: str, *, wait: float = 0.0) -> "BaseFileLock":
    """Make ``folder`` if it is not there and lock its ``.lock`` for this process.

    The lock ends with ``release()``, and with the process however that ends. A ``.lock`` that is a symbolic link is
    refused.

    Args:
        what: what the folder is, for messages.
        wait: seconds for which another process may have it.

    Raises:
        UserError: another process has it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=wait, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{what} {folder} {IN_USE}") from None
    except OSError as error:
        raise UserError(f"{what} {folder} cannot be written: {error}") from None
    return lock


Locked = dict[int, set[tuple[int, int]]]


def locked_files() -> Locked | None:
    """What is locked by processes of this machine: of each inode devices and process numbers; None where not told."""
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    found: Locked = {}
    for line in lines:  # 1: FLOCK  ADVISORY  WRITE 24704 fe:00:2728054 0 EOF; who waits for one has -> after the number
        parts = line.split()
        if parts[1:2] == ["FLOCK"] and len(parts) > 5:
            major, minor, inode = parts[5].split(":")
            device = os.makedev(int(major, 16), int(minor, 16))
            found.setdefault(int(inode), set()).add((device, int(parts[4])))
    return found


def is_locked(folder: Path, locked: Locked) -> bool:
    """Whether a process has ``folder`` by ``lock_folder``, found without touching the lock.

    Args:
        locked: what ``locked_files`` has found.
    """
    try:
        found = (folder / ".lock").stat()
    except OSError:
        return False
    owners = locked.get(found.st_ino, set())
    return any(device == found.st_dev or _has_open(process, found) for device, process in owners)


def _has_open(process: int, file: os.stat_result) -> bool:
    """Whether ``process`` has ``file`` open; some file systems name another device to it than to the list of locks."""
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{process}/fd"):
            with suppress(OSError):
                if os.path.samestat(entry.stat(), file):
                    return True
    return False
