"""Small experiments: the one helper of the tests that builds and runs them, in this process.

    cfg = runs.write_config(tmp_path, "kd")                                 # the file, and weights for its teacher
    metrics = runs.train(cfg, tmp_path / "whole")                           # [one line per epoch] per seed
    runs.train(cfg, tmp_path / "parts", "run.teacher_logits=float32", stop_at=7)  # SIGTERM during the 7th step
    runs.train(cfg, tmp_path / "parts", "run.teacher_logits=float32", mode="resume")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    experiment = runs.experiment(cfg, "solver.lr=0.1", seeds=(0, 1))        # built, not run

Unless told otherwise a run has 3 epochs of 5 steps (four of 24 images and one of 4), a constant rate and 60 images to
evaluate, and takes well under a second. What seed k writes lies in ``output/seed<k>``, whatever the overrides.
"""

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mdistill import config
from mdistill.data.loader import BatchLoader
from mdistill.distillers import DISTILLERS
from mdistill.engine import build, trainer
from mdistill.engine.build import Experiment
from mdistill.engine.run_folder import Mode, RunFolder, read_metrics
from mdistill.errors import Stopped
from mdistill.models import MODELS

from .distillers.examples import SETTINGS
from .same import assert_same

IMAGES, BATCH, STEPS, EPOCHS = 100, 24, 5, 3


def write_config(
    folder: Path,
    method: str = "kd",
    *,
    student: str = "tiny_net",
    data: Mapping[str, Any] | None = None,
    solver: Mapping[str, Any] | None = None,
    distiller: Mapping[str, Any] | None = None,
    **sections: Any,
) -> Path:
    """Write ``<folder>/<method>.yaml`` and, for a method with a teacher, weights in ``<folder>/teacher.pt``.

    Args:
        student: "tiny_net" or a network of the zoo; the teacher is another one of the kind.
        data: added to the section of this name, as are ``solver`` and ``distiller`` (to ``examples.SETTINGS``).
        sections: whole further sections, such as ``run`` or ``teacher``.
    """
    settings: dict[str, Any] = {
        "data": {"name": "tiny", "images": IMAGES, "batch_size": BATCH, "eval_batch_size": 60, **(data or {})},
        "student": {"name": student},
        "distiller": {"name": method, **SETTINGS.get(method, {"ce_weight": 1.0}), **(distiller or {})},
        "solver": {"name": "sgd", "epochs": EPOCHS, "lr": 0.05, "milestones": [], "gamma": 0.1}
        | {"momentum": 0.9, "weight_decay": 5e-4, **(solver or {})},
    }
    if settings["solver"]["name"] == "adamw":
        del settings["solver"]["momentum"]
    if DISTILLERS.get(method).needs.teacher != "none":
        settings["teacher"] = {"name": student, "checkpoint": "teacher.pt"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            torch.save({"model": MODELS.build(student, 10).state_dict()}, folder / "teacher.pt")
    if DISTILLERS.get(method).phases:
        settings["phases"] = {name: {"epochs": 2} for name in DISTILLERS.get(method).phases}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump({**settings, **sections}))
    return path


def experiment(
    cfg: Path,
    *overrides: str,
    seeds: Sequence[int] = (0,),
    cache: bool = True,
    output: Path | None = None,
    device: str = "cpu",
) -> Experiment:
    """``cfg`` with ``key=value`` overrides, built; weights are beside it, the logit cache is ``output/cache``."""
    output = output or cfg.parent
    return build.build(
        [config.load(cfg, overrides, seed=seed) for seed in seeds],
        torch.device(device),
        data_root=cfg.parent,
        checkpoint_root=cfg.parent,
        output_root=output,
        cache_root=output / "cache" if cache else None,
    )


def train(
    cfg: Path,
    output: Path,
    *overrides: str,
    mode: Mode = "new",
    seeds: Sequence[int] = (0,),
    cache: bool = True,
    stop_at: int | None = None,
    device: str = "cpu",
) -> list[list[dict[str, Any]]]:
    """Run ``cfg``, or until SIGTERM in step ``stop_at`` of all seeds together; the metrics of each seed."""
    folders = [RunFolder(output / f"seed{seed}", mode) for seed in seeds]
    built = experiment(cfg, *overrides, seeds=seeds, cache=cache, output=output, device=device)
    if stop_at is None:
        return trainer.fit(built, folders)
    with stopping(stop_at), pytest.raises(Stopped):
        trainer.fit(built, folders)
    return [read_metrics(folder.path) for folder in folders]


@contextmanager
def stopping(at: int) -> Iterator[None]:
    """Within, this process gets SIGTERM as the n-th training step is launched, captured or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLoader, "fetch", stopping_fetch(at))
        yield


def stopping_fetch(at: int, number: signal.Signals = signal.SIGTERM) -> Callable[[BatchLoader, int], int]:
    """``BatchLoader.fetch``, with a signal to this process as it is called for the n-th time, from 1."""
    fetch, count = BatchLoader.fetch, itertools.count(1)

    def counted(loader: BatchLoader, step: int) -> int:
        if next(count) == at:
            os.kill(os.getpid(), number)
        return fetch(loader, step)

    return counted


def state(output: Path, seed: int = 0) -> dict[str, Any]:
    """The checkpoint of a seed."""
    return dict(torch.load(output / f"seed{seed}" / "last.pt", weights_only=True))


def place(output: Path, seed: int = 0) -> tuple[int, int]:
    """Epoch (from 1) and steps done in it, by the checkpoint of a seed."""
    progress = state(output, seed)["progress"]
    return progress["epoch"], progress["step"]


def assert_same_runs(left: Path, right: Path, *, seed: int = 0) -> None:
    """Bit for bit: checkpoint (but its configuration), metrics (but timings) and exported networks of a seed."""
    one, other = left / f"seed{seed}", right / f"seed{seed}"
    names = sorted(path.name for path in one.glob("*.pt"))
    assert names == sorted(path.name for path in other.glob("*.pt"))
    for name in names:
        assert_same(*(torch.load(folder / name, weights_only=True) for folder in (one, other)), name, ignore={"config"})
    assert_same(read_metrics(one), read_metrics(other), "metrics")
