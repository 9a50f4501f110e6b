#!/usr/bin/env python3
"""What a training step of each method costs over one of KD: time, parameters and memory.

    python benchmarks/methods.py                    every method (about 15 minutes on 2 CPU cores)
    python benchmarks/methods.py dkd mcld kd_dot    some: folders of configs/cifar100
    python benchmarks/methods.py --imagenet         the losses alone, of 512 x 1,000 random logits

resnet32x4 -> resnet8x4 at batch 64 with a live teacher, in float32 on a CPU and TF32 on CUDA. Methods without a teacher
train resnet8x4 alone.

A whole step takes turns with one of KD, block by block, and only the ratio within a turn counts: its median and, as a
measure of the noise, half the distance between the quartiles. What a method computes beside the networks is small
against that noise, so it is timed by itself as well: its losses, forward and backward, and what it writes after a step,
on what the networks said once; "over kd" is what that adds to a step of KD.

Parameters are those that are trained beside the student's, state is what a method keeps on the device between steps
beside both networks and the solver's momentum; on CUDA the peak memory is compared too.

With --imagenet no network runs: settings are those of configs/cifar100, features have the shapes of ResNet18's, and the
training set has ImageNet's size. The peak is what a step of the losses needs beside logits, features and state; on a
CPU as the kernel counts it (Linux alone).
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from step import BATCH, CONFIGS, PAIRS, Ours, machine, precisions, seconds
from torch import Tensor, nn

from mdistill.config import Config, load
from mdistill.data import Batch, DataInfo
from mdistill.distillers import DISTILLERS
from mdistill.engine.build import pick_device
from mdistill.errors import UserError, suggestion
from mdistill.models.base import Features
from mdistill.reporting.tables import text_table

STUDENT = "resnet8x4"
BASELINE = "kd"
IMAGES = 50_000
"""In the training set, as in CIFAR-100: what some methods keep grows with ours."""


def configurations(names: Sequence[str]) -> dict[str, Path]:
    """The configuration of the pair, or of its student alone, in each folder; all plain methods and DOT by default.

    Raises:
        UserError: there is no such folder, or it has neither.
    """
    found = {}
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir() and not path.name.startswith("_")):
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
    for each in (one, other):
        seconds(each.step, 2 if device.type == "cpu" else 20, device)
    pairs = []
    for number in range(rounds):
        order = (one, other) if number % 2 == 0 else (other, one)
        spent = {id(each): seconds(each.step, count, device) for each in order}
        pairs.append((spent[id(one)], spent[id(other)]))
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def losses(ours: Ours) -> Callable[[], None]:
    """A step without networks: both repeat what they computed of one batch of images."""
    distiller = ours.distiller
    index = torch.arange(BATCH, device=next(distiller.student.parameters()).device)
    batch = ours.dataset.train_batch(index, index)
    batch = dataclasses.replace(batch, strong_image=batch.image, strong_view=batch.view)
    run, outputs = distiller._run, {}

    def repeat(network: nn.Module, image: Tensor, precision: Any, *, features: bool) -> tuple[Tensor, Features | None]:
        if network not in outputs:
            with torch.no_grad():
                outputs[network] = run(network, image, precision, features=features)
        logits, known = outputs[network]
        if network is not distiller.student:
            return logits, known
        if known is None:
            return logits.clone().requires_grad_(), None
        fresh = {field.name: _fresh(getattr(known, field.name)) for field in dataclasses.fields(known)}
        return fresh["logits"], Features(**fresh)

    distiller._run = repeat  # type: ignore[method-assign]
    epoch = torch.ones((), dtype=torch.int64, device=index.device)

    def step() -> None:
        output = distiller(batch, epoch)
        output.total.backward()
        with torch.no_grad():
            distiller.after_step(output.signals)

    return step


def _fresh(value: Any) -> Any:
    """Tensors, or tuples of them, as new leaves that need a gradient."""
    if isinstance(value, tuple):
        return tuple(_fresh(each) for each in value)
    return value if value is None else value.clone().requires_grad_()


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """Of one call: the least over several blocks, which other work on the machine disturbs least."""
    seconds(step, 20, device)
    return min(1000 * seconds(step, 10, device) / 10 for _ in range(20))


IMAGENET = DataInfo(
    num_classes=1000,
    num_samples=1_281_167,
    image_size=224,
    num_views=None,
    batch_size=512,
    strong_views=True,
    labels=torch.arange(1_281_167) % 1000,
)
QUEUE = 65536
"""Of MCLD's configuration for ImageNet."""


class Said(nn.Module):
    """A network that repeats logits (B, C), and features in the shapes of ResNet18's at 224 pixels.

    Args:
        maps: whether it is asked for features.
    """

    def __init__(self, info: DataInfo, maps: bool) -> None:
        super().__init__()
        batch = info.batch_size
        self.logits = nn.Parameter(3 * torch.randn(batch, info.num_classes))
        self.classifier = nn.Linear(512, info.num_classes)
        shapes = [(64, 56), (64, 56), (128, 28), (256, 14), (512, 7)] if maps else []
        self.maps = [torch.rand(batch, width, size, size, requires_grad=True) for width, size in shapes]
        self.pooled = torch.rand(batch, 512, requires_grad=True)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits

    def forward_features(self, image: Tensor) -> Features:
        last = self.maps[-1]
        return Features(self.logits, tuple(self.maps), tuple(self.maps), last, self.pooled)


