"""Random resized crops: the words, the boxes against a scalar loop from the description, and their distribution."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from mdistill.data.resized_crop import STRONG_STREAM, Crop, Ints, crop, draw, philox

FULL = 0xFFFFFFFF
KNOWN = [  # counter, key, words: the three answers that Random123 publishes for philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL, FULL, FULL, FULL), (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_words_are_those_of_philox(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert tuple(philox(np.array(counter, np.uint64), key).tolist()) == words


def plain_philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """In plain integers."""
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(second >> 32) ^ counter[1] ^ k0, second & FULL, (first >> 32) ^ counter[3] ^ k1, first & FULL]
        k0, k1 = (k0 + 0x9E3779B9) & FULL, (k1 + 0xBB67AE85) & FULL
    return counter


def crops(index: Ints, view: Ints, height: Ints, width: Ints) -> list[Crop]:
    """Of images of these sizes."""
    sizes = zip(height.tolist(), width.tolist(), strict=True)
    return [crop(words, *size) for words, size in zip(draw(index, view), sizes, strict=True)]


def plain(index: int, view: int, height: int, width: int, stream: int = 6) -> tuple[int, int, int, int, bool]:
    """Top, left, height, width and flip of one image, one attempt after the other."""

    def words(block: int) -> list[int]:
        return plain_philox([view % 2**32, view // 2**32, index, block], (stream, 1))

    flip = words(10)[0] >= 2**31
    for block in range(10):
        u = [(word + 0.5) / 2**32 for word in words(block)]
        area = height * width * (0.08 + 0.92 * u[0])
        ratio = round(math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[1]) * 2**20) / 2**20
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(u[2] * (height - h + 1)), math.floor(u[3] * (width - w + 1)), h, w, flip
    w, h = width, height
    if width / height < 3 / 4:
        h = min(height, round(width / (3 / 4)))
    elif width / height > 4 / 3:
        w = min(width, round(height * (4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w, flip


def test_boxes_are_those_of_the_plain_loop() -> None:
    """Of all shapes, thin ones among them, to which no attempt may fit."""
    generator = np.random.default_rng(0)
    index, view = generator.integers(0, 2**31, 2000), generator.integers(0, 2**63 - 1, 2000)
    height, width = generator.integers(1, 700, 2000), generator.integers(1, 700, 2000)
    height[:400], width[400:800] = 5, 3
    expected = [plain(*map(int, each)) for each in zip(index, view, height, width, strict=True)]
    assert crops(index, view, height, width) == expected


def test_a_strong_view_has_words_of_its_own() -> None:
    index, view = np.arange(20), np.arange(20) * 2**40 + 5
    drawn = [crop(words, 300, 400) for words in draw(index, view, STRONG_STREAM)]
    assert drawn == [plain(k, k * 2**40 + 5, 300, 400, stream=7) for k in range(20)]
    assert drawn != crops(index, view, np.full(20, 300), np.full(20, 400))


def test_a_box_depends_on_its_own_image_and_view_alone() -> None:
    index, view, size = np.arange(50), np.arange(50) * 12345, np.full(50, 300)
    alone = [crops(*(each[k : k + 1] for each in (index, view, size, size + 40))) for k in range(50)]
    assert crops(index, view, size, size + 40) == [each for (each,) in alone]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The statistic of Kolmogorov and Smirnov."""
    values = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(each), values, side="right") / len(each) for each in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(64, 64), (401, 468), (300, 90)])
def test_boxes_are_distributed_as_torchvision_s(height: int, width: int) -> None:
    count = 8000
    drawn = crops(np.arange(count), np.arange(count) * 7919, np.full(count, height), np.full(count, width))
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    columns = np.array(theirs).T
    critical = 1.95 * math.sqrt(2 / count)  # at a significance of 0.001
    for ours, published in zip(np.array(drawn).T[:4], columns, strict=True):
        assert distance(ours, published) < critical
    assert abs(np.mean([each.flip for each in drawn]) - 0.5) < 0.02
