"""Classifiers of torchvision and timm by name: ``torchvision/resnet34``, ``timm/mobilenetv3_small_100.lamb_in1k``.

A library is imported when one of its names is first asked for. The networks keep their own parameter names, so that
published files load into them, and files of theirs load into the plain network of the library.

Letters: B batch, C classes, D pooled width, K channels of a stage, L tokens, H and W height and width.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistill.errors import UserError, printable, suggestion
from mdistill.models.base import MODELS, Features, Network
from mdistill.models.layers import Classifier, global_average

Extractor = Callable[[nn.Module, Tensor], Features]

RESERVED = {
    "num_classes": "the data set says it",
    "in_chans": "images have three channels",
    "features_only": "the network would be no classifier",
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "weights"), "weights come by checkpoint"
    ),
    **dict.fromkeys(("checkpoint_path", "cache_dir", "progress"), "weights come by checkpoint"),
}
SIGNED = {  # of timm: no activation ends a stage
    *("EfficientNet", "MobileNetV3", "GhostNet", "ConvNeXt", "MetaFormer", "EdgeNeXt"),
    *("VisionTransformer", "SwinTransformer", "SwinTransformerV2", "Eva", "BEiT", "Cait", "MlpMixer"),
}
MOST_STAGES = 6  # a network that has more, one for each block of a transformer, gives five of them


class ExternalNetwork(Network):
    """A network of a library, under its own parameter names, that offers what the zoo's networks do.

    It shares the modules, parameters and buffers of ``network`` rather than holding it as a module of its own: a prefix
    would change every name. The final linear layer computes in float32 under autocast, as the zoo's do.

    ``forward_features`` of a network whose features cannot be read, and ``classifier`` of one that ends in none, say so
    by UserError and AttributeError.

    Args:
        name: as registered, for messages.
        network: a classifier.
        linear: the name of its final linear layer, the whole input of which is the pooled map; None where it has none.
        features: gives its features, or the reason why there are none.
        note: what a user of its preacts must know.
    """

    def __init__(
        self, name: str, network: nn.Module, *, linear: str | None, features: Extractor | str, note: str | None = None
    ) -> None:
        super().__init__()
        self._modules, self._parameters = network._modules, network._parameters
        self._buffers, self._non_persistent_buffers_set = network._buffers, network._non_persistent_buffers_set
        self._held = (network,)  # in a tuple, which registers nothing
        self.name, self.note = name, note
        self._linear, self._features = linear, features
        self.no_features = features if isinstance(features, str) else None

    @property
    def inner(self) -> nn.Module:
        """The library's network itself."""
        return self._held[0]

    @property
    def classifier(self) -> nn.Module:  # type: ignore[override]  # read-only
        """The final linear layer; of a network without a single one, its own module of this name."""
        if self._linear is not None:
            return self.inner.get_submodule(self._linear)
        if "classifier" not in self._modules:
            raise AttributeError
        return cast(nn.Module, self._modules["classifier"])

    def train(self, mode: bool = True) -> "ExternalNetwork":
        super().train(mode)
        self.inner.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C); those of auxiliary classifiers, which some networks give in training, are left out.

        Args:
            x: (B, 3, H, W), images.
        """
        output = self.inner.forward(x)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def forward_features(self, x: Tensor) -> Features:
        if isinstance(self._features, str):
            raise UserError(f"{self.name}: {self._features}; take a method that reads logits")
        return self._features(self.inner, x)

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        norms = [stage_norm(stage) for stage in map(self._modules.get, RESNET_STAGES)]
        if self._features not in (torchvision_resnet_features, timm_resnet_features) or None in norms:
            raise UserError(f"{self.name} has no BatchNorm that is known to stand before its stages' last ReLU")
        return cast(list[nn.BatchNorm2d], norms)


class LibraryNetwork:
    """The builder of one network of a library.

    Args:
        name: as registered.
        make: the library's own, which takes ``num_classes`` and its arguments.
        adapt: the network with its features.
    """

    def __init__(
        self, name: str, make: Callable[..., nn.Module], adapt: Callable[[str, nn.Module], ExternalNetwork]
    ) -> None:
        self.name, self._make, self._adapt = name, make, adapt

    def __call__(self, *args: Any, **arguments: Any) -> nn.Module:
        """The network, for a number of classes."""
        (num_classes,) = args
        return self._adapt(self.name, self._build(num_classes, arguments))

    def problems(self, arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The arguments that the library's code does not take; found by building the network without values."""
        reserved = [(key, f"cannot be set for {self.name!r}: {RESERVED[key]}") for key in arguments if key in RESERVED]
        if reserved or not arguments:
            return reserved
        try:
            with torch.device("meta"):
                self._make(num_classes=2, **arguments)
        except TypeError as error:
            named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if named:
                near = suggestion(named[1], sorted(self._parameters() | RESERVED.keys()))
                return [(named[1], f"unknown key (value {arguments.get(named[1])!r}) for model {self.name!r}{near}")]
            return [("", f"{self.name!r} cannot be built with {dict(arguments)}: {_one_line(error)}")]
        except (ValueError, AssertionError, KeyError, IndexError) as error:
            return [("", f"{self.name!r} cannot be built with {dict(arguments)}: {_one_line(error)}")]
        except Exception:  # of a network that needs values to be built: told when it is
            return []
        return []

    def _build(self, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
        try:
            return self._make(num_classes=num_classes, **arguments)
        except (TypeError, ValueError, AssertionError, KeyError, IndexError) as error:
            raise UserError(f"{self.name!r} cannot be built with {dict(arguments)}: {_one_line(error)}") from error

    def _parameters(self) -> set[str]:
        """What its classes take, as far as their signatures say."""
        with torch.device("meta"):
            network = self._make(num_classes=2)
        functions = [kind.__dict__["__init__"] for kind in type(network).__mro__ if "__init__" in kind.__dict__]
        return {name for function in functions for name in inspect.signature(function).parameters} - {"self"}


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()), 200) or type(error).__name__


