#!/usr/bin/env python3
"""Images per second from JPEG files to normalised batches, ours and torchvision's, timed in turn within one run.

    python benchmarks/images.py ROOT                      a folder with train/<class>/ and val/<class>/
    python benchmarks/images.py ROOT --workers 8 --size 224

"torchvision" is the loader in common use: ImageFolder with v1 transforms on Pillow images (RandomResizedCrop, flip,
ToTensor, Normalize) and a DataLoader with as many worker processes as ours has threads. Both hand over normalised
float32 batches on the CPU. "pixels" ends where the device takes over in training on CUDA: with uint8 batches in the
order of the epoch, which it normalises; "two views" has the crop of a strong view beside each. Files are read once
before, so that they come from memory. A round is an epoch of each. Only ratios within one run count; each is the
median over rounds of the ratio within a round. CPU time is that of the process and its workers.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from mdistill.data.decoding import fast_decoder
from mdistill.data.folder import IMAGENET_MEAN, IMAGENET_STD, FolderDataset
from mdistill.data.image_files import Split, common_classes, find_splits, scan
from mdistill.data.loader import BatchLoader
from mdistill.reporting.tables import text_table


def theirs(folder: Path, args: argparse.Namespace) -> Callable[[], int]:
    """An epoch of torchvision's; returns the number of images."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    images = datasets.ImageFolder(str(folder), transform)
    loader: DataLoader[object] = DataLoader(
        Subset(images, [number % len(images) for number in range(args.images)]),
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        persistent_workers=True,
    )
    return lambda: sum(len(image) for image, _ in loader)


def ours(
    train: Split, test: Split, classes: list[str], args: argparse.Namespace, *, finish: bool, strong: bool = False
) -> Callable[[], int]:
    """An epoch of ours, with ``finish`` up to normalised batches."""
    dataset = FolderDataset(train, test, classes, image_size=args.size, workers=args.workers)
    loader = BatchLoader(dataset, seed=0, batch_size=args.batch_size, device=torch.device("cpu"), strong=strong)
    numbers = itertools.count(1)

    def epoch() -> int:
        loader.begin(next(numbers), 0)
        sizes = [loader.fetch(step) if not finish else len(loader.batch(loader.fetch(step)).image) for step in steps]
        return sum(sizes)

    steps = range(loader.steps)
    return epoch


def cpu_seconds() -> float:
    """CPU time of this process and of its live workers (of these only on Linux)."""
    ticks = 0
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if stat.exists():
            ticks += sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(epoch: Callable[[], int]) -> tuple[float, float]:
    """Images per second over an epoch, and CPU seconds for each."""
    cpu, start = cpu_seconds(), time.perf_counter()
    images = epoch()
    return images / (time.perf_counter() - start), (cpu_seconds() - cpu) / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder that holds train/ and val/")
    parser.add_argument("--size", type=int, default=224, help="pixels of the crops (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="%(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes of theirs, threads of ours (%(default)s)")
    parser.add_argument("--images", type=int, default=1280, help="in an epoch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = find_splits(args.root)
    classes = common_classes(*folders)
    train, test = (scan(folder, classes) for folder in folders)
    for name in train.files:
        (train.folder / name).read_bytes()
    chosen = np.arange(args.images) % len(train.files)
    some = Split(
        train.folder, tuple(train.files[number] for number in chosen), train.labels[chosen], train.sizes[chosen]
    )
    print(
        f"{len(train.files):,} images of {train.sizes.mean():,.0f} bytes on average, {args.workers} workers,"
        f" {platform.processor() or platform.machine()}, torch {torch.__version__}, torchvision"
        f" {torchvision.__version__}, Pillow {PIL.__version__}, decoder"
        f" {'simplejpeg' if fast_decoder() else 'Pillow'}, Python {platform.python_version()}"
    )
    entries = {
        "torchvision": theirs(folders[0], args),
        "ours": ours(some, test, classes, args, finish=True),
        "ours, pixels": ours(some, test, classes, args, finish=False),
        "ours, two views, pixels": ours(some, test, classes, args, finish=False, strong=True),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in entries}
    for turn in range(args.rounds + 1):
        for name, epoch in entries.items():
            measured = measure(epoch)
            if turn:  # the first starts the workers
                found[name].append(measured)
    rows = []
    for name, values in found.items():
        pairs = [*zip(values, found["torchvision"], strict=True)]
        faster = statistics.median(one[0] / other[0] for one, other in pairs)
        cheaper = statistics.median(other[1] / one[1] for one, other in pairs)
        rate, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        rows.append([name, f"{rate:.0f}", f"{faster:.2f}", f"{1000 * cpu:.2f}", f"{cheaper:.2f}"])
    header = ["from files to batches", "images/s", "over torchvision", "CPU ms an image", "torchvision's over it"]
    print(text_table(header, rows))


if __name__ == "__main__":
    main()
