"""Mixed images: the plan against plain arithmetic, the pixels against a loop, and the batches of a feed."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from mdistill.data import InMemoryDataset
from mdistill.data.feed import Feed
from mdistill.data.mixing import ROWS, Mixing, labels, mix, plan, symmetric_beta, uniform
from mdistill.data.sampling import epoch_plan, random_words, strong_views

from ..host_reads import NoHostReads

N, SIZE, CLASSES = 40, 8, 5
MIXUP, CUTMIX = Mixing("mixup", 1.0), Mixing("cutmix", 1.0)
PICK = Mixing("cutmix_pick", 1.0, candidates=3)


@pytest.fixture
def data() -> InMemoryDataset:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8)
    split = pixels, np.arange(N) % CLASSES
    return InMemoryDataset(split, split, num_classes=CLASSES, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def planned(mixing: Mixing, epoch: int = 1, seed: int = 0, count: int = N) -> dict[str, np.ndarray]:
    """The plan's rows by name; those of further candidates are left out."""
    columns = dict(zip(ROWS, plan(mixing, seed, epoch, count, 162, 32), strict=False))
    return {**columns, "share": columns["share"].view(np.float64)}


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX])
def test_every_sample_is_a_partner_once_in_a_view_that_exists(mixing):
    found = planned(mixing, count=500)
    assert sorted(found["partner"]) == list(range(500))
    assert (found["partner"] != np.arange(500)).mean() > 0.95
    assert 0 <= found["view"].min() <= found["view"].max() < 162
    assert len(np.unique(found["view"])) > 140


def test_the_plan_follows_from_seed_and_epoch():
    plans = {(s, e): plan(PICK, s, e, N, 162, 32) for s in range(2) for e in range(2)}
    assert np.array_equal(plans[1, 1], plan(PICK, 1, 1, N, 162, 32))
    assert all(not np.array_equal(a, b) for a, b in pairwise(plans.values()))
    assert plans[0, 0].shape == (3 * len(ROWS), N)
    rows = plans[0, 0].reshape(3, len(ROWS), N)
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(plan(CUTMIX, 0, 1, N, 162, 32)[0], epoch_plan(0, 1, N, 162).index)


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
        (0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))),
    ],
)
def test_shares_are_drawn_from_the_beta_distribution(alpha, cdf):
    """Against its distribution function, where there is a formula; the largest gap of n draws is about 1 / sqrt(n)."""
    words = random_words(0, "mixing", 0, 40_000)
    draws = np.sort(symmetric_beta(alpha, uniform(words[:20_000]), uniform(words[20_000:])))
    assert abs(cdf(draws) - (np.arange(20_000) + 0.5) / 20_000).max() < 1.4 / np.sqrt(20_000)


def test_shares_of_a_tiny_alpha_are_0_or_1():
    share = symmetric_beta(1e-3, np.array([1e-300, 0.5, 1 - 1e-16]), np.array([0.1, 0.6, 0.9]))
    assert np.isfinite(share).all()
    assert share[:2] == pytest.approx([1.0, 0.0])


def test_boxes_are_those_of_the_paper():
    """Side floor(32 sqrt(1 - lambda)) about the drawn middle, cut off at the edges; the share is the area left."""
    words = random_words(3, "mixing", 2, 7 * N).reshape(7, N)
    share = symmetric_beta(1.0, uniform(words[2]), uniform(words[3]))
    found = planned(CUTMIX, epoch=2, seed=3)
    for k in range(N):
        half = int(32 * (1 - share[k]) ** 0.5) // 2
        row, column = int(words[4, k] % np.uint64(32)), int(words[5, k] % np.uint64(32))
        box = max(row - half, 0), min(row + half, 32), max(column - half, 0), min(column + half, 32)
        assert tuple(found[name][k] for name in ROWS[3:]) == box
        assert found["share"][k] == pytest.approx(1 - (box[1] - box[0]) * (box[3] - box[2]) / 1024)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_some_images_are_left_whole_where_the_probability_is_below_1(name):
    whole = planned(Mixing(name, 1.0, probability=0.25), count=2000)["share"] == 1.0
    assert 0.7 < whole.mean() < 0.8


def test_labels_by_hand():
    found = labels(torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0.75, 0.25]), 3)
    assert found.tolist() == [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX])
