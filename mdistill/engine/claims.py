"""Who works on what, where several processes and machines share a folder.

The claims on one thing are numbered folders, ``1``, ``2`` and so on; the last one counts, and the file in it says whose
it is. A claim is written under another name and renamed to the next number, which of several processes one alone
succeeds in. Nothing is ever taken away, so nobody can mistake a new claim for the old one that it has judged. The owner
touches its claim while it works, and marks it when it is done. One that nobody has touched for ``STALE`` seconds, or
whose process was of this machine and is gone, counts no more. Clocks of different machines are not compared: the file
system's own tells the time of both.
"""

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from mdistill.errors import UserError, printable
from mdistill.files import read_text

BEAT = 20.0  # seconds between two touches
STALE = 300.0  # seconds without one, after which the owner is taken to be dead
PENDING = ".pending-"  # begins the name of a claim that is being written
CLOCK = ".clock-"  # and of the file that an owner reads the file system's time from


@dataclass(frozen=True)
class Owner:
    """A process that claims things."""

    host: str
    machine: str  # what tells one booted system, or container, from another of the same name
    process: int
    token: str  # of this object alone

    def __str__(self) -> str:
        return f"process {self.process} on {printable(self.host, 80)}"


@dataclass(frozen=True)
class Claim:
    """The last claim on something, as it is found."""

    path: Path
    number: int
    owner: Owner | None  # None where its file cannot be read
    silent: float  # seconds since it was touched
    released: bool

    @property
    def place(self) -> str:
        """Whose it is, for people."""
        return "an unknown process" if self.owner is None else str(self.owner)


