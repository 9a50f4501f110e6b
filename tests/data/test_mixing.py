"""Mixed images: the plan against plain arithmetic, the pixels against a loop, and which images a teacher picks."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from mdistill.data import InMemoryDataset
from mdistill.data.loader import BatchLoader
from mdistill.data.mixing import COLUMNS, Mixing, concatenate, labels, least_certain, mix, plan, symmetric_beta, uniform
from mdistill.data.sampling import epoch_plan, random_words

from ..host_reads import NoHostReads

N, SIZE, CLASSES = 40, 8, 5
MIXUP, CUTMIX = Mixing("mixup", 1.0), Mixing("cutmix", 1.0)
PICK = Mixing("cutmix_pick", 1.0, candidates=3)
SHARED = Mixing("cutmix_pick", 1.0, candidates=2, mode="beside", share="batch", partner="batch")
NEXT = Mixing("mixup", 1.0, share="batch", partner="next", larger_share=True)


@pytest.fixture
def data() -> InMemoryDataset:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8)
    split = pixels, np.arange(N) % CLASSES
    return InMemoryDataset(split, split, num_classes=CLASSES, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def plan_of(mixing: Mixing, seed: int, epoch: int, *, count: int = N, size: int = 32, batch: int = N) -> np.ndarray:
    order = epoch_plan(seed, epoch, count, 162)
    return plan(mixing, seed, epoch, order, num_views=162, image_size=size, batch_size=batch)


def planned(mixing: Mixing, epoch: int = 1, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """The plan's columns by name; those of further candidates are left out."""
    columns = dict(zip(COLUMNS, plan_of(mixing, seed, epoch, **sizes), strict=False))
    return {**columns, "lam": columns["lam"].view(np.float64)}


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX])
def test_every_sample_is_a_partner_once_in_a_view_that_exists(mixing):
    found = planned(mixing, count=500)
    assert sorted(found["partner"]) == list(range(500))
    assert (found["partner"] != np.arange(500)).mean() > 0.95
    assert 0 <= found["view"].min() <= found["view"].max() < 162
    assert len(np.unique(found["view"])) > 140


def test_the_plan_follows_from_seed_and_epoch():
    plans = {(s, e): plan_of(PICK, s, e) for s in range(2) for e in range(2)}
    assert np.array_equal(plans[1, 1], plan_of(PICK, 1, 1))
    assert all(not np.array_equal(a, b) for a, b in pairwise(plans.values()))
    assert plans[0, 0].shape == (3 * len(COLUMNS), N)
    candidates = plans[0, 0].reshape(3, len(COLUMNS), N)
    assert not np.array_equal(candidates[0], candidates[1])
    assert not np.array_equal(plan_of(CUTMIX, 0, 1)[0], epoch_plan(0, 1, N, 162).index)


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
        (0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))),
    ],
)
def test_lam_is_drawn_from_the_beta_distribution(alpha, cdf):
    """Against its distribution function, where there is a formula; the largest gap of n draws is about 1 / sqrt(n)."""
    words = random_words(0, "mixing", 0, 40_000)
    draws = np.sort(symmetric_beta(alpha, uniform(words[:20_000]), uniform(words[20_000:])))
    assert abs(cdf(draws) - (np.arange(20_000) + 0.5) / 20_000).max() < 1.4 / np.sqrt(20_000)


def test_lam_of_a_tiny_alpha_is_0_or_1():
    lam = symmetric_beta(1e-3, np.array([1e-300, 0.5, 1 - 1e-16]), np.array([0.1, 0.6, 0.9]))
    assert np.isfinite(lam).all()
    assert lam[:2] == pytest.approx([1.0, 0.0])


def test_boxes_are_those_of_the_paper():
    """Side floor(32 sqrt(1 - lam)) about the drawn middle, cut off at the edges; lam is then the area left."""
    words = random_words(3, "mixing", 2, 7 * N).reshape(7, N)
    lam = symmetric_beta(1.0, uniform(words[2]), uniform(words[3]))
    found = planned(CUTMIX, epoch=2, seed=3)
    for k in range(N):
        half = int(32 * (1 - lam[k]) ** 0.5) // 2
        row, column = int(words[4, k] % np.uint64(32)), int(words[5, k] % np.uint64(32))
        box = max(row - half, 0), min(row + half, 32), max(column - half, 0), min(column + half, 32)
        assert tuple(found[name][k] for name in COLUMNS[3:]) == box
        assert found["lam"][k] == pytest.approx(1 - (box[1] - box[0]) * (box[3] - box[2]) / 1024)


