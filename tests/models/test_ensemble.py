"""Several teachers as one: by hand, and folded as each alone."""

import math

import pytest
import torch
from torch import nn

from mdistill.models import MODELS
from mdistill.models.ensemble import Ensemble
from mdistill.models.fold_bn import fold_batchnorm


class Fixed(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(image), -1)


IMAGE = torch.zeros(2, 3, 4, 4)


def test_averaged_probabilities_are_those_by_hand():
    """(3/4, 1/4) and (1/4, 3/4) make (1/2, 1/2); with (1/2, 1/2) the mean of the first two is (5/8, 3/8)."""
    sure, other, even = Fixed(math.log(3), 0.0), Fixed(0.0, math.log(3)), Fixed(7.0, 7.0)
    for members, expected in (([sure, other], (0.5, 0.5)), ([sure, even], (0.625, 0.375))):
        logits = Ensemble(members, "probabilities")(IMAGE)
        torch.testing.assert_close(logits.exp(), torch.tensor([expected] * 2))


def test_averaged_logits_are_those_by_hand():
    logits = Ensemble([Fixed(1.0, 5.0), Fixed(3.0, -1.0)], "logits")(IMAGE)
    assert logits.tolist() == [[2.0, 2.0]] * 2


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_average_is_finite_for_logits_of_1e4_and_float32_for_half_precision(average):
    logits = Ensemble([Fixed(1e4, -1e4), Fixed(-1e4, 1e4)], average)(IMAGE)
    assert logits.isfinite().all()
    halves = [Fixed(1.0, 2.0), Fixed(0.0, 2.0)]
    for member in halves:
        member.logits = member.logits.bfloat16()
    assert Ensemble(halves, average)(IMAGE).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_one_network_twice_is_that_network(average):
    network = MODELS.build("resnet8", 10).eval()
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, alone = Ensemble([network, network], average)(image), network(image)
    torch.testing.assert_close(logits.softmax(dim=1), alone.softmax(dim=1))


def test_members_are_folded_as_each_alone():
    members = [MODELS.build(name, 10).eval() for name in ("resnet8", "wrn_16_1")]
    ensemble = Ensemble(members, "probabilities").eval()
    folded, count = fold_batchnorm(ensemble)
    assert count == sum(fold_batchnorm(member)[1] for member in members) > 0
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded(image), ensemble(image), rtol=1e-4, atol=1e-5)
