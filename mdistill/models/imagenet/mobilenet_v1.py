"""MobileNetV1: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
arXiv:1704.04861, Table 1 (width 1.0), as the distillation papers train it on ImageNet.

Differs from the published code: the pooling is global, which at 224 pixels is the published 7x7 one and at other sizes
gives one prediction per image too; any number of classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mdistill.models.base import MODELS, Features, Network
from mdistill.models.layers import BatchNorm2d, Classifier, conv, global_average

# channels and stride of each block after the stem of 32 channels
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
STAGE_ENDS = (3, 5, 11, 13)  # positions in ``model``, counted from the stem at 0


class MobileNetV1(Network):
    """A 3x3 stem of stride 2 and 13 blocks of a 3x3 depthwise and a 1x1 convolution.

    ``stages`` and ``preacts``: 5 maps, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image size: the stem's (after ReLU in
    both), then those of blocks 3, 5, 11 and 13. Methods that skip the stem, ``stages[1:]``, read the published four.
    Weights start from PyTorch's defaults, as published.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        stem = nn.Sequential(conv(3, 32, 3, stride=2), BatchNorm2d(32))
        widths = (32, *(channels for channels, _ in BLOCKS))
        blocks = (_block(widths[i], channels, stride) for i, (channels, stride) in enumerate(BLOCKS))
        self.model = nn.Sequential(stem, *blocks)
        self.fc = Classifier(widths[-1], num_classes)

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]  # read-only: the layer's published name is fc
        return self.fc

    def forward_features(self, x: Tensor) -> Features:
        stages, preacts = [], []
        for number, block in enumerate(self.model):
            preact = block(x)
            x = F.relu(preact)
            if number == 0 or number in STAGE_ENDS:
                stages.append(x)
                preacts.append(x if number == 0 else preact)
        pooled = global_average(x)
        return Features(logits=self.fc(pooled), stages=tuple(stages), preacts=tuple(preacts), last_map=x, pooled=pooled)

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last BatchNorm of blocks 3, 5, 11 and 13."""
        return [self.model.get_submodule(f"{number}.4") for number in STAGE_ENDS]  # type: ignore[misc]


def _block(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """A depthwise separable convolution; the ReLU at its end is left to the network."""
    return nn.Sequential(
        conv(in_channels, in_channels, 3, stride=stride, groups=in_channels),
        BatchNorm2d(in_channels),
        nn.ReLU(),
        conv(in_channels, channels, 1),
        BatchNorm2d(channels),
    )


@MODELS.register("mobilenet_v1", "MobileNetV1")
def mobilenet_v1(num_classes: int) -> MobileNetV1:
    return MobileNetV1(num_classes)
