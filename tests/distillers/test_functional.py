"""Shared maths: standardised logits, and draws by counter against Python integers and statistics."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mdistill.distillers import functional
from mdistill.distillers.functional import (
    dropout_factors,
    kl_divergence,
    kl_divergence_per_sample,
    normal,
    standardize,
    uniform,
)

from ..host_reads import NoHostReads
from . import examples

WORD = 2**64


def test_standardize_gives_mean_0_and_unbiased_deviation_1():
    logits = standardize(examples.logits(0, 6, 5))
    torch.testing.assert_close(logits.mean(dim=1), torch.zeros(6).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits.std(dim=1), torch.ones(6).double(), rtol=0, atol=1e-6)


def test_standardize_of_a_constant_row_is_0_with_a_finite_gradient():
    logits = torch.full((2, 5), 3.0, requires_grad=True)
    standardize(logits).square().sum().backward()
    assert standardize(logits).abs().max() == 0
    assert logits.grad.isfinite().all()


def splitmix(state: int) -> int:
    """The next word after ``state``: Steele, Lea, Flood, OOPSLA 2014, in Python integers."""
    z = (state + 0x9E3779B97F4A7C15) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def in_integers(seed: int, stream: int, epoch: int, index: int, position: int) -> float:
    """One number of ``uniform``: every part of the key is so many steps of the generator, then its output function."""
    word = 0
    for steps, first in ((seed, True), (stream, False), (epoch, False), (index, False), (position + 1, False)):
        start = steps if first else word + steps * functional.GAMMA
        word = splitmix((start - functional.GAMMA) % WORD)
    return (word >> 40) / 2**24


def draw(count: int = 1, *, seed: int = 0, epoch: int = 1, samples: int = 2**16, stream: int = 0) -> Tensor:
    """Numbers of the first samples: (samples, count)."""
    return uniform(seed, torch.tensor(epoch), torch.arange(samples), count, stream=stream)


def test_the_hash_gives_the_published_words_of_splitmix64():
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix(1234567 + step * functional.GAMMA) for step in range(4)] == words


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 3])
def test_uniform_equals_python_integers(seed, stream):
    index = torch.tensor([0, 1, 2, 49_999, 1_281_166, 2**40 + 3])
    for epoch in (1, 2, 240):
        numbers = uniform(seed, torch.tensor(epoch), index, 5, stream=stream)
        expected = [[in_integers(seed, stream, epoch, i, position) for position in range(5)] for i in index.tolist()]
        assert numbers.tolist() == expected


def test_uniform_is_float32_from_0_to_below_1():
    numbers = draw(4)
    assert numbers.dtype == torch.float32
    assert numbers.shape == (2**16, 4)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    assert torch.equal(numbers * 2**24, (numbers * 2**24).round())


@pytest.mark.parametrize("seed", range(4))
def test_uniform_passes_a_chi_square_test(seed):
    """Over 256 bins, and over 16 x 16 bins of two neighbours: 255 degrees of freedom, deviation sqrt(510)."""
    numbers = draw(4, seed=seed)  # (2^16, 4)
    pairs = (numbers[:, :-1] * 16).floor() * 16 + (numbers[:, 1:] * 16).floor()
    below = (numbers[:-1] * 16).floor() * 16 + (numbers[1:] * 16).floor()
    for bins in (numbers * 256, pairs, below):
        counts = torch.bincount(bins.flatten().long(), minlength=256).double()
        expected = bins.numel() / 256
        statistic = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(statistic - 255) < 4 * math.sqrt(510)


def test_neighbouring_keys_give_independent_numbers():
    """Correlations of 2^16 pairs: zero within four standard errors."""
    numbers = draw(2, seed=2, epoch=3)
    others = {
        "position": numbers[:, 1],
        "index": numbers[:, 0].roll(1),
        "epoch": draw(seed=2, epoch=4)[:, 0],
        "seed": draw(seed=3, epoch=3)[:, 0],
        "stream": draw(seed=2, epoch=3, stream=1)[:, 0],
        "seed and epoch exchanged": draw(seed=3, epoch=2)[:, 0],
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([numbers[:, 0], other]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(2**16), name
        assert (numbers[:, 0] == other).sum() < 4, name


def test_a_sample_s_numbers_over_epochs_are_independent():
    over_epochs = torch.stack([draw(epoch=epoch, samples=64)[:, 0] for epoch in range(1, 513)])  # (512, 64)
    left, right = (torch.cat(list(parts)) for parts in zip(*pairwise(over_epochs), strict=True))
    assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 4 / math.sqrt(len(left))
    assert abs(over_epochs.mean(dim=0) - 0.5).max() < 4 * math.sqrt(1 / 12 / 512)


def test_a_sample_s_numbers_do_not_depend_on_its_batch():
    whole, order = draw(3, samples=40), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for part in order.split([8, 1, 31]):
        assert torch.equal(uniform(0, torch.tensor(1), part, 3), whole[part])
    assert torch.equal(draw(1, samples=40), whole[:, :1])


def test_normal_has_the_moments_and_the_tails_of_the_normal_distribution():
    """2^18 numbers: mean, variance and fourth moment within four standard errors, and as many beyond 2 as there are."""
    numbers = normal(3, torch.tensor(2), torch.arange(2**16), 4).double()
    assert numbers.shape == (2**16, 4)
    error = 4 / math.sqrt(numbers.numel())
    assert abs(numbers.mean()) < error
    assert abs(numbers.square().mean() - 1) < error * math.sqrt(2)
    assert abs(numbers.pow(4).mean() - 3) < error * math.sqrt(96)
    beyond = math.erfc(2 / math.sqrt(2))
    assert abs((numbers.abs() > 2).double().mean() - beyond) < error * math.sqrt(beyond * (1 - beyond))


def test_normal_is_the_inverse_of_the_distribution_at_uniform_s_numbers():
    """At the middle of each number's interval of 2^-24, so that the ends are finite and alike."""
    key = 0, torch.tensor(1), torch.arange(64)
    numbers = normal(*key, 3, stream=2).double()
    shares = 0.5 * (1 + torch.erf(numbers / math.sqrt(2)))
    torch.testing.assert_close(shares, uniform(*key, 3, stream=2).double() + 2**-25, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("number", "sign"), [(0, -1), (2**24 - 1, 1)])
