"""Networks of torchvision and timm by name: their own keys, features, and what the engine does with a network."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdistill.errors import UserError
from mdistill.models import MODELS, Features, Network, feature_shapes
from mdistill.models import external as external_module
from mdistill.models.external import ExternalNetwork
from mdistill.models.fold_bn import fold_batchnorm
from mdistill.optim.averaging import AveragedNetwork

TORCHVISION = "torchvision/resnet18"
TIMM_RESNET = "timm/resnet10t"
MOBILENET = "timm/mobilenetv3_small_050"
VIT = "timm/vit_tiny_patch16_224"

pytestmark = pytest.mark.slow

EACH = [TORCHVISION, TIMM_RESNET, MOBILENET, VIT]


def build(name: str, num_classes: int = 5, **arguments: Any) -> ExternalNetwork:
    if name == VIT:
        arguments = {"img_size": 64, "depth": 8, "embed_dim": 48, **arguments}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MODELS.build(name, num_classes, **arguments)
    assert isinstance(network, ExternalNetwork)
    return network


def images(count: int = 2, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def trained_looking(network: ExternalNetwork) -> ExternalNetwork:
    """Statistics and norms that differ from their initial values, so that what skips them shows."""
    generator = torch.Generator().manual_seed(1)
    for value in network.state_dict().values():
        if value.is_floating_point() and value.ndim == 1:
            value.add_(0.1 * torch.rand(value.shape, generator=generator))
    return network


@pytest.fixture(scope="module", params=EACH)
def network(request: pytest.FixtureRequest) -> Network:
    """In eval mode."""
    return trained_looking(build(request.param)).eval()


def plain(name: str, num_classes: int = 5) -> nn.Module:
    """The library's own network."""
    if name == TORCHVISION:
        from torchvision.models import resnet18

        return resnet18(num_classes=num_classes)
    import timm

    arguments = {"img_size": 64, "depth": 8, "embed_dim": 48} if name == VIT else {}
    return timm.create_model(name.partition("/")[2], num_classes=num_classes, **arguments)


# --- the library's own names ---


@torch.no_grad()
def test_state_loads_into_the_plain_network_and_back(network: ExternalNetwork) -> None:
    other = plain(network.name)
    assert list(other.state_dict()) == list(network.state_dict())
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in network.named_parameters()]
    other.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(other.eval()(images()), network(images()))
    network.load_state_dict(other.state_dict(), strict=True)


def test_mode_device_and_copies_reach_the_network_inside(network: ExternalNetwork) -> None:
    other = copy.deepcopy(network).train()
    assert other.inner.training
    assert not network.inner.training
    assert {id(one) for one in other.parameters()} == {id(one) for one in other.inner.parameters()}
    assert not {id(one) for one in other.parameters()} & {id(one) for one in network.parameters()}
    other.double()
    assert all(parameter.dtype == torch.float64 for parameter in other.inner.parameters())
    assert torch.equal(pickle.loads(pickle.dumps(network))(images()), network(images()))


@torch.no_grad()
def test_an_average_of_weights_is_a_network_of_its_own(network: ExternalNetwork) -> None:
    average = AveragedNetwork(network)
    before = average.network(images())
    average.network.inner.get_parameter(next(name for name, _ in network.named_parameters())).mul_(2)
    assert not torch.equal(average.network(images()), before)


# --- features ---


def tensors(features: Features) -> list[Tensor]:
    return [features.logits, *features.stages, *features.preacts, features.last_map, features.pooled]


@torch.no_grad()
def test_features_are_those_of_the_forward_pass(network: ExternalNetwork) -> None:
    features = network.forward_features(images())
    torch.testing.assert_close(features.logits, network(images()))
    assert torch.equal(network.classifier(features.pooled), features.logits)
    for stage, preact in zip(features.stages, features.preacts, strict=True):
        assert stage.shape == preact.shape
        assert stage.ndim == 4
    assert features.last_map.ndim == 4
    assert len(features.stages) in (4, 5)


@torch.no_grad()
@pytest.mark.parametrize("name", EACH[:2])
def test_preacts_of_resnets_are_before_the_last_relu_and_come_from_the_named_norm(name: str) -> None:
    network = trained_looking(build(name)).eval()
    assert isinstance(network, ExternalNetwork)
    features, added = network.forward_features(images()), []
    assert torch.equal(features.preacts[0], features.stages[0])
    for stage, preact in list(zip(features.stages, features.preacts, strict=True))[1:]:
        assert preact.min() < 0
        assert torch.equal(torch.relu(preact), stage)
    torch.testing.assert_close(features.pooled, features.last_map.mean(dim=(2, 3)))
    for norm in network.bn_before_relu():
        norm.register_forward_hook(lambda *call: added.append(call[2].clone()))
    network.forward_features(images())
    for norm, preact in zip(added, features.preacts[1:], strict=True):
        assert norm.shape == preact.shape


@torch.no_grad()
def test_maps_of_a_transformer_are_its_tokens() -> None:
    network = build(VIT).eval()
    features = network.forward_features(images())
    assert [tuple(stage.shape) for stage in features.stages] == [(2, 48, 4, 4)] * 5
    tokens = network.inner.forward_features(images())
    assert torch.equal(features.last_map[:, :, 1, 2], tokens[:, 1 + 4 + 2])
    assert torch.equal(features.pooled, tokens[:, 0])  # the class token


