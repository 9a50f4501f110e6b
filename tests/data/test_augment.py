"""Views: every one is the image that torchvision's transforms give, and uniform views are their distribution."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, Pad, RandomCrop, RandomHorizontalFlip, ToTensor
from torchvision.transforms import functional as F

from mdistill.data import augment
from mdistill.data.sampling import epoch_plan

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def torchvision_view(image: np.ndarray, dy: int, dx: int, mirrored: int, padding: int) -> torch.Tensor:
    """(S, S, 3) uint8 -> (3, S, S) float32 by torchvision's own transforms on a PIL image."""
    size = len(image)
    picture = F.crop(Pad(padding, fill=0)(Image.fromarray(image)), dy, dx, size, size)
    picture = F.hflip(picture) if mirrored else picture
    return Compose([ToTensor(), Normalize(MEAN, STD)])(picture)


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal counts."""
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_view_algebra_is_a_bijection_in_the_documented_order():
    assert augment.count(4, True) == 162
    assert augment.count(4, False) == 81
    assert augment.count(0, True) == 2
    assert augment.decode(0, padding=4, flip=True) == (0, 0, 0)
    assert augment.decode(1, padding=4, flip=True) == (0, 0, 1)  # flip changes fastest
    assert augment.decode(2, padding=4, flip=True) == (0, 1, 0)  # then dx
    assert augment.decode(18, padding=4, flip=True) == (1, 0, 0)  # then dy
    assert augment.decode(161, padding=4, flip=True) == (8, 8, 1)
    assert augment.decode(10, padding=4, flip=False) == (1, 1, 0)
    for padding, flip in [(0, False), (1, True), (4, True), (4, False)]:
        parts = [augment.decode(view, padding=padding, flip=flip) for view in range(augment.count(padding, flip))]
        assert len(set(parts)) == augment.count(padding, flip)
        assert [augment.encode(*part, padding=padding, flip=flip) for part in parts] == list(range(len(parts)))


@pytest.mark.parametrize(("size", "padding", "flip"), [(32, 4, True), (32, 4, False), (8, 2, True), (5, 7, True)])
def test_every_view_is_torchvisions_to_the_last_bit(size: int, padding: int, flip: bool):
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    stored = augment.store(images)
    view = torch.arange(augment.count(padding, flip))
    index = view % len(images)
    pixels = augment.crop_and_flip(stored, index, view, *augment.offset_tables(size, padding, flip))
    found = augment.Normalization(size, MEAN, STD)(pixels)
    for number in view.tolist():
        parts = augment.decode(number, padding=padding, flip=flip)
        expected = torchvision_view(images[number % len(images)], *parts, padding)
        assert torch.equal(found[number], expected), f"view {number}: {parts}"


def test_every_grey_level_is_normalised_to_the_last_bit():
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    found = augment.Normalization(16, MEAN, STD)(torch.from_numpy(levels)[None])
    assert torch.equal(found[0], torchvision_view(levels, 0, 0, 0, padding=0))


def test_the_identity_view_is_the_image():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for flip in (True, False):
        view = torch.full((2,), augment.identity(3, flip))
        pixels = augment.crop_and_flip(augment.store(images), torch.arange(2), view, *augment.offset_tables(8, 3, flip))
        assert np.array_equal(pixels.numpy(), images)


def test_images_are_channels_last_float32():
    found = augment.Normalization(8, MEAN, STD)(torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
    assert found.shape == (4, 3, 8, 8)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_view_outside_the_table_is_refused():
    stored = augment.store(np.zeros((2, 8, 8, 3), dtype=np.uint8))
    tables = augment.offset_tables(8, 2, True)
    with pytest.raises(IndexError):
        augment.crop_and_flip(stored, torch.tensor([0]), torch.tensor([augment.count(2, True)]), *tables)


def test_uniform_views_have_the_distribution_of_random_crop_and_random_flip():
    """Every draw of the random transforms is one of our views, all of them occur, and equally often.

    An image of distinct pixels tells each view apart. With 18 views and 3,600 draws, Pearson's statistic exceeds 40.8
    with probability 0.001 (17 degrees of freedom).
    """
    size, padding = 6, 1
    image = np.arange(1, 3 * size * size + 1, dtype=np.uint8).reshape(size, size, 3)
    view = torch.arange(augment.count(padding, True))
    tables = augment.offset_tables(size, padding, True)
    pixels = augment.crop_and_flip(augment.store(image[None]), torch.zeros_like(view), view, *tables)
    numbers = {pixels[number].numpy().tobytes(): number for number in view.tolist()}
    assert len(numbers) == len(view)
    transform = Compose([RandomCrop(size, padding=padding), RandomHorizontalFlip()])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        picture = Image.fromarray(image)
        drawn = [numbers[np.asarray(transform(picture)).tobytes()] for _ in range(3600)]
    assert chi_square(np.bincount(drawn, minlength=len(view))) < 40.8


def test_the_views_of_an_epoch_are_uniform():
    """161 degrees of freedom: exceeds 221 with probability 0.001. Place, mirroring and sample are independent too."""
    plan = epoch_plan(seed=0, epoch=1, num_samples=50_000, num_views=162)
    assert chi_square(np.bincount(plan.view, minlength=162)) < 221
    assert chi_square(np.bincount(plan.view % 2, minlength=2)) < 10.8
    by_sample = np.empty_like(plan.view)
    by_sample[plan.index] = plan.view
    previous = np.empty_like(plan.view)
    other = epoch_plan(seed=0, epoch=2, num_samples=50_000, num_views=162)
    previous[other.index] = other.view
    joint = np.bincount((by_sample % 9) * 9 + previous % 9, minlength=81)  # the same sample in two epochs
    assert chi_square(joint) < 124.9  # 80 degrees of freedom
