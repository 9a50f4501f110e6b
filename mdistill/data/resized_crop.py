"""Random resized crops as a pure function of (index, view): a box of random area and aspect ratio, and a flip.

The distribution is that of Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, section 6, as torchvision
draws it: an area uniform from 8 to 100 percent of the image's, a log-uniform ratio from 3/4 to 4/3, ten attempts to fit
the box into the image, then the central crop. Letters: B images.

The words are Philox4x32-10's (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with the key
(stream, scheme) and the counter (view mod 2^32, view div 2^32, index, block), so that neither the order of the images
nor the number of workers, the step or the run enters.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

STREAM, STRONG_STREAM = 6, 7  # of the words of a view and of a strong view
SCHEME = 1  # another way to crop gets another one
ATTEMPTS = 10
FLIP_BLOCK = 10  # blocks 0 to 9 are the attempts
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
_LOGARITHMS = math.log(RATIO[0]), math.log(RATIO[1])
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)


class Crop(NamedTuple):
    """Where an image is cut out, in pixels, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10: four 32-bit words (..., 4) for each counter of four 32-bit words (..., 4)."""
    c0, c1, c2, c3 = (counter[..., word] & _MASK for word in range(4))
    keys = [np.uint64(word) for word in key]
    for _ in range(10):
        first, second = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ keys[0],
            second & _MASK,
            (first >> np.uint64(32)) ^ c3 ^ keys[1],
            first & _MASK,
        )
        keys = [(word + np.uint64(weyl)) & _MASK for word, weyl in zip(keys, _WEYL, strict=True)]
    return np.stack([c0, c1, c2, c3], axis=-1)


def draw(index: Ints, view: Ints, stream: int = STREAM) -> Words:
    """The words that decide the crop of view ``view[b]`` of image ``index[b]``: (B, FLIP_BLOCK + 1, 4), 32 bits each.

    Args:
        index: (B,), from 0 to 2**32 - 1.
        view: (B,), from 0 to 2**63 - 1.
        stream: which crop of the image it is.
    """
    counter = np.empty((len(index), FLIP_BLOCK + 1, 4), np.uint64)
    counter[..., 0] = (view.astype(np.uint64) & _MASK)[:, None]
    counter[..., 1] = (view.astype(np.uint64) >> np.uint64(32))[:, None]
    counter[..., 2] = index.astype(np.uint64)[:, None]
    counter[..., 3] = np.arange(FLIP_BLOCK + 1, dtype=np.uint64)
    return philox(counter, (stream, SCHEME))


def crop(words: npt.NDArray[Any], height: int, width: int) -> Crop:
    """The crop that ``words`` (FLIP_BLOCK + 1, 4) decide for an image of ``height`` x ``width`` pixels."""
    flip = int(words[FLIP_BLOCK, 0]) >= 2**31
    for attempt in range(ATTEMPTS):
        u1, u2, u3, u4 = ((word + 0.5) / 2**32 for word in words[attempt].tolist())
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * u1)
        logarithm = _LOGARITHMS[0] + (_LOGARITHMS[1] - _LOGARITHMS[0]) * u2
        ratio = round(math.exp(logarithm) * 2**20) / 2**20  # libraries disagree on the last bit of exp
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))  # half to even
        if 0 < w <= width and 0 < h <= height:
            return Crop(math.floor(u3 * (height - h + 1)), math.floor(u4 * (width - w + 1)), h, w, flip)
    w, h = width, height  # the largest central box whose ratio is allowed
    if width / height < RATIO[0]:
        h = min(height, round(width / RATIO[0]))
    elif width / height > RATIO[1]:
        w = min(width, round(height * RATIO[1]))
    return Crop((height - h) // 2, (width - w) // 2, h, w, flip)