def test_shapes_without_data_are_those_of_the_features(network: ExternalNetwork) -> None:
    with torch.no_grad():
        features = network.forward_features(images())
    shapes = feature_shapes(network, 64)
    assert shapes.stages == tuple(tuple(stage.shape[1:]) for stage in features.stages)
    assert shapes.last_map == tuple(features.last_map.shape[1:])
    assert shapes.pooled == tuple(features.pooled.shape[1:])


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["efficientnet_b0", "convnext_atto", "densenet121", "swin_tiny_patch4_window7_224"],
)
def test_other_families_of_timm_give_features(name: str) -> None:
    network = build(f"timm/{name}", **({"img_size": 64, "window_size": 2} if "swin" in name else {})).eval()
    features = network.forward_features(images(1))
    torch.testing.assert_close(features.logits, network(images(1)))
    assert features.last_map.shape[2:] == features.stages[-1].shape[2:]


def test_a_network_whose_features_cannot_be_read_says_so() -> None:
    network = build("torchvision/shufflenet_v2_x0_5")
    assert network(images()).shape == (2, 5)
    for read in (network.forward_features, lambda x: feature_shapes(network, 64)):
        with pytest.raises(UserError, match="torchvision/shufflenet_v2_x0_5: of torchvision's networks, features are"):
            read(images())
    with pytest.raises(UserError, match="no BatchNorm that is known to stand before"):
        network.bn_before_relu()


def test_stages_that_end_in_an_activation_are_told() -> None:
    assert "its preacts are its stages" in str(build("timm/regnety_002").note)
    assert build(MOBILENET).note is None


# --- what the engine does with a network ---


@torch.no_grad()
@pytest.mark.parametrize("name", EACH[:3])
def test_batchnorm_folds_without_a_change(name: str) -> None:
    network = trained_looking(build(name)).eval().double()
    assert isinstance(network, ExternalNetwork)
    folded, count = fold_batchnorm(network)
    assert isinstance(folded, ExternalNetwork)
    x = images().double()
    assert count == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(folded(x), network(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(copy.deepcopy(folded)(x), folded(x))
    for one, other in zip(tensors(folded.forward_features(x)), tensors(network.forward_features(x)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_channels_last_gives_the_same(network: ExternalNetwork) -> None:
    other = copy.deepcopy(network).double().to(memory_format=torch.channels_last)
    x = images().double()
    torch.testing.assert_close(other(x.contiguous(memory_format=torch.channels_last)), network.double()(x))
    network.float()


@torch.no_grad()
def test_logits_under_autocast_are_in_float32(network: ExternalNetwork) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(images()).dtype == torch.float32


def test_every_parameter_gets_a_gradient(network: ExternalNetwork) -> None:
    other = copy.deepcopy(network).train()
    features = other.forward_features(images())
    torch.stack([tensor.square().mean() for tensor in tensors(features)]).sum().backward()
    assert not [name for name, parameter in other.named_parameters() if parameter.grad is None]


# --- names and arguments ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet43", "unknown model 'torchvision/resnet43'; did you mean 'torchvision/resnet34'"),
        ("tochvision/resnet18", "unknown model 'tochvision/resnet18'; did you mean 'torchvision'"),
        pytest.param("timm/resnet1O", "unknown model 'timm/resnet1O'; did you mean 'timm/resnet1"),
        pytest.param(
            "timm/mobilenetv3_small_100.lam_in1k",
            "has no weights 'lam_in1k' of mobilenetv3_small_100; did you mean 'mobilenetv3_small_100.lamb_in1k'",
        ),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        MODELS.canonical(name)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (TORCHVISION, {"zero_init_residua": True}, "student.zero_init_residua: unknown key (value True) for model"),
        (TORCHVISION, {"weights": "DEFAULT"}, "student.weights: cannot be set for 'torchvision/resnet18'"),
        (TORCHVISION, {"groups": 2}, "student: 'torchvision/resnet18' cannot be built with {'groups': 2}: BasicBlock"),
        pytest.param(MOBILENET, {"drop_rat": 0.1}, "did you mean 'drop_rate'"),
        pytest.param(MOBILENET, {"pretrained": True}, "student.pretrained: cannot be set"),
    ],
)
def test_a_wrong_argument_is_one_line(name: str, arguments: dict[str, Any], message: str) -> None:
    _, (problem,) = MODELS.check(name, arguments, where="student.")
    assert message in problem
    assert "\n" not in problem


def test_arguments_pass_through() -> None:
    assert MODELS.check(TORCHVISION, {"zero_init_residual": True}) == ({"zero_init_residual": True}, [])
    network = build(TORCHVISION, zero_init_residual=True)
    assert not network.get_parameter("layer1.0.bn2.weight").any()


def test_libraries_are_imported_when_one_of_their_names_is_asked_for() -> None:
    code = (
        "import sys; from mdistill.engine import build; from mdistill.models import MODELS; MODELS.get('resnet8');"
        "print([name for name in ('timm', 'torchvision.models', 'huggingface_hub') if name in sys.modules])"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_without_timm_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    external_module.timm_builder.cache_clear()
    with pytest.raises(UserError, match=r"need timm: pip install 'mdistill\[images\]'"):
        MODELS.canonical("timm/resnet18")
