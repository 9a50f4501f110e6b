"""Images that tests make, and folders of them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F


def picture(seed: int, height: int = 40, width: int = 52) -> np.ndarray:
    """Smooth colours, which JPEG keeps."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.random((1, 3, 5, 6)))
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def encoded(pixels: np.ndarray, form: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def fill(place: Path, classes: Sequence[str] = ("ant", "bee")) -> Path:
    """Images of different sizes, of each class five to train on and two to evaluate; and what lies beside."""
    for split, count, seed in (("train", 5, 0), ("val", 2, 50)):
        for label, name in enumerate(classes):
            folder = place / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = 30 + 7 * number, 61 - 5 * number
                content = encoded(picture(100 * label + seed + number, *size))
                (folder / f"{number}.jpg").write_bytes(content)
            (folder / "notes.txt").write_text("no image")
            (folder / ".hidden.jpg").write_bytes(b"")
    (place / "train" / "README").write_text("no class")
    return place
