"""The shapes of features without data, and what they leave as it was."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mdistill.errors import UserError
from mdistill.models import MODELS, Features, Network
from mdistill.models.base import FeatureShapes, feature_shapes, trunk

from ..same import assert_same
from .zoo import FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("image_size", [32, 64])
def test_shapes_are_those_of_a_forward_pass(name: str, image_size: int) -> None:
    network = MODELS.build(name, 10).eval()
    assert isinstance(network, Network)
    with torch.no_grad():
        features = network.forward_features(torch.zeros(2, 3, image_size, image_size))
    assert feature_shapes(network, image_size) == FeatureShapes(
        stages=tuple(tuple(stage.shape[1:]) for stage in features.stages),
        preacts=tuple(tuple(preact.shape[1:]) for preact in features.preacts),
        last_map=tuple(features.last_map.shape[1:]),
        pooled=tuple(features.pooled.shape[1:]),
    )


def test_shapes_by_hand() -> None:
    shapes = feature_shapes(MODELS.build("resnet8x4", 100), 32)
    assert shapes.stages == shapes.preacts == ((32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8))
    assert shapes.last_map == (256, 8, 8)
    assert shapes.pooled == (256,)


class Counted(Network):
    """Tied weights, a buffer, dropout, and one image too few for BatchNorm in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 8, stride=8, bias=False)
        self.tied = nn.Conv2d(3, 3, 8, stride=8, bias=False)
        self.tied.weight = self.conv.weight
        self.bn = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("scale", torch.full((3, 1, 1), 2.0), persistent=False)
        self.classifier = nn.Linear(3, 10)

    def forward_features(self, x: Tensor) -> Features:
        preact = self.bn(self.tied(self.conv(x))) * self.get_buffer("scale") * torch.ones(())
        out = self.dropout(torch.relu(preact))
        pooled = out.mean(dim=(2, 3))
        return Features(self.classifier(pooled), (out,), (preact,), out, pooled)


def test_network_its_mode_and_random_numbers_stay_as_they_are() -> None:
    network = Counted().train()
    network.dropout.eval()
    before, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    parameters, random_state = [*network.parameters()], torch.get_rng_state()
    assert feature_shapes(network, 64) == FeatureShapes(((3, 1, 1),), ((3, 1, 1),), (3, 1, 1), (3,))
    assert_same(network.state_dict(), before)
    assert [module.training for module in network.modules()] == modes
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)
    assert torch.equal(torch.get_rng_state(), random_state)


class ReadsValues(Counted):
    def forward_features(self, x: Tensor) -> Features:
        assert x.sum().item() == 0
        return super().forward_features(x)


class GivesATensor(nn.Module):
    def forward_features(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (nn.Linear(2, 2), "Linear has no forward_features"),
        (ReadsValues(), r"ReadsValues.forward_features fails on 64x64 images: .*meta"),
        (GivesATensor(), "GivesATensor.forward_features returns a Tensor, not Features"),
    ],
    ids=["no features", "reads values", "no Features"],
)
def test_a_network_without_features_is_refused(network: nn.Module, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        feature_shapes(network, 64)
    assert "\n" not in str(caught.value)


def test_the_trunk_is_all_that_the_stages_depend_on_and_the_network_stays_as_it_is() -> None:
    network = MODELS.build("wrn_16_2", 10).train()
    network.block1.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    assert trunk(network, 32) == [network.conv1, network.block1, network.block2, network.block3]
    assert_same(network.state_dict(), before)
    assert not any(parameter.requires_grad for parameter in network.block1.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())
