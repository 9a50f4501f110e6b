"""A data set that needs no download: small pictures drawn from a seed, with classes that resemble one another.

Every image shows one patterned figure, turned, scaled, shifted and perhaps mirrored, on a cluttered background, often
with a bar across it. A super-class is a grammar: how many lobes the figure has, which pattern fills it, the colours of
both, the pattern's spacing and angle. Its fine classes are variations of it: each of seven properties takes as many
steps as there are fine classes, in a random order, so that any two fine classes differ in all seven. An image strays
from its class by less than half a step. So the wrong classes are not equally wrong, which is what a teacher has to
tell; no label is noisy; and neither crops nor mirror images change one.

The same seed gives the same pixels everywhere: random numbers are raw Philox words, which NumPy keeps the same in every
release, and pixels follow from them by arithmetic that IEEE 754 fixes (no sines, no sums whose order is open).

Letters: N images, S super-classes, C classes, P properties. Lengths are in halves of the image's width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mdistill.data.dataset import DATASETS, InMemoryDataset, Split
from mdistill.errors import UserError
from mdistill.registry import PositiveInt

SIZE = 32  # pixels, height and width
CHUNK = 256  # images drawn at a time: about what a processor's cache holds
DRAWS = 64  # uniform numbers set aside for an image; fewer are used
LOBES = (2, 3, 4, 5, 6)
JITTER = 0.45  # how far an image strays from its class, as a fraction of the step between fine classes; below 0.5
STREAMS = ("super", "fine", "train_order", "train_draws", "train_noise", "test_order", "test_draws", "test_noise")

PROPERTIES = {
    "hue": (0.0, 1.0, 0.0225, False),  # of the figure, in turns of the colour circle
    "pattern_hue": (0.0, 1.0, 0.08, False),
    "frequency": (1.4, 3.0, 0.22, True),  # waves of the pattern per unit of length
    "depth": (0.29, 0.55, 0.35, True),  # of the lobes
    "tilt": (-0.5, 0.5, 0.5, False),  # tangent of half the angle between pattern and figure
    "stretch": (1.0, 1.0, 0.15, False),  # of the figure, across and not along
    "mark": (0.35, 0.35, 0.15, False),  # distance of the white mark from the middle
}
"""Each property's range over super-classes, low and high, how far the outermost fine class is from its super-class's,
and whether that is relative to it."""

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]


@DATASETS.register("synthetic")
def synthetic(
    root: Path,
    download: bool,
    *,
    superclasses: PositiveInt = 20,
    fine_classes: PositiveInt = 5,
    train_images: PositiveInt = 5000,
    test_images: PositiveInt = 2000,
    seed: int = 0,
) -> InMemoryDataset:
    """The data set; a view is a crop after 4 pixels of zero padding, perhaps mirrored.

    Args:
        root: not used; nothing is read.
        download: not used; nothing is fetched.
        superclasses: number of super-classes.
        fine_classes: number of classes in each super-class; class c belongs to super-class c // fine_classes.
        train_images: number of training images, as even over the classes as can be; at least one each.
        test_images: the same for the test images.
        seed: of the classes and of all images, below 2**64; the seed of a run is another.

    Raises:
        UserError: fewer than two classes, fewer images than classes, or a seed that is too large.
    """
    train, test = generate(
        superclasses=superclasses,
        fine_classes=fine_classes,
        train_images=train_images,
        test_images=test_images,
        seed=seed,
    )
    mean, std = _channel_statistics(train[0])
    return InMemoryDataset(
        train, test, num_classes=superclasses * fine_classes, mean=mean, std=std, padding=4, flip=True
    )


def generate(
    *, superclasses: int, fine_classes: int, train_images: int, test_images: int, seed: int
) -> tuple[Split, Split]:
    """The training and the test split; the arguments are those of ``synthetic``.

    Raises:
        UserError: fewer than two classes, fewer images than classes, or a seed that is too large.
    """
    num_classes = superclasses * fine_classes
    if num_classes < 2:
        raise UserError(f"data.superclasses times data.fine_classes must be at least 2, found {num_classes}")
    for key, count in (("train_images", train_images), ("test_images", test_images)):
        if count < num_classes:
            raise UserError(f"data.{key} must be at least the number of classes, {num_classes}, found {count}")
    if not 0 <= seed < 2**64:
        raise UserError(f"data.seed must be from 0 to 2**64 - 1, found {seed}")
    classes = _design_classes(superclasses, fine_classes, seed)
    return _split(classes, train_images, seed, "train"), _split(classes, test_images, seed, "test")


@dataclass(frozen=True)
class _Classes:
    """What makes each class what it is."""

    lobes: Integers  # (C,), of the outline
    pattern: Integers  # (C,), an index into PATTERNS
    centre: Floats  # (C, P) in [0, 1): each property of the super-class
    variation: Floats  # (C, P) in [-1, 1]: what the fine class adds
    step: float  # between the variations of two fine classes


def _design_classes(superclasses: int, fine_classes: int, seed: int) -> _Classes:
    """Super-classes are spread evenly over each property, fine classes over its variation, each in a random order."""
    rank = _ranks(_philox(seed, "super"), len(PROPERTIES) + 2, superclasses).T  # (S, P + 2)
    order = _ranks(_philox(seed, "fine"), superclasses, len(PROPERTIES), fine_classes)
    order = order.transpose(0, 2, 1).reshape(-1, len(PROPERTIES))  # (C, P)
    step = 2 / max(fine_classes - 1, 1)
    of_super = np.repeat(rank, fine_classes, axis=0)  # (C, P + 2)
    return _Classes(
        lobes=np.array(LOBES)[of_super[:, 0] % len(LOBES)],
        pattern=of_super[:, 1] % len(PATTERNS),
        centre=of_super[:, 2:] / superclasses,
        variation=(order - (fine_classes - 1) / 2) * step,
        step=step,
    )


def _split(classes: _Classes, count: int, seed: int, split: str) -> Split:
    """``count`` images in a random order of classes, and their labels."""
    labels = _ranks(_philox(seed, f"{split}_order"), count) % len(classes.lobes)
    draws = _uniform(_philox(seed, f"{split}_draws"), count, DRAWS)
    noise = _philox(seed, f"{split}_noise")
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        picture = _picture(classes, labels[part], _Draws(draws[part]))
        picture = picture * np.float32(255) + np.float32(30) * _noise(noise, *picture.shape)
        images[part] = np.clip(picture, 0, 255).astype(np.uint8)
    return images, labels


def _picture(classes: _Classes, labels: Integers, draw: "_Draws") -> Floats:
    """Noiseless images (N, 32, 32, 3), about in 0 to 1, of the classes ``labels`` (N,)."""
    axis = (np.arange(SIZE, dtype=np.float32) - np.float32((SIZE - 1) / 2)) / np.float32(SIZE / 2)
    x, y = axis[None, None, :], axis[None, :, None]
    image = _background(x, y, draw)
    _add_figure(image, x, y, classes, labels, draw)
    _add_bar(image, x, y, draw)
    contrast, brightness = draw(0.7, 1.2), draw(0.38, 0.62)
    centred = image - np.float32(0.5)
    shaded: Floats = centred * contrast[..., None] + brightness[..., None]
    return shaded


def _background(x: Floats, y: Floats, draw: "_Draws") -> Floats:
    """A gradient between random colours, with three ellipses on it; nothing in it depends on the class."""
    corner, right, below = (draw.colour(0.2, 0.8) for _ in range(3))
    across, down = ((axis + 1) / 2 for axis in (x[..., None], y[..., None]))
    image: Floats = corner + (right - corner) * across + (below - corner) * down
    for _ in range(3):
        dx, dy = x - draw(-1, 1), y - draw(-1, 1)
        dx, dy = dx / draw(0.12, 0.47), dy / draw(0.12, 0.47)
        _paint(image, np.clip((1 - (dx * dx + dy * dy)) * 3, 0, 1), draw.colour(0, 1))
    return image


def _add_figure(image: Floats, x: Floats, y: Floats, classes: _Classes, labels: Integers, draw: "_Draws") -> None:
    """Paint the figure that each image's class asks for, in a random place, size, turn and light."""
    properties = _properties(classes, labels, draw)
    size, mirror, stretch = draw(0.55, 0.8), draw.sign(), properties["stretch"]
    u, v = _rotate(x - draw(-0.3, 0.3), y - draw(-0.3, 0.3), draw(-0.4, 0.4))
    u, v = u * (mirror * stretch / size), v / (stretch * size)  # the figure's own axes, its radius about 1
    radius = np.sqrt(u * u + v * v + np.float32(1e-6))

    outline = 1 + properties["depth"] * _cosine(u / radius, classes.lobes[labels])
    body = np.clip((outline - radius) * (11 * size) + np.float32(0.5), 0, 1)
    a, b = _rotate(u, v, properties["tilt"])
    waves = _pattern(a * properties["frequency"], b * properties["frequency"], draw(0, 0.3), classes.pattern[labels])
    from_mark = u - properties["mark"], v + np.float32(0.3) * properties["mark"]
    mark = np.clip((np.float32(0.05) - from_mark[0] ** 2 - from_mark[1] ** 2) * 25, 0, 1)

    figure = np.empty_like(image)
    figure[...] = _rainbow(properties["hue"]) * draw(0.55, 1.0)[..., None]
    _paint(
        figure,
        np.clip(waves * 2 + np.float32(0.5), 0, 1),
        _rainbow(properties["pattern_hue"]) * draw(0.45, 0.95)[..., None],
    )
    _paint(figure, mark, np.float32(0.95))
    _paint(image, body, figure)


