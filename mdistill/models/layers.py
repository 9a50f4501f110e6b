"""Pieces shared by the families of the zoo. Letters: B batch, D pooled width, K channels, H and W height and width."""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mdistill.precision import widen


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that leaves ``num_batches_tracked`` to ``count_batches``: one kernel less in each layer."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised map (B, K, H, W).

        Args:
            x: (B, K, H, W).
        """
        if self.momentum is None:  # a cumulative average is weighted by the count and cannot do without it
            return super().forward(x)
        running = not self.training or self.track_running_stats
        return F.batch_norm(
            x,
            self.running_mean if running else None,
            self.running_var if running else None,
            self.weight,
            self.bias,
            training=self.training or self.running_mean is None,
            momentum=self.momentum,
            eps=self.eps,
        )


class _Lenient(_BatchNorm):
    """Normalises what has a single value in each channel, and so no variance, by the stored statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """What torch's own layer gives, in training for more than one value in each channel.

        Args:
            x: (B, D) or (B, K, H, W).
        """
        if not self.training or x.numel() > x.shape[1]:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class BatchNorm1d(_Lenient, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` that normalises a single row (1, D) by the stored statistics."""


class LenientBatchNorm2d(_Lenient, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that normalises a single map of 1 x 1, (1, K, 1, 1), by the stored statistics.

    For the modules of methods: it counts its batches by itself.
    """


class Classifier(nn.Linear):
    """``nn.Linear`` in float32 or wider, also under autocast: rounded to bfloat16, logits of 20 lie 0.125 apart."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C).

        Args:
            x: (B, D), the pooled map.
        """
        if x.is_meta:  # has no autocast
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(widen(x), widen(self.weight), None if self.bias is None else widen(self.bias))


_NORMS: WeakKeyDictionary[nn.Module, list[BatchNorm2d]] = WeakKeyDictionary()


def count_batches(network: nn.Module) -> None:
    """Add 1 to ``num_batches_tracked`` of every ``BatchNorm2d`` above that is training, in one call.

    To be called after each training forward pass of ``network``. Layers of torch's own count by themselves. The layers
    are looked up at the first call: walking a network takes longer than counting.
    """
    if network not in _NORMS:
        _NORMS[network] = [module for module in network.modules() if isinstance(module, BatchNorm2d)]
    counting = [
        norm for norm in _NORMS[network] if norm.training and norm.track_running_stats and norm.momentum is not None
    ]
    counters = [norm.num_batches_tracked for norm in counting if norm.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)


DRAW_RATES = ("p", "drop_prob", "drop_rate", "dropout", "attention_dropout")
"""Attributes of layers; the last two are of attention, in torch and torchvision."""


def draws_in_training(network: nn.Module) -> bool:
    """Whether a layer of ``network`` draws random numbers in training mode (dropout, stochastic depth).

    Told by the probabilities that such layers of torch, torchvision and timm have: ``DRAW_RATES``.
    """
    modules = [*network.modules()]
    inside = (getattr(module, "inner", None) for module in modules)  # of libraries, which are no modules of ours
    modules += [module for module in inside if isinstance(module, nn.Module)]
    rates = (getattr(module, name, 0) for module in modules for name in DRAW_RATES)
    return any(isinstance(rate, float | int) and rate > 0 for rate in rates)


def conv(in_channels: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias whose padding keeps the size at stride 1 (``kernel`` is odd)."""
    return nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class ReLUStage(nn.Sequential):
    """Blocks that return their output before its ReLU, each followed here by that ReLU."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's output and the same map before its last ReLU, both (B, K', H', W').

        Args:
            x: (B, K, H, W).
        """
        preact = x
        for block in self:
            preact = block(x)
            x = F.relu(preact)
        return x, preact


def global_average(x: Tensor) -> Tensor:
    """The mean over space, (B, D).

    Args:
        x: (B, D, H, W).
    """
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
