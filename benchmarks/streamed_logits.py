#!/usr/bin/env python3
"""Training steps on a folder of photographs: the teacher in every step, and its logits from a cache, timed in turn.

    python benchmarks/streamed_logits.py --root photos           about 6 minutes on 2 CPU cores

The teacher's weights are random: time does not depend on them. The caches hold all that the epoch reads. Each figure is
the median over rounds of the ratio within a round.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from step import alternate, machine, rate, ratio

from mdistill.config import load
from mdistill.engine.active_trial import ActiveTrial
from mdistill.engine.build import build, build_dataset, build_network, pick_device
from mdistill.engine.logit_cache import LogitCache
from mdistill.engine.teacher import Filler, entries_of_epochs
from mdistill.engine.trainer import train_step
from mdistill.models.weights import save_weights
from mdistill.reporting.tables import text_table

LIVE = "teacher in every step"
WAYS = {
    LIVE: ["data.views=null"],
    "computed ahead": [],
    "float16 cache": [],
    "sparse cache": ["run.teacher_logits=sparse", "run.teacher_top_k={top_k}"],
}


def steps_of(cfg: Path, scratch: Path, way: str, top_k: int, device: torch.device) -> Callable[[], None]:
    """A step on the next batch of the first epoch, over and over; its cache is filled, and told of."""
    experiment = build(
        [load(cfg, [word.format(top_k=top_k) for word in WAYS[way]])],
        device,
        data_root=scratch,
        checkpoint_root=scratch,
        output_root=scratch,
        cache_root=scratch / "cache" if way.endswith("cache") else None,
        check_teacher=False,
    )
    if experiment.cache is not None:
        assert experiment.teacher is not None
        assert experiment.logit_format is not None
        form, ids = experiment.logit_format, entries_of_epochs(experiment.dataset, 1, [0])
        Filler(experiment.teacher, experiment.dataset, form=form).fill(experiment.cache, ids, advance=lambda _: None)
        print(f"{way}: {LogitCache.size(1, form.width, form.dtype)} bytes an entry", flush=True)
    trial, position = ActiveTrial(experiment, experiment.trials[0]), iter(range(10**9))

    def step() -> None:
        number = next(position) % trial.loader.steps
        if number == 0:
            trial.begin_epoch(1)
        trial.run(train_step, trial.loader.fetch(number))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="a folder of photographs, with train/ and val/")
    parser.add_argument("--teacher", default="wrn_40_2", help="(%(default)s)")
    parser.add_argument("--student", default="wrn_16_2", help="(%(default)s)")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (%(default)s)")
    parser.add_argument("--top-k", type=int, default=3, help="of the sparse cache (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--count", type=int, default=4, help="steps of each way in a round (%(default)s)")
    parser.add_argument("--device", help="such as cpu (default: CUDA if there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        scratch, cfg = Path(folder), Path(folder, "cfg.yaml")
        data = {"name": "folder", "root": str(args.root.resolve()), "image_size": args.image_size, "batch_size": 64}
        distiller = {"name": "kd", "ce_weight": 1.0, "kd_weight": 1.0, "temperature": 1.0}
        solver = {"name": "sgd", "epochs": 1, "lr": 0.01, "milestones": [], "gamma": 0.1}
        settings = {
            "data": {**data, "views": 10},
            "teacher": {"name": args.teacher, "checkpoint": "teacher.pt"},
            "student": {"name": args.student},
            "distiller": distiller,
            "solver": {**solver, "momentum": 0.9, "weight_decay": 5e-4},
        }
        cfg.write_text(yaml.safe_dump(settings))
        info = build_dataset(load(cfg), data_root=scratch, download=False).info(64)
        save_weights(scratch / "teacher.pt", build_network("teacher", args.teacher, {}, info, seed=0).state_dict())
        steps = {way: steps_of(cfg, scratch, way, args.top_k, device) for way in WAYS}
        times = alternate(steps, rounds=args.rounds, count=args.count, device=device)
    rows = [[way, rate(spent, args.count), f"{ratio(times[LIVE], spent):.2f}"] for way, spent in times.items()]
    print(f"{args.teacher} -> {args.student}, {args.image_size} pixels, {machine(device)}")
    print(text_table(["KD", "images/s", "over live"], rows))


if __name__ == "__main__":
    main()
