"""Writing files so that a crash, a kill or a full disk never costs the old one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mdistill.errors import RunFailed


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
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        kept = "; the previous file is kept" if os.path.exists(path) else ""
        raise RunFailed(f"could not write {path}: {error}{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` with ``text`` (UTF-8), all or nothing."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
