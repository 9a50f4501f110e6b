#!/usr/bin/env python3
"""Channels-last against contiguous memory: a training step of one network in either layout, timed in turn.

    python benchmarks/memory_format.py                            every family, fp32 and bf16 (about 10 minutes)
    python benchmarks/memory_format.py vgg8 --precisions fp32     some networks
    python benchmarks/memory_format.py --threads 1 --cpu-time     on a CPU that others use too

A step is forward, cross-entropy, backward and SGD on the same images, which arrive in channels-last memory as the data
pipeline gives them. Each round times both layouts, the first one changing places; the figure is the median over rounds
of contiguous over channels-last within a round, beside its quartiles: above 1, channels-last is faster.
``mdistill.models.memory_format`` chooses by these figures.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from mdistill.models import MODELS
from mdistill.models.layers import count_batches
from mdistill.precision import Precision, computing, set_numerics

NETWORKS = ["resnet8x4", "wrn_16_2", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2"]
LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
NUM_CLASSES = 100


def training_step(
    network: nn.Module, layout: torch.memory_format, images: torch.Tensor, precision: Precision
) -> Callable[[], None]:
    """A function that takes one step of ``network`` in ``layout``.

    Args:
        images: (B, 3, H, W), channels last.
    """
    network = network.to(images.device).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    target = torch.arange(len(images), device=images.device) % NUM_CLASSES

    def step() -> None:
        with computing(precision, images.device):
            logits = network(images.contiguous(memory_format=layout))
        count_batches(network)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="names in the zoo (one of each family)")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "tf32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=1, help="per layout and round (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's choice)")
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's time, not the clock's")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, clock = torch.device(args.device), time.process_time if args.cpu_time else time.perf_counter
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    images = images.to(memory_format=torch.channels_last)

    def seconds(step: Callable[[], None], count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = clock()
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    print(f"batch {args.batch_size}, {device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}\n")
    print("| network | precision | channels last, ms | contiguous, ms | ratio | quartiles |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    for name in args.networks:
        for precision in args.precisions:
            set_numerics(precision, deterministic=False)
            steps = {
                layout: training_step(MODELS.build(name, NUM_CLASSES), memory_format, images, precision)
                for layout, memory_format in LAYOUTS.items()
            }
            times: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
            for layout in LAYOUTS:
                seconds(steps[layout], 3)
            for round_number in range(args.rounds):
                for layout in list(LAYOUTS)[:: 1 if round_number % 2 else -1]:
                    times[layout].append(seconds(steps[layout], args.steps) / args.steps)
            last, contiguous = times.values()
            low, middle, high = statistics.quantiles([b / a for a, b in zip(last, contiguous, strict=True)], n=4)
            print(
                f"| {name} | {precision} | {1000 * statistics.median(last):.1f}"
                f" | {1000 * statistics.median(contiguous):.1f} | {middle:.2f} | {low:.2f} to {high:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
