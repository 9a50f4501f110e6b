"""``mdistill quickstart``: the main job on the embedded data set: a teacher, a student alone and by several methods."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdistill.cli import common
from mdistill.errors import UserError
from mdistill.reporting.drawing import curves, save, styles_of
from mdistill.reporting.figures import learning
from mdistill.reporting.records import HEADLINE, Record, read_record
from mdistill.reporting.series import Series
from mdistill.reporting.tables import text_table

if TYPE_CHECKING:
    from mdistill.config import Config

DESCRIPTION = """Train a small teacher, then one small student, alone and distilled by several methods, on a data set
that is generated on the spot. Ends with a table and a picture of the learning curves. Runs that are complete are not
repeated, and a run that was stopped goes on where it was."""

EXAMPLES = """  mdistill quickstart
  mdistill quickstart --output /tmp/try --seed 1"""

NEXT = """what to try next:
  mdistill eval {student}
  mdistill train --cfg {config} --output {output} --checkpoint-root {output} distiller.standardize_logits=true
  tensorboard --logdir {output}
  real data: mdistill train --cfg configs/cifar100/vanilla/resnet8x4.yaml --download"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("quickstart", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--output", type=common.path, default=Path("runs/quickstart"), help="folder of the runs (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the students; the teacher's is 0 (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="start again instead of going on")
    return parser.parse_args(arguments)


def plan(configs: Path, seed: int) -> "list[tuple[Path, Config]]":
    """The teacher's configuration first, then the student alone, then each method's."""
    from mdistill.config import load

    parts = {path: path.relative_to(configs).parts for path in sorted(configs.rglob("*.yaml"))}
    paths = [path for path in parts if not any(part.startswith("_") for part in parts[path])]  # those are bases
    runs = [(path, load(path)) for path in paths]
    teachers = {config.teacher.name for _, config in runs if config.teacher}
    alone = [(path, config) for path, config in runs if config.teacher is None]
    distilled = [(path, load(path, seed=seed)) for path, config in runs if config.teacher is not None]
    first = [(path, config) for path, config in alone if config.student.name in teachers]
    students = [(path, load(path, seed=seed)) for path, config in alone if config.student.name not in teachers]
    return [*first, *students, *distilled]


def train_one(config: "Config", args: argparse.Namespace) -> Series:
    from mdistill.engine import build, trainer
    from mdistill.engine.run_folder import RunFolder

    label = config.student.name if config.teacher is None else f"{config.student.name} + {config.distiller.name}"
    folder = RunFolder(args.output / config.run_folder(), "overwrite" if args.overwrite else "resume")
    experiment = build.build(
        [config],
        build.pick_device(args.device),
        data_root=args.data_root,
        checkpoint_root=args.output,
        output_root=args.output,
        cache_root=args.output / "teacher_cache",
        download=args.download,
    )
    trainer.fit(experiment, [folder])
    return Series(label, [read_record(folder.path)])


def table(groups: Sequence[Series]) -> str:
    """Each run with the parameters of its network, the accuracy of its last epoch, and how long all epochs took."""
    rows = [[each.label, *_row(each.first)] for each in groups]
    return text_table(["run", "parameters", "top-1", "top-5", "seconds"], rows)


def _row(record: Record) -> list[str]:
    seconds = sum(line["seconds/train"] + line["seconds/eval"] for line in record.metrics)
    accuracies = [f"{record.accuracy(metric):.2f}" for metric in ("top1", "top5")]
    parameters = (record.noted("parameters") or {}).get("student")
    return ["" if parameters is None else f"{parameters:,}", *accuracies, f"{seconds:.0f}"]


def quickstart(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    root = common.project_root()
    configs = root / "configs" / "quickstart"
    runs = plan(configs, args.seed)
    if len(runs) < 3:
        raise UserError(
            f"{configs} holds {len(runs)} configurations; the quickstart needs a teacher and two students:"
            " start it in a clone of the project"
        )
    groups = []
    for number, (path, config) in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {path.relative_to(root)}", flush=True)
        groups.append(train_one(config, args))
    picture = args.output / "curves.png"
    looks = styles_of([each.label for each in groups])
    title = "one student, alone and distilled (embedded data)"
    save(curves({"": learning(groups, HEADLINE)}, looks, title=title, ylabel="test top-1 (%)"), picture)
    teacher, *_ = groups
    print(f"\n{table(groups)}\n")
    print(f"{teacher.label} is the teacher; top-1 and top-5 are of the last epoch, in percent, on the test split")
    print(f"runs: {args.output}   learning curves: {picture}   {time.perf_counter() - started:.0f} s in all\n")
    last_path, last = runs[-1]
    student = args.output / last.run_folder()
    print(NEXT.format(student=student, config=last_path.relative_to(root), output=args.output))


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(quickstart, parse, arguments, when_stopped="run it again to go on")