def test_pixels_and_labels_equal_a_loop(data, mixing):
    data = data.to("cpu")
    columns = torch.from_numpy(plan(mixing, 0, 1, N, data.num_views, SIZE))
    index, view = torch.arange(N), torch.arange(N) % 162
    own, other = data.train_batch(index, view), data.train_batch(columns[0], columns[1])
    batch = mix(mixing, own, other, columns, CLASSES)
    share = columns[2].numpy().view(np.float64)
    for k in range(N):
        top, bottom, left, right = columns[3:, k].tolist()
        for y in range(SIZE):
            for x in range(SIZE):
                a, b = own.image[k, :, y, x], other.image[k, :, y, x]
                inside = top <= y < bottom and left <= x < right
                expected = share[k] * a + (1 - share[k]) * b if mixing is MIXUP else (b if inside else a)
                torch.testing.assert_close(batch.image[k, :, y, x], expected.float())
        expected = torch.zeros(CLASSES)
        expected[own.target[k]] += share[k]
        expected[other.target[k]] += 1 - share[k]
        torch.testing.assert_close(batch.target[k], expected)
    assert torch.equal(batch.index, index)
    assert torch.equal(batch.partner, columns[0])
    assert batch.mix.tolist() == pytest.approx(share)


def feed_of(data: InMemoryDataset, *, strong: bool = False, mixing: Mixing | None = None) -> Feed:
    feed = Feed(data.to("cpu"), seed=4, strong=strong, mixing=mixing, device=torch.device("cpu"))
    feed.begin(torch.from_numpy(feed.plan(epoch=2)))
    return feed


@pytest.mark.parametrize(
    "options", [{}, {"strong": True}, {"mixing": MIXUP}, {"mixing": CUTMIX}, {"mixing": PICK}], ids=str
)
def test_an_image_does_not_depend_on_the_rest_of_its_batch(data, options):
    """Nor on where a batch begins: it is read one by one as in one piece. Nothing is read by the host."""
    feed, index, view, slots = feed_of(data, **options), torch.arange(N).flip(0), torch.arange(N), torch.arange(N)
    with NoHostReads():
        whole = feed.batch(index, view, slots)
    runs = len(whole.image) // N
    for k in range(0, N, 7):
        one = feed.batch(index[k : k + 1], view[k : k + 1], slots[k : k + 1])
        for run in range(runs):
            assert torch.equal(one.image[run], whole.image[run * N + k])
            assert torch.equal(one.target[run], whole.target[run * N + k])
    assert whole.kept == (N if runs > 1 else None)


def test_a_plain_feed_gives_the_data_set_s_batches(data):
    feed, index, view = feed_of(data), torch.arange(N), torch.arange(N) % 162
    found, expected = feed.batch(index, view, torch.arange(N)), data.train_batch(index, view)
    assert torch.equal(found.image, expected.image)
    assert replace(found, image=None, target=None, index=None, view=None) == replace(
        expected, image=None, target=None, index=None, view=None
    )


def test_a_strong_feed_adds_the_second_view(data):
    feed, index, view = feed_of(data, strong=True), torch.arange(N).flip(0), torch.arange(N) % 162
    batch = feed.batch(index[:9], view[:9], torch.arange(9))
    words = torch.from_numpy(strong_views(4, 2, N)[:9])
    assert torch.equal(batch.strong_view, words)
    assert torch.equal(batch.strong_image, data.strong_image(index[:9], words))
    assert torch.equal(batch.image, data.train_batch(index[:9], view[:9]).image)
    assert batch.strong_image.shape == batch.image.shape
    assert not torch.equal(batch.strong_image, batch.image)


def test_candidates_differ_in_their_partners_alone(data):
    feed, index, view = feed_of(data, mixing=PICK), torch.arange(N), torch.arange(N) % 162
    batch = feed.batch(index[:6], view[:6], torch.arange(6))
    assert batch.kept == 6
    assert torch.equal(batch.index, index[:6].repeat(3))
    assert torch.equal(batch.view, view[:6].repeat(3))
    assert not torch.equal(batch.partner[:6], batch.partner[6:12])
    assert batch.image.shape == (18, 3, SIZE, SIZE)