def _properties(classes: _Classes, labels: Integers, draw: "_Draws") -> dict[str, Floats]:
    """Each image's own properties, (N, 1, 1) each: those of its class, and a little more or less."""
    stray = JITTER * classes.step
    properties = {}
    for column, (name, (low, high, spread, relative)) in enumerate(PROPERTIES.items()):
        centre = low + (high - low) * classes.centre[labels, column]
        variation = spread * (classes.variation[labels, column] + draw.next(-stray, stray))
        properties[name] = _column(centre * (1 + variation) if relative else centre + variation)
    return properties


def _add_bar(image: Floats, x: Floats, y: Floats, draw: "_Draws") -> None:
    """Paint a bar of random colour and slope across two images in five."""
    across, _ = _rotate(x, y, draw(-1, 1))
    width = np.where(draw(0, 1) < 0.4, draw(0.08, 0.16), np.float32(-1))
    _paint(image, np.clip((width - np.abs(across - draw(-0.85, 0.85))) * 16 + np.float32(0.5), 0, 1), draw.colour(0, 1))


def _paint(image: Floats, cover: Floats, colour: Floats | np.float32) -> None:
    """Lay ``colour`` over ``image`` (N, 32, 32, 3) in place, where and as far as ``cover`` (N, 32, 32) in 0..1 says."""
    image += cover[..., None] * (colour - image)


def _rotate(x: Floats, y: Floats, half_tangent: Floats) -> tuple[Floats, Floats]:
    """Turn coordinates by the angle with that tangent of its half: a rotation by arithmetic alone."""
    square = half_tangent * half_tangent
    cosine, sine = (1 - square) / (1 + square), 2 * half_tangent / (1 + square)
    return cosine * x + sine * y, cosine * y - sine * x


def _cosine(cosine: Floats, multiple: Integers) -> Floats:
    """cos(k t) from cos t (N, 32, 32), with each image's own k = ``multiple`` (N,), by Chebyshev's recurrence."""
    multiples = np.zeros_like(cosine)
    before, now = np.ones_like(cosine), cosine
    for k in range(1, max(LOBES) + 1):
        rows = np.flatnonzero(multiple == k)
        multiples[rows] = now[rows]
        before, now = now, 2 * cosine * now - before
    return multiples


def _wave(phase: Floats) -> Floats:
    """A triangle wave of period 1 between -1 and 1."""
    wave: Floats = np.abs((phase - np.floor(phase)) * 4 - 2) - 1
    return wave


def _stripes(a: Floats, b: Floats, phase: Floats) -> Floats:
    return _wave(a + phase)


def _checks(a: Floats, b: Floats, phase: Floats) -> Floats:
    checks: Floats = _wave(a + phase) * _wave(b * np.float32(0.8)) * np.float32(1.6)
    return checks


