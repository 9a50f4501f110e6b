"""The layers of the zoo against torch's own."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mdistill.models import MODELS
from mdistill.models.layers import BatchNorm1d, BatchNorm2d, Classifier, LenientBatchNorm2d, count_batches

from ..same import assert_same
from .zoo import FAMILIES

# --- BatchNorm2d and its count ---


def maps(*, batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def pair(**options: object) -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    """Ours and torch's, with the same state."""
    ours, theirs = BatchNorm2d(3, **options), nn.BatchNorm2d(3, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def run_both(ours: BatchNorm2d, theirs: nn.BatchNorm2d, *, steps: int) -> None:
    """Some forward and backward passes, counted; outputs, gradients and state are equal bit by bit."""
    for step in range(steps):
        x, y = maps(seed=step).requires_grad_(), maps(seed=step).requires_grad_()
        out, expected = ours(x), theirs(y)
        count_batches(ours)
        assert torch.equal(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert torch.equal(x.grad, y.grad)
        assert_same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"eps": 1e-3, "momentum": 0.3}, {"momentum": None}, {"track_running_stats": False}],
    ids=["plain", "no affine", "other numbers", "cumulative", "batch statistics"],
)
def test_batch_norm_with_its_count_equals_torchs(options: dict[str, object]) -> None:
    ours, theirs = pair(**options)
    run_both(ours, theirs, steps=3)
    run_both(ours.eval(), theirs.eval(), steps=1)
    run_both(ours.train(), theirs.train(), steps=1)


def test_tracking_switched_off_afterwards_uses_batch_statistics_and_counts_nothing() -> None:
    ours, theirs = pair()
    run_both(ours, theirs, steps=1)
    ours.track_running_stats = theirs.track_running_stats = False
    run_both(ours, theirs, steps=2)
    run_both(ours.eval(), theirs.eval(), steps=1)
    assert ours.num_batches_tracked == 1


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (1, 3, 1, 2), (2, 3, 1, 1), (4, 3)])
def test_lenient_layers_equal_torchs_where_that_has_a_variance(shape: tuple[int, ...]) -> None:
    ours, theirs = (
        (BatchNorm1d(3), nn.BatchNorm1d(3)) if len(shape) == 2 else (LenientBatchNorm2d(3), nn.BatchNorm2d(3))
    )
    for step in range(4):
        ours.train(step < 3)
        theirs.train(step < 3)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        assert ours(x).equal(theirs(x))
        assert_same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3)])
def test_lenient_layers_normalise_a_single_pixel_by_the_stored_statistics(shape: tuple[int, ...]) -> None:
    norm = BatchNorm1d(3) if len(shape) == 2 else LenientBatchNorm2d(3)
    norm(torch.randn(8, *shape[1:], generator=torch.Generator().manual_seed(0)))
    before, x = copy.deepcopy(norm.state_dict()), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert norm(x).equal(copy.deepcopy(norm).eval()(x))
    assert_same(norm.state_dict(), before)


def test_forward_pass_alone_counts_nothing() -> None:
    norm = BatchNorm2d(3)
    norm(maps())
    assert norm.num_batches_tracked == 0


def test_torchs_own_layers_are_not_counted_twice() -> None:
    network = nn.Sequential(BatchNorm2d(3), nn.BatchNorm2d(3))
    for expected in (1, 2):
        network(maps())
        count_batches(network)
        assert [int(layer.num_batches_tracked) for layer in network] == [expected, expected]


def test_layers_in_eval_mode_are_not_counted() -> None:
    network = nn.Sequential(BatchNorm2d(3), BatchNorm2d(3))
    network[1].eval()
    count_batches(network)
    assert [int(layer.num_batches_tracked) for layer in network] == [1, 0]
    count_batches(network.eval())
    assert [int(layer.num_batches_tracked) for layer in network] == [1, 0]
    count_batches(network.train())
    assert [int(layer.num_batches_tracked) for layer in network] == [2, 1]


def test_counting_follows_new_buffers_and_copies() -> None:
    """Moving a network replaces its buffers; a copy has layers of its own."""
    network = nn.Sequential(BatchNorm2d(3))
    count_batches(network)
    network.load_state_dict({key: value.clone() for key, value in network.state_dict().items()}, assign=True)
    count_batches(network)
    other = copy.deepcopy(network)
    count_batches(other)
    assert (network[0].num_batches_tracked, other[0].num_batches_tracked) == (2, 3)


def test_network_without_such_layers_is_left_alone() -> None:
    count_batches(nn.Linear(2, 2))


def test_zoo_counts_one_batch_in_every_layer() -> None:
    network = MODELS.build("shufflenet_v2", 10)
    count_batches(network)
    counts = {int(value) for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == {1}


# --- Classifier ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classifier_equals_torchs_linear_layer(dtype: torch.dtype) -> None:
    ours, theirs = Classifier(6, 4).to(dtype), nn.Linear(6, 4).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    pooled = torch.randn(5, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(pooled), theirs(pooled))


def test_classifier_computes_in_float32_under_autocast() -> None:
    classifier = Classifier(6, 4)
    pooled = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = classifier(pooled)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, classifier(pooled.float()))
    logits.sum().backward()
    assert classifier.weight.grad is not None
    assert pooled.grad is not None


def test_classifier_of_a_network_in_bfloat16_gives_float32() -> None:
    assert Classifier(6, 4).bfloat16()(torch.ones(5, 6, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_ends_in_a_classifier(name: str) -> None:
    network = MODELS.build(name, 10).eval()
    assert isinstance(network.classifier, Classifier)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(images).dtype == torch.float32
