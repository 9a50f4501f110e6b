"""Every registered network: published values, shapes and names, and what the training loop relies on.

``tests/golden/models.{json,npz}`` were computed with the published CIFAR-100 networks (float64, eval mode, weights as
in ``set_deterministic_weights``, two images of 32x32); ``models_lively.npz`` likewise with the scale of every norm
doubled, under which the logits of deep networks depend on the image; ``bn_before_relu.json`` was read off the same
networks.
"""

import copy
import json
import math
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdistill.errors import UserError
from mdistill.models import MODELS, Features, Network
from mdistill.models.layers import BatchNorm2d

from ..host_reads import NoHostReads
from .published import double_norm_scales, set_weights
from .zoo import CIFAR, EACH, EACH_CIFAR, ZOO

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent.parent / "golden"
PUBLISHED = {
    MODELS.canonical(name): (name, entry) for name, entry in json.loads((GOLDEN / "models.json").read_text()).items()
}
BN_BEFORE_RELU = json.loads((GOLDEN / "bn_before_relu.json").read_text())
VALUES = {"calm": np.load(GOLDEN / "models.npz"), "lively": np.load(GOLDEN / "models_lively.npz")}
NUM_CLASSES = 100


def image_batch(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def build(name: str, num_classes: int = NUM_CLASSES) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MODELS.build(name, num_classes)
    assert isinstance(network, Network)
    return network


def tensors(features: Features) -> list[Tensor]:
    return [features.logits, *features.stages, *features.preacts, features.last_map, features.pooled]


class Evaluated:
    """A network in float64 and eval mode, and its features of the golden images under both sets of weights.

    The network has the lively weights.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.published_name, self.published = PUBLISHED[name]
        with torch.device("meta"):
            network = MODELS.build(name, NUM_CLASSES)
        assert isinstance(network, Network)
        self.network = network.to_empty(device="cpu")
        set_weights(self.network)
        self.network.double().eval()
        self.images = torch.from_numpy(VALUES["calm"]["input"]).double()
        with torch.no_grad():
            calm = self.network.forward_features(self.images)
            double_norm_scales(self.network)
            self.features = self.network.forward_features(self.images)
        self.under = {"calm": calm, "lively": self.features}


@pytest.fixture(scope="module", params=EACH_CIFAR)
def evaluated(request: pytest.FixtureRequest) -> Evaluated:
    return Evaluated(request.param)


@pytest.fixture(scope="module", params=EACH)
def fresh(request: pytest.FixtureRequest) -> Network:
    """A freshly initialised network after one training step's forward and backward pass through everything returned."""
    network = build(request.param).train()
    features = network.forward_features(image_batch())
    torch.stack([tensor.square().mean() for tensor in tensors(features)]).sum().backward()
    return network


def test_the_published_zoo_is_registered() -> None:
    assert set(CIFAR) == set(PUBLISHED) == set(BN_BEFORE_RELU)
    assert set(ZOO) == {*CIFAR, "mobilenet_v1"}  # whose values are in ``test_imagenet.py``
    assert len(PUBLISHED) == 26


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("ResNet18", "resnet18"),
        ("ResNet50", "resnet50"),
        ("MobileNetV2", "mobilenet_v2"),
        ("ShuffleV1", "shufflenet_v1"),
        ("ShuffleV2", "shufflenet_v2"),
    ],
)
def test_published_names_are_aliases(alias: str, name: str) -> None:
    assert MODELS.canonical(alias) == name


# --- published values ---


def test_state_dict_has_the_published_keys_order_and_shapes(evaluated: Evaluated) -> None:
    state = [(key, list(value.shape)) for key, value in evaluated.network.state_dict().items()]
    assert state == list(evaluated.published["state"].items())


def test_parameter_count_is_the_published(evaluated: Evaluated) -> None:
    assert sum(parameter.numel() for parameter in evaluated.network.parameters()) == evaluated.published["parameters"]


@pytest.mark.parametrize("weights", VALUES)
def test_logits_and_features_equal_the_published(evaluated: Evaluated, weights: str) -> None:
    features = evaluated.under[weights]
    actual = {"logits": features.logits, "pooled": features.pooled}
    actual |= {f"feat{i}_mean": stage.mean(dim=(2, 3)) for i, stage in enumerate(features.stages)}
    actual |= {f"preact{i}_mean": preact.mean(dim=(2, 3)) for i, preact in enumerate(features.preacts)}
    prefix = f"{evaluated.published_name}/"
    assert {prefix + key for key in actual} == {key for key in VALUES[weights] if key.startswith(prefix)}
    for key, value in actual.items():
        expected = torch.from_numpy(VALUES[weights][prefix + key])
        assert (value - expected).abs().max() <= 1e-9 * expected.abs().max(), key


