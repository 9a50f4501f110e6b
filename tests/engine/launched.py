"""``mdistill`` for a launcher, with the data of the tests; ``KILL=rank:step`` ends one process by SIGKILL.

A process that would end by itself while gloo's threads are still there ends with an error: they can abort it.
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

from mdistill.cli.main import main
from mdistill.data.loader import BatchLoader

from .. import runs
from . import test_distributed

assert test_distributed  # registers what the runs name

if __name__ == "__main__":
    rank, _, step = os.environ.get("KILL", "").partition(":")
    if rank == os.environ["RANK"]:
        mock.patch.object(BatchLoader, "fetch", runs.stopping_fetch(int(step), signal.SIGKILL)).start()
    code, threads = main(), set[str]()
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # another thread, which has ended meanwhile
            threads.add(path.read_text().strip())
    left = sorted(name for name in threads if "gloo" in name)
    sys.exit(f"error: {left} are left" if left else code)
