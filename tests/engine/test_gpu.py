"""What only a CUDA device can show."""

from pathlib import Path

import pytest
import torch

from mdistill import config
from mdistill.engine import build, trainer
from mdistill.engine.checkpoint import Progress
from mdistill.engine.metrics import EpochSums
from mdistill.engine.run import RunFolder

pytestmark = pytest.mark.gpu


def made(cfg: Path, *overrides: str) -> tuple[config.Config, build.Experiment]:
    settings = config.load(cfg, overrides)
    roots = {"data_root": cfg.parent, "checkpoint_root": cfg.parent, "output_root": cfg.parent / "runs"}
    return settings, build.build(settings, torch.device("cuda"), **roots)


def test_an_epoch_never_makes_the_host_wait(kd_cfg: Path, teacher_file: Path) -> None:
    settings, run = made(kd_cfg)
    run.solver.set_lr(settings.solver.lr)
    run.distiller.train()
    progress = Progress(EpochSums(run.device))
    arguments = {"seed": 0, "batch_size": 64, "device": run.device}
    trainer.train_epoch(run.distiller, run.solver, run.dataset, progress, **arguments)  # warms the allocator up
    progress = Progress(EpochSums(run.device), epoch=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        finished = trainer.train_epoch(run.distiller, run.solver, run.dataset, progress, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert finished
    assert progress.sums.read(2).images == 150


def test_a_run_on_cuda_learns_and_resumes(kd_cfg: Path, teacher_file: Path, tmp_path: Path) -> None:
    metrics = []
    for mode, epochs in (("new", 2), ("resume", 4)):
        settings, run = made(kd_cfg, f"solver.epochs={epochs}", "run.deterministic=true", "run.precision=fp32")
        folder = RunFolder(tmp_path / "runs" / settings.run_folder(), mode)
        metrics = trainer.fit(run, settings, folder)
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4]
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
