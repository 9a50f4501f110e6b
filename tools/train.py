#!/usr/bin/env python3
"""Train a student from a teacher, or a network alone, as a YAML file says."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mdistill import cli, config
from mdistill.engine import build, trainer
from mdistill.engine.run_folder import RunFolder, run_mode

DESCRIPTION = """Train a network as a configuration says.

A configuration is one YAML file plus the file that its `base:` names; together they hold everything that changes the
result. Change single values with key=value words: solver.lr=0.1 distiller.beta=4. What a run wrote is under
<output>/<dataset>/<method>/<teacher>_<student>[/<overrides>]/seed<N>/: config.yaml, env.json, metrics.jsonl,
tensorboard/, last.pt (to resume) and student.pt (the trained network; averages of it beside it, where asked for)."""

EXAMPLES = """  python tools/train.py --cfg configs/quickstart/vanilla/vgg8.yaml               a teacher, no data needed
  python tools/train.py --cfg configs/cifar100/vanilla/resnet32x4.yaml --download   a CIFAR-100 teacher
  python tools/train.py --cfg configs/cifar100/mcld/res32x4_res8x4.yaml --seed 1    a student
  python tools/train.py --cfg configs/cifar100/dkd/res32x4_res8x4.yaml distiller.beta=4 solver.lr=0.1
  python tools/train.py --cfg ... --seeds 0,1,2   three trials at once, each a run of its own
  python tools/train.py --cfg ... --resume        go on where a run stopped (or start, if nothing is there)
  python tools/train.py --cfg ... --dry-run       build everything and do one step, write nothing

exit codes: 0 done, 1 the run failed, 2 bad input, 75 stopped and saved: run again with --resume, 130 interrupted"""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("--cfg", type=Path, required=True, help="the configuration, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, help="fixes initial weights, order and views (default: the file's)")
    seeds.add_argument("--seeds", type=cli.seeds, help="several, such as 0,1,2: trained together, a run folder each")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="your code")
    cli.add_roots(parser)
    cli.add_cache_root(parser)
    parser.add_argument("--no-cache", action="store_true", help="keep no teacher logits: the same result, slower")
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--resume", action="store_true", help="continue the run that is there")
    exclusive.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    exclusive.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    exclusive.add_argument("--dry-run", action="store_true", help="one step, no files")
    return parser.parse_intermixed_args(words)


def train(args: argparse.Namespace) -> None:
    seeds = args.seeds or [args.seed]
    settings = [config.load(args.cfg, args.overrides, imports=args.imports, seed=seed) for seed in seeds]
    first = settings[0]
    if args.print_config:
        print(first.to_yaml(), end="")
        return
    for warning in first.warnings():
        print(f"warning: {args.cfg}: {warning}", file=sys.stderr)
    device = build.pick_device(args.device)
    mode = run_mode(args.resume, args.overwrite)
    folders = [] if args.dry_run else [RunFolder(args.output / each.run_folder(), mode) for each in settings]
    made = build.build(
        settings,
        device,
        data_root=args.data_root,
        checkpoint_root=args.checkpoint_root,
        output_root=args.output,
        cache_root=None if args.no_cache or args.dry_run else cli.cache_root(args),
        download=args.download,
        check_teacher=not args.dry_run,
    )
    made.facts["config_folder"] = str(args.cfg.resolve().parent)
    for note in made.facts["data"]["notes"]:
        print(f"data: {note}")
    if "loss" in made.facts:
        print(f"loss: {made.facts['loss']}")
    if args.dry_run:
        print(trainer.dry_run(made))
        return
    trainer.fit(made, folders)


def main(words: Sequence[str] | None = None) -> int:
    return cli.run(train, parse(words))


if __name__ == "__main__":
    sys.exit(main())
