#!/usr/bin/env python3
"""Is distillation worth it on the embedded data set? The quickstart over several seeds, compared seed by seed.

    python benchmarks/embedded.py                 5 seeds (about 15 minutes on 2 CPU cores)

The teacher is trained once; a seed fixes a student's initial weights, order and views, whatever the method. Runs that
are complete are not repeated.
"""

import argparse
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from mdistill.config import load
from mdistill.engine.run import read_metrics
from mdistill.reporting.tables import paired_table

QUICKSTART = Path(__file__).resolve().parents[1] / "tools" / "quickstart.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/embedded"), help="folder of the runs (%(default)s)")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds: a comparison needs at least 2, found {args.seeds}")
    for seed in range(args.seeds):
        subprocess.run([sys.executable, str(QUICKSTART), "--output", str(args.output), "--seed", str(seed)], check=True)
    results: dict[str, dict[int, float]] = defaultdict(dict)
    students = set()
    for path in sorted(args.output.glob("synthetic/*/*/seed*/config.yaml")):
        config = load(path)
        label = config.student.name
        if config.teacher is not None:
            students.add(label)
            label = f"{label} + {config.distiller.name}"
        results[label][config.seed] = read_metrics(path.parent)[-1]["test/top1"]
    (student,) = students
    (teacher,) = [label for label in results if len(results[label]) == 1]
    print(f"\nteacher {teacher}: {results.pop(teacher)[0]:.2f}\n")
    print(paired_table({student: results.pop(student), **results}, student))


if __name__ == "__main__":
    main()
