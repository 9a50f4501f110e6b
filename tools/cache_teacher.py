#!/usr/bin/env python3
"""Compute a teacher's logits ahead of the runs that will read them."""

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from mdistill import cli, config
from mdistill.engine import build
from mdistill.engine.cuda_graph import own_stream
from mdistill.engine.teacher import KEPT, Filler, describe, rows_of_epochs
from mdistill.engine.teacher_cache import NoRoom, TeacherTable
from mdistill.errors import RunFailed, UserError

DESCRIPTION = """Fill the table of a teacher's logits that training reads.

Every view of every training image has one row. Runs add what they miss by themselves, so this is only needed to have it
done beforehand, for many seeds, methods and students of one teacher. Prints the size of the table and the time it takes
before anything is written. Stop it at any time: what is computed is kept."""

EXAMPLES = """  python tools/cache_teacher.py --cfg configs/cifar100/kd/res32x4_res8x4.yaml --estimate
  python tools/cache_teacher.py --cfg configs/cifar100/kd/res32x4_res8x4.yaml
  python tools/cache_teacher.py --cfg configs/cifar100/kd/res32x4_res8x4.yaml --epochs 20 --seeds 0,1,2"""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("--cfg", type=Path, required=True, help="a configuration with the teacher, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    parser.add_argument("--epochs", type=int, help="only what the first EPOCHS epochs of the seeds read")
    parser.add_argument("--seeds", type=cli.seeds, help="with --epochs: whose, such as 0,1,2 (default: the file's)")
    parser.add_argument("--estimate", action="store_true", help="print size and time, write nothing")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="your code")
    cli.add_roots(parser)
    cli.add_cache_root(parser)
    return parser.parse_intermixed_args(words)


def cache(args: argparse.Namespace) -> None:
    if args.epochs is not None and args.epochs < 1:
        raise UserError(f"--epochs: should be at least 1, found {args.epochs}")
    if args.seeds and args.epochs is None:
        raise UserError("--seeds goes with --epochs: without it every view of every image is computed")
    settings = config.load(args.cfg, args.overrides, imports=args.imports)
    if settings.teacher is None:
        raise UserError(f"{args.cfg}: teacher: missing; this configuration has no teacher to ask")
    made = build.build(
        [settings],
        build.pick_device(args.device),
        data_root=args.data_root,
        checkpoint_root=args.checkpoint_root,
        output_root=args.output,
        download=args.download,
    )
    if made.teacher is None:
        raise UserError(f"{args.cfg}: this run reads no table: its teacher {made.teacher_note}")
    ids = rows_of_epochs(made.dataset, args.epochs, args.seeds or [settings.seed])
    root, kept = cli.cache_root(args), KEPT[settings.run.teacher_logits]
    with own_stream(made.device):
        filler = Filler(made.teacher, made.dataset, kept=kept)
        per_row = filler.seconds_per_row()
        size = TeacherTable.size(made.dataset.num_samples * filler.views, made.dataset.num_classes, kept)
        time = timedelta(seconds=round(per_row * len(ids)))
        amount = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
        print(f"table: {amount} under {root}; {len(ids):,} rows, {time} if all are missing", flush=True)
        if args.estimate:
            return
        try:
            table = build.open_table(made, root)
        except NoRoom as error:
            raise RunFailed(str(error)) from None
        with table:
            missing = int(table.missing(ids).sum())
            time = timedelta(seconds=round(per_row * missing))
            print(f"{table.path}: {missing:,} rows to compute, about {time}", flush=True)
            with tqdm(total=missing, unit="row", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
                for count in filler.fill(table, ids):
                    bar.update(count)
            print(describe(table))


def main(words: Sequence[str] | None = None) -> int:
    return cli.run(cache, parse(words))


if __name__ == "__main__":
    sys.exit(main())
