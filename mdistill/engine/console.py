"""What a person sees and sends while a run goes on: a bar, lines, memory; signals that ask it to stop."""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from mdistill.errors import Stopped

if TYPE_CHECKING:  # slow to import, and a signal may come before they are needed
    import torch

    from mdistill.engine.run_folder import RunFolder
    from mdistill.file_schemas import Progress

Handler = Callable[[int, FrameType | None], None]


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, Ctrl-C and, where the platform has it and nohup does not ignore it, SIGHUP."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


@contextmanager
def on_stop_signal(handler: Handler) -> Iterator[None]:
    """Let ``handler`` answer the ``stop_signals`` meanwhile."""
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody handle signals
        yield
        return
    previous = {number: signal.getsignal(number) for number in stop_signals()}
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, handled in previous.items():
            signal.signal(number, handled)


class StopHandler:
    """Answers stop signals: the first one is told to ``first``, a second one ends the process at once.

    Shells and schedulers send one request twice in the same moment; within ``DOUBLE`` seconds that counts as one. So do
    SIGTERMs of a launcher of several processes, which kills those that take too long by itself.

    Args:
        owns_process: whether the process may be ended; else, as in a notebook, an exception ends what is going on.

    Attributes:
        signal: name of the first signal, None before it.
    """

    DOUBLE = 0.25

    def __init__(self, owns_process: bool) -> None:
        self.signal: str | None = None
        self.owns_process = owns_process
        self._asked = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._asked = signal.Signals(number).name, now
            self.first(frame)
        elif now - self._asked >= self.DOUBLE and not (_launched() and number == signal.SIGTERM):
            self.end("ended at once; what was saved before stays")

    def first(self, frame: FrameType | None) -> None:
        """Take note of the first signal."""

    def end(self, how: str) -> None:
        """Leave the process with a line that says ``how``, or raise."""
        message = f"{self.signal}: {how}"
        if not self.owns_process:
            raise KeyboardInterrupt if self.signal == "SIGINT" else Stopped(message)
        os.write(2, f"\n{message}\n".encode())
        os._exit(Stopped.exit_code)


def _launched() -> bool:
    """Whether a launcher such as torchrun, which sends SIGTERM after any other signal, began this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class StopRequest(StopHandler):
    """Turns SIGTERM, SIGHUP and Ctrl-C into a flag, ``signal``, that a loop reads between its steps."""

    def __init__(self) -> None:
        outer = signal.getsignal(signal.SIGTERM)
        super().__init__(isinstance(outer, StopHandler) and outer.owns_process)
        self._outer = outer
        self._stack = ExitStack()

    @property
    def number(self) -> int:
        """Of the first signal; 0 before it."""
        return signal.Signals[self.signal].value if self.signal else 0

    def __enter__(self) -> "StopRequest":
        self._stack.enter_context(on_stop_signal(self))
        if isinstance(self._outer, StopHandler) and self.signal is None:
            self.signal = self._outer.signal  # one whose exception was lost on its way
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


STRIDE = 16


class StepBar:
    """A bar that counts completed steps without making the host wait for the device; in a terminal, on rank 0 alone.

    On CUDA an event is recorded every ``STRIDE`` steps and the bar counts those that have passed, as found by polling.
    """

    def __init__(self, total: int, done: int, label: str, device: "torch.device") -> None:
        import torch
        from tqdm import tqdm

        from mdistill import distributed

        hidden = True if distributed.rank() != 0 else None  # None: where there is no terminal
        self._bar = tqdm(
            total=total, initial=done, desc=label, unit="step", leave=False, dynamic_ncols=True, disable=hidden
        )
        self._record: Callable[[], Any] | None = torch.cuda.Event if device.type == "cuda" else None
        self._pending: deque[Any] = deque()
        self._launched = 0

    def __enter__(self) -> "StepBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One more step has been handed to the device."""
        if self._bar.disable:
            return
        if self._record is None:
            self._bar.update()
            return
        self._launched += 1
        if self._launched % STRIDE:
            return
        event = self._record()
        event.record()
        self._pending.append(event)
        while self._pending and self._pending[0].query():
            self._pending.popleft()
            self._bar.update(STRIDE)


