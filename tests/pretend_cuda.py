"""A pretended CUDA device: what a GPU refuses, or gets wrong in silence, shows on a machine without one.

    with pretend() as device:
        trainer.fit(build.build(configs, torch.device("cuda"), ...), folders)

Tensors "on the device" are CPU tensors whose storage is marked: values, autograd and the optimiser are the real ones.
Launches are counted: a stream is a vector clock, and so is what a thread of the host has waited for. Refused, by
``PretendError``, are

* tensors of two devices in one operation;
* inside a capture: reads by the host, shapes that depend on values, copies between host and device, work on another
  stream, garbage collection that frees another graph, the mode "global" while there are other threads;
* the same reads and copies wherever ``torch.cuda.set_sync_debug_mode("error")`` is on;
* races: an access to memory that another stream wrote (or a write to what it read) without waiting for it, pinned
  memory that is written while a copy may still read it, or read while a copy may still write it;
* replays that use memory which was freed after the capture;
* fused SGD or AdamW with a rate that a capture would freeze, or with weights and gradients in different layouts;
* in deterministic mode, operations without a deterministic kernel, and scatters of a tensor in more than one
  dimension, for which torch 2.9 copies strides from the host (so does the backward pass of ``gather`` or ``sort``).

Not refused but as wrong as on a GPU: a captured function has no effect until it is replayed, its new memory holds 0xFF
bytes till then, and numbers of the host are frozen in it; pinned memory that the device writes holds NaN (integers: the
largest) until a thread has waited for it.

Not seen: what kernels compute and how fast, cuDNN, ``torch.compile``, draws of random numbers on the device, memory
that the allocator hands from one stream to another, and work that other threads launch (they may wait for events).
Forks to other streams inside a capture, and events in it, are refused though a GPU can do them.
"""

