"""How training steps are launched: as Python calls, as one captured CUDA graph, or with the student compiled.

All three compute the same. A step works on static tensors: the learning rate, the epoch, the position within the epoch,
images, views and queues are read from device memory, so nothing is captured twice.
"""

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mdistill.engine.console import print_line
from mdistill.errors import UserError
from mdistill.precision import Precision, computing

WARM_UP = 3
"""Real calls before a capture: they allocate momentum and sums, and let cuDNN choose its kernels."""


@dataclass(frozen=True)
class Engine:
    """How a run launches its steps, and why."""

    name: Literal["eager", "graph", "compile"]
    reason: str
    captures: bool = False  # whether steps are captured; on CUDA those of compiled networks are too

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_engine(asked: Literal["auto", "eager", "graph", "compile"], device: torch.device) -> Engine:
    """The engine for ``device``.

    Raises:
        UserError: one was asked for that the device cannot have.
    """
    if asked == "graph" and device.type != "cuda":
        raise UserError(
            f"run.engine: graph needs a CUDA device, this run is on {device.type}; use auto, eager or compile"
        )
    if asked == "compile" and device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise UserError("run.engine: compile needs a C++ compiler on the CPU and there is no g++ or clang++; use eager")
    if asked == "auto":
        return (
            Engine("graph", "one launch per step", captures=True) if device.type == "cuda" else Engine("eager", "CPU")
        )
    return Engine(asked, "as asked", captures=device.type == "cuda" and asked != "eager")


class CapturedStep:
    """``function(size)``, called again and again; after ``WARM_UP`` calls at the full size it is captured and replayed.

    When a capture fails, it is tried once more; then the function runs eagerly, with the same results.

    Args:
        function: works on static tensors; given the number of images.
        size: the full one; calls with another number are never captured.
        capture: False never captures.
        name: what is captured, for the message about a failure.
        compiled: whether the function runs a compiled network, which other sizes would compile anew.
    """

    def __init__(
        self, function: Callable[[int], None], size: int, *, capture: bool, name: str, compiled: bool = False
    ) -> None:
        self.function, self.size, self.capture, self.name, self.compiled = function, size, capture, name, compiled
        self.replay: Callable[[], None] | None = None
        self._calls = 0

    def __call__(self, size: int) -> None:
        if size != self.size:
            with uncompiled() if self.compiled else nullcontext():
                self.function(size)
            return
        if self.capture and self.replay is None and self._calls >= WARM_UP:
            self._capture()
        if self.replay is None:
            self.function(size)
        else:
            self.replay()
        self._calls += 1

    def _capture(self) -> None:
        for _ in range(2):
            reason = self._try_capture()
            if reason is None:
                return
        self.capture = False
        print_line(f"engine: {self.name} could not be captured ({reason}); continuing eagerly, with the same results")

    def _try_capture(self) -> str | None:
        """Try once; why it failed. An error is let go here: it would stay on as the context of the next one."""
        try:
            self.replay = capture_graph(partial(self.function, self.size))
        except Exception as error:  # whatever cannot be captured; nothing has run yet
            return deepest_cause(error)
        return None


def capture_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Capture ``function`` on the current stream, without running it; returns what replays it.

    Graphs of earlier runs sit in reference cycles, and freeing one during a capture invalidates it: garbage is
    collected before, and the collector is off during the capture.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            function()
    finally:
        if was_enabled:
            gc.enable()
    return graph.replay


def deepest_cause(error: BaseException) -> str:
    """The error that started a chain of them, in one line: a failed capture raises others on its way out."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return one_line(error)


def one_line(error: BaseException) -> str:
    """Its type and the first line of its text, which may be empty."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A new CUDA stream to make current, behind what was launched before; nothing on the CPU.

    Captures need a stream of their own, and trials on streams of their own overlap.
    """
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def compile_network(network: nn.Module, example: Tensor, precision: Precision | None, *, features: bool) -> bool:
    """Compile ``network`` in place and try it, forward and backward; False, with a message, leaves it as before.

    Weights and buffers stay as they are. What its forward pass holds is good for one backward pass, which may overwrite
    it.

    Args:
        example: (B, 3, S, S) images of the size that it is compiled for.
        features: whether methods read ``forward_features``.
    """
    if features:
        network.forward_features = torch.compile(network.forward_features, dynamic=False)  # type: ignore[assignment, arg-type]
    else:
        network.compile(dynamic=False)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    error: Exception | None = None
    try:
        with computing(precision, example.device):
            output = network.forward_features(example).logits if features else network(example)  # type: ignore[operator]
        output.float().square().sum().backward()
    except Exception as failure:
        error = failure
        network._compiled_call_impl = None
        network.__dict__.pop("forward_features", None)
        print_line(f"engine: compile failed ({one_line(error)}); continuing eagerly, with the same results")
    network.zero_grad(set_to_none=True)
    network.load_state_dict(state)
    return error is None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Networks run as plain Python within: evaluation and the last, smaller batch are not worth a compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield
