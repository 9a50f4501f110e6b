#!/usr/bin/env python3
"""Images per second of a training step, ours and the plain reference loop's, timed in turn within one run.

    python benchmarks/step.py                 both pairs, the data path, and what each method costs (about 6 minutes)
    python benchmarks/step.py --only step     one part: step, data or methods

Only ratios within one run count on a shared machine; each is the median over rounds of the ratio within a round.
The pixels are random: time does not depend on them.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from reference import MEAN, STD, ReferenceLoop, endless, loader

from mdistill.config import Config, load
from mdistill.data import InMemoryDataset
from mdistill.data.sampling import epoch_plan
from mdistill.engine.build import build_distiller, build_network, pick_device, set_numerics
from mdistill.engine.metrics import EpochSums
from mdistill.engine.solver import SOLVERS
from mdistill.engine.trainer import train_step
from mdistill.reporting.tables import text_table

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "cifar100"
PAIRS = ("res32x4_res8x4", "wrn40_2_wrn16_2")
BATCH = 64
VOID_BELOW = 58.0  # images/s of the reference on two CPU cores, first pair; a slower one would flatter us


class Engine:
    """Our training step on one configuration, data path included."""

    def __init__(self, config: Config, dataset: InMemoryDataset, device: torch.device) -> None:
        info = dataset.info(BATCH)
        self.dataset = dataset
        self.distiller = build_distiller(config, info).to(device).train()
        self.solver = SOLVERS.build(config.solver.name, self.distiller.param_groups(), **config.solver.arguments)
        self.solver.set_lr(config.solver.lr)
        plan = epoch_plan(0, 1, info.num_samples, info.num_views)
        self.index, self.view = (torch.from_numpy(part).to(device) for part in (plan.index, plan.view))
        self.epoch, self.sums, self.at = torch.tensor(1, device=device), EpochSums(device), 0

    def step(self) -> None:
        """One step on the next batch of the epoch."""
        part = slice(self.at, self.at + BATCH)
        self.at = (self.at + BATCH) % (len(self.index) - BATCH)
        batch = self.dataset.train_batch(self.index[part], self.view[part])
        train_step(self.distiller, self.solver, batch, self.epoch, self.sums)


def seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Time of ``count`` steps, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turn(
    steps: dict[str, Callable[[], None]], *, rounds: int, count: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of ``count`` steps of each entry, round by round, after one warm-up round of three steps."""
    for step in steps.values():
        seconds(step, 3, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        names = list(steps) if number % 2 == 0 else list(reversed(steps))
        for name in names:
            times[name].append(seconds(steps[name], count, device))
    return times


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def rate(times: Sequence[float], count: int) -> str:
    """Images per second, median over rounds."""
    return f"{BATCH * count / statistics.median(times):.0f}"


def time_pairs(
    data: InMemoryDataset, pixels: np.ndarray, labels: np.ndarray, device: torch.device, args: argparse.Namespace
) -> str:
    rows = []
    for pair in PAIRS:
        config = load(CONFIGS / "kd" / f"{pair}.yaml")
        assert config.teacher is not None
        ours = Engine(config, data, device)
        info = data.info(BATCH)
        networks = [
            build_network(role, name, {}, info, seed=0).to(memory_format=torch.contiguous_format)
            for role, name in (("student", config.student.name), ("teacher", config.teacher.name))
        ]
        plain = ReferenceLoop(networks[0], networks[1], device)
        batches = endless(loader(pixels, labels, BATCH, device))
        held = [next(batches) for _ in range(args.count)]
        cursor = iter(range(10**9))
        times = in_turn(
            {
                "reference": lambda plain=plain, batches=batches: plain.step(*next(batches)),  # type: ignore[misc]
                "in memory": lambda plain=plain, held=held, cursor=cursor: plain.step(*held[next(cursor) % len(held)]),  # type: ignore[misc]
                "ours": ours.step,
            },
            rounds=args.rounds,
            count=args.count,
            device=device,
        )
        slow = BATCH * args.count / statistics.median(times["reference"])
        void = device.type == "cpu" and pair == PAIRS[0] and slow < VOID_BELOW
        rows.append(
            [
                f"{config.teacher.name} -> {config.student.name}",
                *(rate(times[name], args.count) for name in ("reference", "in memory", "ours")),
                f"{ratio(times['reference'], times['ours']):.2f}",
                f"{ratio(times['in memory'], times['ours']):.2f}",
                f"void: reference below {VOID_BELOW:.0f}" if void else "",
            ]
        )
    header = ["KD step, images/s", "reference", "ref. in memory", "ours", "ours/reference", "ours/in memory", ""]
    return text_table(header, rows)


def time_data(
    data: InMemoryDataset, pixels: np.ndarray, labels: np.ndarray, device: torch.device, args: argparse.Namespace
) -> str:
    batches = endless(loader(pixels, labels, BATCH, device))
    plan = epoch_plan(0, 1, data.num_samples, data.num_views)
    index, view = (torch.from_numpy(part[:BATCH]).to(device) for part in (plan.index, plan.view))
    count = 100
    times = in_turn(
        {"reference": lambda: (next(batches), None)[1], "ours": lambda: (data.train_batch(index, view), None)[1]},
        rounds=args.rounds,
        count=count,
        device=device,
    )
    row = ["pixels to a normalised batch", rate(times["reference"], count), rate(times["ours"], count)]
    header = ["data path, images/s", "DataLoader", "ours", "ratio"]
    return text_table(header, [[*row, f"{ratio(times['reference'], times['ours']):.1f}"]])


def time_methods(
    data: InMemoryDataset, pixels: np.ndarray, labels: np.ndarray, device: torch.device, args: argparse.Namespace
) -> str:
    """What each method's step costs over KD's. Shapes are static, so an empty queue costs what a full one does."""
    configs = [load(path) for path in sorted(CONFIGS.glob(f"*/{PAIRS[0]}.yaml"))]
    engines = {config.distiller.name: Engine(config, data, device) for config in configs}
    times = in_turn(
        {name: engine.step for name, engine in engines.items()}, rounds=args.rounds, count=args.count, device=device
    )
    rows = [
        [name, f"{1000 * statistics.median(spent) / args.count:.1f}", f"{100 * (ratio(spent, times['kd']) - 1):+.1f} %"]
        for name, spent in times.items()
    ]
    return text_table([f"step on {PAIRS[0]}", "ms", "over kd"], rows)


PARTS = {"step": time_pairs, "data": time_data, "methods": time_methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), help="one part instead of all")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, each timing every entry once (%(default)s)")
    parser.add_argument("--count", type=int, default=8, help="steps an entry does in a round (%(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    set_numerics(load(CONFIGS / "kd" / f"{PAIRS[0]}.yaml").run)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 100, 50_000)
    data = InMemoryDataset((pixels, labels), (pixels[:1000], labels[:1000]), num_classes=100, mean=MEAN, std=STD)
    data = data.to(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"batch {BATCH}, {args.rounds} rounds of {args.count} steps, float32 (TF32 on CUDA)\n", flush=True)
    for part, measure in PARTS.items():
        if args.only in (None, part):
            print(measure(data, pixels, labels, device, args) + "\n", flush=True)


if __name__ == "__main__":
    main()
