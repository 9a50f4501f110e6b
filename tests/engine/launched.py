"""``mdistill train`` for a launcher, with the data of the tests; ``KILL=rank:step`` ends one process by SIGKILL."""

import itertools
import os
import signal
import sys

from mdistill.cli.train import main
from mdistill.data.loader import BatchLoader

from . import test_distributed

assert test_distributed  # registers what the runs name

if __name__ == "__main__":
    rank, _, step = os.environ.get("KILL", "").partition(":")
    if rank == os.environ["RANK"]:
        fetch, count = BatchLoader.fetch, itertools.count(1)

        def fatal(loader: BatchLoader, number: int) -> int:
            if next(count) == int(step):
                os.kill(os.getpid(), signal.SIGKILL)
            return fetch(loader, number)

        setattr(BatchLoader, "fetch", fatal)  # noqa: B010
    sys.exit(main())
