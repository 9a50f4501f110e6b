"""What a person sees while a run goes on: a bar in a terminal, one line per epoch elsewhere."""

import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import torch
from tqdm import tqdm


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a flag that the training loop reads between steps.

    More of them change nothing, as job schedulers send several; only a Ctrl-C a second or more later interrupts.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._asked = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._asked = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked >= 1.0:
            raise KeyboardInterrupt


STRIDE = 16


class StepBar:
    """Counts completed steps without making the host wait for the device.

    On CUDA an event is recorded every ``STRIDE`` steps and the bar counts those that have passed, as found by polling.
    """

    def __init__(self, total: int, done: int, label: str, device: torch.device) -> None:
        self._bar = tqdm(
            total=total, initial=done, desc=label, unit="step", leave=False, dynamic_ncols=True, disable=None
        )
        self._record: Callable[[], Any] | None = torch.cuda.Event if device.type == "cuda" else None
        self._pending: deque[Any] = deque()
        self._launched = 0

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

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def say(message: str) -> None:
    """Print one line, above any bar; a reader that has gone away does not end a run."""
    with suppress(BrokenPipeError):
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
