"""How steps are launched: as Python calls, as one captured CUDA graph, or with the networks compiled.

All three compute the same. What is launched works on static tensors: the learning rate, the epoch, the place in the
epoch, images, views and queues are read from device memory, so nothing is captured twice.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mdistill.errors import UserError

EngineName = Literal["eager", "graph", "compile"]
Function = Callable[[], None]
Record = Callable[[Function], Function]
"""Captures a function of static tensors, without running it, and returns what replays it."""

WARM_UP = 3
"""Real steps before the capture: they allocate momentum and sums, and let cuDNN choose its kernels."""


@dataclass(frozen=True)
class Engine:
    """How a run launches its steps, and why."""

    name: EngineName
    reason: str
    captures: bool = False  # whether steps are captured; on CUDA those of compiled networks are too


def choose_engine(
    asked: Literal["auto", "eager", "graph", "compile"],
    device: torch.device,
    generators: Iterable[torch.Generator] = (),
) -> Engine:
    """The engine for ``device``; ``generators`` are those that a step draws from.

    Raises:
        UserError: one was asked for that the device cannot have.
    """
    if asked == "graph" and device.type != "cuda":
        raise UserError(
            f"run.engine: graph needs a CUDA device, this run is on {device.type}; use auto, eager or compile"
        )
    if asked == "compile" and device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise UserError("run.engine: compile needs a C++ compiler on the CPU and there is no g++ or clang++; use eager")
    if device.type == "cpu":
        return Engine("compile" if asked == "compile" else "eager", "as asked" if asked != "auto" else "the CPU's")
    if asked == "eager":
        return Engine("eager", "as asked")
    if any(generator.device.type != "cuda" for generator in generators):
        return Engine("eager", "this method draws random numbers on the host, which cannot be captured")
    if asked == "auto":
        return Engine("graph", "one launch a step", captures=True)
    return Engine(asked, "as asked", captures=True)


class Launcher:
    """Calls a function of static tensors again and again; after ``WARM_UP`` calls it is recorded and then replayed.

    Args:
        function: what one call does.
        record: captures it; None never does.
        on_failure: told why, in one line, when the capture fails; the function then runs as it is from there on.
    """

    def __init__(
        self,
        function: Function,
        *,
        record: Record | None = None,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._function, self._record, self._on_failure = function, record, on_failure
        self._replay: Function | None = None
        self._calls = 0

    def __call__(self) -> None:
        if self._record is not None and self._replay is None and self._calls >= WARM_UP:
            try:
                self._replay = self._record(self._function)
            except Exception as error:  # whatever cannot be captured; nothing has run yet
                self._record = None
                self._on_failure(in_one_line(error))
        (self._replay or self._function)()
        self._calls += 1


def in_one_line(error: Exception) -> str:
    """Its type and the first line of its text, which may be empty."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A new CUDA stream as the current one, behind what was launched before; nothing on the CPU.

    Captures need a stream of their own, and trials on streams of their own overlap.
    """
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def cuda_graph(generators: Iterable[torch.Generator] = ()) -> Record:
    """A ``Record`` that captures on the current stream; ``generators`` go on drawing as if nothing were captured."""

    def record(function: Function) -> Function:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            function()
        return graph.replay

    return record


def upload(values: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Host to device; the host does not wait."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def compile_network(network: nn.Module, *, features: bool) -> None:
    """Compile ``network`` in place, its ``forward_features`` when methods read those; its state stays as it is.

    What its forward pass keeps is good for one backward pass, which may overwrite it.
    """
    if features:
        network.forward_features = torch.compile(network.forward_features, dynamic=False)  # type: ignore[assignment, arg-type]
    else:
        network.compile(dynamic=False)


def undo_compile(network: nn.Module) -> None:
    """The network as it was before ``compile_network``."""
    network._compiled_call_impl = None
    network.__dict__.pop("forward_features", None)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Networks run as plain Python within: evaluation and the last, smaller batch are not worth a compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield
