"""The weights under which the reference values of networks were computed: a function of each entry's name and shape."""

import math
import zlib

import numpy as np
import torch
from torch import nn


def set_weights(network: nn.Module) -> None:
    """The calm weights."""
    for key, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        x = np.random.default_rng([1, zlib.crc32(key.encode())]).normal(0, 1, tuple(value.shape))
        if key.endswith("running_var"):
            x = 1 + 0.1 * np.abs(x)
        elif key.endswith(("running_mean", "bias")):
            x = 0.1 * x
        elif x.ndim == 1:
            x = 0.5 * (1 + 0.1 * x)
        else:
            x = x * math.sqrt(2 / math.prod(x.shape[1:]))
        value.copy_(torch.from_numpy(x.astype(np.float32)))


@torch.no_grad()
def double_norm_scales(network: nn.Module) -> None:
    """The lively weights from the others, exactly."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight *= 2
