"""What every network of the zoo offers.

Letters: B batch, C classes, D pooled width, K channels of a stage, H and W height and width.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mdistill.errors import UserError
from mdistill.registry import Registry

MODELS: Registry[nn.Module] = Registry("model")


@dataclass(frozen=True)
class Features:
    """All that a method may read of a forward pass.

    Attributes:
        logits: (B, C).
        stages: the stem's output, then each stage's, (B, K, H, W) with sizes of their own.
        preacts: one map for each of ``stages``, of the same shape: the stem's output itself, then each stage's before
            its last activation, so of either sign. Where a stage ends without activation (MobileNetV2) its output is of
            either sign already and is here again. WRN's, whose stages are raw sums, are these after the BatchNorm that
            follows. ShuffleNetV2's are before the shuffle of channels, and the half that passes its last unit
            untouched is after the ReLU of an earlier one.
        last_map: (B, D, H, W), what is pooled.
        pooled: (B, D), the classifier's input: ``last_map`` averaged over space.
    """

    logits: Tensor
    stages: tuple[Tensor, ...]
    preacts: tuple[Tensor, ...]
    last_map: Tensor
    pooled: Tensor


class Network(nn.Module, ABC):
    """A classifier with inspectable features. ``classifier(pooled) == logits`` and ``pooled == mean(last_map)``.

    The second does not hold for networks of timm that have layers between the two, or classify by a token.
    """

    classifier: nn.Linear
    no_features: str | None = None  # why ``forward_features`` cannot be called; None where it can

    @abstractmethod
    def forward_features(self, x: Tensor) -> Features:
        """Logits and features.

        Args:
            x: (B, 3, H, W), images.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C).

        Args:
            x: (B, 3, H, W), images.
        """
        return self.forward_features(x).logits

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The BatchNorm nearest before each stage's last ReLU, one for each of ``preacts`` but the stem's.

        Raises:
            UserError: no single BatchNorm has all the channels of a stage.
        """
        raise UserError(f"{type(self).__name__} has no BatchNorm over all the channels before its stages' last ReLU")


def why_no_features(network: nn.Module | None) -> str | None:
    """Why ``network`` gives no ``Features``, for a message; None where it does."""
    return getattr(network, "no_features", None) if hasattr(network, "forward_features") else "no forward_features"


# --- shapes without data ---

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FeatureShapes:
    """The shapes of ``Features`` for one image, without the batch."""

    stages: tuple[Shape, ...]  # (K, H, W) each
    preacts: tuple[Shape, ...]  # (K, H, W) each
    last_map: Shape  # (D, H, W)
    pooled: Shape  # (D,)


def feature_shapes(network: nn.Module, image_size: int) -> FeatureShapes:
    """The shapes of everything that ``network.forward_features`` gives for images of ``image_size`` pixels.

    Nothing is computed: a copy without values runs on the meta device. ``network``, its mode and its statistics stay as
    they are.

    Raises:
        UserError: ``network`` has no ``forward_features``, or its code reads values, which the copy has not.
    """
    with torch.no_grad():
        features = _features(_without_values(network), type(network).__name__, image_size)
    return FeatureShapes(
        stages=tuple(_shape(stage) for stage in features.stages),
        preacts=tuple(_shape(preact) for preact in features.preacts),
        last_map=_shape(features.last_map),
        pooled=_shape(features.pooled),
    )


def trunk(network: nn.Module, image_size: int) -> list[nn.Module]:
    """The modules of ``network`` whose weights its stages depend on: all but what comes behind the last one.

    A module of which this holds in part is replaced by those of its parts. As in ``feature_shapes``, nothing is
    computed and ``network`` stays as it is.

    Raises:
        UserError: as there.
    """
    copied = _without_values(network).requires_grad_()
    names, weights = zip(*copied.named_parameters(), strict=True)
    with torch.enable_grad():
        stages = _features(copied, type(network).__name__, image_size).stages
        gradients = torch.autograd.grad([stage.sum() for stage in stages], weights, allow_unused=True)
    behind = {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}
    return list(_modules_without(network, behind))


def _modules_without(module: nn.Module, names: set[str], prefix: str = "") -> Iterator[nn.Module]:
    """The largest modules in ``module`` that have parameters, but none of ``names``, which begin with ``prefix``."""
    own = [prefix + name for name, _ in module.named_parameters()]
    if own and names.isdisjoint(own):
        yield module
    elif own:
        for name, child in module.named_children():
            yield from _modules_without(child, names, f"{prefix}{name}.")


def _features(network: nn.Module, name: str, image_size: int) -> Features:
    """What ``network``, a copy on the meta device of the network ``name``, gives for one image, in eval mode."""
    if not hasattr(network, "forward_features"):
        raise UserError(f"{name} has no forward_features, from which the shapes of features are read")
    try:
        with torch.device("meta"):
            features = network.eval().forward_features(torch.empty(1, 3, image_size, image_size))  # type: ignore[operator]
    except Exception as error:  # whatever the network's own code raises
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}.forward_features fails on {image_size}x{image_size} images: {reason}") from error
    if not isinstance(features, Features):
        raise UserError(f"{name}.forward_features returns a {type(features).__name__}, not Features")
    return features


def _without_values(network: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying a value."""
    parameters = {id(each): nn.Parameter(each.to("meta"), requires_grad=False) for each in network.parameters()}
    buffers = {id(each): each.to("meta") for each in network.buffers()}
    return copy.deepcopy(network, {**parameters, **buffers})  # what is in the memo counts as copied


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape[1:])
