"""A command in a process of its own, in a fraction of a second: forked from a server that has imported everything.

ended = forked.command(["train", "--cfg", str(cfg)], before=functools.partial(plant, 3))
assert ended.code == 75 and "Traceback" not in ended.err
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PRELOADED = [
    *("mdistill.cli.train", "mdistill.cli.eval", "mdistill.cli.cache", "mdistill.cli.audit", "mdistill.engine.trainer"),
    *("torch._dynamo.convert_frame", "torch._inductor.standalone_compile"),  # by an optimizer: most of a second
    *("torch.utils.tensorboard", "torchvision", "filelock", "tests.faults.io_cases", __name__),
]


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int  # its exit code; -9 for one that SIGKILL ended
    out: str
    err: str


@dataclass
class Running:
    """A process that may still be running."""

    process: multiprocessing.process.BaseProcess
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        """Of the process, for signals."""
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout: float = 60) -> Ended:
        """Until it has ended; one that takes longer than ``timeout`` seconds is killed and fails the test."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s: {self.err.read_text(errors='replace')[-2000:]}")
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (self.out, self.err)]
        return Ended(self.process.exitcode, *texts)


@contextlib.contextmanager
def started(arguments: Sequence[str], *, before: Callable[[], object] | None = None) -> Iterator[Running]:
    """``mdistill`` with ``arguments``, under way; within it runs, after it is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = context.Process(target=_main, args=(list(arguments), before, out, err))
        process.start()
        try:
            yield Running(process, out, err)
        finally:
            process.kill()
            process.join()


def command(arguments: Sequence[str], *, before: Callable[[], object] | None = None, timeout: float = 60) -> Ended:
    """``mdistill`` with ``arguments``, to its end.

    Args:
        before: called in the process first; a function of a module, or a ``functools.partial`` of one.
        timeout: seconds.
    """
    with started(arguments, before=before) as running:
        return running.wait(timeout)


def _main(arguments: list[str], before: Callable[[], object] | None, out: Path, err: Path) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    import torch
    from tqdm import tqdm

    from mdistill.cli.main import main

    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    tqdm.set_lock(threading.RLock())  # instead of one between processes, which a kill would leave behind
    sys.argv = ["mdistill", *arguments]
    if before is not None:
        before()
    code = main()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # what ends here is the test's own
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    sys.exit(code)
