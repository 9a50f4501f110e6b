"""Kills of a table's workers and of the runs that they train, at chosen points; planted in a forked process.

ended = forked.command(["table", "run", ...], before=functools.partial(table_kills.plant, Kill("worker", 1, 5), log))
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

Victim = Literal["run", "worker", "both", "stop", "claim", "release"]
VICTIMS: tuple[Victim, ...] = ("run", "worker", "both", "stop", "claim", "release")


@dataclass(frozen=True)
class Kill:
    """Of whom, and when.

    ``run``, ``worker``, ``both``: SIGKILL, as step ``step`` of the worker's run number ``run``, and of those after it,
    is fetched; ``stop``: SIGTERM to the worker then. ``claim``: the worker, when it has claimed its run number ``run``;
    ``release``: before it gives it up.
    """

    victim: Victim
    run: int  # from 0
    step: int  # from 1


class Forked:
    """A run in a fork of the worker, which has all modules loaded; as the subprocess that it takes the place of."""

    def __init__(self, arguments: Sequence[str], log: Path, within: Callable[[], None], ended: Path) -> None:
        ours, self._theirs = os.pipe()
        self._code: int | None = None
        self._pid = os.fork()
        if self._pid:
            os.close(ours)
            return
        os.close(self._theirs)
        os.dup2(ours, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        sys.argv = ["table", *arguments]
        code, steps = 1, _at_each_step(lambda step: None)
        try:
            within()
            from mdistill.reporting.table_runs import child

            child()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if code == 0 and steps[0]:  # else it was complete, by another process a moment ago
                _append(ended, log.stem)
            os._exit(code)

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                os.close(self._theirs)
        return self._code

    def terminate(self) -> None:
        """SIGTERM."""
        os.kill(self._pid, signal.SIGTERM)


def plant(kill: Kill | None, ended: Path) -> None:
    """Make this a worker whose runs are forks, killed as ``kill`` says; ``ended`` notes what trains to its end."""
    from mdistill.engine.claims import Claim, Claims
    from mdistill.reporting import table_runs

    count = {"run": -1, "take": -1, "release": -1}

    def within() -> None:
        if kill is not None and count["run"] >= kill.run:
            _kill_at_step(kill)

    def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Forked:
        count["run"] += 1
        return Forked(arguments, log, within, ended)

    def take(claims: Claims, key: str) -> Claim | None:
        other = real_take(claims, key)
        count["take"] += other is None
        if other is None and kill is not None and (kill.victim, kill.run) == ("claim", count["take"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return other

    def release(claims: Claims, key: str) -> None:
        count["release"] += 1
        if kill is not None and (kill.victim, kill.run) == ("release", count["release"]):
            os.kill(os.getpid(), signal.SIGKILL)
        real_release(claims, key)

    real_take, real_release = Claims.take, Claims.release
    mock.patch.object(Claims, "take", take).start()  # in a forked process of its own
    mock.patch.object(Claims, "release", release).start()
    mock.patch.object(table_runs, "_start", start).start()
    mock.patch.object(table_runs, "POLL", 0.02).start()
    mock.patch.object(table_runs, "SCAN", 0.1).start()


def _kill_at_step(kill: Kill) -> None:
    victims = {
        "run": [(os.getpid(), signal.SIGKILL)],
        "worker": [(os.getppid(), signal.SIGKILL)],
        "both": [(os.getppid(), signal.SIGKILL), (os.getpid(), signal.SIGKILL)],
        "stop": [(os.getppid(), signal.SIGTERM)],
    }.get(kill.victim, [])

    def stab(step: int) -> None:
        if step == kill.step:
            for process, number in victims:
                os.kill(process, number)

    _at_each_step(stab)


def _at_each_step(do: Callable[[int], None]) -> list[int]:
    """Before each step is fetched, ``do`` with how many there have been, from 1; their number, as it grows."""
    from mdistill.data.loader import BatchLoader

    fetch, done = BatchLoader.fetch, [0]

    def counted(loader: BatchLoader, step: int) -> int:
        done[0] += 1
        do(done[0])
        return fetch(loader, step)

    mock.patch.object(BatchLoader, "fetch", counted).start()
    return done


def _append(path: Path, line: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)
