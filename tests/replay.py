"""An emulator of a CUDA graph for the CPU: records what a function does to which memory, and does just that again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mdistill.engine import active_trial, cuda_graph
from mdistill.engine.cuda_graph import Engine

from .host_reads import NoHostReads


class Replay:
    """A recorded function: calling it runs the recorded operations again, on the memory that they had.

    The first call after the recording does nothing: unlike a capture, the recording has run the function already.
    """

    def __init__(self) -> None:
        self.operations: list[Callable[[], None]] = []
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls > 1:
            with torch.no_grad():
                for operation in self.operations:
                    operation()


class Recorder:
    """Stands in for ``capture_graph``: everything that Python does while it records is frozen, as in a real graph.

    A function that cannot be captured, because the host would read a value, makes the recording fail.

    Attributes:
        replays: one for each recording, in order.
    """

    def __init__(self) -> None:
        self.replays: list[Replay] = []

    def __call__(self, function: Callable[[], None]) -> Replay:
        replay = Replay()
        with NoHostReads(), _Recording(replay):
            function()
        self.replays.append(replay)
        return replay


@contextmanager
def emulated() -> Iterator[Recorder]:
    """Within, runs on the CPU capture their steps and teacher batches, by this recorder; all that fails is an error."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "capture_graph", recorder)
        patch.setattr(active_trial, "choose_engine", lambda *_: Engine("graph", "emulated", captures=True))
        patch.setattr(cuda_graph, "print_line", pytest.fail)
        yield recorder


class _Recording(TorchDispatchMode):
    """Runs each operation and adds it to ``replay``, unless it only looks at memory that is there already."""

    def __init__(self, replay: Replay) -> None:
        super().__init__()
        self._replay = replay

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        inputs = {_storage(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        outputs = pytree.tree_leaves(result)
        # Not what the schema says: it calls outputs new that are views, such as those of _unsafe_view.
        fresh = [isinstance(value, Tensor) and _storage(value) not in inputs for value in outputs]
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        if not writes and not any(fresh):
            return result
        # Other names of the same memory: a tensor may get other memory later (``.data = ...``), which no graph sees.
        held_args, held_kwargs, held_outputs = pytree.tree_map_only(Tensor, _held, (tuple(args), kwargs, outputs))

        def again() -> None:
            for new, old, copied in zip(
                pytree.tree_leaves(func(*held_args, **held_kwargs)), held_outputs, fresh, strict=True
            ):
                if copied:
                    if (new.shape, new.dtype) != (old.shape, old.dtype):
                        raise AssertionError(f"{func} gave {old.dtype} {old.shape} and now {new.dtype} {new.shape}")
                    old.copy_(new)

        self._replay.operations.append(again)
        return result


def _held(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
