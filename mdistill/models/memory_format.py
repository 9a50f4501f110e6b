"""In which memory format a network runs fastest; ``benchmarks/memory_format.py`` measures it."""

import torch
from torch import Tensor, nn

from mdistill.precision import Precision


def memory_format(network: nn.Module, device: torch.device, precision: Precision) -> tuple[torch.memory_format, str]:
    """The format for ``network`` and its images on ``device`` in ``precision``, and the reason in a few words.

    Convolutions run channels-last as soon as either their weights or their input are: to run contiguously a network
    needs contiguous images.
    """
    if device.type == "cpu":
        return torch.channels_last, "measured to be the faster one on a CPU"
    if device.type != "cuda":
        return torch.contiguous_format, "torch's default, nothing measured on this device"
    if _has_depthwise_convolutions(network):
        return torch.contiguous_format, "depthwise convolutions on CUDA, an estimate, not measured"
    if precision == "fp32":
        return torch.contiguous_format, "float32 without tensor cores on CUDA, an estimate, not measured"
    return torch.channels_last, f"tensor cores in {precision} on CUDA, an estimate, not measured"


def move(network: nn.Module, device: torch.device, precision: Precision) -> tuple[str, str]:
    """Move ``network`` to ``device``, in the memory format that suits it there; returns its name and the reason."""
    layout, reason = memory_format(network, device, precision)
    network.to(device).to(memory_format=layout)
    network.memory_format = layout  # type: ignore[assignment]  # copies of the network have it too
    return str(layout).removeprefix("torch."), reason


def to_layout(network: nn.Module, image: Tensor) -> Tensor:
    """``image`` (B, 3, H, W) in the memory format of a ``network`` that was moved by ``move``; else as it is."""
    layout = getattr(network, "memory_format", None)
    return image if layout is None else image.contiguous(memory_format=layout)


def _has_depthwise_convolutions(network: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 for module in network.modules()
    )