def _unknown(name: str, known: list[str], library: ModuleType) -> NoReturn:
    near = suggestion(f"{library.__name__}/{name}", [f"{library.__name__}/{each}" for each in known])
    count = f"{len(known)} classifiers of {library.__name__} {library.__version__}"
    raise UserError(f"unknown model {f'{library.__name__}/{name}'!r}{near} ({count})")


def _final_linear(network: nn.Module) -> str | None:
    """The name of the last linear layer."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def _widen_logits(network: nn.Module, linear: str | None) -> None:
    """Let the final layer, where it is a plain linear one, compute in float32 under autocast."""
    layer = None if linear is None else network.get_submodule(linear)
    if type(layer) is nn.Linear or (type(layer).__name__, type(layer).__bases__) == ("Linear", (nn.Linear,)):  # timm's
        cast(nn.Module, layer).__class__ = Classifier


# --- torchvision ---


@cache
def torchvision_builder(name: str) -> LibraryNetwork:
    """The classifier called ``name`` in torchvision.

    Raises:
        UserError: there is none.
    """
    import torchvision
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        _unknown(name, known, torchvision)

    defaults = {"init_weights": True} if name in {"googlenet", "inception_v3"} else {}  # else they warn

    def make(**arguments: Any) -> nn.Module:
        return cast(nn.Module, models.get_model(name, weights=None, **{**defaults, **arguments}))

    return LibraryNetwork(f"torchvision/{name}", make, _adapt_torchvision)


def _adapt_torchvision(name: str, network: nn.Module) -> ExternalNetwork:
    from torchvision.models import ResNet

    last = _final_linear(network)
    _widen_logits(network, last)
    if type(network) is ResNet:
        return ExternalNetwork(name, network, linear="fc", features=torchvision_resnet_features)
    reason = "of torchvision's networks, features are read from ResNet, ResNeXt and Wide ResNet (timm has many more)"
    return ExternalNetwork(name, network, linear=None, features=reason)


RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")


def torchvision_resnet_features(network: nn.Module, x: Tensor) -> Features:
    """Five maps, at 1/2 to 1/32 of the image size: the stem's before max-pooling, then those of the four layers.

    Args:
        x: (B, 3, H, W).
    """
    net = cast(Any, network)

    def run(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        *first, last = layer
        for block in first:
            x = block(x)
        preact = _before_last_relu(last, x)
        return preact, F.relu(preact)

    stages, preacts = _resnet_maps(net, F.relu(net.bn1(net.conv1(x))), run)
    pooled = global_average(stages[-1])
    return Features(net.fc(pooled), stages, preacts, last_map=stages[-1], pooled=pooled)


def _resnet_maps(
    net: Any, stem: Tensor, run: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Stages and preacts of a ResNet, the stem's output first.

    Args:
        stem: (B, K, H, W), before max-pooling.
        run: one of the four layers, on the map before it: its output before the last activation, and behind it.
    """
    stages, preacts, x = [stem], [stem], net.maxpool(stem)
    for name in RESNET_STAGES:
        preact, x = run(getattr(net, name), x)
        stages.append(x)
        preacts.append(preact)
    return tuple(stages), tuple(preacts)


