"""``mdistill train``: train a student from a teacher, or a network alone, as a YAML file says."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mdistill.cli import common

if TYPE_CHECKING:
    from mdistill.config import Config
    from mdistill.engine.run_folder import RunFolder

DESCRIPTION = """Train a network as a configuration says.

A configuration is a YAML file plus those that its `base:` names; together they hold everything that changes the result.
Change single values with key=value: solver.lr=0.1 distiller.beta=4. What a run wrote is under
<output>/<dataset>/<method>/<teacher>_<student>[/<overrides>]/seed<N>/: config.yaml, env.json, metrics.jsonl,
tensorboard/, last.pt (to resume) and student.pt (the trained network; averages of it beside it, where asked for)."""

EXAMPLES = f"""  mdistill train --cfg configs/quickstart/vanilla/vgg8.yaml               a teacher, no data needed
  mdistill train --cfg configs/cifar100/vanilla/resnet32x4.yaml --download   a CIFAR-100 teacher
  mdistill train --cfg configs/cifar100/mcld/res32x4_res8x4.yaml --seed 1    a student
  mdistill train --cfg configs/cifar100/dkd/res32x4_res8x4.yaml distiller.beta=4 solver.lr=0.1
  mdistill train --cfg ... --pair res56_res20   the same method with another teacher and student
  mdistill train --cfg ... --seeds 0,1,2   three trials at once, each a run of its own
  mdistill train --cfg ... --resume        go on where a run stopped (or start, if nothing is there)
  mdistill train --cfg ... --dry-run       build everything and do one step, write nothing

{common.EXIT_CODES}"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("train", DESCRIPTION, EXAMPLES)
    common.add_configuration(parser, "the configuration")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, help="fixes initial weights, order and views (default: the file's)")
    seeds.add_argument("--seeds", type=common.seeds, help="several, such as 0,1,2: trained together, a run folder each")
    common.add_roots(parser)
    common.add_cache_root(parser)
    parser.add_argument(
        "--no-cache", action="store_true", help="recompute teacher logits every step: the same result, slower"
    )
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--resume", action="store_true", help="resume from the last checkpoint, if there is one")
    exclusive.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    exclusive.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    exclusive.add_argument("--dry-run", action="store_true", help="one step, no files")
    return parser.parse_intermixed_args(arguments)


def train(args: argparse.Namespace) -> None:
    if args.print_config:
        configs = common.load_configs(args, args.seeds or [args.seed])
        if os.environ.get("RANK", "0") == "0":
            print("---\n".join(config.to_yaml() for config in configs), end="")
        return
    from mdistill import distributed

    with distributed.joined(args.device) as device:
        with distributed.together():
            configs = common.load_configs(args, args.seeds or [args.seed])
        _train(args, configs, device)


def _train(args: argparse.Namespace, configs: "Sequence[Config]", device_name: str | None) -> None:
    from mdistill import distributed
    from mdistill.engine import build, trainer
    from mdistill.engine.console import print_line
    from mdistill.engine.run_folder import RunFolder, run_mode

    if distributed.rank() == 0:
        for warning in configs[0].warnings():
            print(f"warning: {args.cfg}: {warning}", file=sys.stderr)
    with distributed.together():
        device = build.pick_device(device_name)
        mode = run_mode(args.resume, args.overwrite)
        folders = [] if args.dry_run else [RunFolder(args.output / config.run_folder(), mode) for config in configs]
    experiment = build.build(
        configs,
        device,
        data_root=args.data_root,
        checkpoint_root=args.checkpoint_root,
        output_root=args.output,
        cache_root=None if args.no_cache or args.dry_run else common.cache_root(args),
        download=args.download,
        check_teacher=not args.dry_run,
    )
    experiment.metadata["config_folder"] = str((args.cfg if args.cfg.is_dir() else args.cfg.parent).resolve())
    for note in experiment.metadata["notes"]:
        print_line(note)
    if "loss" in experiment.metadata:
        print_line(f"loss: {experiment.metadata['loss']}")
    if args.dry_run:
        print_line(trainer.dry_run(experiment))
        return
    try:
        trainer.fit(experiment, folders)
    finally:
        if len(folders) > 1 and distributed.rank() == 0:
            _print_mean(configs, folders)


def _print_mean(configs: "Sequence[Config]", folders: "Sequence[RunFolder]") -> None:
    """What the trials that are complete reach together."""
    from mdistill.engine.console import print_line
    from mdistill.engine.run_folder import read_metrics
    from mdistill.reporting.statistics import mean_std_text

    ends = [(config, read_metrics(folder.path)[-1:]) for config, folder in zip(configs, folders, strict=True)]
    complete = {config.seed: line[0] for config, line in ends if line and line[0]["epoch"] >= config.epochs}
    for split in ("val", "test"):
        values = {seed: line[f"{split}/top1"] for seed, line in complete.items() if f"{split}/top1" in line}
        if len(values) > 1:
            seeds = f"seeds {', '.join(map(str, values))}" + (
                f" of {len(configs)}" if len(values) < len(configs) else ""
            )
            print_line(f"{split} top-1 after the last epoch: {mean_std_text(list(values.values()))} over {seeds}")


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(train, parse, arguments)
