"""Random resized crops as a pure function of (index, view): a box of random area and aspect ratio, and a flip.

The distribution is that of Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, section 6, as torchvision
draws it: an area uniform from 8 to 100 percent of the image's, a log-uniform ratio from 3/4 to 4/3, ten attempts to fit
the box into the image, then the central crop. Letters: B images, K attempts.

The words are Philox4x32-10's (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with the key
(stream, scheme) and the counter (view mod 2^32, view div 2^32, index, block), so that neither the order of the images
nor the number of workers, the step or the run enters.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

STREAM, SCHEME = 6, 1  # of these words; another way to crop gets another scheme
ATTEMPTS = 10
FLIP_BLOCK = 10  # blocks 0 to 9 are the attempts
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)

Ints = npt.NDArray[np.int64]
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Crops:
    """Where each image is cut out, each (B,), and whether it is mirrored left to right."""

    top: Ints
    left: Ints
    height: Ints
    width: Ints
    flip: npt.NDArray[np.bool_]


def philox(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
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


def draw(index: Ints, view: Ints, height: Ints, width: Ints) -> Crops:
    """The crop of view ``view[b]`` of image ``index[b]``, whose size is ``height[b]`` x ``width[b]``.

    Args:
        index: (B,), from 0 to 2**32 - 1.
        view: (B,), from 0 to 2**63 - 1.
        height: (B,), pixels, at least 1.
        width: (B,), the same.
    """
    blocks = np.arange(FLIP_BLOCK + 1, dtype=np.uint64)
    counter = np.empty((len(index), len(blocks), 4), np.uint64)
    counter[..., 0] = (view.astype(np.uint64) & _MASK)[:, None]
    counter[..., 1] = (view.astype(np.uint64) >> np.uint64(32))[:, None]
    counter[..., 2] = index.astype(np.uint64)[:, None]
    counter[..., 3] = blocks
    words = philox(counter, (STREAM, SCHEME))
    uniform = (words[:, :ATTEMPTS].astype(np.float64) + 0.5) / 2**32  # (B, K, 4)
    rows, columns = height.astype(np.float64)[:, None], width.astype(np.float64)[:, None]
    area = rows * columns * (AREA[0] + (AREA[1] - AREA[0]) * uniform[..., 0])
    logarithm = math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * uniform[..., 1]
    ratio = np.rint(np.exp(logarithm) * 2**20) / 2**20  # libraries disagree on the last bit of exp
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # (B, K), half to even
    fits = (w > 0) & (w <= columns) & (h > 0) & (h <= rows)
    chosen = fits.argmax(axis=1)[:, None]  # the first that fits

    def of_chosen(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.take_along_axis(values, chosen, axis=1)[:, 0]

    box_height, box_width = of_chosen(h).astype(np.int64), of_chosen(w).astype(np.int64)
    top = np.floor(of_chosen(uniform[..., 2]) * (height - box_height + 1)).astype(np.int64)
    left = np.floor(of_chosen(uniform[..., 3]) * (width - box_width + 1)).astype(np.int64)
    none = ~fits.any(axis=1)
    if none.any():
        central = _central(height[none], width[none])
        for values, central_values in zip((top, left, box_height, box_width), central, strict=True):
            values[none] = central_values
    flip = words[:, FLIP_BLOCK, 0] >= np.uint64(2**31)
    return Crops(top, left, box_height, box_width, flip)


def _central(height: Ints, width: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Top, left, height and width of the largest central box whose ratio is allowed."""
    ratio = width / height
    box_height = np.where(ratio < RATIO[0], np.minimum(height, np.rint(width / RATIO[0])), height).astype(np.int64)
    box_width = np.where(ratio > RATIO[1], np.minimum(width, np.rint(height * RATIO[1])), width).astype(np.int64)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