def losses_alone(config: Config, device: torch.device) -> tuple[float, float, float]:
    """Milliseconds, MiB at the peak and MiB of state of a step of the losses of ``config`` at ImageNet's size."""
    info, arguments = IMAGENET, dict(config.distiller.arguments)
    if "queue_size" in arguments:
        arguments["queue_size"] = QUEUE
    builder = DISTILLERS.get(config.distiller.name)
    needs = builder.needs  # type: ignore[attr-defined]
    with torch.device(device):
        student = Said(info, needs.student_features)
        teacher = Said(info, needs.teacher_features) if needs.teacher != "none" else None
        distiller = builder(student, teacher, info, **arguments)
        number = torch.arange(info.batch_size)
        image = torch.zeros(info.batch_size, 3, 2, 2)
        batch = Batch(image, number * 7 % 1000, number, number, strong_image=image)
        epoch = torch.ones((), dtype=torch.int64)

    def step() -> None:
        output = distiller(batch, epoch)
        output.total.backward()
        with torch.no_grad():
            distiller.after_step(output.signals)

    seconds(step, 2, device)
    before = memory(device, reset=True)
    seconds(step, 1, device)
    peak = memory(device) - before
    spent = min(seconds(step, 2, device) / 2 for _ in range(3))
    state = distiller.state_dict()
    kept = sum(value.nbytes for key, value in state.items() if not key.startswith(("student.", "teacher.")))
    return 1000 * spent, peak / 2**20, kept / 2**20


def memory(device: torch.device, *, reset: bool = False) -> float:
    """Bytes that are in use at the peak since the last reset, or, with ``reset``, now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device) if reset else torch.cuda.max_memory_allocated(device))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith("VmRSS" if reset else "VmHWM")).split()[1])


def time_losses_alone(names: Sequence[str], device: torch.device) -> str:
    rows = []
    for name, path in configurations(names).items():
        config = load(path)
        if config.solver.name == "sgd":
            spent, peak, state = losses_alone(config, device)
            rows.append([name, f"{spent:.1f}", f"{peak:.0f}", f"{state:,.0f}"])
            print("  ".join(rows[-1]), flush=True)
    return text_table(["512 x 1,000", "losses, ms", "peak, MiB", "state, MiB"], rows)


def peak_memory(ours: Ours, device: torch.device) -> float:
    """MiB that a few steps need on the device at once; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    seconds(ours.step, 6, device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="of configs/cifar100 (default: every method)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--rounds", type=int, default=5, help="turns (%(default)s)")
    parser.add_argument("--count", type=int, default=3, help="steps in a block (%(default)s)")
    parser.add_argument("--imagenet", action="store_true", help="the losses alone, at the size of ImageNet")
    args = parser.parse_args()
    device = pick_device(args.device)
    precision = precisions(device)[0]
    print(machine(device))
    if args.imagenet:
        print(f"\n{time_losses_alone(args.folders, device)}")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        baseline = Ours(
            CONFIGS / BASELINE / f"{PAIRS[0]}.yaml", scratch, device, precision=precision, cached=False, images=IMAGES
        )
        needed = peak_memory(baseline, device)
        spare = Ours(
            CONFIGS / BASELINE / f"{PAIRS[0]}.yaml", scratch, device, precision=precision, cached=False, images=IMAGES
        )
        plain_losses = milliseconds(losses(spare), device)
        for name, path in configurations(args.folders).items():
            ours = Ours(path, scratch, device, precision=precision, cached=False, images=IMAGES)
            peak = peak_memory(ours, device) - needed  # before anything is captured, as for the baseline
            base, spent = turns(baseline, ours, device, rounds=args.rounds, count=args.count)
            ratios = [100 * (b / a - 1) for a, b in zip(base, spent, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            extra = milliseconds(losses(ours), device) - plain_losses
            row = [
                name,
                f"{1000 * statistics.median(spent) / args.count:.0f}",
                f"{middle:+.1f} %",
                f"{(high - low) / 2:.1f} %",
                f"{extra:+.2f}",
                f"{100 * extra / (1000 * statistics.median(base) / args.count):+.2f} %",
                f"{ours.extra_parameters:,}",
                f"{ours.state_bytes / 2**20:.1f}",
            ]
            if device.type == "cuda":
                row.append(f"{peak:+.1f}")
            rows.append(row)
            print(f"{name}: step {middle:+.1f} %, losses {extra:+.2f} ms", flush=True)
    header = ["", "step, ms", "over kd", "noise", "losses over kd, ms", "over kd", "parameters", "state, MiB"]
    print(f"\n{text_table(header + (['peak, MiB'] if device.type == 'cuda' else []), rows)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
