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


def write_stl10(root: Path, train: int = 30, test: int = 20) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """STL-10 in its binary layout in ``root/stl10_binary``, of so many images; their pixels (N, 96, 96, 3) and labels.

    An image is one colour a class with a bright corner, so that a turned or mirrored one is seen.
    """
    folder, made = root / "stl10_binary", {}
    folder.mkdir(parents=True)
    colours = np.random.default_rng(3).integers(0, 200, (10, 3))
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 10
        images = np.repeat(np.repeat(colours[labels][:, None, None, :], 96, axis=1), 96, axis=2)
        images = images + np.random.default_rng(count).integers(0, 56, images.shape)
        images[:, :20, -30:] = 255  # the upper right
        images = images.astype(np.uint8)
        planes = images.transpose(0, 3, 2, 1)  # plane by plane, column by column
        (folder / f"{split}_X.bin").write_bytes(np.ascontiguousarray(planes).tobytes())
        (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        made[split] = images, labels
    names = "airplane bird car cat deer dog horse monkey ship truck"
    (folder / "class_names.txt").write_text(names.replace(" ", "\n") + "\n")
    (folder / "fold_indices.txt").write_text("0 1 2\n")
    return made