@pytest.mark.parametrize("partner", ["batch", "next"])
@pytest.mark.parametrize(("count", "batch"), [(40, 16), (41, 8), (7, 7), (5, 2)])
def test_partners_may_be_those_of_the_batch(partner, count, batch):
    """In the view that the batch shows: each of them once, none itself but where it is alone."""
    order = epoch_plan(0, 1, count, 162)
    found = planned(Mixing("cutmix", 1.0, partner=partner), count=count, batch=batch)
    for first in range(0, count, batch):
        part = slice(first, first + batch)
        own = list(zip(order.index[part], order.view[part], strict=True))
        others = list(zip(found["partner"][part], found["view"][part], strict=True))
        assert sorted(others) == sorted(own)
        assert len(own) == 1 or all(one != other for one, other in zip(own, others, strict=True))
        if partner == "next":
            assert others == [*own[1:], own[0]]


def test_partners_of_a_batch_are_drawn_anew_for_each_batch_candidate_and_epoch():
    plans = [plan_of(SHARED, 0, epoch, batch=8).reshape(2, len(COLUMNS), N) for epoch in (1, 2)]
    for each in plans:
        assert not np.array_equal(each[0, 0], each[1, 0])
    position = {index: place for place, index in enumerate(epoch_plan(0, 1, N, 162).index.tolist())}
    steps = [[position[index] % 8 for index in plans[0][0, 0, first : first + 8]] for first in range(0, N, 8)]
    assert len(set(map(tuple, steps))) == 5


@pytest.mark.parametrize("mixing", [SHARED, NEXT], ids=str)
def test_a_batch_may_have_one_share_and_one_box(mixing):
    columns = plan_of(mixing, 0, 1, batch=16)
    for row in range(len(columns)):
        if row % len(COLUMNS) < 2:  # partner and view
            continue
        assert [len(set(columns[row, first : first + 16])) for first in (0, 16, 32)] == [1, 1, 1]
    shares = columns[2].view(np.float64)[::16]
    assert len(set(shares)) == 3
    assert np.array_equal(columns[2, ::16], plan_of(mixing, 0, 1, batch=16)[2, ::16])


def test_the_larger_share_is_an_image_s_own():
    lam, larger = (planned(Mixing("mixup", 1.0, larger_share=large))["lam"] for large in (False, True))
    assert np.array_equal(larger, np.maximum(lam, 1 - lam))
    assert (lam < 0.5).any()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_some_images_are_left_whole_where_the_probability_is_below_1(name):
    whole = planned(Mixing(name, 1.0, probability=0.25), count=2000)["lam"] == 1.0
    assert 0.7 < whole.mean() < 0.8


def test_labels_by_hand():
    found = labels(torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0.75, 0.25]), 3)
    assert found.tolist() == [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX])
def test_pixels_and_labels_equal_a_loop(data, mixing):
    data = data.to("cpu")
    columns = torch.from_numpy(plan_of(mixing, 0, 1, size=SIZE))
    index, view = torch.arange(N), torch.arange(N) % 162
    own, other = data.train_batch(index, view), data.train_batch(columns[0], columns[1])
    batch = mix(mixing, own, other, columns, CLASSES)
    lam = columns[2].numpy().view(np.float64)
    for k in range(N):
        top, bottom, left, right = columns[3:, k].tolist()
        for y in range(SIZE):
            for x in range(SIZE):
                a, b = own.image[k, :, y, x], other.image[k, :, y, x]
                inside = top <= y < bottom and left <= x < right
                expected = lam[k] * a + (1 - lam[k]) * b if mixing is MIXUP else (b if inside else a)
                torch.testing.assert_close(batch.image[k, :, y, x], expected.float())
        expected = torch.zeros(CLASSES)
        expected[own.target[k]] += lam[k]
        expected[other.target[k]] += 1 - lam[k]
        torch.testing.assert_close(batch.target[k], expected)
    assert torch.equal(batch.index, index)
    assert torch.equal(batch.partner, columns[0])
    assert batch.lam.tolist() == pytest.approx(lam)


