"""Folding of BatchNorm into the layers before it, for networks that are only evaluated.

In eval mode BatchNorm is a fixed scale and shift of each channel, which the weights and bias of a convolution or linear
layer before it can take over. Which BatchNorm follows which layer is read off a symbolic trace (``torch.fx``). The
trace only chooses: the copy keeps its own Python ``forward``, whose conditions still decide on every call.
"""

import copy
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mdistill.models.base import Network
from mdistill.models.layers import BatchNorm2d, Classifier

NORMS_AFTER: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Conv1d: (nn.BatchNorm1d,),
    nn.Conv2d: (nn.BatchNorm2d, BatchNorm2d),
    nn.Conv3d: (nn.BatchNorm3d,),
    nn.Linear: (nn.BatchNorm1d,),
}
ELEMENTWISE = (nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
MAX_DECISIONS = 6  # conditions on one path through a forward, so 64 paths at most


def fold_batchnorm(network: nn.Module) -> tuple[nn.Module, int]:
    """A copy of ``network`` in eval mode with BatchNorm folded into the layers before, and how many were folded.

    A BatchNorm is folded when, whatever conditions on the images decide, it is called once, on the output of a
    convolution or linear layer that is called once, and nothing else reads that output or that layer's parameters. A
    linear layer's output must be known to be (B, C): in (B, L, C), BatchNorm would normalise each of L. Layers with
    hooks, parametrisations or a type of their own (but timm's BatchNorm with an activation), and BatchNorm without
    running statistics, stay as they are.

    ``forward`` of the copy, and ``forward_features`` of a ``Network``, give the same up to rounding. A folded BatchNorm
    keeps its place, type and values but returns its input (timm's applies its activation). Devices, dtypes, memory
    formats and tied parameters are preserved; no parameter requires a gradient. ``network`` and the global random
    generators stay as they were.

    A network whose Python cannot be traced (which loops over a size, reads values, or raises for some images) is copied
    without folding. A trace does not see what a forward decides by ``isinstance`` of the images, by identity (``is``)
    of their dtype or device, or by the autocast or gradient mode: which layers run must not depend on these.
    """
    pairs = _pairs(network)
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    modules = dict(folded.named_modules())
    return folded, sum(_fold(modules[layer], modules[norm]) for layer, norm in pairs)


# --- which layer and BatchNorm belong together ---


@dataclass(frozen=True)
class _Path:
    """What one path through a forward calls, by the modules' names."""

    called: frozenset[str]
    pairs: frozenset[tuple[str, str]]  # layer and BatchNorm that may be folded, as far as this path goes


class _Tracer(fx.Tracer):
    """Takes given decisions where Python asks for the truth of a traced value, then False where more are asked for."""

    def __init__(self, decisions: list[bool]) -> None:
        super().__init__()
        self.decisions, self.taken = decisions, 0

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, BatchNorm2d | Classifier) or _activates(m)
        return ours or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self.taken == len(self.decisions):
            if self.taken == MAX_DECISIONS:
                raise fx.proxy.TraceError(f"more than {MAX_DECISIONS} conditions")
            self.decisions.append(False)
        self.taken += 1
        return self.decisions[self.taken - 1]


class _Entry(nn.Module):
    """A method of ``network`` as a forward of the images alone, with the hooks and defaults that a call has."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, x: Tensor) -> object:
        return self.network(x) if self.method == "forward" else getattr(self.network, self.method)(x)


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of the layers and BatchNorms to fold, sorted; none when the network cannot be traced."""
    has_features = isinstance(network, Network) and network.no_features is None
    methods = ["forward", "forward_features"] if has_features else ["forward"]
    try:
        with torch.no_grad(), _random_state_restored(network):
            paths = [path for method in methods for path in _paths(network, method)]
    except Exception:  # whatever the network's own code raises on meeting a symbol in place of images
        return []
    pairs = frozenset[tuple[str, str]]().union(*(path.pairs for path in paths))
    return sorted(pair for pair in pairs if all(pair in path.pairs or path.called.isdisjoint(pair) for path in paths))


def _paths(network: nn.Module, method: str) -> Iterator[_Path]:
    """Every path through ``method``, one for each outcome of the conditions that depend on the images."""
    decisions: list[bool] = []
    while True:
        probe = copy.deepcopy(network).eval()  # a fresh one each time: a forward may write to its module
        tracer = _Tracer(decisions)
        yield _read(probe, tracer.trace(_Entry(probe, method)))
        tracer.root = nn.Module()  # a tracer is garbage in a cycle, and would keep the probe's memory until collected
        while decisions and decisions[-1]:
            decisions.pop()
        if not decisions:
            return
        decisions[-1] = True


