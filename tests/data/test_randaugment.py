"""Strong views: every one is the image that Pillow gives, and uniform words are uniform over all that is drawn."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from mdistill.data import randaugment
from mdistill.data.sampling import random_words

from ..host_reads import NoHostReads

pytestmark = pytest.mark.slow

NAMES = [operation.name for operation in randaugment.OPERATIONS]
LEVELS = [
    0,
    1,
    255,
    256,
    400,
    511,
    512,
    513,
    767,
    768,
    900,
    1022,
    1023,
]  # both ends and both sides of each whole number
IDENTITY = 5

strengthener = cache(randaugment.Strengthen)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small here: more threads would only wait for each other, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apply_pillow(picture: Image.Image, name: str, value: float) -> Image.Image:
    """One operation, written out for one picture."""
    size = picture.size
    affine = {
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, value * size[0], 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, value * size[1]),
    }
    if name in affine:
        return picture.transform(size, Image.Transform.AFFINE, affine[name])
    if name in ("brightness", "color", "contrast", "sharpness"):
        return getattr(ImageEnhance, name.capitalize())(picture).enhance(value)
    return {
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "identity": lambda: picture,
        "posterize": lambda: ImageOps.posterize(picture, int(value)),
        "rotate": lambda: picture.rotate(value),
        "solarize": lambda: ImageOps.solarize(picture, value),
    }[name]()


def cut_out(picture: Image.Image, side: int, x: int, y: int) -> Image.Image:
    """The cutout of the given levels, in float arithmetic as published."""
    width, height = picture.size
    length = (side + 0.5) / 256 * 0.5 * width
    left = int(max(0, (x + 0.5) / 256 * width - length / 2))
    top = int(max(0, (y + 0.5) / 256 * height - length / 2))
    corners = (left, top, min(width, left + length), min(height, top + length))
    picture = picture.copy()
    ImageDraw.Draw(picture).rectangle(corners, (125, 123, 114))
    return picture


def expected(image: np.ndarray, operations: list[int], levels: list[int], cutout: list[int]) -> np.ndarray:
    picture = Image.fromarray(image)
    for operation, level in zip(operations, levels, strict=True):
        _, low, high = randaugment.OPERATIONS[operation]
        picture = apply_pillow(picture, NAMES[operation], low + (high - low) * (level + 0.5) / 1024)
    return np.asarray(cut_out(picture, *cutout))


def assert_equals_pillow(images: np.ndarray, parts: randaugment.StrongView):
    """Images (B, S, S, 3): all of them at once against one after the other."""
    found = strengthener(images.shape[1])(torch.from_numpy(images), parts)
    assert found.dtype == torch.uint8
    assert found.shape == images.shape
    assert found.is_contiguous()
    operation, level = parts.operation.T.tolist(), parts.level.T.tolist()
    cutout = torch.stack([parts.side, parts.x, parts.y], dim=1).tolist()
    for number, image in enumerate(images):
        drawn = operation[number], level[number], cutout[number]
        assert np.array_equal(found[number].numpy(), expected(image, *drawn)), f"image {number}: {drawn}"


def random_parts(operation: torch.Tensor, level: torch.Tensor) -> randaugment.StrongView:
    """Both (2, B); the cutout at random."""
    cutout = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, operation.shape[1])))
    return randaugment.StrongView(torch.zeros_like(cutout[0]), operation, level, *cutout)


def parts_of(name: str, levels: list[int]) -> randaugment.StrongView:
    """One operation at these levels, by turns in the first round and in the second."""
    level = torch.tensor(levels)
    first = torch.arange(len(levels)) % 2 == 0
    operation = torch.where(torch.stack([first, ~first]), NAMES.index(name), IDENTITY)
    return random_parts(operation, torch.stack([level, level]))


def noise(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def clouds(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Smooth images of few and unevenly used values, as photographs have."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 12 / size, (count, size, size, 3))
    values = rng.integers(20, 236, (count, 1, 1, 3)) + steps.cumsum(1).cumsum(2) * rng.uniform(0.1, 3, (count, 1, 1, 3))
    return values.clip(0, 255).astype(np.uint8)


def encode(num_views: int, view: int, ops: list[int], levels: list[int], side: int, x: int, y: int) -> int:
    """The least word of these parts."""
    left = -(-(2**63) // (num_views * 14 * 14 * 1024 * 1024 * 256 * 256))
    remainder = -(-y * left // 256)
    word = remainder
    for part, radix in [
        (x, 256),
        (side, 256),
        *((level, 1024) for level in levels[::-1]),
        *((op, 14) for op in ops[::-1]),
    ]:
        word = word * radix + part
    return word * num_views + view


def uniform_words(count: int) -> torch.Tensor:
    """(count,) int64 from 0 to 2**63 - 1."""
    return torch.from_numpy((random_words(0, "strong_view", 1, count) >> np.uint64(1)).astype(np.int64))


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal counts."""
    mean = counts.sum() / len(counts)
    return float(((counts - mean) ** 2 / mean).sum())


