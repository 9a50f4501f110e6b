#!/usr/bin/env python3
"""What a training step of each method costs over one of KD: time, parameters and memory.

    python benchmarks/methods.py                    every method (about 15 minutes on 2 CPU cores)
    python benchmarks/methods.py dkd mcld kd_dot    some: folders of configs/cifar100

resnet32x4 -> resnet8x4 at batch 64 with a live teacher, in float32 on a CPU and TF32 on CUDA. Each method takes turns
with KD, block by block, and only the ratio within a turn counts: its median and, as a measure of the noise, half the
distance between the quartiles. Methods without a teacher train resnet8x4 alone. Parameters are those that are trained
beside the student's, state is what a method keeps on the device between steps beside both networks; on CUDA the
peak memory is compared too.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from step import BATCH, CONFIGS, PAIRS, Ours, machine, precisions, seconds

from mdistill.config import load
from mdistill.engine.build import pick_device
from mdistill.errors import UserError, suggestion
from mdistill.reporting.tables import text_table

STUDENT = "resnet8x4"
BASELINE = "kd"


def configurations(names: Sequence[str]) -> dict[str, Path]:
    """The configuration of the pair, or of its student alone, in each folder; all plain methods and DOT by default.

    Raises:
        UserError: there is no such folder, or it has neither.
    """
    found = {}
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir()):
        files = [folder / f"{PAIRS[0]}.yaml", folder / f"{STUDENT}.yaml"]
        if there := [path for path in files if path.exists()]:
            found[folder.name] = there[0]
    for name in names:
        if name not in found:
            raise UserError(f"no configuration of {PAIRS[0]} in {CONFIGS / name}{suggestion(name, found)}")
    chosen = names or [name for name, path in found.items() if plain(path)]
    return {name: found[name] for name in chosen}


def plain(path: Path) -> bool:
    """Whether the configuration is that of a method itself, or of a solver of its own with the baseline method."""
    config = load(path)
    variant, recipe = config.variant, load(CONFIGS / BASELINE / f"{PAIRS[0]}.yaml")
    return not variant or (config.distiller == recipe.distiller and config.solver.name != recipe.solver.name)


def turns(one: Ours, other: Ours, device: torch.device, *, rounds: int, count: int) -> tuple[list[float], list[float]]:
    """Seconds of ``count`` steps of each, in turn, after a warm-up of both."""
    for it in (one, other):
        seconds(it.step, 6, device)
    pairs = []
    for number in range(rounds):
        order = (one, other) if number % 2 == 0 else (other, one)
        spent = {id(it): seconds(it.step, count, device) for it in order}
        pairs.append((spent[id(one)], spent[id(other)]))
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def peak_memory(it: Ours, device: torch.device) -> float:
    """MiB that a few steps need on the device at once; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    seconds(it.step, 6, device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="of configs/cifar100 (default: every method)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--rounds", type=int, default=9, help="turns (%(default)s)")
    parser.add_argument("--count", type=int, default=3, help="steps in a block (%(default)s)")
    args = parser.parse_args()
    device = pick_device(args.device)
    precision = precisions(device)[0]
    print(machine(device))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        baseline = Ours(CONFIGS / BASELINE / f"{PAIRS[0]}.yaml", scratch, device, precision=precision, cached=False)
        needed = peak_memory(baseline, device)
        for name, path in configurations(args.folders).items():
            it = Ours(path, scratch, device, precision=precision, cached=False)
            base, spent = turns(baseline, it, device, rounds=args.rounds, count=args.count)
            ratios = [100 * (b / a - 1) for a, b in zip(base, spent, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            extra = [1000 * (b - a) / args.count for a, b in zip(base, spent, strict=True)]
            row = [
                name,
                f"{1000 * statistics.median(spent) / args.count:.1f}",
                f"{statistics.median(extra):+.1f}",
                f"{middle:+.1f} %",
                f"{(high - low) / 2:.1f} %",
                f"{it.extra_parameters:,}",
                f"{it.state_bytes / 2**20:.1f}",
            ]
            if device.type == "cuda":
                row.append(f"{peak_memory(it, device) - needed:+.1f}")
            rows.append(row)
            print(f"{name}: {middle:+.1f} %", flush=True)
    header = [f"{PAIRS[0]}, batch {BATCH}", "ms a step", "ms over kd", "over kd", "noise", "parameters", "state, MiB"]
    print(f"\n{text_table(header + (['peak, MiB'] if device.type == 'cuda' else []), rows)}")


if __name__ == "__main__":
    main()
