"""Networks for photographs against published values.

``tests/golden/imagenet_models.{json,npz}`` were computed with torchvision's ResNets and the published MobileNetV1
(float64, eval mode, weights and images as ``about`` in the JSON file says); "calm" and "lively" are two scales of the
norms' weights.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdistill.models import MODELS, Features, Network

from .published import double_norm_scales, set_weights

GOLDEN = Path(__file__).parent.parent / "golden"
PUBLISHED: dict[str, Any] = json.loads((GOLDEN / "imagenet_models.json").read_text())["models"]
VALUES = np.load(GOLDEN / "imagenet_models.npz")


def images(size: int) -> Tensor:
    """The two golden images: 224 or 64 pixels."""
    salt, block = {224: (0, 32), 64: (1, 16)}[size]
    rng = np.random.default_rng([1, salt])
    blocks = rng.normal(0, 1, (2, 3, size // block, size // block)).repeat(block, 2).repeat(block, 3)
    return torch.from_numpy((blocks + rng.normal(0, 1, (2, 3, size, size))).astype(np.float32)).double()


def registered(name: str) -> str:
    return name if name == "mobilenet_v1" else f"torchvision/{name}"


def golden_network(name: str) -> Network:
    """``name`` in float64 and eval mode, with the calm weights."""
    with torch.device("meta"):
        network = MODELS.build(registered(name), 1000)
    assert isinstance(network, Network)
    network = network.to_empty(device="cpu")
    set_weights(network)
    return network.double().eval()


def close(actual: Tensor, expected: np.ndarray) -> bool:
    values = torch.from_numpy(np.asarray(expected))
    return bool((actual - values).abs().max() <= 1e-9 * values.abs().max())


@pytest.fixture(params=PUBLISHED)
def on_meta(request: pytest.FixtureRequest) -> tuple[str, Network]:
    with torch.device("meta"):
        network = MODELS.build(registered(request.param), 1000)
    assert isinstance(network, Network)
    return request.param, network


def test_keys_order_shapes_and_parameters_are_the_published(on_meta: tuple[str, Network]) -> None:
    name, network = on_meta
    state = [(key, list(value.shape)) for key, value in network.state_dict().items()]
    assert state == list(PUBLISHED[name]["state"].items())
    assert sum(parameter.numel() for parameter in network.parameters()) == PUBLISHED[name]["parameters"]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenet_v1", "resnet18"])
def test_every_map_equals_the_published_at_224_pixels(name: str) -> None:
    network = golden_network(name)
    compare(network.forward_features(images(224)), name, "calm")
    double_norm_scales(network)
    compare(network.forward_features(images(224)), name, "lively")


def compare(features: Features, name: str, weights: str) -> None:
    assert close(features.logits, VALUES[f"{name}/{weights}/logits"])
    assert close(features.pooled, VALUES[f"{name}/{weights}/pooled"])
    published = PUBLISHED[name][weights]
    for maps, key in ((features.stages, "maps"), (features.preacts[1:], "preacts")):
        entries = list(published[key].values())[-len(maps) :]
        for value, entry in zip(maps, entries, strict=True):
            flat = value.flatten()
            at = [(2 * i + 1) * len(flat) // 16 for i in range(8)]
            assert list(value.shape) == entry["shape"]
            assert float(flat.sum()) == pytest.approx(entry["sum"], abs=1e-9 * entry["abs_sum"])
            assert float(flat.abs().sum()) == pytest.approx(entry["abs_sum"], rel=1e-9)
            assert flat[at].tolist() == pytest.approx(entry["entries"], rel=1e-8, abs=1e-9)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_logits_equal_the_published_at_64_pixels(name: str) -> None:
    network = golden_network(name)
    assert close(network(images(64)), VALUES[f"{name}/calm/logits_64"])
    double_norm_scales(network)
    assert close(network(images(64)), VALUES[f"{name}/lively/logits_64"])


# --- MobileNetV1 alone ---


def test_stages_of_mobilenet_v1_are_its_stem_and_the_published_four() -> None:
    network = MODELS.build("mobilenet_v1", 7).eval()
    with torch.no_grad():
        features = network.forward_features(torch.randn(2, 3, 64, 64))
    assert [tuple(stage.shape[1:]) for stage in features.stages] == [
        (32, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (1024, 2, 2),
    ]
    assert torch.equal(features.preacts[0], features.stages[0])
    for stage, preact in list(zip(features.stages, features.preacts, strict=True))[1:]:
        assert preact.min() < 0
        assert torch.equal(torch.relu(preact), stage)
    assert torch.equal(features.last_map.mean(dim=(2, 3)), features.pooled)
    assert torch.equal(network.classifier(features.pooled), features.logits)


def test_mobilenet_v1_gives_one_prediction_per_image_at_other_sizes() -> None:
    with torch.device("meta"):
        network = MODELS.build("mobilenet_v1", 7)
        assert network(torch.empty(3, 3, 448, 448)).shape == (3, 7)
        assert network(torch.empty(3, 3, 40, 56)).shape == (3, 7)


def test_bn_before_relu_of_mobilenet_v1_gives_its_preacts() -> None:
    network, given = MODELS.build("mobilenet_v1", 7).eval(), []
    for norm in network.bn_before_relu():
        norm.register_forward_hook(lambda *call: given.append(call[2]))
    with torch.no_grad():
        features = network.forward_features(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(one, other) for one, other in zip(given, features.preacts[1:], strict=True))


def test_mobilenet_v1_starts_from_the_frameworks_initialisation() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MODELS.build("mobilenet_v1", 7)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(math.prod(module.weight.shape[1:]))
            assert 0.9 * bound < module.weight.abs().max().item() <= bound * (1 + 1e-6)