def test_the_pool_is_the_published_one():
    assert [tuple(operation) for operation in randaugment.OPERATIONS] == [
        ("autocontrast", 0, 0),
        ("brightness", 0.05, 0.95),
        ("color", 0.05, 0.95),
        ("contrast", 0.05, 0.95),
        ("equalize", 0, 0),
        ("identity", 0, 0),
        ("posterize", 4, 8),
        ("rotate", -30, 30),
        ("sharpness", 0.05, 0.95),
        ("shear_x", -0.3, 0.3),
        ("shear_y", -0.3, 0.3),
        ("solarize", 0, 256),
        ("translate_x", -0.3, 0.3),
        ("translate_y", -0.3, 0.3),
    ]
    assert randaugment.NUMBER["identity"] == IDENTITY


@pytest.mark.parametrize("size", [32, 8])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_pillows_to_the_last_bit(name: str, size: int):
    for kind in (noise, clouds):
        assert_equals_pillow(kind(2 * len(LEVELS), size), parts_of(name, sorted(LEVELS * 2)))


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.slow
def test_a_geometric_operation_is_pillows_at_every_level(name: str):
    size = 32
    image = np.arange(1, 3 * size * size + 1).reshape(1, size, size, 3).astype(np.uint8).repeat(1024, axis=0)
    assert_equals_pillow(image, parts_of(name, list(range(1024))))


@pytest.mark.parametrize("name", ["brightness", "color", "contrast", "sharpness", "solarize", "posterize"])
def test_a_magnitude_is_pillows_at_every_level(name: str):
    assert_equals_pillow(noise(1024, 4), parts_of(name, list(range(1024))))


@pytest.mark.parametrize("name", NAMES)
def test_degenerate_images_are_pillows(name: str):
    """One value, one channel, two values far apart and close, a single other pixel."""
    size = 32
    images = []
    for value in (0, 1, 127, 254, 255):
        images.append(np.full((size, size, 3), value))
        for channel in range(3):
            images.append(np.full((size, size, 3), value) * (np.arange(3) == channel))
            images.append(np.where(np.arange(3) == channel, noise(1, size)[0], value))
    for low, high in [(0, 255), (0, 1), (254, 255), (100, 103), (3, 250)]:
        for bright in (1, 200, size * size - 256, size * size - 254, size * size - 1):
            flat = np.where(np.arange(size * size) < bright, high, low)
            images.append(np.repeat(flat, 3).reshape(size, size, 3))
    pixels = np.stack(images).astype(np.uint8)
    levels = [LEVELS[number % len(LEVELS)] for number in range(len(pixels))]
    assert_equals_pillow(pixels, parts_of(name, levels))
    assert_equals_pillow(pixels[1:], parts_of(name, levels[1:]))  # the rounds exchanged


