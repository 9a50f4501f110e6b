"""The strong view of an image: two operations of Pillow's, drawn at random, and a cutout; on a whole batch at once.

Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023, train on it besides the crop and flip of ``augment.py``, on
top of which it is applied. It is RandAugment (Cubuk et al., arXiv:1909.13719) with the pool of FixMatch (Sohn et al.,
arXiv:2001.07685) and Cutout (DeVries, Taylor, arXiv:1708.04552).

A strong view is one number from 0 to 2**63 - 1. Everything follows from it by integer arithmetic on the device. It is
a number of mixed radix, whose parts are, from the one that changes fastest:

======================= ============================================================================================
part                    values
======================= ============================================================================================
view                    num_views: the crop and flip is ``word % num_views``
operation 1, 2          14 each: where they stand in ``OPERATIONS``, the first to be applied first
level 1, 2              1024 each: the magnitude is the middle of one of 1024 equal parts of its range
side, x                 256 each: of the cutout, the same with 256 parts
y                       256, from the r = ceil(2**63 / product of the others) values that are left: ``value * 256 // r``
======================= ============================================================================================

y is spread over all that is left instead of being one more digit: 2**63 is no multiple of the product, and the upper
rows would come more often (by 6 % with 162 views). But for the levels, uniform words are the published distribution.

Every operation gives Pillow's pixels to the last bit, on every device. Integers and tables do most of it. Float
arithmetic is Python's own where its rounding shows (autocontrast); a blend is never nearer to a whole number than
1/20480, and its rounding errors stay below half of that. All this is for images of less than 1024 pixels a side: above,
a translation can fall exactly between two pixels, where Pillow's float arithmetic decides.

Letters: B batch, S size (height and width), P = S * S pixels of an image, K = 14 * 1024 settings of an operation.
"""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 1024
"""Magnitudes of an operation."""
CUTOUT_LEVELS = 256
"""Sides, columns and rows of a cutout."""
CUTOUT_COLOUR = (125, 123, 114)


class Operation(NamedTuple):
    """An operation and the range of its magnitude (0 to 0 where it has none)."""

    name: str
    low: float = 0.0
    high: float = 0.0


OPERATIONS = (
    Operation("autocontrast"),
    Operation("brightness", 0.05, 0.95),
    Operation("color", 0.05, 0.95),
    Operation("contrast", 0.05, 0.95),
    Operation("equalize"),
    Operation("identity"),
    Operation("posterize", 4, 8),  # its whole part is the number of bits
    Operation("rotate", -30, 30),  # degrees
    Operation("sharpness", 0.05, 0.95),
    Operation("shear_x", -0.3, 0.3),
    Operation("shear_y", -0.3, 0.3),
    Operation("solarize", 0, 256),
    Operation("translate_x", -0.3, 0.3),  # of the width, not rounded to whole pixels
    Operation("translate_y", -0.3, 0.3),
)
"""The pool, in the order of the numbers in ``StrongView.operation``."""

NUMBER = {operation.name: number for number, operation in enumerate(OPERATIONS)}
"""Where an operation stands in the pool."""

_WORDS = 2**63
_BEFORE_Y = (len(OPERATIONS) * LEVELS) ** 2 * CUTOUT_LEVELS**2  # product of the radices, without num_views and y
MOST_PIXELS = 1023
"""Of a side: up to here all pixels are Pillow's."""
MOST_VIEWS = _WORDS // (_BEFORE_Y * CUTOUT_LEVELS)
"""With more views than these (2674) not every y would be reached."""


@dataclass(frozen=True)
class StrongView:
    """What a word stands for. All int64, on the word's device."""

    view: Tensor  # (B,), the crop and flip: 0 to num_views - 1
    operation: Tensor  # (2, B), the first and the second: places in ``OPERATIONS``
    level: Tensor  # (2, B), of their magnitudes: 0 to LEVELS - 1
    side: Tensor  # (B,), of the cutout: 0 to CUTOUT_LEVELS - 1 stand for 0 to half of the width
    x: Tensor  # (B,), its centre: 0 to CUTOUT_LEVELS - 1 stand for the left edge to the right
    y: Tensor  # (B,), from the top to the bottom


