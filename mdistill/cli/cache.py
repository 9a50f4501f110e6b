"""``mdistill cache``: compute a teacher's logits ahead of the runs that will read them."""

import argparse
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from typing import TYPE_CHECKING

from mdistill.cli import common
from mdistill.errors import Stopped, UserError

if TYPE_CHECKING:
    from mdistill.config import Config

DESCRIPTION = """Fill the cache of a teacher's logits that training reads.

Every view of every training image has one entry. Runs add what they miss by themselves, so this is only needed to have
it done beforehand, for many seeds, methods and students of one teacher. Prints the size of the cache and the time it
takes before anything is written. Stop it at any time: what is computed stays.

With --distances it computes instead how far classes lie apart for the teacher, which some methods read."""

EXAMPLES = """  mdistill cache --cfg configs/cifar100/kd/res32x4_res8x4.yaml --estimate
  mdistill cache --cfg configs/cifar100/kd/res32x4_res8x4.yaml
  mdistill cache --cfg configs/cifar100/kd/res32x4_res8x4.yaml --epochs 20 --seeds 0,1,2
  mdistill cache --cfg configs/cifar100/wkd_l/res32x4_res8x4.yaml --distances
  mdistill cache --cfg photos.yaml data.views=10 run.teacher_logits=sparse --estimate"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("cache", DESCRIPTION, EXAMPLES)
    common.add_configuration(parser, "a configuration with the teacher")
    parser.add_argument("--epochs", type=int, help="only what the first EPOCHS epochs of the seeds read")
    parser.add_argument("--seeds", type=common.seeds, help="with --epochs: whose, such as 0,1,2 (default: the file's)")
    parser.add_argument("--estimate", action="store_true", help="print size and time, write nothing")
    parser.add_argument(
        "--distances", action="store_true", help="the distances between classes, in place of the logits of images"
    )
    common.add_roots(parser)
    common.add_cache_root(parser)
    return parser.parse_intermixed_args(arguments)


def fill(args: argparse.Namespace) -> None:
    if args.epochs is not None and args.epochs < 1:
        raise UserError(f"--epochs: should be at least 1, found {args.epochs}")
    if args.seeds and args.epochs is None:
        raise UserError("--seeds goes with --epochs: without it every view of every image is computed")
    if args.distances and (args.epochs is not None or args.estimate):
        raise UserError("--distances takes neither --epochs nor --estimate: they are of the logits of images")
    (config,) = common.load_configs(args, [None])
    if config.teacher is None:
        raise UserError(f"{args.cfg}: teacher: missing; this configuration has no teacher to ask")

    if args.distances:
        _fill_distances(args, config)
        return

    from tqdm import tqdm

    from mdistill.engine import build
    from mdistill.engine.console import StopRequest
    from mdistill.engine.cuda_graph import side_stream
    from mdistill.engine.logit_cache import LogitCache
    from mdistill.engine.teacher import Filler, describe, entries_of_epochs, open_cache

    experiment = build.build(
        [config],
        build.pick_device(args.device),
        data_root=args.data_root,
        checkpoint_root=args.checkpoint_root,
        output_root=args.output,
        download=args.download,
        check_teacher=not args.estimate,  # which remembers what it measured
    )
    teacher, dataset, form = experiment.teacher, experiment.dataset, experiment.logit_format
    if teacher is None or form is None:
        raise UserError(f"{args.cfg}: this run reads no cache: its teacher {experiment.teacher_note}")
    ids = entries_of_epochs(dataset, args.epochs, args.seeds or [config.seed])
    root = common.cache_root(args)
    with side_stream(experiment.device), closing(Filler(teacher, dataset, form=form)) as filler:
        per_entry = filler.seconds_per_entry()
        size = LogitCache.size(len(ids), form.width, form.dtype)
        amount = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
        print(
            f"{len(ids):,} entries: {amount} under {root}, {_duration(per_entry, len(ids))} if all are missing",
            flush=True,
        )
        if args.estimate:
            return
        cache = open_cache(teacher, dataset, root, fingerprints=experiment.fingerprints, form=form)
        missing = int(cache.missing(ids).sum())
        print(f"{cache.path}: {missing:,} entries to compute, about {_duration(per_entry, missing)}", flush=True)
        with StopRequest() as stop, tqdm(total=missing, unit="entry", dynamic_ncols=True, disable=None) as bar:

            def advance(count: int) -> None:
                bar.update(count)
                if stop.signal is not None:
                    raise Stopped(f"{stop.signal}: stopped, what was computed stays")

            filler.fill(cache, ids, advance=advance)
        print(describe(cache, form))


def _fill_distances(args: argparse.Namespace, config: "Config") -> None:
    from mdistill.engine import build
    from mdistill.engine.console import StopRequest

    experiment = build.build(
        [config],
        build.pick_device(args.device),
        data_root=args.data_root,
        checkpoint_root=args.checkpoint_root,
        output_root=args.output,
        cache_root=common.cache_root(args),
        download=args.download,
    )
    if experiment.class_distances is None:
        raise UserError(
            f"{args.cfg}: --distances: the method {config.distiller.name!r} reads no distances between classes"
        )
    with StopRequest() as stop:

        def stopped() -> None:
            if stop.signal is not None:
                raise Stopped(f"{stop.signal}: stopped, nothing was kept")

        experiment.class_distances.provide(stopped=stopped, must_write=True)


def _duration(seconds_per_entry: float, entries: int) -> timedelta:
    return timedelta(seconds=round(seconds_per_entry * entries))


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(fill, parse, arguments)
