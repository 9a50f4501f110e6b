"""``mdistill`` for a launcher, with the data of the tests; ``KILL=rank:step`` ends one process by SIGKILL."""

import os
import signal
import sys
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
    sys.exit(main())
