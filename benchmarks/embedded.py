#!/usr/bin/env python3
"""Is distillation worth it on the embedded data set? The quickstart over several seeds, compared seed by seed.

    python benchmarks/embedded.py                 5 seeds (about 10 minutes on 2 CPU cores)
    python benchmarks/embedded.py --change run.precision=bf16 --change run.teacher_logits=float32

The teacher is trained once; a seed fixes a student's initial weights, order and views, whatever the method. Runs that
are complete are not repeated.
"""

import argparse
import itertools
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from mdistill.config import load
from mdistill.engine.run_folder import read_metrics
from mdistill.reporting.statistics import mean_std_text, paired
from mdistill.reporting.tables import text_table

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "quickstart"


def paired_table(results: Mapping[str, Mapping[int, float]], baseline: str) -> str:
    """Mean and deviation over seeds of each label, and how far it is above ``baseline``, seed by seed."""
    rows = []
    for label, values in results.items():
        row = [label, mean_std_text([*values.values()])]
        comparison = paired([values[seed] - results[baseline][seed] for seed in sorted(values)])
        assert comparison is not None
        interval = f"{comparison.low:+.2f} to {comparison.high:+.2f}"
        rows.append([*row, "", ""] if label == baseline else [*row, f"{comparison.difference:+.2f}", interval])
    return text_table([f"top-1 over {len(results[baseline])} seeds", "", "difference", "95 % interval"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/embedded"), help="folder of the runs (%(default)s)")
    parser.add_argument("--change", action="append", default=[], metavar="key=value", help="also with this setting")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds: a comparison needs at least 2, found {args.seeds}")
    for seed in range(args.seeds):
        quickstart = [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--output", str(args.output)]
        subprocess.run([*quickstart, "--seed", str(seed)], check=True)
    taught = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if load(path).teacher is not None]
    seeds = ",".join(map(str, range(args.seeds)))
    for cfg, change in itertools.product(taught, args.change):
        train = [sys.executable, str(ROOT / "tools" / "train.py"), "--cfg", str(cfg), "--seeds", seeds, "--resume"]
        subprocess.run(
            [*train, "--output", str(args.output), "--checkpoint-root", str(args.output), change], check=True
        )
    results: dict[str, dict[int, float]] = defaultdict(dict)
    students = set()
    for path in sorted(args.output.glob("synthetic/**/seed*/config.yaml")):
        config = load(path)
        label = config.student.name
        if config.teacher is not None:
            students.add(label)
            label = f"{label} + {config.distiller.name}" + (f", {config.variant}" if config.variant else "")
        results[label][config.seed] = read_metrics(path.parent)[-1]["test/top1"]
    (student,) = students
    (teacher,) = [label for label in results if len(results[label]) == 1]
    print(f"\nteacher {teacher}: {results.pop(teacher)[0]:.2f}\n")
    plain = {label: runs for label, runs in results.items() if "," not in label}
    print(paired_table(plain, student))
    for method in plain:
        changed = {label: runs for label, runs in results.items() if label.startswith(f"{method}, ")}
        if changed:
            print(f"\n{paired_table({method: results[method], **changed}, method)}")


if __name__ == "__main__":
    main()
