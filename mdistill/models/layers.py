"""Pieces shared by the families of the zoo."""

import torch.nn.functional as F
from torch import Tensor, nn


def conv(in_channels: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias whose padding keeps the size at stride 1 (``kernel`` is odd)."""
    return nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class ReLUStage(nn.Sequential):
    """Blocks that return their output before its ReLU, each followed here by that ReLU."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) to the stage's output and the same map before the last ReLU, both (B, C', H', W')."""
        preact = x
        for block in self:
            preact = block(x)
            x = F.relu(preact)
        return x, preact


def global_average(x: Tensor) -> Tensor:
    """(B, D, H, W) to (B, D)."""
    return x.mean(dim=(2, 3))


def init_convolutions(network: nn.Module) -> None:
    """He et al., arXiv:1502.01852, over outgoing connections: weights N(0, 2 / (kernel area * output channels))."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_classifier(classifier: nn.Linear) -> None:
    """Weights N(0, 0.01^2), bias zero."""
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