def _before_last_relu(block: Any, x: Tensor) -> Tensor:
    """A residual block of torchvision up to the sum, (B, K, H, W)."""
    out = F.relu(block.bn1(block.conv1(x)))
    out = block.bn2(block.conv2(out))
    if hasattr(block, "conv3"):
        out = block.bn3(block.conv3(F.relu(out)))
    return cast(Tensor, out + (x if block.downsample is None else block.downsample(x)))


def stage_norm(stage: nn.Module | None) -> nn.BatchNorm2d | None:
    """The last BatchNorm of a ResNet's stage, before the shortcut is added; None where it is none of torch's."""
    last = stage[-1] if isinstance(stage, nn.Sequential) else None
    norm = getattr(last, "bn3", None) or getattr(last, "bn2", None)
    return norm if isinstance(norm, nn.BatchNorm2d) else None


# --- timm ---


def import_timm() -> ModuleType:
    """The package timm.

    Raises:
        UserError: it is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError("models called timm/... need timm: pip install 'mdistill[images]'") from None
    return timm


@cache
def timm_builder(name: str) -> LibraryNetwork:
    """The classifier called ``name`` in timm: an architecture, or one with the tag of its weights.

    Raises:
        UserError: timm is not installed, or has no such architecture or tag.
    """
    timm = import_timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        _unknown(name, timm.list_models(), timm)
    tags = [known for known in timm.models.get_arch_pretrained_cfgs(architecture) if known.partition(".")[2]]
    if tag and name not in tags:
        near = suggestion(name, tags)
        raise UserError(
            f"unknown model {f'timm/{name}'!r}: timm {timm.__version__} has no weights {tag!r} of {architecture}{near}"
            f" (its weights: {', '.join(known.partition('.')[2] for known in tags) or 'none'})"
        )

    def make(**arguments: Any) -> nn.Module:
        return cast(nn.Module, timm.create_model(name, pretrained=False, **arguments))

    return LibraryNetwork(f"timm/{name}", make, _adapt_timm)


def _adapt_timm(name: str, network: nn.Module) -> ExternalNetwork:
    from timm.models.resnet import ResNet

    net = cast(Any, network)
    head = net.get_classifier() if hasattr(net, "get_classifier") else None
    linear = next((path for path, module in network.named_modules() if module is head), None)
    _widen_logits(network, linear if linear is not None else _final_linear(network))
    if not isinstance(head, nn.Linear) or linear is None:
        kind = "several layers" if isinstance(head, tuple) else type(head).__name__
        return ExternalNetwork(name, network, linear=None, features=f"its classifier is {kind}, not one linear layer")
    if type(network) is ResNet and _separate_activations(network):
        return ExternalNetwork(name, network, linear=linear, features=timm_resnet_features)
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "feature_info"):
        return ExternalNetwork(name, network, linear=linear, features="timm does not give its intermediate maps")
    note = None
    signed = any(kind.__name__ in SIGNED for kind in type(network).__mro__)
    if not signed or name.startswith("timm/mobilenetv4"):  # some of its stages end in an activation
        note = f"{name}: maps before a stage's last activation are not known; its preacts are its stages"
    return ExternalNetwork(name, network, linear=linear, features=timm_features, note=note)


class ActivatedStage(nn.Sequential):
    """A stage of residual blocks, the last of which leaves its activation to the stage."""

    activation: tuple[nn.Module]  # in a tuple, which registers nothing

    def preact(self, x: Tensor) -> Tensor:
        """The stage's output before its last activation, (B, K', H', W').

        Args:
            x: (B, K, H, W).
        """
        return cast(Tensor, super().forward(x))  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """The stage's output, (B, K', H', W').

        Args:
            x: (B, K, H, W).
        """
        return cast(Tensor, cast(Any, self.activation[0]).forward(self.preact(x)))


def _separate_activations(network: nn.Module) -> bool:
    """Take the last activation out of each stage's last block, if all blocks are of the two plain kinds."""
    from timm.models.resnet import BasicBlock, Bottleneck

    stages = [network.get_submodule(name) for name in RESNET_STAGES]
    kinds: dict[type | None, str] = {BasicBlock: "act2", Bottleneck: "act3"}
    lasts = [stage[-1] if type(stage) is nn.Sequential else None for stage in stages]
    if not all(type(last) in kinds for last in lasts):
        return False
    if any([*getattr(last, kinds[type(last)]).parameters()] for last in lasts):  # it would lose its place
        return False
    for stage, last in zip(stages, lasts, strict=True):
        attribute = kinds[type(last)]
        activation = getattr(last, attribute)
        activation.inplace = False  # what it reads is given out
        setattr(last, attribute, nn.Identity())
        stage.__class__ = ActivatedStage
        stage.activation = (activation,)  # type: ignore[assignment]
    return True


