"""Images as a published network expects them, made from those of another data set's normalisation and size.

Letters: B batch, C classes, H and W height and width, S image size.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistill.models.base import Features, Network


@dataclass(frozen=True)
class Preprocessing:
    """How images come to a network: mean and std of the channels, on the scale 0 to 1, and height and width."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int  # pixels


class Preprocessed(nn.Module):
    """A network behind another normalisation and image size than those of the images it is given.

    The images are resized bilinearly with antialiasing. Normalising is the same before as after: weights of an
    interpolation sum to 1.

    Args:
        network: (B, 3, S, S) -> (B, C).
        given: of the images that come.
        wanted: of those that ``network`` gets.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, given: Preprocessing, wanted: Preprocessing) -> None:
        super().__init__()
        self.network, self.wanted = network, wanted
        self.resizes = given.image_size != wanted.image_size
        statistics = (given.mean, given.std, wanted.mean, wanted.std)
        mean, std, new_mean, new_std = (torch.tensor(each, dtype=torch.float64) for each in statistics)
        self.register_buffer("scale", (std / new_std).float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - new_mean) / new_std).float().view(3, 1, 1), persistent=False)

    def prepare(self, image: Tensor) -> Tensor:
        """The images as the network expects them, (B, 3, S, S).

        Args:
            image: (B, 3, H, W).
        """
        if self.resizes:
            size = [self.wanted.image_size] * 2
            image = F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
        return image * self.scale + self.shift

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, C).

        Args:
            image: (B, 3, H, W).
        """
        return cast(Tensor, self.network(self.prepare(image)))


class PreprocessedNetwork(Preprocessed, Network):
    """The same around a network with features, which are those of the images as it sees them."""

    @property
    def no_features(self) -> str | None:  # type: ignore[override]  # read-only
        """The network's own."""
        return getattr(self.network, "no_features", None)

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]  # read-only
        """The network's own."""
        return cast(nn.Linear, self.network.classifier)

    def forward_features(self, x: Tensor) -> Features:
        return cast(Network, self.network).forward_features(self.prepare(x))

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return cast(Network, self.network).bn_before_relu()


def preprocessed(network: nn.Module, given: Preprocessing, wanted: Preprocessing) -> nn.Module:
    """``network`` behind what turns ``given`` images into ``wanted`` ones; itself where they are the same."""
    if given == wanted:
        return network
    kind = PreprocessedNetwork if hasattr(network, "forward_features") else Preprocessed
    return kind(network, given, wanted)


def bare(network: nn.Module) -> nn.Module:
    """The network that weights are loaded into."""
    return network.network if isinstance(network, Preprocessed) else network
