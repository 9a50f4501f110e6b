"""Folding BatchNorm: the same function over the whole zoo, and what must be left as it is."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from mdistill.models import MODELS, Features, Network
from mdistill.models.fold_bn import MAX_DECISIONS, fold_batchnorm
from mdistill.models.layers import BatchNorm2d

from .zoo import EACH

pytestmark = pytest.mark.slow

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NOT_AFTER_A_LAYER = {"wrn_16": 7, "wrn_28": 13, "wrn_40": 19}  # BatchNorm layers of a sum or of a returned feature


def trained_looking(network: nn.Module) -> nn.Module:
    """``network`` with random statistics and affine values in every BatchNorm."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, NORMS):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(0, 0.5, generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.5, generator=generator)
    return network


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(2))


def difference(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


@torch.no_grad()
def folds(network: nn.Module, *inputs: Tensor) -> int:
    """How many were folded, having checked that the folded copy computes the same as ``network`` in eval mode."""
    reference = trained_looking(network).double()
    folded, count = fold_batchnorm(reference)
    reference.eval()
    for x in inputs or (images(),):
        expected = reference(x.double())
        torch.testing.assert_close(folded(x.double()), expected, rtol=1e-10, atol=1e-10)
    return count


# --- the zoo ---


@pytest.fixture(scope="module", params=EACH)
def network(request: pytest.FixtureRequest) -> Network:
    """In training mode, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = trained_looking(MODELS.build(request.param, 100)).train()
    network.name = request.param
    assert isinstance(network, Network)
    return network


@torch.no_grad()
def test_every_network_folds_to_the_same_logits_in_float32(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.deepcopy(network.state_dict())
    folded, count = fold_batchnorm(network)

    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert count == norms - NOT_AFTER_A_LAYER.get(str(network.name)[:6], 0)
    assert count > 0

    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module.training for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())

    x, calls, batch_norm = images(2, 3, 32, 32), [], F.batch_norm
    expected = copy.deepcopy(network).eval()(x)
    monkeypatch.setattr(F, "batch_norm", lambda *x, **options: calls.append(None) or batch_norm(*x, **options))
    assert difference(folded(x), expected) <= 1e-5 * expected.abs().max().item()
    assert len(calls) == norms - count


@torch.no_grad()
def test_every_network_folds_to_the_same_features_in_float64(network: Network) -> None:
    """VGG takes another way at 64 pixels."""

    def tensors(features: Features) -> list[Tensor]:
        return [*features.stages, *features.preacts, features.last_map, features.pooled]

    reference = copy.deepcopy(network).double().eval()
    folded, _ = fold_batchnorm(reference)
    assert isinstance(folded, Network)
    for size in (32, 64) if "vgg" in str(network.name) else (32,):
        x = images(2, 3, size, size).double()
        expected, actual = reference.forward_features(x), folded.forward_features(x)
        tolerance = 1e-10 * max(1.0, expected.logits.abs().max().item())
        assert difference(folded(x), expected.logits) <= tolerance
        assert difference(actual.logits, expected.logits) <= tolerance
        for one, other in zip(tensors(actual), tensors(expected), strict=True):
            assert difference(one, other) <= 1e-10 * max(1.0, other.abs().max().item())


def test_memory_format_and_dtype_stay() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        network = trained_looking(MODELS.build("resnet8x4", 10)).to(dtype).to(memory_format=torch.channels_last)
        folded, count = fold_batchnorm(network)
        assert count == 10
        for (name, before), after in zip(
            [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)],
            [module for module in folded.modules() if isinstance(module, nn.Conv2d)],
            strict=True,
        ):
            assert after.weight.stride() == before.weight.stride(), name
            assert after.weight.dtype == dtype
            assert after.bias is not None
            assert after.bias.dtype == dtype
            assert not torch.equal(after.weight, before.weight)


def test_folded_network_has_its_layers_copies_and_folds_no_further() -> None:
    network = MODELS.build("wrn_16_1", 10)
    assert isinstance(network, Network)
    folded, _ = fold_batchnorm(trained_looking(network))
    assert isinstance(folded, type(network))
    for one, other in zip(folded.bn_before_relu(), network.bn_before_relu(), strict=True):
        assert type(one) is BatchNorm2d
        assert torch.equal(one.weight, other.weight)
    x = images(1, 3, 32, 32)
    assert torch.equal(copy.deepcopy(folded)(x), folded(x))
    assert fold_batchnorm(folded)[1] == 0
    assert torch.equal(fold_batchnorm(folded)[0](x), folded(x))


# --- layers that are folded ---


def conv_bn(channels: int = 4, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 3, **options), nn.BatchNorm2d(channels))


@pytest.mark.parametrize(
    ("network", "x"),
    [
        (conv_bn(), images()),
        (conv_bn(bias=False, padding=1, padding_mode="reflect"), images()),
        (conv_bn(6, groups=3, stride=2, dilation=2), images()),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), images()),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(inplace=True)), images(2, 3, 9)),
        (nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), images(2, 3, 5, 5, 5)),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)), images()),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False), nn.BatchNorm1d(5, affine=False)), images()),
    ],
    ids=["plain", "padded", "grouped", "no-affine", "1d", "3d", "linear", "linear-bare"],
)
def test_norm_after_a_layer_is_folded(network: nn.Module, x: Tensor) -> None:
    assert folds(network, x) == 1


class Pair(nn.Module):
    """A convolution and a BatchNorm, called as ``call`` says."""

    def __init__(self, call: Callable[[Any, Any], Any], conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.call = call

    def forward(self, x: Any, flag: bool = False) -> Any:
        return self.call(self, x)


@dataclass
class Output:
    logits: Tensor
    rest: list[Tensor]


def flattened(m: Pair, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    return m.bn(m.conv(x)).reshape(B, C * H * W)


def returned_inside(m: Pair, x: Tensor) -> Tensor:
    out = Output(m.bn(m.conv(x)), [x])
    return out.logits


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.bn(m.conv(x)),
        lambda m, x: F.dropout(m.bn(m.conv(x)), training=m.training),
        lambda m, x: m.bn(m.conv(x)) if m.training else F.relu(m.bn(m.conv(x)), inplace=True),
        lambda m, x: m.bn(m.conv(x)) if x.shape[2] == 8 else m.bn(m.conv(F.avg_pool2d(x, 2))) + 1,
        lambda m, x: m.bn(m.conv(x)) if x.shape[2] == 8 else x,
        lambda m, x: m.bn(m.conv(x.float() if x.dtype == torch.float16 else x)),
        lambda m, x: m.bn(m.conv(x)) if x.sum() > 1e6 else m.bn(m.conv(x)).tanh(),
        lambda m, x: {"logits": m.bn(m.conv(x))}["logits"],
        lambda m, x: m.bn(m.conv(x)) * (2 if isinstance(m.bn, nn.BatchNorm2d) else 1),
        flattened,
        returned_inside,
    ],
)
def test_norm_is_folded_whatever_the_images_decide(call: Callable[[Any, Any], Any]) -> None:
    assert folds(Pair(call), images(), images(2, 3, 12, 12)) == 1


# --- layers that are left ---


def conv_with_hook() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    conv.register_forward_hook(lambda module, args, output: output * 2)
    return conv


def conv_with_a_forward_of_its_own() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    forward = conv.forward
    conv.forward = lambda x: forward(x) * 2
    return conv


class ScaledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def called_for_large_images(m: Pair, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y) if x.shape[2] == 8 else y


def norm_of_either(m: Pair, x: Tensor) -> Tensor:
    return m.bn(m.conv(x) if x.shape[2] == 8 else m.other(x))


def stored_in_a_result(m: Pair, x: Tensor) -> Tensor:
    y = m.conv(x)
    out = Output(m.bn(y), [y])
    return out.logits + out.rest[0]


@pytest.mark.parametrize(
    "network",
    [
        Pair(lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x))),
        Pair(stored_in_a_result),
        Pair(lambda m, x: m.bn(m.conv(m.conv(x)))),
        Pair(lambda m, x: m.bn(m.bn(m.conv(x)))),
        Pair(lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x))),
        Pair(lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1)),
        Pair(lambda m, x: m.bn(F.relu(m.conv(x)))),
        Pair(lambda m, x: m.bn(x)),
        Pair(lambda m, x: m.bn(F.conv2d(x, m.conv.weight))),
        Pair(called_for_large_images),
        Pair(norm_of_either),
        Pair(lambda m, x: m.bn(m.conv(x)), weight_norm(nn.Conv2d(3, 3, 3))),
        Pair(lambda m, x: m.bn(m.conv(x)), conv_with_hook()),
        Pair(lambda m, x: m.bn(m.conv(x)), conv_with_a_forward_of_its_own()),
        Pair(lambda m, x: m.bn(m.conv(x)), ScaledConv(3, 3, 3)),
        Pair(lambda m, x: m.bn(m.conv(x)), nn.ConvTranspose2d(3, 3, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(nn.Flatten(2), nn.Linear(64, 3), nn.BatchNorm1d(3)),
    ],
)
def test_norm_of_another_or_a_shared_output_is_left(network: nn.Module) -> None:
    assert folds(network, images(), *([images(2, 3, 12, 12)] if isinstance(network, Pair) else [])) == 0


def always_training() -> nn.Module:
    """A BatchNorm that normalises by the batch whatever mode it is put in."""
    bn = nn.BatchNorm2d(3)
    bn.train = lambda mode=True: bn
    return bn


def test_others_are_folded_beside_what_is_left() -> None:
    """Without running statistics; always in training mode; of a number of channels that only a call would refuse."""
    for bn in (nn.BatchNorm2d(3, track_running_stats=False), always_training(), nn.BatchNorm2d(5)):
        network = Pair(lambda m, x: m.bn(m.conv(m.first(x))))
        network.first, network.bn = conv_bn(3), bn
        assert fold_batchnorm(network)[1] == 1


def test_a_module_of_two_names_is_one_module() -> None:
    first = conv_bn(3, padding=1)
    holder = nn.ModuleDict({"first": first, "second": first[0]})

    class Holder(nn.Module):
        def __init__(self, call: Callable[[Any, Tensor], Tensor]) -> None:
            super().__init__()
            self.parts, self.call = holder, call

        def forward(self, x: Tensor) -> Tensor:
            return self.call(self.parts, x)

    assert folds(Holder(lambda parts, x: parts["first"](x))) == 1
    assert folds(Holder(lambda parts, x: parts["first"](x) + parts["second"](x))) == 0


def test_tied_weights_are_untied_where_one_layer_is_folded() -> None:
    network = Pair(lambda m, x: m.bn(m.conv(x)) + m.other(x))
    network.other.weight = network.conv.weight
    assert folds(network) == 1


def test_weights_that_would_overflow_are_left() -> None:
    network = conv_bn().half()
    with torch.no_grad():
        network[1].running_var.zero_()
        network[1].weight.fill_(60000)
    assert fold_batchnorm(network)[1] == 0
    assert fold_batchnorm(network.float())[1] == 1


# --- networks that cannot be traced, and what tracing must not touch ---


def sums_over_rows(m: Pair, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    return torch.stack([y[i] for i in range(y.shape[0])])


def checks_its_images(m: Pair, x: Tensor) -> Tensor:
    if x.ndim != 4:
        raise ValueError("not images")
    return m.bn(m.conv(x))


def shrinks(m: Pair, x: Tensor) -> Tensor:
    while x.shape[2] > 4:
        x = F.avg_pool2d(x, 2)
    return m.bn(m.conv(x))


def branches_often(m: Pair, x: Tensor) -> Tensor:
    for limit in range(MAX_DECISIONS + 1):
        if x.shape[2] > 100 + limit:
            x = x[:, :, :-1]
    return m.bn(m.conv(x))


@pytest.mark.parametrize(
    "call",
    [
        sums_over_rows,
        checks_its_images,
        shrinks,
        branches_often,
        lambda m, x: m.bn(m.conv(x)) * float(x.mean()),
        lambda m, x: m.bn(m.conv(x)) if x.mean().item() > 0 and int(x.sum()) else m.bn(m.conv(x)) + 1,
        lambda m, x: torch.from_numpy(m.bn(m.conv(x)).numpy()),
    ],
)
def test_an_untraceable_network_is_copied(call: Callable[[Any, Any], Any]) -> None:
    network = trained_looking(Pair(call)).train()
    copied, count = fold_batchnorm(network)
    assert count == 0
    assert copied is not network
    assert network.training
    assert not any(module.training for module in copied.modules())
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    for key, value in copied.state_dict().items():
        assert torch.equal(value, network.state_dict()[key])
        assert value.data_ptr() != network.state_dict()[key].data_ptr()
    with torch.no_grad():
        assert torch.equal(copied(images()), network.eval()(images()))


def test_a_meta_network_is_copied() -> None:
    with torch.device("meta"):
        assert fold_batchnorm(conv_bn())[1] == 0


def test_tracing_changes_neither_network_nor_random_state() -> None:
    """A forward that draws, counts its calls and remembers its images."""

    def call(m: Any, x: Tensor) -> Tensor:
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        m.calls += 1
        m.last = x
        return m.bn(m.conv(x))

    network = Pair(call)
    network.register_buffer("calls", torch.zeros(()))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    folded, count = fold_batchnorm(network)
    assert count == 1
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    for one in (network, folded):
        assert not hasattr(one, "last")
        assert one.get_buffer("calls") == 0