class Stopwatch:
    """Seconds of work on a device, without a wait for it until they are read."""

    def __init__(self, device: "torch.device") -> None:
        self._on_cuda = device.type == "cuda"
        self._times = [0.0, 0.0, 0.0]
        self._events: list[Any] = [None, None, None]

    def start(self) -> None:
        """Begin with what is launched from here on."""
        self._note(0)

    def stop(self) -> None:
        """End with what was launched so far."""
        self._note(1)

    def seconds(self) -> float:
        """Between the two; the device must have been waited for."""
        if self._on_cuda:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._times[1] - self._times[0]

    def seconds_since_stop(self) -> float:
        """From ``stop`` to now; waits for what was launched in between."""
        if not self._on_cuda:
            return time.perf_counter() - self._times[1]
        self._note(2)
        self._events[2].synchronize()
        return float(self._events[1].elapsed_time(self._events[2])) / 1000

    def _note(self, number: int) -> None:
        self._times[number] = time.perf_counter()
        if self._on_cuda:
            import torch

            self._events[number] = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._events[number].record()


def print_line(message: str) -> None:
    """Print one line, above any bar, on rank 0 alone; a reader or a terminal that has gone away does not end a run."""
    from tqdm import tqdm

    from mdistill import distributed

    if distributed.rank() != 0:
        return
    with suppress(OSError):
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def start_line(folder: "RunFolder", progress: "Progress", epochs: int, phase: str | None = None) -> str:
    """What a session begins with; ``phase`` is the first phase that it is in, if any."""
    if progress.epoch > epochs:
        return f"{folder.path} is complete: {epochs} of {epochs} epochs"
    if progress.epoch == 1 and progress.step == 0:
        return f"writing to {folder.path}"
    return f"resuming {folder.path} at epoch {progress.epoch}, step {progress.step}{f' ({phase})' if phase else ''}"


def epoch_line(results: Mapping[str, Any], epochs: int, headline: str) -> str:
    """One epoch's metrics; ``headline`` is the split that counts."""
    terms = " + ".join(
        f"{key.removeprefix('train/loss_')} {value:.4g}"
        for key, value in results.items()
        if key.startswith("train/loss_")
    )
    evaluated = ""
    if f"{headline}/top1" in results:
        others = [key.split("/")[0] for key in results if key.endswith(f"/{headline}/top1")]  # further students
        beside = "".join(f"  {name} {results[f'{name}/{headline}/top1']:.2f}" for name in others)
        evaluated = (
            f"  {headline} top-1 {results[f'{headline}/top1']:.2f}  top-5 {results[f'{headline}/top5']:.2f}"
            f"{beside}  best {results['best/top1']:.2f} @ {results['best/epoch']}"
        )
    phase = f" ({results['phase']})" if results.get("phase") else ""
    train = f"  train top-1 {results['train/top1']:.2f}" if "train/top1" in results else ""
    return (
        f"epoch {results['epoch']}/{epochs}{phase}  lr {results['lr']:g}  loss {results['train/loss']:.4f} ({terms})"
        f"{train}{evaluated}  {results['images_per_second']:.0f} images/s"
    )


def end_line(results: Mapping[str, Any], headline: str, folder: "RunFolder") -> str:
    """What a run ends with: its last epoch, and the best one beside it."""
    return (
        f"{headline} top-1 {results[f'{headline}/top1']:.2f} after epoch {results['epoch']}, the last one"
        f" (best {results['best/top1']:.2f} after epoch {results['best/epoch']}); network: {folder.student}"
    )


def peak_memory_line(device: "torch.device") -> str:
    """``"peak memory: 512 MiB on the host, 900 MiB on the device"``, as far as the platform tells."""
    import torch

    parts = []
    with suppress(ImportError):
        import resource  # Windows has none

        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        parts.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB on the host")
    if device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the device")
    return f"peak memory: {', '.join(parts) or 'unknown'}"
