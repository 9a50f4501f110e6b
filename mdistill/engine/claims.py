"""Who works on what, where several processes and machines share a folder.

A claim is a folder that one process has made: the file system lets one alone succeed. Its owner touches it while it
works. One that nobody has touched for ``STALE`` seconds, or whose process was of this machine and is gone, belongs to
nobody any more: it is moved out of the way, which again one alone succeeds in. Clocks of different machines are not
compared: the file system's own tells the time of both.
"""

import json
import os
import shutil
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path

from mdistill.errors import UserError
from mdistill.files import read_text

BEAT = 20.0  # seconds between two touches
STALE = 300.0  # seconds without one, after which the owner is taken to be dead


class Claims:
    """The claims below ``root``, whose owner is this object; a thread touches those that it holds.

    Args:
        beat: seconds between two touches.
        stale: seconds without a touch, after which another owner's claim is taken over.
    """

    def __init__(self, root: Path, *, beat: float = BEAT, stale: float = STALE) -> None:
        self.root, self._beat, self._stale = root, beat, stale
        self.token = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
        self._clock = root / f".clock-{uuid.uuid4().hex}"
        self._held: set[str] = set()
        self._lock, self._end = threading.Lock(), threading.Event()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output: {root} cannot be written: {error}") from None
        self._thread = threading.Thread(target=self._touch, name="claims", daemon=True)
        self._thread.start()

    def take(self, key: str) -> bool:
        """Claim ``key``, or find that another owner has it. A stale claim is taken over."""
        folder = self.root / key
        if not self._make(folder) and not (self._is_stale(folder) and self._clear(folder) and self._make(folder)):
            return False
        with self._lock:
            self._held.add(key)
        return True

    def owner(self, key: str) -> str | None:
        """Who has ``key``, as host, process and a random word; None where nobody has."""
        try:
            return str(json.loads(read_text(self.root / key / "owner.json"))["owner"])
        except (UserError, ValueError, KeyError, TypeError):
            return "somebody" if (self.root / key).is_dir() else None

    def release(self, key: str) -> None:
        """Give ``key`` up, if it is still ours."""
        with self._lock:
            self._held.discard(key)
        if self.owner(key) == self.token:
            self._clear(self.root / key)

    def close(self) -> None:
        """Give everything up."""
        self._end.set()
        self._thread.join()
        for key in list(self._held):
            self.release(key)

    def _make(self, folder: Path) -> bool:
        try:
            folder.mkdir()
            (folder / "owner.json").write_text(json.dumps({"owner": self.token}) + "\n", encoding="utf-8")
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"--output: {folder} cannot be written: {error}") from None
        return True

    def _is_stale(self, folder: Path) -> bool:
        """By the clock of the file system that the claim is on, or because its process is gone from this machine."""
        host, _, rest = (self.owner(folder.name) or "").partition("/")
        process = rest.partition("/")[0]
        if host == socket.gethostname() and process.isdecimal() and not _is_alive(int(process)):
            return True
        clock = self._clock
        with suppress(OSError):  # the claim was released meanwhile
            clock.touch()
            last = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            return clock.stat().st_mtime - last > self._stale
        return False

    def _clear(self, folder: Path) -> bool:
        """Take a claim away; of several that try, one succeeds."""
        aside = self.root / f".gone-{uuid.uuid4().hex}"
        try:
            os.rename(folder, aside)
        except OSError:
            return False
        shutil.rmtree(aside, ignore_errors=True)
        return True

    def _touch(self) -> None:
        while not self._end.wait(self._beat):
            with self._lock:
                held = list(self._held)
            for key in held:
                with suppress(OSError):
                    os.utime(self.root / key / "owner.json")
        with suppress(OSError):
            self._clock.unlink()


def _is_alive(process: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
