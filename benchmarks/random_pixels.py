"""A data set of random pixels, by default in the shape of CIFAR-100: time does not depend on what images show."""

from pathlib import Path

import numpy as np

from mdistill.data import DATASETS, InMemoryDataset
from mdistill.registry import PositiveInt

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def pixels(images: int, *, size: int = 32, classes: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """(N, size, size, 3) uint8 and labels (N,)."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (images, size, size, 3), dtype=np.uint8), generator.integers(0, classes, images)


@DATASETS.register("random_pixels")
def random_pixels(
    root: Path,
    download: bool,
    *,
    images: PositiveInt = 4096,
    test_images: PositiveInt = 512,
    image_size: PositiveInt = 32,
    classes: PositiveInt = 100,
) -> InMemoryDataset:
    """``images`` to train on and ``test_images`` to evaluate."""
    train, test = (pixels(count, size=image_size, classes=classes) for count in (images, test_images))
    return InMemoryDataset(train, test, num_classes=classes, mean=MEAN, std=STD)
