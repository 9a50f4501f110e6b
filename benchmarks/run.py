#!/usr/bin/env python3
"""A whole run with every teacher logit at hand: from the command to its end, start-up and evaluation told apart.

    python benchmarks/run.py --epochs 240                        CIFAR-100's size (for a GPU)
    python benchmarks/run.py --epochs 2 --images 4096            a short one (for a CPU)

Runs tools/cache.py, then tools/train.py, on random pixels with a teacher of random weights: time depends on
neither. The logits that the epochs read are computed first and their time is given on its own.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from step import CONFIGS, network

from mdistill.config import load
from mdistill.engine.run_folder import read_metrics
from mdistill.models.weights import save_weights

ROOT = Path(__file__).resolve().parents[1]


def torch_alone() -> float:
    """Seconds that a Python process takes to import torch."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="res32x4_res8x4", help="a file of configs/cifar100/kd (%(default)s)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=50_000, help="training images (%(default)s)")
    parser.add_argument("--test-images", type=int, default=10_000, help="images evaluated (%(default)s)")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2 (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run.precision=bf16")
    args = parser.parse_args()
    cfg = CONFIGS / "kd" / f"{args.pair}.yaml"
    config = load(cfg)
    assert config.teacher is not None
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "teacher.pt"
        save_weights(weights, network(config.teacher.name).state_dict())
        words = ["--cfg", str(cfg), "--import", "random_pixels", "--output", scratch]
        words += ["--device", args.device] if args.device else []
        words += [f"teacher.checkpoint={weights}", "teacher.expected_top1=null", f"solver.epochs={args.epochs}"]
        words += ["data.name=random_pixels", f"data.images={args.images}", f"data.test_images={args.test_images}"]
        words += args.overrides
        tools = ROOT / "tools"
        started = time.perf_counter()
        fill = [sys.executable, str(tools / "cache.py"), "--epochs", str(args.epochs), "--seeds", args.seeds]
        subprocess.run([*fill, *words], check=True, cwd=ROOT / "benchmarks")
        filled = time.perf_counter() - started
        before = torch_alone()
        started = time.perf_counter()
        command = [sys.executable, "-u", str(tools / "train.py"), "--seeds", args.seeds, *words]
        process = subprocess.Popen(command, cwd=ROOT / "benchmarks", stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = 0.0
        for line in process.stdout:
            print(line, end="", flush=True)
            if "writing to" in line and not first:  # the last line before the first step
                first = time.perf_counter() - started
        if process.wait():
            sys.exit(process.returncode)
        whole = time.perf_counter() - started
        metrics = [read_metrics(path.parent) for path in sorted(Path(scratch).rglob("metrics.jsonl"))]
    train = sum(line["seconds/train"] for lines in metrics for line in lines) / len(metrics)
    evaluation = sum(line["seconds/eval"] for lines in metrics for line in lines) / len(metrics)
    print(f"\nteacher logits computed beforehand in {filled:.1f} s")
    print(f"start-up {first:.1f} s, of which importing torch takes {before:.1f} s")
    print(
        f"{args.epochs} epochs in {whole:.1f} s, with start-up; training {train:.1f} s, evaluation {evaluation:.1f} s"
    )
    print(f"evaluation over training: {100 * evaluation / train:.1f} %")


if __name__ == "__main__":
    main()
