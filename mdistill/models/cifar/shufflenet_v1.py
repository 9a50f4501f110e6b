"""ShuffleNet: Zhang, Zhou, Lin, Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
Devices", arXiv:1707.01083.

Three groups at full width (the paper's Table 1). Differs from the paper, for 32x32 images: the stem is a 1x1
convolution of stride 1 without max pooling; and a ReLU follows the depthwise convolution.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistill.models.base import MODELS, Features, Network
from mdistill.models.layers import BatchNorm2d, Classifier, ReLUStage, conv, global_average

GROUPS = 3
STEM_CHANNELS = 24


class ShuffleUnit(nn.Module):
    """1x1 grouped convolution, channel shuffle, depthwise 3x3, 1x1 grouped; the ReLU after them is left to the stage.

    At stride 2 the averaged input is concatenated after the branch, else the input is added.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = channels - in_channels if stride == 2 else channels
        inner = branch // 4
        self.groups = 1 if in_channels == STEM_CHANNELS else GROUPS  # as in the paper: too few channels to group
        self.conv1 = conv(in_channels, inner, 1, groups=self.groups)
        self.bn1 = BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride=stride, groups=inner)
        self.bn2 = BatchNorm2d(inner)
        self.conv3 = conv(inner, branch, 1, groups=GROUPS)
        self.bn3 = BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output before its ReLU, (B, K', H / stride, W / stride).

        Args:
            x: (B, K, H, W).
        """
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = cast(Tensor, self.bn3(self.conv3(out)))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        return out + x


class ShuffleNetV1(Network):
    """A 1x1 stem of 24 channels and three stages of ``ShuffleUnit``, with 240, 480 and 960 channels.

    ``stages`` and ``preacts``: 4 maps, at 1, 1/2, 1/4 and 1/8 of the image size; the stem's is after ReLU in both.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv(3, STEM_CHANNELS, 1)
        self.bn1 = BatchNorm2d(STEM_CHANNELS)
        self.layer1 = _stage(STEM_CHANNELS, 240, units=4)
        self.layer2 = _stage(240, 480, units=8)
        self.layer3 = _stage(480, 960, units=4)
        self.linear = Classifier(960, num_classes)

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]  # read-only: the layer's published name is linear
        return self.linear

    def forward_features(self, x: Tensor) -> Features:
        stem = F.relu(self.bn1(self.conv1(x)))
        out1, preact1 = self.layer1(stem)
        out2, preact2 = self.layer2(out1)
        out3, preact3 = self.layer3(out2)
        pooled = global_average(out3)
        return Features(
            logits=self.linear(pooled),
            stages=(stem, out1, out2, out3),
            preacts=(stem, preact1, preact2, preact3),
            last_map=out3,
            pooled=pooled,
        )

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last BatchNorm of each stage's last unit, before its input is added; the published network names none."""
        return [cast(ShuffleUnit, stage[-1]).bn3 for stage in (self.layer1, self.layer2, self.layer3)]


def _stage(in_channels: int, channels: int, *, units: int) -> ReLUStage:
    rest = (ShuffleUnit(channels, channels, stride=1) for _ in range(units - 1))
    return ReLUStage(ShuffleUnit(in_channels, channels, stride=2), *rest)


@MODELS.register("shufflenet_v1", "ShuffleV1")
def shufflenet_v1(num_classes: int) -> ShuffleNetV1:
    return ShuffleNetV1(num_classes)