def _read(network: nn.Module, graph: fx.Graph) -> _Path:
    entry = _Entry(network, "")
    modules = dict(entry.named_modules(remove_duplicate=False))
    names = {module: name for name, module in network.named_modules()}  # the first of several, as in every copy
    called = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    calls = Counter(module for outer in called for module in outer.modules())  # a leaf may call what is inside
    tensors = dict(entry.named_parameters(remove_duplicate=False))
    read = {id(tensors.get(str(node.target))) for node in graph.nodes if node.op == "get_attr"}
    pairs = set()
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer, norm = modules[str(before.target)], modules[str(node.target)]
        if (
            _foldable(layer, norm)
            and calls[layer] == calls[norm] == 1
            and not any(id(parameter) in read for parameter in layer.parameters())
            and (type(layer) is not nn.Linear or _is_matrix(before.args[0], modules))
        ):
            pairs.add((names[layer], names[norm]))
    return _Path(frozenset(names[module] for module in calls), frozenset(pairs))


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether the two are plain enough that the layer can do the work of both."""
    kind = nn.BatchNorm2d if _activates(norm) else type(norm)
    if kind not in NORMS_AFTER.get(type(layer), ()) or not all(map(_plain, [layer, *norm.modules()])):
        return False
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return (
        norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_features == channels
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_floating_point()
        and layer.weight.device == norm.running_mean.device
        and not layer.weight.is_meta
    )


def _activates(norm: nn.Module) -> bool:
    """Whether this is timm's BatchNorm with an activation behind it; told by its name, since timm may not be there."""
    kind = type(norm)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")


def _plain(module: nn.Module) -> bool:
    """In eval mode, and a call runs the class's own forward on the module's own parameters and nothing else."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not (module.training or any(hooks) or "forward" in vars(module))


def _is_matrix(value: object, modules: dict[str, nn.Module]) -> bool:
    """Whether ``value`` of a graph is surely of two dimensions: flattened from the second on, then maybe layers."""
    if not isinstance(value, fx.Node) or not value.args:
        return False
    if value.op == "call_module":
        module = modules[str(value.target)]
        if type(module) is nn.Flatten:
            return (module.start_dim, module.end_dim) == (1, -1)
        return isinstance(module, (nn.Linear, nn.BatchNorm1d, *ELEMENTWISE)) and _is_matrix(value.args[0], modules)
    if value.target in (nn.functional.relu, torch.relu):
        return _is_matrix(value.args[0], modules)
    flattens = value.target is torch.flatten or (value.op == "call_method" and value.target == "flatten")
    return flattens and (value.args[1:], value.kwargs) in (((1,), {}), ((), {"start_dim": 1}))


@contextmanager
def _random_state_restored(network: nn.Module) -> Iterator[None]:
    """Put torch's, NumPy's and Python's global generators back: a forward may draw while it is traced."""
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


# --- folding ---


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> bool:
    """Let ``layer`` do what ``norm`` did, unless its new weights overflow; computed in float64 and rounded once."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    wide_weight, wide_bias = fuse_conv_bn_weights(  # right for a linear layer as well, which is a 1x1 convolution
        layer.weight.cpu().double(),
        None if layer.bias is None else layer.bias.cpu().double(),
        norm.running_mean.cpu().double(),
        norm.running_var.cpu().double(),
        norm.eps,
        None if norm.weight is None else norm.weight.cpu().double(),
        None if norm.bias is None else norm.bias.cpu().double(),
    )
    weight = torch.empty_like(layer.weight).copy_(wide_weight)  # in the strides it had
    bias = wide_bias.to(layer.weight if layer.bias is None else layer.bias)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return False
    layer.weight = nn.Parameter(weight, requires_grad=False)  # not in place: another layer may be tied to the old one
    layer.bias = nn.Parameter(bias, requires_grad=False)
    norm.forward = partial(_activation, norm) if _activates(norm) else _same  # type: ignore[method-assign, assignment]
    return True


def _activation(norm: nn.Module, x: Tensor) -> Tensor:
    """What is left of timm's BatchNorm with an activation."""
    result: Tensor = norm.act(norm.drop(x))  # type: ignore[operator]
    return result


def _same(x: Tensor) -> Tensor:
    """What is left of a folded BatchNorm."""
    return x
