"""VGG: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv:1409.1556.

Configurations A, B, D and E of the paper's Table 1 (``vgg11`` to ``vgg19``), and ``vgg8`` with one per block.
Differs from the paper: BatchNorm after each convolution; one linear layer on the pooled map in place of three; the map
is halved after the first three blocks only (after the fourth too when the image is 64 pixels high).
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from mdistill.models.base import MODELS, Features, Network
from mdistill.models.layers import BatchNorm2d, Classifier, global_average, init_classifier, init_convolutions


class VGG(Network):
    """Five blocks of 3x3 convolutions, ``convolutions`` in each, with 64, 128, 256, 512 and 512 channels.

    ``stages`` and ``preacts``: 5 maps, at 1, 1/2, 1/4, 1/8 and 1/8 of the image size (the last at 1/16 for images 64
    pixels high); the first block's is after ReLU in both.
    """

    def __init__(self, convolutions: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.block0 = _block(3, 64, convolutions[0])
        self.block1 = _block(64, 128, convolutions[1])
        self.block2 = _block(128, 256, convolutions[2])
        self.block3 = _block(256, 512, convolutions[3])
        self.block4 = _block(512, 512, convolutions[4])
        self.classifier = Classifier(512, num_classes)
        init_convolutions(self)
        init_classifier(self.classifier)

    def forward_features(self, x: Tensor) -> Features:
        out0 = F.relu(self.block0(x))
        preact1 = self.block1(F.max_pool2d(out0, 2))
        out1 = F.relu(preact1)
        preact2 = self.block2(F.max_pool2d(out1, 2))
        out2 = F.relu(preact2)
        preact3 = self.block3(F.max_pool2d(out2, 2))
        out3 = F.relu(preact3)
        preact4 = self.block4(F.max_pool2d(out3, 2) if x.shape[2] == 64 else out3)
        out4 = F.relu(preact4)
        pooled = global_average(out4)
        return Features(
            logits=self.classifier(pooled),
            stages=(out0, out1, out2, out3, out4),
            preacts=(out0, preact1, preact2, preact3, preact4),
            last_map=out4,
            pooled=pooled,
        )

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last BatchNorm of each block but the first."""
        blocks = (self.block1, self.block2, self.block3, self.block4)
        return [cast(nn.BatchNorm2d, block[-1]) for block in blocks]


def _block(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU, repeated; without the last ReLU."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [
            nn.Conv2d(in_channels, channels, 3, padding=1),
            BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
        in_channels = channels
    return nn.Sequential(*layers[:-1])


@MODELS.register("vgg8")
def vgg8(num_classes: int) -> VGG:
    return VGG((1, 1, 1, 1, 1), num_classes)


@MODELS.register("vgg11")
def vgg11(num_classes: int) -> VGG:
    return VGG((1, 1, 2, 2, 2), num_classes)


@MODELS.register("vgg13")
def vgg13(num_classes: int) -> VGG:
    return VGG((2, 2, 2, 2, 2), num_classes)


@MODELS.register("vgg16")
def vgg16(num_classes: int) -> VGG:
    return VGG((2, 2, 3, 3, 3), num_classes)


@MODELS.register("vgg19")
def vgg19(num_classes: int) -> VGG:
    return VGG((2, 2, 4, 4, 4), num_classes)
