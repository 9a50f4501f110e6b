#!/usr/bin/env python3
"""Train a student from a teacher, or a network alone, as a YAML file says."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mdistill import cli, config
from mdistill.engine import build, trainer
from mdistill.engine.run import RunFolder, run_mode

DESCRIPTION = """Train a network as a configuration says.

A configuration is one YAML file plus the file that its `base:` names; together they hold everything that changes the
result. Change single values with key=value words: solver.lr=0.1 distiller.beta=4. What a run wrote is under
<output>/<dataset>/<method>/<teacher>_<student>[/<overrides>]/seed<N>/: config.yaml, env.json, metrics.jsonl,
tensorboard/, last.pt (to resume) and student.pt (the trained network)."""

EXAMPLES = """  python tools/train.py --cfg configs/quickstart/vanilla/vgg8.yaml               a teacher, no data needed
  python tools/train.py --cfg configs/cifar100/vanilla/resnet32x4.yaml --download   a CIFAR-100 teacher
  python tools/train.py --cfg configs/cifar100/mcld/res32x4_res8x4.yaml --seed 1    a student
  python tools/train.py --cfg configs/cifar100/dkd/res32x4_res8x4.yaml distiller.beta=4 solver.lr=0.1
  python tools/train.py --cfg ... --resume        go on where a run stopped (or start, if nothing is there)
  python tools/train.py --cfg ... --dry-run       build everything and do one step, write nothing

exit codes: 0 done, 1 the run failed, 2 bad input, 75 stopped and saved: run again with --resume, 130 interrupted"""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("--cfg", type=Path, required=True, help="the configuration, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    parser.add_argument("--seed", type=int, help="fixes initial weights, order and views (default: the file's)")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="your code")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    parser.add_argument(
        "--checkpoint-root", type=Path, default=Path("checkpoints"), help="folder of teacher weights (%(default)s)"
    )
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--resume", action="store_true", help="continue the run that is there")
    exclusive.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    exclusive.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    exclusive.add_argument("--dry-run", action="store_true", help="one step, no files")
    return parser.parse_intermixed_args(words)


def train(args: argparse.Namespace) -> None:
    settings = config.load(args.cfg, args.overrides, imports=args.imports, seed=args.seed)
    if args.print_config:
        print(settings.to_yaml(), end="")
        return
    for warning in settings.warnings():
        print(f"warning: {args.cfg}: {warning}", file=sys.stderr)
    device = build.pick_device(args.device)
    folder = None
    if not args.dry_run:
        folder = RunFolder(args.output / settings.run_folder(), run_mode(args.resume, args.overwrite))
    made = build.build(
        settings,
        device,
        data_root=args.data_root,
        checkpoint_root=args.checkpoint_root,
        output_root=args.output,
        download=args.download,
        check_teacher=not args.dry_run,
    )
    made.facts["config_folder"] = str(args.cfg.resolve().parent)
    for note in made.facts["data"]["notes"]:
        print(f"data: {note}")
    if "loss" in made.facts:
        print(f"loss: {made.facts['loss']}")
    if folder is None:
        print(trainer.dry_run(made, settings))
        return
    trainer.fit(made, settings, folder)


def main(words: Sequence[str] | None = None) -> int:
    return cli.run(train, parse(words))


if __name__ == "__main__":
    sys.exit(main())
