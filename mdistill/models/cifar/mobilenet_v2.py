"""MobileNetV2: Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
arXiv:1801.04381.

Half the width of the paper's Table 2. Differs from the paper: the stage of 24 channels has stride 1, ReLU stands for
ReLU6, channel counts are not rounded to multiples of 8, the first block has its 1x1 convolution although that does not
expand, and there is no dropout.
"""

from typing import cast

from torch import Tensor, nn

from mdistill.models.base import MODELS, Features, Network
from mdistill.models.layers import BatchNorm2d, Classifier, conv, global_average, init_classifier, init_convolutions

# expansion, channels at full width, blocks, stride of the first block
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
HEAD_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """Expanding 1x1, depthwise 3x3 and linear 1x1 convolutions, plus the input where the shape stays; no ReLU after."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            conv(in_channels, inner, 1),
            BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            conv(inner, inner, 3, stride=stride, groups=inner),
            BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            conv(inner, channels, 1),
            BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output (B, K', H / stride, W / stride).

        Args:
            x: (B, K, H, W).
        """
        out = self.conv(x)
        return cast(Tensor, x + out if self.residual else out)


class NumberedClassifier(Classifier):
    """A classifier that also answers to the name ``0``.

    The layer is published as ``classifier.0`` while ``classifier`` is the layer itself: what follows parameter names
    by attribute (``get_submodule``, ``functional_call``, ``torch.export``) finds the layer all the same.
    """

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        return self if name == "0" else super().__getattr__(name)


class MobileNetV2(Network):
    """A 3x3 stem of stride 2, seven stages of ``InvertedResidual``, a 1x1 convolution to 1280 channels.

    ``stages``: the stem (after ReLU), then stages 1, 2, 4 and 6 counted from 0 (linear, so of either sign), at 1/2,
    1/2, 1/4, 1/8 and 1/16 of the image size. ``preacts`` are the same maps: no ReLU ends a stage.
    """

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = _conv_bn_relu(3, channels, 3, stride=2)
        self.blocks = nn.ModuleList()
        for expansion, full_width, blocks, stride in STAGES:
            in_channels, channels = channels, int(full_width * width)
            first = InvertedResidual(in_channels, channels, stride, expansion)
            rest = (InvertedResidual(channels, channels, 1, expansion) for _ in range(blocks - 1))
            self.blocks.append(nn.Sequential(first, *rest))
        self.conv2 = _conv_bn_relu(channels, HEAD_CHANNELS, 1)
        self._modules["classifier"] = nn.Sequential(NumberedClassifier(HEAD_CHANNELS, num_classes))
        init_convolutions(self)
        init_classifier(self.classifier)

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]  # read-only: published as classifier.0
        return cast(nn.Linear, cast(nn.Sequential, self._modules["classifier"])[0])

    def forward_features(self, x: Tensor) -> Features:
        out = self.conv1(x)
        stages = [out]
        for number, block in enumerate(self.blocks):
            out = block(out)
            if number in (1, 2, 4, 6):
                stages.append(out)
        last_map = self.conv2(out)
        pooled = global_average(last_map)
        return Features(
            logits=self.classifier(pooled),
            stages=tuple(stages),
            preacts=tuple(stages),
            last_map=last_map,
            pooled=pooled,
        )

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last BatchNorm of stages 1, 2, 4 and 6, which no ReLU follows: they end in linear bottlenecks."""
        lasts = (cast(nn.Sequential, self.blocks[number])[-1] for number in (1, 2, 4, 6))
        return [cast(nn.BatchNorm2d, cast(InvertedResidual, last).conv[-1]) for last in lasts]


def _conv_bn_relu(in_channels: int, channels: int, kernel: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        conv(in_channels, channels, kernel, stride=stride), BatchNorm2d(channels), nn.ReLU(inplace=True)
    )


@MODELS.register("mobilenet_v2", "MobileNetV2")
def mobilenet_v2(num_classes: int) -> MobileNetV2:
    return MobileNetV2(0.5, num_classes)