def test_autocontrast_of_every_span_is_pillows():
    """The float arithmetic of Python now and then gives one less than the exact quotient; so must ours."""
    pairs = [(low, low + span) for span in range(1, 256) for low in {0, (255 - span) // 3, 255 - span}]
    values = np.arange(256).reshape(16, 16, 1).repeat(3, axis=2)
    images = np.stack([values.clip(low, high) for low, high in pairs]).astype(np.uint8)
    operation = torch.tensor([[NAMES.index("autocontrast")], [IDENTITY]]).expand(2, len(images))
    assert_equals_pillow(images, random_parts(operation, torch.zeros_like(operation)))
    low, high = np.array(pairs).T[..., None]
    exact = (np.arange(256).clip(low, high) - low) * 255 // (high - low)
    rounded = np.stack([np.asarray(ImageOps.autocontrast(Image.fromarray(image)))[..., 0] for image in images])
    assert (exact != rounded.reshape(len(images), 256)).any()


def test_equalize_is_pillows_where_values_overflow():
    """With 765 to 1019 pixels below the greatest value the step is 3, and the quotient may exceed 255."""
    size = 32
    images = []
    for greatest in (1, 4, 5, 100, 259, 260, 600, 769, 770):
        flat = np.random.default_rng(greatest).integers(0, 200, size * size)
        flat[:greatest] = 201
        images.append(np.stack([flat, flat // 20, np.sort(flat)], axis=1).reshape(size, size, 3))
    pixels = np.stack(images).astype(np.uint8)
    assert_equals_pillow(pixels, parts_of("equalize", [0] * len(pixels)))
    assert_equals_pillow(pixels[1:], parts_of("equalize", [0] * len(pixels[1:])))  # the rounds exchanged


@pytest.mark.parametrize(("size", "count"), [(32, 600), (8, 200), (24, 100), (17, 100), (3, 50), (2, 50), (1, 50)])
def test_words_are_pillows_two_operations_and_cutout(size: int, count: int):
    word = uniform_words(count)
    images = np.concatenate([noise(count - count // 2, size), clouds(count // 2, size)])
    assert_equals_pillow(images, randaugment.decode(word, 162))


def test_a_cutout_of_every_side_and_place_is_pillows():
    side, place = torch.arange(256), torch.arange(256)
    other = (place * 37 + 11) % 256
    identity = torch.full((2, 512), IDENTITY)
    parts = randaugment.StrongView(
        torch.zeros(512, dtype=torch.int64),
        identity,
        identity,
        torch.cat([side, torch.full_like(side, 255)]),
        torch.cat([other, place]),
        torch.cat([other.flip(0), place.flip(0)]),
    )
    for size in (32, 8):
        assert_equals_pillow(np.zeros((512, size, size, 3), dtype=np.uint8), parts)


@pytest.mark.parametrize("num_views", [1, 2, 81, 162])
def test_decode_inverts_what_was_written_by_hand(num_views: int):
    cases = [
        (0, [0, 0], [0, 0], 0, 0, 0),
        (num_views - 1, [13, 13], [1023, 1023], 255, 255, 255),
        (num_views // 2, [7, 2], [1, 1000], 3, 200, 77),
        (0, [0, 13], [1023, 0], 255, 0, 128),
    ]
    parts = randaugment.decode(torch.tensor([encode(num_views, *case) for case in cases]), num_views)
    for number, (view, operations, levels, side, x, y) in enumerate(cases):
        assert parts.view[number] == view
        assert parts.operation[:, number].tolist() == operations
        assert parts.level[:, number].tolist() == levels
        assert [parts.side[number], parts.x[number], parts.y[number]] == [side, x, y]


def test_the_parts_stand_in_the_documented_order():
    """The view changes fastest, then the operations, the levels, the side, x and y."""
    place = 1
    for name, turn, radix in [
        ("view", None, 162),
        ("operation", 0, 14),
        ("operation", 1, 14),
        ("level", 0, 1024),
        ("level", 1, 1024),
        ("side", None, 256),
        ("x", None, 256),
    ]:
        parts = randaugment.decode(torch.tensor([0, place, (radix - 1) * place, radix * place]), 162)
        part = getattr(parts, name) if turn is None else getattr(parts, name)[turn]
        assert part.tolist() == [0, 1, radix - 1, 0]
        place *= radix
    left = randaugment.remainders(162)
    assert left == -(-(2**63) // place)
    word = torch.tensor([0, (left - 1) * place, (left // 2 + 1) * place, 2**63 - 1])
    assert randaugment.decode(word, 162).y.tolist() == [0, 255, 128, 255]


def test_every_row_is_reached_with_as_many_views_as_are_allowed():
    assert randaugment.decode(torch.tensor([2**63 - 1]), randaugment.MOST_VIEWS).y == 255
    assert randaugment.remainders(randaugment.MOST_VIEWS) == 257
    assert randaugment.remainders(randaugment.MOST_VIEWS + 1) == 256  # the last of them would hardly ever come


def test_the_view_is_the_word_modulo_the_number_of_views():
    word = uniform_words(1000)
    for num_views in (1, 81, 162):
        assert torch.equal(randaugment.decode(word, num_views).view, word % num_views)


@pytest.mark.parametrize("num_views", [0, -1, randaugment.MOST_VIEWS + 1])
def test_too_many_or_no_views_are_refused(num_views: int):
    with pytest.raises(ValueError, match=rf"from 1 to {randaugment.MOST_VIEWS} .*found {num_views}"):
        randaugment.decode(torch.zeros(1, dtype=torch.int64), num_views)


@pytest.mark.parametrize("num_views", [1, 162])
def test_all_that_is_drawn_is_uniform(num_views: int):
    """Pearson's statistic exceeds these bounds with probability 0.001: 13, 195, 255 and 1023 degrees of freedom."""
    parts = randaugment.decode(uniform_words(200_000), num_views)
    first, second = parts.operation.numpy()
    assert chi_square(np.bincount(first, minlength=14)) < 34.5
    assert chi_square(np.bincount(second, minlength=14)) < 34.5
    assert chi_square(np.bincount(first * 14 + second, minlength=196)) < 261.7  # with replacement, and independent
    for level in parts.level.numpy():
        assert chi_square(np.bincount(level, minlength=1024)) < 1168.5
    for place in (parts.side, parts.x):
        assert chi_square(np.bincount(place, minlength=256)) < 330.5
    left = randaugment.remainders(num_views)
    share = np.bincount(np.arange(left) * 256 // left, minlength=256)
    assert share.max() - share.min() <= 1
    drawn, mean = np.bincount(parts.y, minlength=256), 200_000 * share / left
    assert ((drawn - mean) ** 2 / mean).sum() < 330.5
    assert abs(drawn[:128].sum() - 100_000) < 740  # neither half is favoured: 3.3 standard deviations


def test_magnitudes_are_the_middles_of_equal_parts_of_the_range():
    for number, (_, low, high) in enumerate(randaugment.OPERATIONS):
        values = [randaugment.magnitude(number, level) for level in range(randaugment.LEVELS)]
        edges = np.linspace(low, high, randaugment.LEVELS + 1)
        assert np.allclose(values, (edges[1:] + edges[:-1]) / 2, rtol=0, atol=1e-12)


def test_the_image_of_a_pair_does_not_depend_on_the_rest_of_the_batch():
    images, word = torch.from_numpy(clouds(64, 16)), uniform_words(64)
    strengthen = strengthener(16)
    together = strengthen(images, randaugment.decode(word, 162))
    assert torch.equal(strengthen(images, randaugment.decode(word, 162)), together)
    order = torch.arange(63, -1, -1)
    assert torch.equal(strengthen(images[order], randaugment.decode(word[order], 162)), together[order])
    for number in range(64):
        one = slice(number, number + 1)
        assert torch.equal(strengthen(images[one], randaugment.decode(word[one], 162)), together[one])


def test_pixels_are_read_and_not_written_whatever_their_strides():
    images, parts = torch.from_numpy(noise(8, 16)), randaugment.decode(uniform_words(8), 162)
    strengthen = strengthener(16)
    found = strengthen(images, parts)
    assert torch.equal(images, torch.from_numpy(noise(8, 16)))
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(strengthen(strided, parts), found)


def test_no_global_generator_is_drawn_from():
    before = torch.get_rng_state()
    strengthener(8)(torch.from_numpy(noise(4, 8)), randaugment.decode(uniform_words(4), 162))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_host_reads_nothing():
    images, word, strengthen = torch.from_numpy(noise(16, 32)), uniform_words(16), strengthener(32)
    with NoHostReads():
        strengthen(images, randaugment.decode(word, 162))


@pytest.mark.gpu
def test_cuda_gives_the_same_pixels_eagerly_and_captured():
    images, word = torch.from_numpy(clouds(512, 32)), uniform_words(1024)
    on_cpu, on_cuda = randaugment.Strengthen(32), randaugment.Strengthen(32).to("cuda")
    found = on_cpu(images, randaugment.decode(word[:512], 162))
    other = on_cpu(images, randaugment.decode(word[512:], 162))
    pixels, static = images.cuda(), word[:512].cuda()
    assert torch.equal(on_cuda(pixels, randaugment.decode(static, 162)).cpu(), found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = on_cuda(pixels, randaugment.decode(static, 162))
    static.copy_(word[512:])
    graph.replay()
    assert torch.equal(result.cpu(), other)
