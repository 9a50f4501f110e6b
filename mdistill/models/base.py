"""What every network of the zoo offers. Letters: B batch, C classes, D pooled width, H and W height and width."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from mdistill.registry import Registry

MODELS: Registry[nn.Module] = Registry("model")


@dataclass(frozen=True)
class Features:
    """All that a method may read of a forward pass."""

    logits: Tensor  # (B, C)
    stages: tuple[Tensor, ...]  # the stem's output, then each stage's: (B, C_i, H_i, W_i)
    preacts: tuple[Tensor, ...] | None  # the same maps before the stage's last ReLU; None where there is none
    last_map: Tensor  # (B, D, H', W'), what is pooled
    pooled: Tensor  # (B, D), the classifier's input; equals last_map averaged over space


class Network(nn.Module, ABC):
    """A classifier with inspectable features. ``classifier(pooled) == logits`` and ``pooled == mean(last_map)``."""

    classifier: nn.Linear

    @abstractmethod
    def forward_features(self, x: Tensor) -> Features:
        """Images (B, 3, H, W) to logits and features."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, C)."""
        return self.forward_features(x).logits

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The BatchNorm nearest before each stage's last ReLU (stem excluded).

        Raises:
            NotImplementedError: the published network names none.
        """
        raise NotImplementedError(f"{type(self).__name__} names no BatchNorm layers before its stages' last ReLU")