import contextlib
import gc
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
READ_BY_HOST = {  # and operations whose shapes depend on values
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
NOT_DETERMINISTIC = {
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "grid_sampler_2d_backward",
    "histc",
    "kthvalue",
    "nll_loss2d_forward",
    "put_",
    "reflection_pad2d_backward",
    "upsample_bilinear2d_backward",
}
SCATTERS = {"scatter", "scatter_", "scatter_add", "scatter_add_"}
Clocks = dict[int, int]  # number of a stream -> launches on it


_probe = torch.zeros(1)
HELD_BY_PYTHON = torch._C._storage_Use_Count(_probe.untyped_storage()._cdata) - 1  # 1 since some version of torch


class PretendError(RuntimeError):
    """What a CUDA run would raise, or should have raised."""


def merge(clocks: Clocks, others: Clocks) -> None:
    """Let ``clocks`` be behind all that ``others`` is behind of."""
    for number, clock in others.items():
        clocks[number] = max(clocks.get(number, 0), clock)


# ---- what stands in for torch.cuda ----


class Stream:
    """A queue of launches; ``seen`` counts, for each stream, those that the next launch here comes after."""

    numbers = itertools.count()

    def __init__(self, device: Any = None) -> None:
        self.number = next(Stream.numbers)
        self.seen: Clocks = {self.number: 0}
        STREAMS.add(self)

    def wait_stream(self, other: "Stream") -> None:
        merge(self.seen, other.seen)

    def wait_event(self, event: "Event") -> None:
        merge(self.seen, event.seen or {})

    def synchronize(self) -> None:
        DEVICE.host_waits("Stream.synchronize", self.seen)


STREAMS: "weakref.WeakSet[Stream]" = weakref.WeakSet()


class StreamContext:
    """Makes a stream current; like torch's it can be entered again, but not while it is entered."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self._before, DEVICE.thread.stream = DEVICE.thread.stream, self.stream

    def __exit__(self, *error: object) -> None:
        DEVICE.thread.stream = self._before


class Event:
    """A place in a stream."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing
        self.seen: Clocks | None = None

    def record(self, stream: Stream | None = None) -> None:
        if DEVICE.capturing:
            raise PretendError("an event is recorded inside a capture")
        self.seen = dict((stream or DEVICE.thread.stream).seen)

    def synchronize(self) -> None:
        DEVICE.host_waits("Event.synchronize", self.seen or {})

    def elapsed_time(self, end: "Event") -> float:
        for event in (self, end):
            if event.seen is None or not event.enable_timing:
                raise PretendError("elapsed_time of an event that was not recorded, or without enable_timing")
            if any(DEVICE.thread.waited.get(number, 0) < clock for number, clock in event.seen.items()):
                raise PretendError("elapsed_time: device not ready, the host has not waited for the event")
        return 1.0


class CUDAGraph:
    """Recorded operations, the memory that they use, and what a replay accesses."""

    def __init__(self) -> None:
        self.operations: list[Callable[[], None]] | None = None
        self.reads: set[int] = set()
        self.writes: set[int] = set()
        self.references: Counter[int] = Counter()  # to storages from before the capture, that the graph itself holds
        GRAPHS.add(self)

    def replay(self) -> None:
        if self.operations is None:
            raise PretendError("replay of a graph that was not captured")
        if DEVICE.capture is not None:
            raise PretendError("replay inside a capture")
        for storage in self.references:
            held = sum(graph.references[storage] for graph in list(GRAPHS)) + HELD_BY_PYTHON
            if torch._C._storage_Use_Count(storage) <= held:
                raise PretendError("the graph uses memory that was freed after the capture")
        DEVICE.replays += 1
        with DEVICE.quiet(), torch.no_grad():
            for operation in self.operations:
                operation()
        DEVICE.launch(self.reads, self.writes, "a replay")

    def __del__(self) -> None:
        if DEVICE.capture is not None and self.operations is not None:
            DEVICE.capture.broken = "another graph was destroyed, by the garbage collector, during the capture"


GRAPHS: "weakref.WeakSet[CUDAGraph]" = weakref.WeakSet()


@dataclass
class Capture:
    """A capture under way; storages are known by ``key``."""

    graph: CUDAGraph
    stream: Stream
    mode: str
    thread: int = field(default_factory=threading.get_ident)
    operations: list[Callable[[], None]] = field(default_factory=list)
    inside: dict[int, Tensor] = field(default_factory=dict)  # allocated in it
    saved: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # written in it: bytes, and those before it
    broken: str = ""

    def before(self, written: list[Tensor]) -> None:
        """Save what is about to be written."""
        for value in written:
            if key(value) not in self.inside and key(value) not in self.saved:
                content = as_bytes(value)
                self.saved[key(value)] = (content, content.clone())

    def add(self, func: Any, args: Any, kwargs: Any, outputs: list[Any], fresh: list[bool]) -> None:
        """Record an operation that has run; ``fresh`` tells which outputs are new memory."""
        for value, new in zip(outputs, fresh, strict=True):
            if new:
                self.inside[key(value)] = value.detach()
        held_args, held_kwargs, held = pytree.tree_map_only(Tensor, self._hold, (args, kwargs, outputs))

        def again() -> None:
            results = pytree.tree_leaves(func(*held_args, **held_kwargs))
            for result, memory, new in zip(results, held, fresh, strict=True):
                if new:
                    memory.copy_(result)

        self.operations.append(again)

    def _hold(self, tensor: Tensor) -> Tensor:
        if not DEVICE.has(tensor):
            return tensor.clone()  # a number of the host: frozen
        if key(tensor) not in self.inside:
            self.graph.references[key(tensor)] += 1
        return tensor.detach()

    def end(self) -> None:
        """Undo: a capture computes nothing."""
        for content, before in self.saved.values():
            content.copy_(before)
        for value in self.inside.values():
            as_bytes(value).fill_(0xFF)


class GraphContext:
    """``torch.cuda.graph``: captures what is launched within, without effect."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self.graph, self.stream, self.mode = cuda_graph, stream or Stream(), capture_error_mode

    def __enter__(self) -> None:
        DEVICE.wait_for_all()
        if self.stream is DEVICE.default:
            raise PretendError("graphs cannot be captured on the default stream")
        self._context = StreamContext(self.stream)
        self._context.__enter__()
        DEVICE.capture = Capture(self.graph, self.stream, self.mode)
        if gc.isenabled():
            gc.collect()  # as it may happen at any moment
        if self.mode == "global" and threading.active_count() > 1:
            DEVICE.capture.broken = "another thread may call CUDA during a capture in global mode"

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        capture, DEVICE.capture = DEVICE.capture, None
        assert capture is not None
        self._context.__exit__()
        with DEVICE.quiet(), torch.no_grad():
            capture.end()
        if kind is not None or capture.broken:
            self.graph.references.clear()
        if kind is None:
            if capture.broken:
                raise PretendError(capture.broken)
            self.graph.operations = capture.operations
            DEVICE.captures += 1


# ---- the device ----


class HostThread(threading.local):
    """What CUDA knows of a thread of the host."""

    def __init__(self, default: Stream) -> None:
        self.stream = default  # the current one
        self.waited: Clocks = {}
        self.quiet = 0  # depth of work of our own, which is none of the device's
        self.device_calls = 0  # depth of calls that make tensors on the device


@dataclass
class Transfer:
    """An asynchronous copy from or to pinned memory, which no thread has waited for."""

    stream: int
    clock: int
    pinned: Tensor
    content: Tensor
    download: bool

    def arrive(self) -> None:
        """A thread has waited for it."""
        if self.download:
            self.pinned.copy_(self.content)
        elif not same_bytes(self.pinned, self.content):
            raise PretendError("race: pinned memory was written while a copy to the device might still read it")


class Device:
    """Memory, streams and what they are doing. Storages are known by ``key``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A device that nothing was done with."""
        self.memory: dict[int, StorageWeakRef] = {}
        self.pinned: dict[int, StorageWeakRef] = {}
        self.wrote: dict[int, tuple[int, int, str]] = {}  # last write: stream, clock, by what
        self.read: dict[int, dict[int, tuple[int, str]]] = {}  # last reads since: stream -> clock, by what
        self.transfers: list[Transfer] = []
        self.default = Stream()
        self.thread = HostThread(self.default)
        self.lock = threading.RLock()
        self.capture: Capture | None = None  # under way
        self.debug: str | int = "default"
        self.captures = self.replays = 0  # how many there were

    # -- memory --

    def has(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is on the device."""
        return key(tensor) in self.memory

    def mark(self, tensor: Tensor) -> Tensor:
        """Put ``tensor`` on the device, as it is."""
        self.memory.setdefault(key(tensor), StorageWeakRef(tensor.untyped_storage()))
        if len(self.memory) % 4096 == 0:
            self._forget()
        return tensor

    def pin(self, tensor: Tensor) -> Tensor:
        """Make memory of the host pinned, as it is."""
        self.pinned[key(tensor)] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def _forget(self) -> None:
        for storages in (self.memory, self.pinned):
            for number in [number for number, reference in storages.items() if reference.expired()]:
                del storages[number]
                self.wrote.pop(number, None)
                self.read.pop(number, None)

    # -- time --

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Work of our own within."""
        self.thread.quiet += 1
        try:
            yield
        finally:
            self.thread.quiet -= 1

    @property
    def capturing(self) -> bool:
        """Whether this thread is within a capture."""
        return self.capture is not None and self.capture.thread == threading.get_ident()

    def launch(self, reads: set[int], writes: set[int], what: str) -> tuple[int, int]:
        """An operation on the current stream; its place there."""
        with self.lock:
            stream = self.thread.stream
            merge(stream.seen, self.thread.waited)
            stream.seen[stream.number] += 1
            clock = stream.seen[stream.number]
            for number in reads | writes:
                self._require_order(stream, self.wrote.get(number), what)
            for number in writes:
                for other, (before, by) in self.read.pop(number, {}).items():
                    self._require_order(stream, (other, before, by), what)
                self.wrote[number] = (stream.number, clock, what)
            for number in reads - writes:
                self.read.setdefault(number, {})[stream.number] = (clock, what)
            return stream.number, clock

    @staticmethod
    def _require_order(stream: Stream, before: tuple[int, int, str] | None, what: str) -> None:
        if before is not None and stream.seen.get(before[0], 0) < before[1]:
            raise PretendError(f"race: {what} on stream {stream.number} does not wait for {before[2]} on {before[0]}")

    def host_waits(self, what: str, clocks: Clocks | None = None) -> None:
        """This thread waits for ``clocks``, by default for the current stream."""
        self.require_no_wait(what)
        self._arrive(self.thread.stream.seen if clocks is None else clocks)

    def wait_for_all(self) -> None:
        """As ``torch.cuda.graph`` does."""
        for stream in list(STREAMS):
            self._arrive(stream.seen)

    def require_no_wait(self, what: str) -> None:
        """Refuse where the host must not wait."""
        if self.capturing:
            raise PretendError(f"not permitted while the stream is capturing: {what}")
        if self.debug == "error" and threading.current_thread() is threading.main_thread():
            raise PretendError(f"the host waits for the device: {what}")

    def _arrive(self, clocks: Clocks) -> None:
        with self.lock, self.quiet():
            merge(self.thread.waited, clocks)
            arrived = [each for each in self.transfers if self.thread.waited.get(each.stream, 0) >= each.clock]
            self.transfers = [each for each in self.transfers if each not in arrived]
            for transfer in arrived:
                transfer.arrive()

    # -- operations --

    def copy(self, target: Tensor, source: Tensor, what: str, *, non_blocking: bool) -> None:
        """A copy between host and device, whose values are there already."""
        download = self.has(source)
        on_device, on_host = (source, target) if download else (target, source)
        reads, writes = ({key(on_device)}, set()) if download else (set(), {key(on_device)})
        stream, clock = self.launch(reads, writes, what)
        if not (non_blocking and key(on_host) in self.pinned):
            self.host_waits(what)
            return
        with self.lock, self.quiet():
            self.transfers.append(Transfer(stream, clock, on_host.detach(), on_host.detach().clone(), download))
            if download:
                poison(on_host.detach())

    def touch(self, tensors: list[Tensor], written: list[Tensor]) -> None:
        """The host reads ``tensors`` and writes some of them."""
        if not self.transfers:
            return
        with self.lock:
            downloads = {key(each.pinned) for each in self.transfers if each.download}
            uploads = {key(each.pinned) for each in self.transfers if not each.download}
        if any(key(value) in downloads for value in tensors) or any(key(value) in uploads for value in written):
            raise PretendError("race: the host uses pinned memory that a copy may still be busy with")

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation, below autograd: checked, run, recorded."""
        name = func.overloadpacket.__name__
        tensors, written = leaves(args, kwargs), writes_of(func, name, args)
        if not any(self.has(tensor) for tensor in tensors) and (tensors or not self.thread.device_calls):
            self.touch(tensors, written)
            return func(*args, **kwargs)
        crossing = name in ("copy_", "_copy_from") and self.has(args[0]) != self.has(args[1])
        kernel_argument = crossing and args[1].ndim == 0 and not self.has(args[1])
        unmixable = [*written, *(tensor for tensor in tensors if tensor.ndim)]  # numbers of the host may be read
        if not crossing and not all(self.has(tensor) for tensor in unmixable):
            raise PretendError(f"expected all tensors on one device: {func} of {shapes(tensors)}")
        waits = host_reads(name, func, args)
        if waits or (crossing and self.capturing and not kernel_argument):
            self.require_no_wait(f"{func} of {shapes(tensors)}")
        if name in ("_fused_sgd_", "_fused_adamw_"):
            check_fused(args, kwargs, lists=3 if name == "_fused_sgd_" else 4)
        if self.capturing:
            assert self.capture is not None
            if self.thread.stream is not self.capture.stream:
                raise PretendError(f"{func} is launched on another stream than the one that is captured")
            with self.quiet():
                self.capture.before([value for value in written if self.has(value)])
        result = func(*args, **kwargs)
        if crossing and not kernel_argument:
            self.copy(args[0], args[1], str(func), non_blocking=len(args) > 2 and bool(args[2]))
            return result
        inputs, outputs = {key(tensor) for tensor in tensors}, pytree.tree_leaves(result)
        fresh = [isinstance(value, Tensor) and key(value) not in inputs for value in outputs]
        new = [self.mark(value) for value, is_new in zip(outputs, fresh, strict=True) if is_new]
        if not func.is_view:
            writes = {key(value) for value in [*written, *new]}
            self._note(
                func, args, kwargs, outputs, fresh, {number for number in inputs if number in self.memory}, writes
            )
        if waits:
            self.host_waits(str(func))
        return result

    def _note(
        self, func: Any, args: Any, kwargs: Any, outputs: Any, fresh: list[bool], inputs: set[int], writes: set[int]
    ) -> None:
        if not self.capturing:
            self.launch(inputs - writes, writes, str(func))
            return
        assert self.capture is not None
        self.capture.graph.reads |= inputs - writes
        self.capture.graph.writes |= writes
        with self.quiet():
            self.capture.add(func, args, kwargs, outputs, fresh)


DEVICE = Device()


def key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def leaves(*values: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += leaves(*value)
        elif isinstance(value, dict):
            found += leaves(*value.values())
    return found


def as_bytes(tensor: Tensor) -> Tensor:
    """The whole storage of ``tensor``."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return torch.equal(*(value.reshape(-1).contiguous().view(torch.uint8) for value in (left, right)))


def poison(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def shapes(tensors: list[Tensor]) -> str:
    return ", ".join(f"{tuple(each.shape)} on {'cuda' if DEVICE.has(each) else 'cpu'}" for each in tensors)


def writes_of(func: Any, name: str, args: Any) -> list[Tensor]:
    declared = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info and argument.alias_info.is_write
    ]
    if name == "native_batch_norm" and args[5]:  # running mean and variance, of which its schema tells nothing
        declared += args[3:5]
    return leaves(declared)


def host_reads(name: str, func: Any, args: Any) -> bool:
    """Whether the host waits for an operation on the device.

    Raises:
        PretendError: it has no deterministic kernel, and these alone are allowed.
    """
    if torch.are_deterministic_algorithms_enabled():
        if name in NOT_DETERMINISTIC:
            raise PretendError(f"{name} does not have a deterministic implementation")
        if name in SCATTERS and args[0].ndim > 1 and isinstance(args[3], Tensor):
            return True  # it uploads strides
    if name.startswith(("index", "_index_put_impl")) and isinstance(args[1], (list, tuple)):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in READ_BY_HOST and not (name == "repeat_interleave" and "Tensor" not in func._overloadname)


def check_fused(args: Any, kwargs: Any, *, lists: int) -> None:
    """An update by SGD or AdamW: ``lists`` of tensors of each weight's shape come first, its own before the others."""
    lr = kwargs["lr"]
    if isinstance(lr, Tensor):
        if not DEVICE.has(lr):
            DEVICE.require_no_wait("the fused update reads its rate on the host")
        elif lr.dtype != torch.float32:
            raise PretendError(f"fused update: the rate is {lr.dtype}")
    elif DEVICE.capturing:
        raise PretendError("fused update: the rate is a number, which a capture freezes")
    for group in zip(*[tensors for tensors in args[:lists] if tensors], strict=True):
        strides = {tuple(step for n, step in zip(t.shape, t.stride(), strict=True) if n != 1) for t in group}
        if len(strides) > 1:
            raise PretendError(f"fused update: weight, gradient and averages are laid out differently: {strides}")


# ---- what Python sees of tensors ----


class Backend(TorchDispatchMode):
    """Below autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DEVICE.thread.quiet:
            return func(*args, **(kwargs or {}))
        return DEVICE.run(func, tuple(args), dict(kwargs or {}))


class Frontend(TorchFunctionMode):
    """Above autograd: devices and pinned memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if DEVICE.thread.quiet:
            return func(*args, **kwargs)
        if func in SPECIAL:
            return SPECIAL[func](func, *args, **kwargs)
        device, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        if device is not None:
            return made(func, args, kwargs, on_device=torch.device(device).type == "cuda", pinned=pinned)
        if pinned:
            return made(func, args, kwargs, on_device=False, pinned=True)
        return called(func, args, kwargs, on_device=any(DEVICE.has(leaf) for leaf in leaves(args, kwargs)))


def called(func: Any, args: Any, kwargs: Any, *, on_device: bool) -> Any:
    DEVICE.thread.device_calls += on_device
    try:
        return func(*args, **kwargs)
    finally:
        DEVICE.thread.device_calls -= on_device


def made(func: Any, args: Any, kwargs: Any, *, on_device: bool, pinned: bool) -> Any:
    """A new tensor where it was asked for."""
    if not on_device:
        with DEVICE.quiet():
            result = func(*args, **kwargs)
        return DEVICE.pin(result) if pinned else result
    if func in (torch.tensor, torch.as_tensor):  # made on the host
        with DEVICE.quiet():
            result = func(*args, **kwargs)
        return moved(result.to, result)
    return called(func, args, kwargs, on_device=True)


def moved(func: Any, tensor: Tensor, *, non_blocking: bool = False, **options: Any) -> Tensor:
    """A copy of ``tensor`` on the other side."""
    download = DEVICE.has(tensor)
    what = f"a copy {'from' if download else 'to'} the device, of {tuple(tensor.shape)}"
    if DEVICE.capturing or not (non_blocking and (download or key(tensor) in DEVICE.pinned)):
        DEVICE.require_no_wait(what)
    if not download:
        DEVICE.touch([tensor], [])
    with DEVICE.quiet():
        result: Tensor = func(copy=True, **options)
    if not download:
        DEVICE.mark(result)
    elif non_blocking:
        DEVICE.pin(result)
    DEVICE.copy(result, tensor, what, non_blocking=non_blocking)
    return result


def get_device(func: Any, tensor: Tensor) -> torch.device:
    return CUDA if DEVICE.has(tensor) else func(tensor)


def to(func: Any, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        other, *args = args
        args = (get_device(Tensor.device.__get__, other), other.dtype, *args)
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    options = {"dtype": dtype or tensor.dtype} | ({} if layout is None else {"memory_format": layout})
    on_device = DEVICE.has(tensor)
    if device is None or (device.type == "cuda") == on_device:
        return called(func, (tensor,), {"copy": copy, **options}, on_device=on_device)
    return moved(lambda **made_with: func(tensor, **made_with), tensor, non_blocking=non_blocking, **options)


def pin_memory(func: Any, tensor: Tensor) -> Tensor:
    DEVICE.touch([tensor], [])
    if DEVICE.has(tensor) or DEVICE.capturing:
        raise PretendError("pinned memory of a tensor on the device, or inside a capture")
    with DEVICE.quiet():
        return DEVICE.pin(tensor.clone())


def on_host_alone(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if DEVICE.has(tensor):
        raise PretendError("a tensor on the device cannot become a NumPy array")
    DEVICE.touch([tensor], [])
    return func(tensor, *args, **kwargs)


def to_list(func: Any, tensor: Tensor) -> Any:
    if DEVICE.has(tensor):
        DEVICE.require_no_wait("tolist")
        DEVICE.launch({key(tensor)}, set(), "tolist")
        DEVICE.host_waits("tolist")
    else:
        DEVICE.touch([tensor], [])
    return func(tensor)


def deep_copy(func: Any, tensor: Tensor, memo: Any) -> Tensor:
    result = func(tensor, memo)
    return DEVICE.mark(result) if DEVICE.has(tensor) else result


SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: get_device,
    Tensor.is_cuda.__get__: lambda func, tensor: DEVICE.has(tensor),
    Tensor.is_cpu.__get__: lambda func, tensor: not DEVICE.has(tensor),
    Tensor.is_pinned: lambda func, tensor: key(tensor) in DEVICE.pinned,
    Tensor.to: to,
    Tensor.cpu: lambda func, tensor: to(Tensor.to, tensor, "cpu"),
    Tensor.cuda: lambda func, tensor, device=None: to(Tensor.to, tensor, "cuda"),
    Tensor.pin_memory: pin_memory,
    Tensor.numpy: on_host_alone,
    Tensor.__array__: on_host_alone,
    Tensor.tolist: to_list,
    Tensor.__deepcopy__: deep_copy,
}


def _autocast_init(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return init


def _group_tensors(original: Callable[..., Any]) -> Callable[..., Any]:
    """As an optimiser groups them, below Python, with the device that Python sees."""

    def group(lists: list[list[Tensor]], **options: Any) -> Any:
        found = original(lists, **options)
        return {(value[0][0][0].device, dtype): value for (_, dtype), value in found.items()}

    return staticmethod(group)


@contextlib.contextmanager
def pretend() -> Iterator[Device]:
    """torch with one CUDA device, within."""
    DEVICE.reset()
    replaced = {
        "CUDAGraph": CUDAGraph,
        "Event": Event,
        "Stream": Stream,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: DEVICE.thread.stream,
        "default_stream": lambda device=None: DEVICE.default,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),  # cuDNN asks when its version is read
        "get_device_name": lambda device=None: "pretended",
        "graph": GraphContext,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_initialized": lambda: True,
        "max_memory_allocated": lambda device=None: 0,
        "set_device": lambda device: None,
        "set_sync_debug_mode": lambda mode: setattr(DEVICE, "debug", mode),
        "stream": StreamContext,
        "synchronize": lambda device=None: (DEVICE.require_no_wait("synchronize"), DEVICE.wait_for_all())[0],
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(
            mock.patch.object(torch.amp.autocast, "__init__", _autocast_init(torch.amp.autocast.__init__))
        )
        group = torch.optim.Optimizer._group_tensors_by_device_and_dtype
        stack.enter_context(
            mock.patch.object(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", _group_tensors(group))
        )
        asked = SimpleNamespace(is_capturing=lambda: DEVICE.capturing)  # what optimisers ask before a step
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", return_value=asked))
        stack.enter_context(Frontend())
        stack.enter_context(Backend())
        yield DEVICE