def test_normal_is_finite_at_uniform_s_ends(monkeypatch, number, sign):
    end = torch.full((1, 1), number * 2.0**-24)
    monkeypatch.setattr(functional, "uniform", lambda *key, **stream: end)
    assert normal(0, torch.tensor(1), torch.arange(1), 1).item() == pytest.approx(sign * 5.4, abs=0.1)


def test_a_divergence_with_weights_is_the_mean_of_weighted_samples():
    student, teacher = (examples.logits(seed, 6, 5).log_softmax(dim=1) for seed in (0, 1))
    weights = torch.tensor([0.0, 1, 2, 0.5, 3, 1]).double()
    expected = sum(weights[i] * kl_divergence(teacher[i : i + 1], student[i : i + 1]) for i in range(6)) / 6
    torch.testing.assert_close(kl_divergence(teacher, student, weights=weights), expected)
    per_sample = kl_divergence_per_sample(teacher, student)
    torch.testing.assert_close(kl_divergence(teacher, student, weights=torch.ones(6)), per_sample.mean())


def test_uniform_draws_without_a_generator_or_a_read_on_the_host():
    epoch, index, state = torch.tensor(1), torch.arange(8), torch.get_rng_state()
    with NoHostReads():
        uniform(3, epoch, index, 4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_uniform_has_the_same_bits_on_every_device():
    for seed in (0, 2**64 - 1):
        on_host = uniform(seed, torch.tensor(7), torch.arange(10_000), 16)
        on_device = uniform(seed, torch.tensor(7, device="cuda"), torch.arange(10_000, device="cuda"), 16)
        assert torch.equal(on_device.cpu(), on_host)


def test_dropout_keeps_what_is_drawn_at_its_probability_or_above():
    key = 3, torch.tensor(2), torch.arange(50)
    draws, factors = uniform(*key, 6, stream=1), dropout_factors(*key, 6, probability=0.25, stream=1)
    assert factors.equal(torch.where(draws < 0.25, 0.0, 4 / 3))
