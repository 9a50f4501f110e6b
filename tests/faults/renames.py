"""A kill right after a file got its name."""

import os
import signal
from pathlib import Path

import tests.conftest  # noqa: F401  (registers the tiny data set and network)


def kill_after(prefix: str) -> None:
    """From now on, the process is killed once something is renamed to a name that begins with ``prefix``."""
    replace = os.replace

    def killing(source: str | Path, target: str | Path) -> None:
        replace(source, target)
        if Path(target).name.startswith(prefix):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killing