def epoch_of(data: InMemoryDataset, batch_size: int, mixing: Mixing) -> dict[str, torch.Tensor]:
    """What an epoch shows, (candidates, N, ...)."""
    source = BatchLoader(data.to("cpu"), seed=4, batch_size=batch_size, device=torch.device("cpu"), mixing=mixing)
    source.begin(2, 0)
    parts = []
    for step in range(source.steps):
        size = source.fetch(step)
        with NoHostReads():
            parts.append(source.batch(size))
    return {
        name: torch.cat([getattr(part, name).unflatten(0, (mixing.candidates, -1)) for part in parts], dim=1)
        for name in ("image", "target", "index", "view", "partner", "lam")
    }


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX, PICK], ids=str)
def test_an_image_does_not_depend_on_the_rest_of_its_batch(data, mixing):
    """Nor on where a batch begins: an epoch shows the same in batches of any size. Nothing is read by the host."""
    whole, parts = epoch_of(data, N, mixing), epoch_of(data, 7, mixing)
    assert len(whole["image"]) == mixing.candidates
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_candidates_differ_in_their_partners_alone(data):
    shown = epoch_of(data, 6, PICK)
    for name in ("index", "view"):
        assert torch.equal(shown[name], shown[name][:1].expand(3, N))
    assert all(not torch.equal(a, b) for a, b in pairwise(shown["partner"]))
    assert all(not torch.equal(a, b) for a, b in pairwise(shown["image"]))


def test_beside_plain_images_mixed_ones_have_no_label_of_their_own(data):
    """The plain ones are those of a loader that mixes nothing, the mixed ones those that would take their place."""
    beside, replaced = (replace(CUTMIX, mode=mode) for mode in ("beside", "replace"))
    parts = []
    for mixing in (beside, replaced, None):
        source = BatchLoader(data.to("cpu"), seed=4, batch_size=8, device=torch.device("cpu"), mixing=mixing)
        source.begin(1, 0)
        parts.append(source.batch(source.fetch(0)))
    found, mixed, plain = parts
    for name in ("image", "target", "index", "view"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    for name in ("image", "index", "view", "partner", "lam"):
        assert torch.equal(getattr(found.mixed, name), getattr(mixed, name)), name
    assert torch.equal(found.mixed.target, plain.target)
    assert found.partner is found.keep is None


def test_the_least_certain_are_picked():
    """Of three pairs of candidates, certain in the order 0, 4, 2, 5, 3, 1."""
    logits = torch.eye(CLASSES)[torch.arange(6) % CLASSES] * torch.tensor([6.0, 1, 4, 2, 5, 3])[:, None]
    with NoHostReads():
        rows = least_certain(logits, 3)
    assert torch.equal(rows, torch.tensor([1, 3, 5]))


def test_picked_images_bring_all_that_is_known_of_them(data):
    data = data.to("cpu")
    columns = torch.from_numpy(plan_of(CUTMIX, 0, 1, count=6, size=SIZE))
    own, other = (data.train_batch(index, torch.zeros(6, dtype=torch.int64)) for index in (torch.arange(6), columns[0]))
    mixed = mix(CUTMIX, own, other, columns, CLASSES)
    halves = [mixed.select(torch.arange(start, start + 3), teacher_logits=None) for start in (0, 3)]
    batch = concatenate(halves, keep=3, pick="student")
    assert (batch.keep, batch.pick) == (3, "student")
    chosen, logits = torch.tensor([1, 3, 5]), torch.rand(3, CLASSES)
    picked = batch.select(chosen, teacher_logits=logits)
    for name in ("image", "target", "index", "view", "partner", "lam"):
        assert torch.equal(getattr(picked, name), getattr(mixed, name)[chosen]), name
    assert picked.teacher_logits is logits
    assert picked.keep is None