def _rings(a: Floats, b: Floats, phase: Floats) -> Floats:
    return _wave(np.sqrt(a * a + b * b) + a / 8 + phase)


def _lattice(a: Floats, b: Floats, phase: Floats) -> Floats:
    lattice: Floats = np.maximum(_wave(a + phase), _wave(b)) - np.float32(0.2)
    return lattice


PATTERNS: tuple[Callable[[Floats, Floats, Floats], Floats], ...] = (_stripes, _checks, _rings, _lattice)


def _pattern(a: Floats, b: Floats, phase: Floats, which: Integers) -> Floats:
    """Each image's pattern, about -1 to 1, over coordinates in waves: all (N, 32, 32), ``phase`` (N, 1, 1)."""
    patterns = np.empty_like(a)
    for kind, pattern in enumerate(PATTERNS):
        rows = np.flatnonzero(which == kind)
        patterns[rows] = pattern(a[rows], b[rows], phase[rows])
    return patterns


def _rainbow(hue: Floats) -> Floats:
    """Saturated colours (N, 1, 1, 3) of hues (N, 1, 1) in turns."""
    turns = hue[..., None] + np.array([0, 2 / 3, 1 / 3], dtype=np.float32)
    colour: Floats = np.clip(np.abs((turns - np.floor(turns)) * 6 - 3) - 1, 0, 1) * np.float32(0.85) + np.float32(0.15)
    return colour


class _Draws:
    """The random numbers of some images, handed out a column (one number for each image) at a time."""

    def __init__(self, numbers: Floats) -> None:
        self._columns = iter(numbers.T)  # uniform in [0, 1)

    def next(self, low: float, high: float) -> Floats:
        """Uniform between the two, (N,)."""
        numbers: Floats = low + (high - low) * next(self._columns)
        return numbers

    def __call__(self, low: float, high: float) -> Floats:
        """Uniform between the two, (N, 1, 1)."""
        return _column(self.next(low, high))

    def sign(self) -> Floats:
        """-1 or 1, (N, 1, 1)."""
        return _column(np.where(self.next(0, 1) < 0.5, -1.0, 1.0))

    def colour(self, low: float, high: float) -> Floats:
        """Three channels between the two, (N, 1, 1, 3)."""
        return np.stack([self(low, high) for _ in range(3)], axis=-1)


def _column(numbers: Floats) -> Floats:
    return numbers.astype(np.float32)[:, None, None]


def _philox(seed: int, stream: str) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, 2**63 + STREAMS.index(stream)], dtype=np.uint64))


def _uniform(philox: np.random.Philox, *shape: int) -> Floats:
    """Multiples of 2**-53 in [0, 1)."""
    words: npt.NDArray[np.uint64] = philox.random_raw(int(np.prod(shape)))
    uniform: Floats = (words >> np.uint64(11)).reshape(shape) * 2.0**-53
    return uniform


def _ranks(philox: np.random.Philox, *shape: int) -> Integers:
    """Random permutations of the last axis."""
    return np.argsort(_uniform(philox, *shape), axis=-1, kind="stable").astype(np.int64)


def _noise(philox: np.random.Philox, *shape: int) -> Floats:
    """The sum of two uniform bytes, scaled to -1..1."""
    words: npt.NDArray[np.uint64] = philox.random_raw(int(np.prod(shape)) // 4)
    pairs = words.astype("<u8").view("<u2").reshape(shape)
    noise: Floats = ((pairs >> 8) + (pairs & 255)).astype(np.float32) / np.float32(255) - 1
    return noise


def _channel_statistics(images: npt.NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the three channels, on the scale 0 to 1; summed in integers, so exact."""
    pixels = images.reshape(-1, 3)
    counts = [np.bincount(pixels[:, channel], minlength=256).tolist() for channel in range(3)]
    mean = [sum(value * count for value, count in enumerate(row)) / len(pixels) / 255 for row in counts]
    square = [sum(value**2 * count for value, count in enumerate(row)) / len(pixels) / 255**2 for row in counts]
    return mean, [(squared - average**2) ** 0.5 for squared, average in zip(square, mean, strict=True)]
