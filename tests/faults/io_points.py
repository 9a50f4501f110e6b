"""The I/O of a command below one folder as a numbered list of points, and a fault at one of them.

A point is an opening, a write, flush, fsync or close of a written file, a rename, a deletion, a folder made or deleted,
a listing, the mapping of a cached file. They are counted from 0, in all threads together.

forked.command(arguments, before=functools.partial(plant, folder, log))                   # writes the points to ``log``
forked.command(arguments, before=functools.partial(plant, folder, log, fault="EIO", at=7))   # ``log``: the one it met
"""

import builtins
import errno
import glob
import io
import itertools
import os
import pathlib
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdistill.engine import class_distances, logit_cache

from .. import conftest

assert conftest  # registers the tiny data set and network

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
WRITING = {"create", "write", "flush", "fsync", "close", "replace", "mkdir"}
FILLING = {"write", "flush", "fsync", "mkdir"}  # what a disk that stays full refuses


@dataclass(frozen=True)
class Point:
    """A kind of operation and the file, relative to the folder, without the parts of its name that change."""

    kind: str
    file: str


def points(log: Path) -> list[Point]:
    """What ``plant`` wrote to ``log``."""
    return [Point(*line.split(" ", 1)) for line in log.read_text().splitlines()] if log.exists() else []


def plant(folder: Path, log: Path, fault: str | None = None, at: int = 0) -> None:
    """Number this process's I/O below ``folder`` from here on; plant ``fault``, unless it is None, at point ``at``.

    Args:
        fault: "kill": SIGKILL, a write half done; "EIO" or "ENOSPC": an error of the disk, a write half done; "full":
            ENOSPC from there on; one of ``SIGNALS``, after which the operation goes on.
    """
    _Planted(folder, log, fault, at).patch()


class _Planted:
    def __init__(self, folder: Path, log: Path, fault: str | None, at: int) -> None:
        self._folder, self._fault, self._at = os.path.abspath(folder), fault, at
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._numbers, self._lock = itertools.count(), threading.RLock()
        self._names: dict[int, str | None] = {}  # of descriptors

    def patch(self) -> None:
        """Replace the functions that do I/O, wherever they are held."""
        opened, scandir = self._opener(builtins.open), os.scandir
        builtins.open = io.open = opened
        os.open = self._low_opener(os.open)
        kinds = {"fsync": "fsync", "replace": "replace", "rename": "replace", "unlink": "unlink", "remove": "unlink"}
        for name, kind in {**kinds, "mkdir": "mkdir", "rmdir": "rmdir", "scandir": "list", "listdir": "list"}.items():
            setattr(os, name, self._counted(kind, getattr(os, name)))
        for module in (logit_cache, class_distances):
            module.safe_open = self._counted("mmap", module.safe_open)
        if accessor := getattr(pathlib, "_NormalAccessor", None):  # Python 3.10 holds the functions of the beginning
            accessor.open, names = staticmethod(opened), ("replace", "rename", "unlink", "mkdir", "rmdir")
            for name in (*names, "scandir", "listdir"):
                setattr(accessor, name, staticmethod(getattr(os, name)))
        for holder in vars(glob).values():  # so does Path.glob in 3.13
            held = vars(holder).get("scandir") if isinstance(holder, type) else None
            if isinstance(held, staticmethod) and held.__func__ is scandir:
                holder.scandir = staticmethod(os.scandir)

    def meet(self, kind: str, name: str | None, half: Callable[[], object] = lambda: None) -> None:
        """Count a point of the file ``name`` below the folder; ``half`` does a part of its operation."""
        if name is None:
            return
        with self._lock:
            number = next(self._numbers)
            if number == self._at or self._fault is None:
                os.write(self._log, f"{kind} {name}\n".encode())
        full = self._fault == "full" and number >= self._at and kind in FILLING
        if self._fault is None or (number != self._at and not full):
            return
        if self._fault in SIGNALS:
            os.kill(os.getpid(), getattr(signal, self._fault))
            return
        half()
        if self._fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if full or self._fault != "full":
            code = errno.EIO if self._fault == "EIO" else errno.ENOSPC
            raise OSError(code, os.strerror(code), name)

    def name(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Relative to the folder; None for what lies elsewhere."""
        if isinstance(path, int):
            return self._names.get(path)
        path = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(path):
            above = self._names.get(dir_fd)
            return None if above is None else _steady(os.path.join(above, path))
        path = os.path.abspath(path)
        if path != self._folder and not path.startswith(self._folder + os.sep):
            return None
        return _steady(os.path.relpath(path, self._folder))

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            name, writes = self.name(file), bool(set(mode) & set("wax+"))
            if name is None or isinstance(file, int):
                return real(file, mode, *args, **kwargs)
            self.meet("create" if writes else "open", name)
            result = real(file, mode, *args, **kwargs)
            return _Written(result, self, name) if writes else result

        return opened

    def _low_opener(self, real: Callable[..., int]) -> Callable[..., int]:
        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            name = self.name(path, dir_fd)
            self.meet("create" if flags & (os.O_WRONLY | os.O_RDWR) else "open", name)
            number = real(path, flags, mode, dir_fd=dir_fd)
            self._names[number] = name
            return number

        return opened

    def _counted(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            self.meet(kind, self.name(path, kwargs.get("dir_fd")))
            return real(path, *args, **kwargs)

        return counted


def _steady(name: str) -> str:
    """Without what differs between two runs."""
    return re.sub(r"[0-9a-f]{32}|[0-9a-f]{16}|(?<=\.)\d+(?=\.tmp)|(?<=tfevents).*", "*", name)


class _Written:
    """A file open for writing whose operations are points."""

    def __init__(self, file: Any, planted: _Planted, name: str) -> None:
        self._file, self._planted, self._name = file, planted, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._file, attribute)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        number = int(self._file.fileno())
        self._planted._names[number] = self._name
        return number

    def write(self, data: Any) -> Any:
        self._planted.meet("write", self._name, lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
        return self._file.write(data)

    def flush(self) -> None:
        self._planted.meet("flush", self._name)
        self._file.flush()

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self._planted.meet("close", self._name)
        finally:
            self._file.close()


def mark(path: Path | None = None) -> None:
    """Note that the command begins; nowhere, where no path is given."""
    if path is not None:
        path.touch()
