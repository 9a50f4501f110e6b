"""ResNet-18 and ResNet-50: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.

The four stages of the paper's Table 1. Differs from the paper, for 32x32 images: the stem is a 3x3 convolution of
stride 1 without max pooling. A bottleneck's stride is on its 3x3 convolution.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from mdistill.models.base import MODELS, Features, Network
from mdistill.models.layers import BatchNorm2d, Classifier, ReLUStage, conv, global_average, init_convolutions


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the ReLU after the sum is left to the stage."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride=stride)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """The sum before its ReLU, (B, K', H / stride, W / stride).

        Args:
            x: (B, K, H, W).
        """
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return cast(Tensor, self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut, to 4 times ``channels``; the ReLU is left to the stage."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride=stride)
        self.bn2 = BatchNorm2d(channels)
        self.conv3 = conv(channels, self.expansion * channels, 1)
        self.bn3 = BatchNorm2d(self.expansion * channels)
        self.shortcut = _shortcut(in_channels, self.expansion * channels, stride)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """The sum before its ReLU, (B, K', H / stride, W / stride).

        Args:
            x: (B, K, H, W).
        """
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return cast(Tensor, self.bn3(self.conv3(out)) + self.shortcut(x))


class FourStageResNet(Network):
    """A 3x3 stem of 64 channels and four stages of ``block``, ``blocks`` in each.

    ``stages`` and ``preacts``: 5 maps, at 1, 1, 1/2, 1/4 and 1/8 of the image size; the stem's is after ReLU in both.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = conv(3, 64, 3)
        self.bn1 = BatchNorm2d(64)
        self.layer1 = _stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, blocks[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, blocks[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, blocks[3], stride=2)
        self.linear = Classifier(512 * block.expansion, num_classes)
        init_convolutions(self)

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]  # read-only: the layer's published name is linear
        return self.linear

    def forward_features(self, x: Tensor) -> Features:
        stem = F.relu(self.bn1(self.conv1(x)))
        out1, preact1 = self.layer1(stem)
        out2, preact2 = self.layer2(out1)
        out3, preact3 = self.layer3(out2)
        out4, preact4 = self.layer4(out3)
        pooled = global_average(out4)
        return Features(
            logits=self.linear(pooled),
            stages=(stem, out1, out2, out3, out4),
            preacts=(stem, preact1, preact2, preact3, preact4),
            last_map=out4,
            pooled=pooled,
        )

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last BatchNorm of each stage's last block, before its shortcut is added."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return [cast(BasicBlock | Bottleneck, stage[-1]).last_bn for stage in stages]


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(conv(in_channels, channels, 1, stride=stride), BatchNorm2d(channels))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, channels: int, blocks: int, *, stride: int
) -> ReLUStage:
    rest = (block(channels * block.expansion, channels, stride=1) for _ in range(blocks - 1))
    return ReLUStage(block(in_channels, channels, stride), *rest)


@MODELS.register("resnet18", "ResNet18")
def resnet18(num_classes: int) -> FourStageResNet:
    return FourStageResNet(BasicBlock, (2, 2, 2, 2), num_classes)


@MODELS.register("resnet50", "ResNet50")
def resnet50(num_classes: int) -> FourStageResNet:
    return FourStageResNet(Bottleneck, (3, 4, 6, 3), num_classes)