def test_features_have_the_published_shapes(evaluated: Evaluated) -> None:
    features, published = evaluated.features, evaluated.published
    assert [list(stage.shape) for stage in features.stages] == published["feats"]
    if evaluated.name != "mobilenet_v2":  # lists none, its preacts are its stages
        assert [list(preact.shape) for preact in features.preacts] == published["preact_feats"]
    assert list(features.pooled.shape) == published["pooled"]
    assert features.logits.shape == (2, NUM_CLASSES)


def test_bn_before_relu_names_the_published_layers(evaluated: Evaluated) -> None:
    expected = BN_BEFORE_RELU[evaluated.name]
    if evaluated.name == "shufflenet_v1":  # none published: as in the ResNets, before the shortcut is added
        expected = ["layer1.3.bn3", "layer2.7.bn3", "layer3.3.bn3"]
    if expected is None:
        with pytest.raises(UserError, match="ShuffleNetV2 has no BatchNorm over all the channels"):
            evaluated.network.bn_before_relu()
        return
    modules = evaluated.network.bn_before_relu()
    assert modules == [evaluated.network.get_submodule(name) for name in expected]
    assert [module.num_features for module in modules] == [preact.shape[1] for preact in evaluated.features.preacts[1:]]


# --- the contract of Features ---


def test_classifier_of_pooled_is_logits(evaluated: Evaluated) -> None:
    network, features = evaluated.network, evaluated.features
    assert isinstance(network.classifier, nn.Linear)
    assert network.classifier.out_features == NUM_CLASSES
    assert torch.equal(network.classifier(features.pooled), features.logits)
    torch.testing.assert_close(features.last_map.mean(dim=(2, 3)), features.pooled, rtol=1e-12, atol=1e-12)


def test_forward_is_the_logits_in_eval_mode(evaluated: Evaluated) -> None:
    with torch.no_grad():
        assert torch.equal(evaluated.network(evaluated.images), evaluated.features.logits)


def test_preacts_are_the_stages_before_their_last_activation(evaluated: Evaluated) -> None:
    network, features = evaluated.network, evaluated.features
    assert torch.equal(features.preacts[0], features.stages[0])
    pairs = list(zip(features.stages, features.preacts, strict=True))[1:]
    for i, (stage, preact) in enumerate(pairs):
        assert preact.shape == stage.shape
        assert preact.min() < 0, "a ReLU was applied"
        if evaluated.name.startswith("wrn"):
            assert torch.equal(network.bn_before_relu()[i](stage), preact)
        elif evaluated.name == "mobilenet_v2":
            assert torch.equal(preact, stage)
        elif evaluated.name == "shufflenet_v2":  # half of the channels passed earlier ReLUs, and all are shuffled
            shuffled = torch.nn.functional.channel_shuffle(preact, 2)
            assert torch.equal(torch.relu(shuffled), stage)
        else:
            assert torch.equal(torch.relu(preact), stage)


def test_channels_last_gives_the_same(evaluated: Evaluated) -> None:
    network = copy.deepcopy(evaluated.network).to(memory_format=torch.channels_last)
    with torch.no_grad():
        features = network.forward_features(evaluated.images.to(memory_format=torch.channels_last))
    for actual, expected in zip(tensors(features), tensors(evaluated.features), strict=True):
        assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()


# --- training ---


def test_every_parameter_gets_a_gradient(fresh: Network) -> None:
    without = [name for name, parameter in fresh.named_parameters() if parameter.grad is None]
    assert not without
    assert all(bool(parameter.grad.isfinite().all()) for parameter in fresh.parameters() if parameter.grad is not None)


