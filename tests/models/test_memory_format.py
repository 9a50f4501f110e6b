"""Which memory format is chosen for which device, precision and family."""

import pytest
import torch
from torch import nn

from mdistill.models import MODELS
from mdistill.models.ensemble import Ensemble
from mdistill.models.memory_format import memory_format
from mdistill.precision import Precision

from .zoo import ZOO

LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
DEPTHWISE = {"mobilenet_v1", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2"}


def network(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS.build(name, 10)


@pytest.mark.parametrize("name", ["resnet8x4", "mobilenet_v2"])
@pytest.mark.parametrize(
    ("device", "precision", "plain", "depthwise"),
    [
        ("cpu", "fp32", LAST, LAST),
        ("cpu", "bf16", LAST, LAST),
        ("cuda", "fp32", CONTIGUOUS, CONTIGUOUS),
        ("cuda", "tf32", LAST, CONTIGUOUS),
        ("cuda:1", "bf16", LAST, CONTIGUOUS),
        ("mps", "fp32", CONTIGUOUS, CONTIGUOUS),
    ],
)
def test_format_follows_device_precision_and_family(
    name: str, device: str, precision: Precision, plain: torch.memory_format, depthwise: torch.memory_format
) -> None:
    chosen, reason = memory_format(network(name), torch.device(device), precision)
    assert chosen == (depthwise if name in DEPTHWISE else plain)
    assert "not measured" in reason if device.startswith("cuda") else reason


@pytest.mark.slow
def test_families_with_depthwise_convolutions_are_told_apart() -> None:
    """ShuffleNetV1's grouped 1x1 convolutions alone would not count."""
    cuda = torch.device("cuda")
    assert {name for name in ZOO if memory_format(network(name), cuda, "bf16")[0] == CONTIGUOUS} == DEPTHWISE
    assert memory_format(nn.Sequential(nn.Conv2d(6, 6, 1, groups=3)), cuda, "bf16")[0] == LAST


def test_one_such_member_decides_for_an_ensemble() -> None:
    ensemble = Ensemble([network("resnet8"), network("shufflenet_v2")], "logits")
    assert memory_format(ensemble, torch.device("cuda"), "bf16")[0] == CONTIGUOUS
