"""From the bytes of an image file to its pixels, the same whichever library decodes."""

import io
from functools import lru_cache
from types import ModuleType

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 100_000_000
_JPEG = b"\xff\xd8\xff"


@lru_cache
def fast_decoder() -> ModuleType | None:
    """simplejpeg, where it is installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    module: ModuleType = simplejpeg
    return module


def decode(content: bytes) -> Pixels:
    """The pixels (H, W, 3) uint8 of an image file, in RGB; a rotation in its metadata is left out.

    JPEG in grey or colour is decoded by simplejpeg where that is installed, to the same bits as by Pillow, which
    decodes all else: CMYK, other formats. Grey images get three equal channels; 16 bits become the upper 8; transparent
    parts are as they are stored.

    Raises:
        ValueError: it is no image, is damaged or truncated, or has more than ``MAX_PIXELS``.
    """
    if not content:
        raise ValueError("the file is empty")
    try:
        jpeg = fast_decoder() if content.startswith(_JPEG) else None
        if jpeg is not None:
            height, width, colours, _ = jpeg.decode_jpeg_header(content)
            _refuse_huge(width, height)
            if colours in {"Gray", "YCbCr"}:
                pixels: Pixels = jpeg.decode_jpeg(content, colorspace="RGB", strict=True)
                return pixels
        with Image.open(io.BytesIO(content)) as image:
            _refuse_huge(*image.size)
            if image.mode.startswith("I;16") or image.mode == "I":
                grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"it begins with {content[:8]!r}, as no known format does") from None
    except Exception as error:  # what decoders raise for damage has no common class
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _refuse_huge(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}")
