"""ResNet for CIFAR: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, Sec. 4.2.

``resnet{depth}`` has depth = 6n + 2 layers and 16, 32, 64 channels; ``x4`` stands for 64, 128, 256 channels after a
stem of 32. Differs from the paper: where the shape changes, the shortcut is a 1x1 convolution with BatchNorm (its
option B) rather than zero padding (option A).
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from mdistill.models.base import MODELS, Features, Network
from mdistill.models.layers import BatchNorm2d, Classifier, ReLUStage, conv, global_average, init_convolutions

NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the ReLU after the sum is left to the stage."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride=stride)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(conv(in_channels, channels, 1, stride=stride), BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The sum before its ReLU, (B, K', H / stride, W / stride).

        Args:
            x: (B, K, H, W).
        """
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return cast(Tensor, self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet(Network):
    """A 3x3 stem and three stages of ``BasicBlock``; ``widths`` are the channels of the stem and of each stage.

    ``stages`` and ``preacts``: 4 maps, at 1, 1, 1/2 and 1/4 of the image size; the stem's is after ReLU in both.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = conv(3, widths[0], 3)
        self.bn1 = BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2)
        self.fc = Classifier(widths[3], num_classes)
        init_convolutions(self)

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]  # read-only: the layer's published name is fc
        return self.fc

    def forward_features(self, x: Tensor) -> Features:
        stem = F.relu(self.bn1(self.conv1(x)))
        out1, preact1 = self.layer1(stem)
        out2, preact2 = self.layer2(out1)
        out3, preact3 = self.layer3(out2)
        pooled = global_average(out3)
        return Features(
            logits=self.fc(pooled),
            stages=(stem, out1, out2, out3),
            preacts=(stem, preact1, preact2, preact3),
            last_map=out3,
            pooled=pooled,
        )

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last BatchNorm of each stage's last block, before its shortcut is added."""
        return [cast(BasicBlock, stage[-1]).bn2 for stage in (self.layer1, self.layer2, self.layer3)]


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int) -> ReLUStage:
    rest = (BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1))
    return ReLUStage(BasicBlock(in_channels, channels, stride), *rest)


@MODELS.register("resnet8")
def resnet8(num_classes: int) -> ResNet:
    return ResNet(8, NARROW, num_classes)


@MODELS.register("resnet14")
def resnet14(num_classes: int) -> ResNet:
    return ResNet(14, NARROW, num_classes)


@MODELS.register("resnet20")
def resnet20(num_classes: int) -> ResNet:
    return ResNet(20, NARROW, num_classes)


@MODELS.register("resnet32")
def resnet32(num_classes: int) -> ResNet:
    return ResNet(32, NARROW, num_classes)


@MODELS.register("resnet44")
def resnet44(num_classes: int) -> ResNet:
    return ResNet(44, NARROW, num_classes)


@MODELS.register("resnet56")
def resnet56(num_classes: int) -> ResNet:
    return ResNet(56, NARROW, num_classes)


@MODELS.register("resnet110")
def resnet110(num_classes: int) -> ResNet:
    return ResNet(110, NARROW, num_classes)


@MODELS.register("resnet8x4")
def resnet8x4(num_classes: int) -> ResNet:
    return ResNet(8, WIDE, num_classes)


@MODELS.register("resnet32x4")
def resnet32x4(num_classes: int) -> ResNet:
    return ResNet(32, WIDE, num_classes)