def decode(word: Tensor, num_views: int) -> StrongView:
    """The parts of the strong views ``word``, (B,) int64 from 0 to 2**63 - 1.

    Raises:
        ValueError: ``num_views`` is not from 1 to ``MOST_VIEWS``.
    """
    if not 0 < num_views <= MOST_VIEWS:
        raise ValueError(f"num_views must be from 1 to {MOST_VIEWS} for strong views, found {num_views}")
    parts = []
    for radix in (num_views, len(OPERATIONS), len(OPERATIONS), LEVELS, LEVELS, CUTOUT_LEVELS, CUTOUT_LEVELS):
        parts.append(word % radix)
        word = word // radix
    view, operation_1, operation_2, level_1, level_2, side, x = parts
    return StrongView(
        view=view,
        operation=torch.stack([operation_1, operation_2]),
        level=torch.stack([level_1, level_2]),
        side=side,
        x=x,
        y=word * CUTOUT_LEVELS // remainders(num_views),
    )


def remainders(num_views: int) -> int:
    """How many values are left for y when all other parts are taken from a word: ceil(2**63 / their product)."""
    return -(-_WORDS // (_BEFORE_Y * num_views))


def magnitude(operation: int, level: int) -> float:
    """The middle of part ``level`` of the range of an operation, by its place in ``OPERATIONS``."""
    _, low, high = OPERATIONS[operation]
    return low + (high - low) * (2 * level + 1) / (2 * LEVELS)


class Strengthen:
    """Applies strong views to images that are cropped and flipped already. Static shapes, no read by the host.

    An image undergoes one operation in each round. Yet all images pass through the same three steps, with parameters
    that leave a pixel as it is where a step is not the image's: a nearest-neighbour affine map (the geometric
    operations), a look-up table for each channel (autocontrast, equalize, posterize, solarize), and a blend with a
    duller image (brightness, color, contrast, sharpness).

    Args:
        size: S, pixels.
    """

    def __init__(self, size: int) -> None:
        settings = [
            (operation.name, magnitude(number, level))
            for number, operation in enumerate(OPERATIONS)
            for level in range(LEVELS)
        ]
        self.size = size
        self._integers = torch.tensor([_integers(*setting, size) for setting in settings], dtype=torch.int32)  # (K, 8)
        self._weights = torch.tensor([_weights(*setting) for setting in settings])  # (K, 6) float32
        self._place = torch.arange(size, dtype=torch.int32)
        inner = ((self._place > 0) & (self._place < size - 1)).float()
        self._inner = (inner[:, None] * inner).flatten()  # (P,), 0 on the border and else 1
        self._values = torch.arange(256, dtype=torch.int32)
        self._white = torch.tensor(255.0, dtype=torch.float64)
        self._colour = torch.tensor(CUTOUT_COLOUR, dtype=torch.float32)[:, None]  # (3, 1)

    def to(self, device: torch.device | str) -> "Strengthen":
        """The same with its constants on ``device``."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        return moved

    def __call__(self, pixels: Tensor, parts: StrongView) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, S, S, 3) uint8; ``parts.view`` is not looked at."""
        # Pixels are whole numbers in float32, one channel after the other. ``lerp`` by 0 or 1 chooses one of two
        # exactly, and is faster than ``where``.
        image = pixels.flatten(1, 2).transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        setting = parts.operation * LEVELS + parts.level  # (2, B)
        *matrix, threshold, shift = self._integers[setting][..., None].unbind(2)  # (2, B, 1) each
        source, table = self._sources(*matrix), self._tables(threshold, shift)
        weight = self._weights[setting][..., None, None]  # (2, B, 6, 1, 1)
        for turn in range(2):
            factor, autocontrast, equalize, contrast, color, sharpness = weight[turn].unbind(1)  # (B, 1, 1) each
            image = self._move(image, source[turn])
            image = self._look_up(image, table[turn], autocontrast, equalize)
            image = self._blend(image, factor, contrast, color, sharpness)
        across, down = self._covered(parts.side, parts.x), self._covered(parts.side, parts.y)
        covered = (down[:, :, None] * across[:, None, :]).flatten(1)[:, None]  # (B, 1, P)
        image = image.lerp_(self._colour, covered).int().to(torch.uint8)  # in two steps, which is faster
        return torch.stack(image.unbind(1), dim=2).view(pixels.shape)

    def _sources(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tensor:
        """Where each pixel comes from in an image with a black rim of one pixel: (2, B, 1, P) int64."""
        column = ((b * self._place + c)[..., None] + (a * self._place)[:, :, None]) >> 16  # (2, B, S, S)
        row = ((e * self._place + f)[..., None] + (d * self._place)[:, :, None]) >> 16
        column.add_(1).clamp_(0, self.size + 1)
        row.add_(1).clamp_(0, self.size + 1)
        return row.mul_(self.size + 2).add_(column).flatten(2)[:, :, None].long()

    def _tables(self, threshold: Tensor, shift: Tensor) -> Tensor:
        """The look-up tables of solarize and posterize, which no pixel changes: (2, B, 1, 256) float64."""
        table = torch.where(self._values < threshold, self._values, 255 - self._values)
        return (table >> shift << shift)[:, :, None].double()

    def _move(self, image: Tensor, source: Tensor) -> Tensor:
        """The pixels, (B, 3, P), from where ``_sources`` says."""
        rimmed = F.pad(image.view(*image.shape[:2], self.size, self.size), (1, 1, 1, 1)).flatten(2)
        return rimmed.gather(2, source.expand_as(image))

    def _look_up(self, image: Tensor, table: Tensor, autocontrast: Tensor, equalize: Tensor) -> Tensor:
        """The pixels, (B, 3, P), through ``table`` and then through that of an operation whose weight is 1."""
        lowest, highest = image.amin(2, keepdim=True), image.amax(2, keepdim=True)  # (B, 3, 1)

        # autocontrast: the least value becomes 0, the greatest 255. In float64, rounded after each step as in Python.
        # The dividend is a tensor because 255 / tensor would be 255 times the rounded reciprocal.
        stretched = autocontrast * (highest > lowest)
        scale = self._white / torch.lerp(self._white.float(), highest - lowest, stretched).double()
        offset = -(lowest * stretched).double() * scale
        table = (table * scale).add_(offset).clamp_(0, 255).floor_().float()  # (B, 3, 256)

        # equalize: the values that occur spread over 0 to 255, each according to how many pixels are below it.
        index = image.int().long()  # in two steps, which is faster
        count = _histograms(index)
        below = count.cumsum(2, dtype=torch.int32).sub_(count)
        step = below.gather(2, highest.long()) // 255  # 0 where most pixels have the greatest value: left as it is
        even = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
        table.lerp_(even.float(), equalize * (step > 0))
        return table.gather(2, index)

    def _blend(self, image: Tensor, factor: Tensor, contrast: Tensor, color: Tensor, sharpness: Tensor) -> Tensor:
        """Factor 1 keeps the pixels, (B, 3, P); 0 would give a uniform grey, a grey or a smooth image, or black."""
        red, green, blue = image.unbind(1)
        grey = red * 19595 + 32768  # here and below whole and less than 2**24, so exact
        grey = grey.add_(green, alpha=38470).add_(blue, alpha=7471).div_(65536).floor_()  # (B, P)
        pixels = grey.shape[1]
        mean = (2 * grey.sum(1, dtype=torch.float64).long() + pixels) // (2 * pixels)  # (B,), rounded
        uniform = contrast * mean[:, None, None]
        dull = torch.lerp(uniform, grey[:, None], color)  # (B, 1, P)
        dull = self._smoothed(image, dull, sharpness)
        return dull.lerp_(image, factor).floor_()

    def _smoothed(self, image: Tensor, other: Tensor, sharpness: Tensor) -> Tensor:
        """The mean of 3 by 3 pixels, the middle one five times, and the border as it is; ``other`` if the weight is 0.

        Shapes: (B, 3, P), (B, 1, P), (B, 1, 1) -> (B, 3, P).
        """
        result = torch.lerp(other.expand_as(image), image, sharpness)
        size = self.size
        inner = slice(size + 1, -size - 1)  # with the border on the left and right, where sums run on to the next row
        row = image[..., :-2] + image[..., 1:-1] + image[..., 2:]
        total = row[..., : -2 * size] + row[..., size:-size] + row[..., 2 * size :]
        mean = total.add_(image[..., inner], alpha=4).div_(13).add_(0.5).floor_()
        result[..., inner].lerp_(mean, sharpness * self._inner[inner])
        return result

    def _covered(self, side: Tensor, centre: Tensor) -> Tensor:
        """The columns (or rows) of the cutout, (B, S) float32: 1 from the first to the last, else 0."""
        # The middles are (2k + 1) / 512 of S for the centre and (2k + 1) / 1024 of S for the side.
        first = ((4 * (2 * centre + 1) - (2 * side + 1)) * self.size // 2048).clamp(min=0)
        last = first + (2 * side + 1) * self.size // 1024
        return ((self._place >= first[:, None]) & (self._place <= last[:, None])).float()


def _histograms(values: Tensor) -> Tensor:
    """How often each of 256 values occurs: (B, 3, P) int64 -> (B, 3, 256) int32."""
    count = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=values.device)
    ones = torch.ones_like(values, dtype=torch.int32)
    if not values.is_cuda:
        return count.scatter_add_(2, values, ones)
    # In one dimension: in more, deterministic kernels of torch 2.9 copy from the host, which no capture allows.
    places = values + torch.arange(0, count.numel(), 256, device=values.device).view(*values.shape[:2], 1)
    count.view(-1).scatter_add_(0, places.flatten(), ones.flatten())
    return count


def _weights(name: str, value: float) -> tuple[float, ...]:
    """Factor of the blend, then 1 for the operation itself: autocontrast, equalize, contrast, color, sharpness."""
    factor = value if name in ("brightness", "contrast", "color", "sharpness") else 1.0
    return factor, *(float(name == other) for other in ("autocontrast", "equalize", "contrast", "color", "sharpness"))


def _integers(name: str, value: float, size: int) -> tuple[int, ...]:
    """The affine map (a, b, c, d, e, f) in 16.16 fixed point as Pillow rounds it, then a threshold and a shift.

    Pixel (x, y) comes from pixel (a * x + b * y + c, d * x + e * y + f) >> 16. Values from the threshold on are
    inverted (solarize), and ``shift`` bits are cleared (posterize).
    """
    matrix = {
        "shear_x": (1.0, value, 0.0, 0.0, 1.0, 0.0),
        "shear_y": (1.0, 0.0, 0.0, value, 1.0, 0.0),
        "translate_x": (1.0, 0.0, value * size, 0.0, 1.0, 0.0),
        "translate_y": (1.0, 0.0, 0.0, 0.0, 1.0, value * size),
    }.get(name, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    a, b, c, d, e, f = _rotation(value, size / 2) if name == "rotate" else matrix
    centred = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)  # (x, y) is the middle of a pixel
    threshold = math.ceil(value) if name == "solarize" else 256
    shift = 8 - int(value) if name == "posterize" else 0
    return *(math.floor(entry * 65536 + 0.5) for entry in centred), threshold, shift


def _rotation(degrees: float, centre: float) -> tuple[float, ...]:
    """Counter-clockwise about the centre, from a pixel to where it comes from."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    shift_x = cos * -centre + sin * -centre + centre
    shift_y = -sin * -centre + cos * -centre + centre
    return cos, sin, shift_x, -sin, cos, shift_y
