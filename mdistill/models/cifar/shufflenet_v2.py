"""ShuffleNet V2: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design",
arXiv:1807.11164.

The paper's 1x network (Table 5). Differs from the paper, for 32x32 images: the stem is a 1x1 convolution of stride 1
without max pooling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistill.models.base import MODELS, Features, Network
from mdistill.models.layers import BatchNorm2d, Classifier, conv, global_average


class DownUnit(nn.Module):
    """Halves the map, Fig. 3 (d): two branches see the whole input."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(in_channels, in_channels, 3, stride=2, groups=in_channels)
        self.bn1 = BatchNorm2d(in_channels)
        self.conv2 = conv(in_channels, half, 1)
        self.bn2 = BatchNorm2d(half)
        self.conv3 = conv(in_channels, half, 1)
        self.bn3 = BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, stride=2, groups=half)
        self.bn4 = BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output (B, K', H / 2, W / 2).

        Args:
            x: (B, K, H, W).
        """
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return F.channel_shuffle(torch.cat([left, right], dim=1), 2)


class SplitUnit(nn.Module):
    """Fig. 3 (c): the first half of the channels passes through, the second half is transformed; then a shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = BatchNorm2d(half)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The unit's output, and the same before its ReLU and its shuffle, both (B, K, H, W).

        Args:
            x: (B, K, H, W).
        """
        passed, branch = x.chunk(2, dim=1)
        branch = F.relu(self.bn1(self.conv1(branch)), inplace=True)
        branch = self.bn2(self.conv2(branch))
        branch = self.bn3(self.conv3(branch))
        out = F.channel_shuffle(torch.cat([passed, F.relu(branch)], dim=1), 2)
        return out, torch.cat([passed, branch], dim=1)


class ShuffleStage(nn.Sequential):
    """A ``DownUnit``, then ``SplitUnit`` layers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last unit's output, and the same before its ReLU and its shuffle, both (B, K', H / 2, W / 2).

        Args:
            x: (B, K, H, W).
        """
        down, *splits = self
        x = preact = down(x)
        for split in splits:
            x, preact = split(x)
        return x, preact


class ShuffleNetV2(Network):
    """A 1x1 stem of 24 channels, three stages with 116, 232 and 464 channels, a 1x1 convolution to 1024.

    ``stages`` and ``preacts``: 4 maps, at 1, 1/2, 1/4 and 1/8 of the image size; the stem's is after ReLU in both, and
    the others' channels are shuffled in ``stages`` but not in ``preacts``, whose first half (what the last unit passes
    through) is after an earlier ReLU.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv(3, 24, 1)
        self.bn1 = BatchNorm2d(24)
        self.layer1 = _stage(24, 116, units=4)
        self.layer2 = _stage(116, 232, units=8)
        self.layer3 = _stage(232, 464, units=4)
        self.conv2 = conv(464, 1024, 1)
        self.bn2 = BatchNorm2d(1024)
        self.linear = Classifier(1024, num_classes)

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]  # read-only: the layer's published name is linear
        return self.linear

    def forward_features(self, x: Tensor) -> Features:
        stem = F.relu(self.bn1(self.conv1(x)))
        out1, preact1 = self.layer1(stem)
        out2, preact2 = self.layer2(out1)
        out3, preact3 = self.layer3(out2)
        last_map = F.relu(self.bn2(self.conv2(out3)))
        pooled = global_average(last_map)
        return Features(
            logits=self.linear(pooled),
            stages=(stem, out1, out2, out3),
            preacts=(stem, preact1, preact2, preact3),
            last_map=last_map,
            pooled=pooled,
        )


def _stage(in_channels: int, channels: int, *, units: int) -> ShuffleStage:
    return ShuffleStage(DownUnit(in_channels, channels), *(SplitUnit(channels) for _ in range(units - 1)))


@MODELS.register("shufflenet_v2", "ShuffleV2")
def shufflenet_v2(num_classes: int) -> ShuffleNetV2:
    return ShuffleNetV2(num_classes)
