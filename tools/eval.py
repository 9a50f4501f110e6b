#!/usr/bin/env python3
"""Evaluate a trained network: top-1, top-5, loss and images per second."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mdistill import cli, config
from mdistill.data import DATASETS, Dataset
from mdistill.engine.build import UNCALIBRATED, build_dataset, build_network, pick_device
from mdistill.engine.evaluate import evaluate
from mdistill.engine.run_folder import code_folders
from mdistill.errors import UserError
from mdistill.models.weights import load_weights
from mdistill.precision import Precision, require_precision, set_numerics

DESCRIPTION = """Evaluate a run folder, one of its checkpoints, or any checkpoint of a known network.

A run folder, and a student.pt, ema.pt, average.pt or last.pt in one, says by itself which network and data it was
trained on; for any other file name the network with --model."""

EXAMPLES = """  python tools/eval.py runs/cifar100/mcld/resnet32x4_resnet8x4/seed0
  python tools/eval.py runs/cifar100/mcld/resnet32x4_resnet8x4/seed0/last.pt --json
  python tools/eval.py --model resnet32x4 --weights checkpoints/cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth"""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder or a checkpoint in one")
    parser.add_argument("--weights", type=Path, help="a checkpoint that stands alone; needs --model")
    parser.add_argument("--model", help="the network that --weights belong to, with its default settings")
    parser.add_argument("--role", choices=["student", "teacher"], help="whose, if a file has both")
    parser.add_argument("--data", help="the data set for --weights (cifar100)")
    parser.add_argument("--split", default="test", help="test, or val where the run held images out (%(default)s)")
    parser.add_argument("--batch-size", type=int, help="images a forward pass (default: what suits the device)")
    parser.add_argument(
        "--precision", choices=get_args(Precision), help="what the network runs in (default: as the run did, or tf32)"
    )
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="your code")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    return parser.parse_intermixed_args(words)


@dataclass
class Subject:
    """What is evaluated."""

    name: str
    arguments: dict[str, object]
    weights: Path
    dataset: Dataset
    precision: Precision
    note: str | None = None  # what a reader of the numbers must know


def subject(args: argparse.Namespace) -> Subject:
    """Find out what the command line means."""
    if (args.run is None) == (args.weights is None):
        raise UserError("name one thing to evaluate: a run folder, a checkpoint in one, or --model NAME --weights FILE")
    if args.run is None:
        if args.model is None:
            raise UserError(f"--weights {args.weights} needs --model, the network that it belongs to")
        for module in args.imports:
            config.import_user_module(module, [Path.cwd()])
        dataset = DATASETS.build(args.data or "cifar100", args.data_root, args.download, where="--data")
        return Subject(args.model, {}, args.weights, dataset, args.precision or "tf32")
    if args.model is not None or args.role is not None or args.data is not None:
        raise UserError(f"--model, --role and --data go with --weights; {args.run} says itself what it is")
    recorded = (args.run if args.run.is_dir() else args.run.parent) / "config.yaml"
    if not args.run.exists():
        raise UserError(f"no run folder or checkpoint at {args.run}")
    if not recorded.is_file():
        raise UserError(f"{args.run}: no {recorded.name} in its folder; give --model NAME --weights {args.run}")
    settings = config.load(recorded, imports=args.imports, search=code_folders(recorded.parent))
    dataset = build_dataset(settings, data_root=args.data_root, download=args.download)
    note = UNCALIBRATED if settings.distiller.arguments["ce_weight"] == 0 else None
    precision = args.precision or settings.run.precision
    return Subject(settings.student.name, settings.student.arguments, args.run, dataset, precision, note)


def report(args: argparse.Namespace) -> None:
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size: should be at least 1, found {args.batch_size}")
    device = pick_device(args.device)
    it = subject(args)
    require_precision(it.precision, device, "--precision" if args.precision else "run.precision")
    set_numerics(it.precision, deterministic=False)
    if args.split not in it.dataset.splits:
        raise UserError(f"--split: no split {args.split!r} here (there is: {', '.join(it.dataset.splits)})")
    network = build_network("--model", it.name, it.arguments, it.dataset.info(1), seed=0)
    load_weights(network, it.weights, name=it.name, role=args.role or "student")
    result = evaluate(
        network.to(device), it.dataset.to(device), args.split, batch_size=args.batch_size, precision=it.precision
    )
    if args.json:
        facts = {"model": it.name, "weights": str(it.weights), "split": args.split, **result.as_dict()}
        print(json.dumps(facts | ({"note": it.note} if it.note else {})))
        return
    print(
        f"{it.name}  {args.split} ({result.images} images)  top-1 {result.top1:.2f}  top-5 {result.top5:.2f}"
        f"  loss {result.loss:.4f}  {result.images_per_second:.0f} images/s"
    )
    if it.note:
        print(f"note: {it.note}")


def main(words: Sequence[str] | None = None) -> int:
    return cli.run(report, parse(words))


if __name__ == "__main__":
    sys.exit(main())