class Claims:
    """The claims below ``root``, whose owner is this object; a thread touches those that it holds.

    Args:
        beat: seconds between two touches.
        stale: seconds without a touch, after which another owner's claim is taken over.
    """

    def __init__(self, root: Path, *, beat: float = BEAT, stale: float = STALE) -> None:
        self.root, self.stale, self._beat = root, stale, beat
        self.owner = Owner(socket.gethostname(), _machine(), os.getpid(), uuid.uuid4().hex)
        self._clock = root / f"{CLOCK}{self.owner.token}"
        self._held: dict[str, Path] = {}
        self._lost: set[str] = set()
        self._lock, self._end = threading.Lock(), threading.Event()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._remove_clocks(before=self._now() - stale)
        except OSError as error:
            raise UserError(f"--output: {root} cannot be written: {error.strerror}") from None
        self._thread = threading.Thread(target=self._keep_touching, name="claims", daemon=True)
        self._thread.start()

    def take(self, key: str) -> Claim | None:
        """Claim ``key``.

        Returns:
            None if it is ours now, else the claim that somebody has on it, or has had a moment ago.

        Raises:
            UserError: the folder cannot be written.
        """
        last = self.last(key)
        if last is not None and self._is_ours(last):
            self._hold(key, last.path)
            return None
        if last is not None and not last.released and not self.is_stale(last):
            return last
        folder = self.root / key
        number = 1 if last is None else last.number + 1
        pending, target = folder / f"{PENDING}{self.owner.token}", folder / str(number)
        try:
            pending.mkdir(parents=True, exist_ok=True)
            (pending / "owner.json").write_text(json.dumps(asdict(self.owner)) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output: {folder} cannot be written: {error.strerror}") from None
        try:
            os.rename(pending, target)  # fails where there is a folder with something in it
        except OSError as error:
            shutil.rmtree(pending, ignore_errors=True)
            other = self.last(key)
            if other is None or other.number < number:
                raise UserError(f"--output: {target} cannot be written: {error.strerror}") from None
            if not self._is_ours(other):
                return other
            target = other.path  # NFS may tell of an error where there was none
        self._hold(key, target)
        return None

    def _is_ours(self, claim: Claim) -> bool:
        return claim.owner == self.owner and not claim.released

    def _hold(self, key: str, target: Path) -> None:
        with self._lock:
            self._held[key] = target
            self._lost.discard(key)

    def last(self, key: str) -> Claim | None:
        """The last claim on ``key``, released or not; None where there is none."""
        return _last(self.root / key, self._now)

    def is_stale(self, claim: Claim) -> bool:
        """Whether its owner is taken to be dead."""
        return is_dead(claim, self.stale)

    def is_gone(self, claim: Claim) -> bool:
        """Whether its owner was a process of this machine and has ended."""
        return _has_ended(claim.owner)

    def holds(self, key: str) -> bool:
        """Whether we have claimed ``key`` and nobody has taken it over since, as after a long sleep of this machine."""
        with self._lock:
            return key in self._held and key not in self._lost

    def release(self, key: str) -> None:
        """Give ``key`` up."""
        with self._lock:
            target = self._held.pop(key, None)
            self._lost.discard(key)
        if target is not None:
            with suppress(OSError):
                (target / "released").touch()

    def close(self) -> None:
        """Give everything up."""
        self._end.set()
        self._thread.join()
        for key in list(self._held):
            self.release(key)
        with suppress(OSError):
            self._clock.unlink()

    def _now(self) -> float:
        """By the clock of the file system that the claims are on."""
        self._clock.touch()
        return self._clock.stat().st_mtime

    def _remove_clocks(self, before: float) -> None:
        """Those of processes that were killed; who still needs one that was not touched for so long makes it anew."""
        for clock in self.root.glob(f"{CLOCK}*"):
            with suppress(OSError):
                if clock.stat().st_mtime < before:
                    clock.unlink()

    def _keep_touching(self) -> None:
        while not self._end.wait(self._beat):
            self.touch()

    def touch(self) -> None:
        """Say that we are alive, and find out what others have taken over."""
        with self._lock:
            held = dict(self._held)
        for key, target in held.items():
            with suppress(OSError):
                os.utime(target / "owner.json")
            with suppress(OSError, ValueError):
                last = max(int(name) for name in os.listdir(target.parent) if name.isdecimal())
                if last > int(target.name):
                    with self._lock:
                        self._lost.add(key)


def read_claims(root: Path) -> dict[str, Claim]:
    """The claims below ``root`` that are not released, by key, for somebody who claims nothing: nothing is written.

    How long one has been silent is by the clock of this machine, which may differ from the file system's.
    """
    try:
        keys = sorted(name for name in os.listdir(root) if not name.startswith("."))
    except OSError:
        return {}
    found = {key: _last(root / key, time.time) for key in keys}
    return {key: claim for key, claim in found.items() if claim is not None and not claim.released}


def is_dead(claim: Claim, stale: float = STALE) -> bool:
    """Whether its owner is taken to be dead: a process of this machine that has ended, or silent for too long."""
    return claim.silent > stale or _has_ended(claim.owner)


def is_here(owner: Owner | None) -> bool:
    """Whether it is a process of this machine, so that it can be seen whether it has ended."""
    return owner is not None and (owner.host, owner.machine) == (socket.gethostname(), _machine())


def _has_ended(owner: Owner | None) -> bool:
    return owner is not None and is_here(owner) and not _is_alive(owner.process)


def _last(folder: Path, now: Callable[[], float]) -> Claim | None:
    try:
        numbers = [int(name) for name in os.listdir(folder) if name.isdecimal()]
    except OSError:
        return None
    if not numbers:
        return None
    path = folder / str(max(numbers))
    silent = 0.0
    with suppress(OSError):
        moment = now()
        silent = moment - path.stat().st_mtime
        silent = max(0.0, moment - (path / "owner.json").stat().st_mtime)
    return Claim(path, max(numbers), _owner(path), silent, (path / "released").exists())


def _owner(path: Path) -> Owner | None:
    try:
        given = json.loads(read_text(path / "owner.json"))
        texts = [str(given[key]) for key in ("host", "machine", "token")]
        return Owner(texts[0], texts[1], int(given["process"]), texts[2])
    except (UserError, ValueError, KeyError, TypeError):
        return None


@cache
def _machine() -> str:
    """What tells this booted system, and this space of process numbers, from others; "" where nothing does."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_alive(process: int) -> bool:
    """Whether this machine has a process of this number; True where that cannot be asked."""
    if os.name != "posix" or process < 1:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return not _is_zombie(process)


def _is_zombie(process: int) -> bool:
    """Whether it has ended and its parent has not asked how."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    return False