def test_every_parameter_moves_the_logits(fresh: Network) -> None:
    """With the logits alone as the objective, as plain distillation has it."""
    logits = fresh(image_batch())
    gradients = torch.autograd.grad(logits.square().sum(), list(fresh.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)


def test_each_batch_norm_runs_once_in_a_forward_pass(evaluated: Evaluated) -> None:
    norms = [module for module in evaluated.network.modules() if isinstance(module, nn.BatchNorm2d)]
    calls: Counter[nn.Module] = Counter()
    hooks = [norm.register_forward_hook(lambda norm, *_: calls.update([norm])) for norm in norms]
    evaluated.network(evaluated.images[:, :, :16, :16])
    for hook in hooks:
        hook.remove()
    assert norms
    assert calls == Counter(norms)


def test_counted_batches_are_those_of_torchs_own_layers(evaluated: Evaluated) -> None:
    with torch.device("meta"):
        network = MODELS.build(evaluated.name, NUM_CLASSES)
    counters = [value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(counters) == len(norms)
    assert {type(norm) for norm in norms} == {BatchNorm2d}


def test_forward_is_the_logits_in_training_mode(fresh: Network) -> None:
    with torch.no_grad():
        assert torch.equal(fresh(image_batch()), fresh.forward_features(image_batch()).logits)


def test_training_reads_nothing_on_the_host(fresh: Network) -> None:
    with NoHostReads():
        fresh(image_batch()).square().sum().backward()


def test_building_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("mobilenet_v2", "resnet8", "wrn_16_1", "shufflenet_v1", "shufflenet_v2", "vgg8"):
        build(name)(image_batch())
    assert capfd.readouterr() == ("", "")


# --- other devices, sizes and class counts ---


@pytest.fixture(params=EACH)
def on_meta(request: pytest.FixtureRequest) -> Iterator[Network]:
    with torch.device("meta"):
        yield MODELS.build(request.param, 7)


def test_meta_device_and_other_image_sizes(on_meta: Network) -> None:
    assert all(value.device.type == "meta" for value in on_meta.state_dict().values())
    for height, width in ((64, 64), (40, 56)):
        features = on_meta.forward_features(torch.empty(3, 3, height, width, device="meta"))
        assert features.logits.shape == (3, 7)
        assert features.pooled.shape == features.last_map.shape[:2]


def test_vgg_halves_once_more_at_64_pixels() -> None:
    with torch.device("meta"):
        network = MODELS.build("vgg8", 10)
        heights = {
            size: network.forward_features(torch.empty(1, 3, size, size)).last_map.shape[2] for size in (32, 64, 128)
        }
    assert heights == {32: 4, 64: 4, 128: 16}


@pytest.mark.parametrize("name", EACH)
def test_submodules_and_parameters_are_found_by_name(name: str) -> None:
    """``functional_call`` and exporters follow the names of parameters by attribute."""
    with torch.device("meta"):
        network = MODELS.build(name, 10)
    for key, parameter in network.named_parameters():
        assert network.get_parameter(key) is parameter


def test_mobilenet_copies_pickles_and_calls_functionally() -> None:
    network = build("mobilenet_v2", 10).eval()
    images = image_batch()
    expected = network(images)
    assert torch.equal(copy.deepcopy(network)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(network))(images), expected)
    doubled = {
        key: 2 * value if key.startswith("classifier.0.") else value for key, value in network.named_parameters()
    }
    torch.testing.assert_close(torch.func.functional_call(network, doubled, (images,)), 2 * expected)


# --- initialisation ---


@pytest.mark.parametrize("name", ["resnet32x4", "resnet50", "wrn_40_2", "vgg13", "mobilenet_v2"])
def test_convolutions_start_from_he_initialisation(name: str) -> None:
    for module in build(name).modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None or not module.bias.any()
            if module.weight.numel() > 10_000:
                fan_out = module.out_channels * math.prod(module.kernel_size)
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
                assert module.weight.mean().abs() < 5 * module.weight.std() / math.sqrt(module.weight.numel())
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()


@pytest.mark.parametrize("name", ["shufflenet_v1", "shufflenet_v2"])
def test_shufflenets_start_from_the_frameworks_initialisation(name: str) -> None:
    """Uniform within 1 / sqrt(fan in), PyTorch's own, as the published networks leave it."""
    for module in build(name).modules():
        if isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(math.prod(module.weight.shape[1:]))
            assert module.weight.abs().max().item() <= bound * (1 + 1e-6)


def test_classifiers_start_as_published() -> None:
    for name in ("vgg8", "mobilenet_v2"):
        classifier = build(name).classifier
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not classifier.bias.any()
    assert not build("wrn_16_2").classifier.bias.any()
    resnet = build("resnet32x4").classifier
    bound = 1 / math.sqrt(resnet.in_features)
    assert resnet.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert bool(resnet.bias.any())


def test_two_builds_under_one_seed_are_equal() -> None:
    first, second = build("mobilenet_v2").state_dict(), build("mobilenet_v2").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
