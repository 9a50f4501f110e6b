"""Wide ResNet: Zagoruyko, Komodakis, "Wide Residual Networks", arXiv:1605.07146.

``wrn_{depth}_{width}`` has depth = 6n + 4 layers; no dropout. Differs from the published code: that runs the BatchNorm
layers of ``bn_before_relu()`` twice in each forward pass, once more to return their output, which in training updates
their running statistics twice; here each runs once.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from mdistill.models.base import MODELS, Features, Network
from mdistill.models.layers import BatchNorm2d, Classifier, conv, global_average, init_convolutions


class PreactBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice, beside a shortcut; no ReLU after the sum.

    Where the width changes, the shortcut is a bare 1x1 convolution of the first ReLU's output.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride=stride)
        self.bn2 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.convShortcut = conv(in_channels, channels, 1, stride=stride) if in_channels != channels else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum (B, K', H / stride, W / stride), and ``x`` after the first BatchNorm.

        Args:
            x: (B, K, H, W).
        """
        preact = self.bn1(x)
        active = F.relu(preact)
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out = F.relu(self.bn2(self.conv1(active)), inplace=True)
        return shortcut + self.conv2(out), preact


class WideStage(nn.Module):
    """Blocks under the published name ``layer``."""

    def __init__(self, in_channels: int, channels: int, blocks: int, *, stride: int) -> None:
        super().__init__()
        rest = (PreactBlock(channels, channels, stride=1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(PreactBlock(in_channels, channels, stride), *rest)

    @property
    def first_bn(self) -> nn.BatchNorm2d:
        return cast(PreactBlock, self.layer[0]).bn1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's output (B, K', H', W'), and ``x`` after ``first_bn``.

        Args:
            x: (B, K, H, W).
        """
        first, *rest = self.layer
        x, preact = first(x)
        for block in rest:
            x, _ = block(x)
        return x, preact


class WideResNet(Network):
    """A 3x3 stem of 16 channels, three stages of ``PreactBlock``, a last BatchNorm and ReLU.

    ``stages``: 4 maps, at 1, 1, 1/2 and 1/4 of the image size: raw sums of convolutions, before BatchNorm and ReLU.
    ``preacts``: the stem's raw output again, then each stage's output after the BatchNorm that follows it.
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = WideStage(16, 16 * width, blocks, stride=1)
        self.block2 = WideStage(16 * width, 32 * width, blocks, stride=2)
        self.block3 = WideStage(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = BatchNorm2d(64 * width)
        self.fc = Classifier(64 * width, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]  # read-only: the layer's published name is fc
        return self.fc

    def forward_features(self, x: Tensor) -> Features:
        stem = self.conv1(x)
        out1, _ = self.block1(stem)
        out2, preact1 = self.block2(out1)
        out3, preact2 = self.block3(out2)
        preact3 = self.bn1(out3)
        last_map = F.relu(preact3)
        pooled = global_average(last_map)
        return Features(
            logits=self.fc(pooled),
            stages=(stem, out1, out2, out3),
            preacts=(stem, preact1, preact2, preact3),
            last_map=last_map,
            pooled=pooled,
        )

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The BatchNorm that follows each stage: the first of the next stage, and the last one."""
        return [self.block2.first_bn, self.block3.first_bn, self.bn1]


@MODELS.register("wrn_16_1")
def wrn_16_1(num_classes: int) -> WideResNet:
    return WideResNet(16, 1, num_classes)


@MODELS.register("wrn_16_2")
def wrn_16_2(num_classes: int) -> WideResNet:
    return WideResNet(16, 2, num_classes)


@MODELS.register("wrn_16_4")
def wrn_16_4(num_classes: int) -> WideResNet:
    return WideResNet(16, 4, num_classes)


@MODELS.register("wrn_28_2")
def wrn_28_2(num_classes: int) -> WideResNet:
    return WideResNet(28, 2, num_classes)


@MODELS.register("wrn_28_4")
def wrn_28_4(num_classes: int) -> WideResNet:
    return WideResNet(28, 4, num_classes)


@MODELS.register("wrn_40_1")
def wrn_40_1(num_classes: int) -> WideResNet:
    return WideResNet(40, 1, num_classes)


@MODELS.register("wrn_40_2")
def wrn_40_2(num_classes: int) -> WideResNet:
    return WideResNet(40, 2, num_classes)
