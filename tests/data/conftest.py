"""A small stand-in for CIFAR-100 in its published layout, and a small data set in memory."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mdistill.data.cifar100 as module
from mdistill.data import InMemoryDataset

SAMPLES = {"train": 300, "test": 100}


def cifar_entries() -> dict[str, dict[str, Any]]:
    """What the three files hold: random pixels, every class, keys as text."""
    rng = np.random.default_rng(0)
    entries: dict[str, dict[str, Any]] = {
        split: {
            "filenames": [f"{split}_{number}.png" for number in range(size)],
            "batch_label": f"{split}ing batch 1 of 1",
            "fine_labels": (np.arange(size) % 100).tolist(),
            "coarse_labels": (np.arange(size) % 20).tolist(),
            "data": rng.integers(0, 256, (size, 3072), dtype=np.uint8),
        }
        for split, size in SAMPLES.items()
    }
    entries["meta"] = {"fine_label_names": [f"class {number}" for number in range(100)], "coarse_label_names": []}
    return entries


@pytest.fixture
def entries() -> dict[str, dict[str, Any]]:
    return cifar_entries()


@pytest.fixture
def write_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write entries under a data root and return the root; the expected sizes are made small."""
    monkeypatch.setattr(module, "SAMPLES", SAMPLES)

    def write(entries: dict[str, Any], dump: Callable[[Any], bytes] = pickle.dumps, root: str = "root") -> Path:
        folder = tmp_path / root / "cifar-100-python"
        folder.mkdir(parents=True)
        for name, entry in entries.items():
            (folder / name).write_bytes(dump(entry))
        return folder.parent

    return write


@pytest.fixture
def small_arrays() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Train and test of 8 by 8 pixels, in 5 classes of unequal size."""
    rng = np.random.default_rng(1)
    return {
        "train": (rng.integers(0, 256, (57, 8, 8, 3), dtype=np.uint8), np.repeat(np.arange(5), [30, 12, 9, 4, 2])),
        "test": (rng.integers(0, 256, (23, 8, 8, 3), dtype=np.uint8), np.arange(23) % 5),
    }


@pytest.fixture
def small(small_arrays: dict[str, tuple[np.ndarray, np.ndarray]]) -> InMemoryDataset:
    return InMemoryDataset(
        **small_arrays, num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), padding=2, notes=["made up"]
    )
