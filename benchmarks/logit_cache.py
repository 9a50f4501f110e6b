#!/usr/bin/env python3
"""How long the cache of teacher logits takes: to open, to look an epoch up, to read it and to write it.

    python benchmarks/logit_cache.py                            CIFAR-100's size: 1.7 GB below --folder
    python benchmarks/logit_cache.py --samples 5000             a tenth of it

Fills a cache with random logits, a chunk for each epoch, opens it again and reads epochs of random views.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mdistill.engine.logit_cache import LogitCache


def milliseconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000, help="training images (%(default)s)")
    parser.add_argument("--views", type=int, default=162, help="views of an image (%(default)s)")
    parser.add_argument("--classes", type=int, default=100, help="logits of an entry (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="epochs that are read (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the cache is made (default: the system's temporary folder)")
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    entries, dtype = args.samples * args.views, torch.float16
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:

        def opened() -> LogitCache:
            return LogitCache(Path(folder), {}, entries=entries, width=args.classes, dtype=dtype)

        cache = opened()
        logits, changed = torch.randn(args.samples, args.classes).to(dtype), np.zeros(args.samples, np.bool_)
        figures: dict[str, list[float]] = {"write": [], "open": [], "look up": [], "read": []}
        for ids in generator.permutation(entries).reshape(args.views, args.samples):
            figures["write"].append(milliseconds(partial(cache.write, ids, logits, changed)))
        for _ in range(3):
            figures["open"].append(milliseconds(opened))
        cache = opened()
        for _ in range(args.rounds):
            samples = generator.permutation(args.samples)
            epoch = samples * args.views + generator.integers(0, args.views, args.samples)
            figures["look up"].append(milliseconds(partial(cache.missing, epoch)))
            figures["read"].append(milliseconds(partial(cache.read, epoch)))
    size = LogitCache.size(entries, args.classes, dtype)
    print(f"{entries:,} entries of {args.classes} logits in {args.views} chunks, {size / 1e9:.2f} GB; milliseconds")
    for name, times in figures.items():
        print(f"{name:8} median {statistics.median(times):8.1f}   least {min(times):8.1f}   most {max(times):8.1f}")


if __name__ == "__main__":
    main()
