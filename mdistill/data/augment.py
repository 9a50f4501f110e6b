"""The views of an image: zero-pad by p, crop back to its size, perhaps mirror. All of it is index arithmetic.

A view is one number: ``view = (dy * (2p + 1) + dx) * 2 + flip``, where (dy, dx), each from 0 to 2p, is the corner of
the crop in the padded image and flip (0 or 1) mirrors the crop left to right. So flip changes fastest, then dx, then
dy; padding 4 with mirroring gives 9 * 9 * 2 = 162 views. Without mirroring, ``view = dy * (2p + 1) + dx``.

Uniform views are the distribution of random-crop-with-padding followed by random mirroring with probability 1/2.

Nothing is padded when an image is viewed: images are stored with one zero row and one zero column after the last, and
the tables send every pixel of the padding there. Letters: N images, B batch, S size (height and width), V views,
P = 2p + 1 places.
"""

import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def count(padding: int, flip: bool) -> int:
    """V, the number of views: (2p + 1)^2, twice that with mirroring."""
    return (2 * padding + 1) ** 2 * (2 if flip else 1)


def encode(dy: int, dx: int, mirrored: int = 0, *, padding: int, flip: bool) -> int:
    """The view that crops at (dy, dx), each 0 to 2p, and mirrors if ``mirrored`` (0 or 1; always 0 without flip)."""
    place = dy * (2 * padding + 1) + dx
    return place * 2 + mirrored if flip else place


def decode(view: int, *, padding: int, flip: bool) -> tuple[int, int, int]:
    """(dy, dx, mirrored) of a view: the inverse of ``encode``."""
    place, mirrored = divmod(view, 2) if flip else (view, 0)
    dy, dx = divmod(place, 2 * padding + 1)
    return dy, dx, mirrored


def identity(padding: int, flip: bool) -> int:
    """The view that leaves an image as it is."""
    return encode(padding, padding, padding=padding, flip=flip)


def offset_tables(size: int, padding: int, flip: bool) -> tuple[Tensor, Tensor]:
    """Where the pixels of a view come from, in an image stored by ``store``.

    Returns:
        rows: (P, S) int64; ``rows[dy, y]`` is the offset of the source row of row y.
        columns: (P, S) or, with mirroring, (2P, S) int64; ``columns[view % len(columns), x]`` is the source column.
    """
    place = torch.arange(2 * padding + 1)[:, None]
    source = place + torch.arange(size) - padding  # (P, S), outside the image where negative or at least S
    source = torch.where((source >= 0) & (source < size), source, size)  # S: the zero row or column
    columns = torch.stack([source, source.flip(1)], dim=1).flatten(0, 1) if flip else source
    return source * (size + 1), columns


def store(images: npt.NDArray[np.uint8]) -> Tensor:
    """Images (N, S, S, 3) as (N, S+1, S+1, 3) uint8, zero in the last row and the last column."""
    num_images, size = images.shape[:2]
    stored = torch.zeros(num_images, size + 1, size + 1, 3, dtype=torch.uint8)
    stored.numpy()[:, :size, :size] = images
    return stored


def crop_and_flip(stored: Tensor, index: Tensor, view: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """View ``view[b]`` of image ``index[b]``: one gather, static shapes, no read by the host.

    Shapes: (N, S+1, S+1, 3) uint8, (B,) int64, (B,) int64, tables of ``offset_tables`` (int64, or int32 if all pixels
    of ``stored`` can be counted in it) -> (B, S, S, 3) uint8.
    """
    pixels_per_image = stored.shape[1] * stored.shape[2]
    first = (index * pixels_per_image).to(rows.dtype)  # (B,), int32 arithmetic is faster where it reaches
    row = rows.index_select(0, view // len(columns)) + first[:, None]  # (B, S)
    column = columns.index_select(0, view % len(columns))  # (B, S)
    pixel = row[:, :, None] + column[:, None, :]  # (B, S, S)
    return stored.view(-1, 3).index_select(0, pixel.view(-1)).view(*pixel.shape, 3)


class Normalization:
    """((pixel / 255) - mean) / std in float32, the same bits on every device.

    Args:
        size: S, pixels.
        mean: of the three channels, on the scale 0 to 1.
        std: of the three channels, on the same scale.
    """

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        # Repeated over the pixels, because broadcasting over a last axis of 3 is slow; the divisor is a tensor because
        # CUDA would multiply by the rounded reciprocal of a number.
        self.white = torch.tensor([255.0])
        self.mean = torch.tensor(mean, dtype=torch.float32).repeat(size * size)
        self.std = torch.tensor(std, dtype=torch.float32).repeat(size * size)

    def to(self, device: torch.device | str) -> "Normalization":
        """The same with its constants on ``device``."""
        moved = copy.copy(self)
        moved.white, moved.mean, moved.std = self.white.to(device), self.mean.to(device), self.std.to(device)
        return moved

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, S, S) float32, channels_last in memory."""
        value = pixels.flatten(1).float().div_(self.white).sub_(self.mean).div_(self.std)  # (B, S*S*3)
        return value.view(pixels.shape).permute(0, 3, 1, 2)