def timm_resnet_features(network: nn.Module, x: Tensor) -> Features:
    """Five maps, at 1/2 to 1/32 of the image size: the stem's before max-pooling, then those of the four layers.

    Args:
        x: (B, 3, H, W).
    """
    net = cast(Any, network)

    def run(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = layer.preact(x)
        return preact, layer.activation[0].forward(preact)

    stages, preacts = _resnet_maps(net, net.act1(net.bn1(net.conv1(x))), run)
    pooled = net.forward_head(stages[-1], pre_logits=True)
    return Features(net.get_classifier()(pooled), stages, preacts, last_map=stages[-1], pooled=pooled)


def timm_features(network: nn.Module, x: Tensor) -> Features:
    """What timm gives of its intermediate maps; of a network with a block after block of one size, five of them.

    Tokens become maps: (B, L, K) -> (B, K, H, W), without the class token. ``pooled`` is what the classifier reads,
    which need not be the mean of ``last_map``: of a transformer it may be the class token, and MobileNetV3 and GhostNet
    have a layer between.

    Args:
        x: (B, 3, H, W).
    """
    net = cast(Any, network)
    count = len(net.feature_info)
    indices = None if count <= MOST_STAGES else [0, *(count * quarter // 4 - 1 for quarter in (1, 2, 3, 4))]
    last, stages = net.forward_intermediates(x, indices=indices, output_fmt="NCHW")
    pooled = net.forward_head(last, pre_logits=True)
    return Features(
        logits=net.get_classifier()(pooled),
        stages=tuple(stages),
        preacts=tuple(stages),
        last_map=_as_map(net, last, stages[-1]),
        pooled=pooled,
    )


def _as_map(net: Any, last: Tensor, stage: Tensor) -> Tensor:
    """The final features as (B, D, H, W).

    Args:
        last: (B, D, H, W), or (B, H, W, D), or (B, L, D).
        stage: (B, K, H, W), the last stage's.
    """
    if last.ndim == 3:
        last = last[:, getattr(net, "num_prefix_tokens", 0) :]
        return last.transpose(1, 2).reshape(last.shape[0], -1, stage.shape[2], stage.shape[3])
    return last.permute(0, 3, 1, 2) if getattr(net, "output_fmt", "NCHW") == "NHWC" else last


MODELS.add_library("torchvision", torchvision_builder)
MODELS.add_library("timm", timm_builder)
