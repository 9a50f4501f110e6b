"""``mdistill eval``: top-1, top-5, loss and images per second of a trained network."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from mdistill.cli import common
from mdistill.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from mdistill.data import Dataset

DESCRIPTION = """Evaluate a run folder, one of its checkpoints, or any checkpoint of a known network.

A run folder, and a student.pt, ema.pt, average.pt or last.pt in one, says by itself which network and data it was
trained on; for any other file name the network with --model."""

EXAMPLES = """  mdistill eval runs/cifar100/mcld/resnet32x4_resnet8x4/seed0
  mdistill eval runs/cifar100/mcld/resnet32x4_resnet8x4/seed0/last.pt --json
  mdistill eval --model resnet32x4 --weights checkpoints/cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth
  mdistill eval --model torchvision/resnet18 --weights w.pth --data '{name: folder, root: photos, image_size: 128}'"""

Precision = Literal["fp32", "tf32"]
"""What a network is evaluated in: float32, whatever it was trained in."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("eval", DESCRIPTION, EXAMPLES)
    parser.add_argument("run", type=common.path, nargs="?", help="a run folder or a checkpoint in one")
    parser.add_argument("--weights", type=common.path, help="a checkpoint that stands alone; needs --model")
    parser.add_argument("--model", help="the network that --weights belong to, with its default settings")
    parser.add_argument("--role", choices=["student", "teacher"], help="whose, if a file has both")
    parser.add_argument(
        "--data",
        default="cifar100",
        help="the data set for --weights (%(default)s), or as in a configuration: '{name: folder, root: photos}'",
    )
    parser.add_argument("--split", default="test", help="test, or val where the run held images out (%(default)s)")
    parser.add_argument("--batch-size", type=int, help="images per forward pass (default: what suits the device)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="float32 arithmetic, with TF32 units where a GPU has them or without (default: fp32 if the run had that)",
    )
    common.add_recorded_code(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    return parser.parse_intermixed_args(arguments)


@dataclass
class Subject:
    """What is evaluated."""

    name: str
    network: "nn.Module"  # its weights are still to be loaded
    weights: Path
    dataset: "Dataset"
    precision: Precision = "tf32"
    note: str | None = None  # what a reader of the figures must know


def find_subject(args: argparse.Namespace) -> Subject:
    """What the command line means."""
    if (args.run is None) == (args.weights is None):
        raise UserError("name one thing to evaluate: a run folder, a checkpoint in one, or --model NAME --weights FILE")
    if args.run is None:
        return _lone_checkpoint(args)
    if args.model is not None or args.role is not None or args.data != "cifar100":
        raise UserError(f"--model, --role and --data go with --weights; {args.run} says itself what it is")
    return _of_run(args)


def _lone_checkpoint(args: argparse.Namespace) -> Subject:
    from mdistill import config
    from mdistill.data import DATASETS
    from mdistill.engine.build import build_network
    from mdistill.user_code import import_user_module

    if args.model is None:
        raise UserError(f"--weights {args.weights} needs --model, the network that it belongs to")
    for module in args.imports:
        import_user_module(module, [Path.cwd()])
    section = config.inline_section(args.data, "--data")
    dataset = DATASETS.build(section.pop("name"), args.data_root, args.download, where="--data", **section)
    network = build_network("--model", args.model, {}, dataset.info(1), seed=0)
    return Subject(args.model, network, args.weights, dataset)


def _of_run(args: argparse.Namespace) -> Subject:
    from mdistill.engine.build import UNCALIBRATED, build_dataset, build_students

    recorded = (args.run if args.run.is_dir() else args.run.parent) / "config.yaml"
    if not args.run.exists():
        raise UserError(f"no run folder or checkpoint at {args.run}")
    if not recorded.is_file():
        raise UserError(f"{args.run}: no {recorded.name} in its folder; give --model NAME --weights {args.run}")
    settings = common.recorded_config(args, recorded.parent)
    dataset = build_dataset(settings, data_root=args.data_root, download=args.download)
    students = build_students(settings, dataset.info(settings.data.batch_size))
    headline = next(iter(students.values()))  # averages of its weights have its network
    return Subject(
        settings.student.name,
        students.get(args.run.stem, headline),
        args.run,
        dataset,
        "fp32" if settings.run.precision == "fp32" else "tf32",
        UNCALIBRATED if settings.distiller.arguments["ce_weight"] == 0 else None,
    )


def run_eval(args: argparse.Namespace) -> None:
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size: should be at least 1, found {args.batch_size}")
    from mdistill.engine.build import pick_device
    from mdistill.engine.evaluate import evaluate
    from mdistill.models.memory_format import move
    from mdistill.models.weights import load_weights
    from mdistill.precision import set_numerics

    device = pick_device(args.device)
    subject = find_subject(args)
    if args.split not in subject.dataset.splits:
        raise UserError(f"--split: no split {args.split!r} here (there is: {', '.join(subject.dataset.splits)})")
    record = load_weights(subject.network, subject.weights, name=subject.name, role=args.role or "student")
    if record.note:
        print(f"note: {subject.weights} {record.note}", file=sys.stderr)
    precision = args.precision or subject.precision
    set_numerics(precision, deterministic=False)
    move(subject.network, device, precision)
    result = evaluate(
        subject.network,
        subject.dataset.to(device),
        args.split,
        batch_size=args.batch_size,
        precision=precision,
    )
    if args.json:
        line = {"model": subject.name, "weights": str(subject.weights), "sha256": record.sha256, "split": args.split}
        line |= result.as_dict()
        print(json.dumps(line | ({"note": subject.note} if subject.note else {})))
        return
    print(
        f"{subject.name}  {args.split} ({result.images} images)  top-1 {result.top1:.2f}  top-5 {result.top5:.2f}"
        f"  loss {result.loss:.4f}  {result.images_per_second:.0f} images/s"
    )
    if subject.note:
        print(f"note: {subject.note}")


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(run_eval, parse, arguments)
