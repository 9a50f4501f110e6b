"""Training: ``fit`` runs epochs, ``train_epoch`` steps, ``train_step`` is one step."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdistill.config import Config
from mdistill.data import Batch, Dataset
from mdistill.data.sampling import epoch_plan
from mdistill.distillers import Distiller
from mdistill.engine import checkpoint
from mdistill.engine.build import Experiment
from mdistill.engine.checkpoint import Progress
from mdistill.engine.evaluate import evaluate
from mdistill.engine.metrics import EpochSums
from mdistill.engine.progress import StepBar, StopRequest, say
from mdistill.engine.run import RunFolder, environment, read_metrics
from mdistill.engine.schedule import learning_rate
from mdistill.engine.solver import Solver
from mdistill.errors import RunFailed, Stopped
from mdistill.models.weights import save_weights


def train_step(distiller: Distiller, solver: Solver, batch: Batch, epoch: Tensor, sums: EpochSums) -> None:
    """One step: forward, backward and update, method state, metrics. Nothing here waits for the device."""
    output = distiller(batch, epoch)
    solver.step(output)
    with torch.no_grad():
        distiller.after_step()
        sums.update(output, batch.target)


def train_epoch(
    distiller: Distiller,
    solver: Solver,
    dataset: Dataset,
    progress: Progress,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train on what is left of epoch ``progress.epoch``; False when ``stop()`` ended it early, at a step boundary.

    The host never waits for the device. Which images, in which order and view, is fixed by (seed, epoch) alone.
    """
    plan = epoch_plan(seed, progress.epoch, dataset.num_samples, dataset.num_views)
    pairs = torch.from_numpy(np.stack([plan.index, plan.view]))
    pairs = pairs.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pairs.to(device)
    index, view = pairs.unbind()
    epoch = torch.full((), progress.epoch, device=device)  # a fill; copying a number over would wait
    steps = -(-dataset.num_samples // batch_size)
    bar = StepBar(steps, progress.step, f"epoch {progress.epoch}", device)
    try:
        while progress.step < steps and not stop():
            part = slice(progress.step * batch_size, (progress.step + 1) * batch_size)
            train_step(distiller, solver, dataset.train_batch(index[part], view[part]), epoch, progress.sums)
            progress.step += 1
            bar.advance()
    finally:
        bar.close()
    return progress.step == steps


def fit(run: Experiment, config: Config, folder: RunFolder) -> list[dict[str, Any]]:
    """Run (or go on with) a whole training and return its metrics, one dictionary per epoch.

    Raises:
        Stopped: SIGTERM or Ctrl-C; the state is saved at a step boundary.
        RunFailed: a loss or the state is not finite, or the disk is full; the last good checkpoint stays.
    """
    folder.acquire()
    try:
        progress = Progress(EpochSums(run.device))
        if folder.resumable:
            state = checkpoint.read(folder.checkpoint, config, run.fingerprints)
            progress = checkpoint.restore(state, run.distiller, run.solver, run.device)
            if state["versions"]["torch"] != torch.__version__:
                say(f"note: begun under torch {state['versions']['torch']}, so the last bits may differ from here on")
        folder.prepare(config.to_yaml(), environment(run.device, run.facts), epochs_done=progress.epoch - 1)
        with StopRequest() as request:
            say(_start_line(folder, progress, config.solver.epochs))
            while progress.epoch <= config.solver.epochs:
                _run_epoch(run, config, folder, progress, request)
        _export(run.distiller, folder)
    finally:
        folder.close()
    metrics = read_metrics(folder.path)
    if metrics:
        say(_end_line(metrics[-1], run.dataset.splits[0], folder))
    return metrics


def dry_run(run: Experiment, config: Config) -> str:
    """Do the first step of a run, write nothing, and say what came out.

    Raises:
        RunFailed: a loss term is not finite.
    """
    size = min(config.data.batch_size, run.dataset.num_samples)
    plan = epoch_plan(config.seed, 1, run.dataset.num_samples, run.dataset.num_views)
    index, view = (torch.from_numpy(part[:size]).to(run.device) for part in (plan.index, plan.view))
    run.solver.set_lr(config.solver.lr)
    run.distiller.train()
    sums = EpochSums(run.device)
    epoch = torch.ones((), dtype=torch.int64, device=run.device)
    train_step(run.distiller, run.solver, run.dataset.train_batch(index, view), epoch, sums)
    result = sums.read(epoch=1)
    terms = ", ".join(f"{name} {value:.4g}" for name, value in result.terms.items())
    return f"dry run: one step of {size} images on {run.device}, loss {result.loss:.4g} ({terms}); nothing was written"


def _run_epoch(run: Experiment, config: Config, folder: RunFolder, progress: Progress, request: StopRequest) -> None:
    """One epoch and all that follows it: metrics, evaluation, log line, checkpoint."""
    epoch, schedule = progress.epoch, config.solver
    lr = learning_rate(epoch, lr=schedule.lr, milestones=schedule.milestones, gamma=schedule.gamma)
    run.solver.set_lr(lr)
    run.distiller.train()
    resumed_images, seconds_before = progress.step * config.data.batch_size, progress.seconds
    started = time.perf_counter()
    finished = train_epoch(
        run.distiller,
        run.solver,
        run.dataset,
        progress,
        seed=config.seed,
        batch_size=config.data.batch_size,
        device=run.device,
        stop=lambda: request.signal is not None,
    )
    try:
        train = progress.sums.read(epoch)  # the one place where the host waits for the epoch's last step
    except RunFailed as error:
        raise RunFailed(f"{error}; {_last_good(folder)}") from None
    trained = time.perf_counter()
    progress.seconds = seconds_before + trained - started
    if not finished:
        _save(run, config, folder, progress)
        raise Stopped(
            f"{request.signal}: stopped after step {progress.step} of epoch {epoch}, saved to {folder.checkpoint};"
            " go on with --resume"
        )
    line: dict[str, Any] = {
        "epoch": epoch,
        "lr": lr,
        "train/loss": train.loss,
        **{f"train/loss_{name}": value for name, value in train.terms.items()},
        "train/top1": train.top1,
        "images_per_second": (train.images - resumed_images) / (trained - started),
        **_evaluate(run, config),
        "seconds/train": progress.seconds,
        "seconds/eval": time.perf_counter() - trained,
    }
    headline = run.dataset.splits[0]
    if not progress.best or line[f"{headline}/top1"] > progress.best["top1"]:
        progress.best = {"epoch": epoch, "split": headline, "top1": line[f"{headline}/top1"]}
    line |= {"best/epoch": progress.best["epoch"], "best/top1": progress.best["top1"]}
    progress.epoch, progress.step, progress.seconds, progress.sums = epoch + 1, 0, 0.0, EpochSums(run.device)
    folder.log(line)  # before the checkpoint: a kill between the two repeats the epoch and drops this line
    _save(run, config, folder, progress)
    _export(run.distiller, folder)
    say(_epoch_line(line, config.solver.epochs, headline))
    if request.signal is not None and epoch < config.solver.epochs:
        raise Stopped(
            f"{request.signal}: stopped after epoch {epoch}, saved to {folder.checkpoint}; go on with --resume"
        )


def _evaluate(run: Experiment, config: Config) -> dict[str, float]:
    """Every student on every split; the first is the headline, the keys of the others start with their name."""
    results: dict[str, float] = {}
    for number, (name, student) in enumerate(run.distiller.students().items()):
        prefix = f"{name}/" if number else ""
        for split in run.dataset.splits:
            result = evaluate(student, run.dataset, split, batch_size=config.data.eval_batch_size)
            results |= {f"{prefix}{split}/{key}": getattr(result, key) for key in ("top1", "top5", "loss")}
    return results


def _save(run: Experiment, config: Config, folder: RunFolder, progress: Progress) -> None:
    checkpoint.save(
        folder.checkpoint, run.distiller, run.solver, progress, config=config, fingerprints=run.fingerprints
    )


def _export(distiller: Distiller, folder: RunFolder) -> None:
    for name, student in distiller.students().items():
        save_weights(folder.path / f"{name}.pt", student.state_dict())


def _last_good(folder: RunFolder) -> str:
    if folder.checkpoint.exists():
        return f"{folder.checkpoint} keeps the state before this epoch"
    return "there was no checkpoint yet; try a smaller solver.lr"


def _start_line(folder: RunFolder, progress: Progress, epochs: int) -> str:
    if progress.epoch > epochs:
        return f"{folder.path} is complete: {epochs} of {epochs} epochs"
    if progress.epoch == 1 and progress.step == 0:
        return f"writing to {folder.path}"
    return f"resuming {folder.path} at epoch {progress.epoch}, step {progress.step}"


def _end_line(line: Mapping[str, Any], headline: str, folder: RunFolder) -> str:
    return (
        f"{headline} top-1 {line[f'{headline}/top1']:.2f} after the last epoch, {line['epoch']}"
        f" (best {line['best/top1']:.2f} after epoch {line['best/epoch']}); network: {folder.student}"
    )


def _epoch_line(line: Mapping[str, Any], epochs: int, headline: str) -> str:
    terms = " + ".join(
        f"{key.removeprefix('train/loss_')} {value:.4g}" for key, value in line.items() if key.startswith("train/loss_")
    )
    return (
        f"epoch {line['epoch']}/{epochs}  lr {line['lr']:g}  loss {line['train/loss']:.4f} ({terms})"
        f"  train top-1 {line['train/top1']:.2f}"
        f"  {headline} top-1 {line[f'{headline}/top1']:.2f}  top-5 {line[f'{headline}/top5']:.2f}"
        f"  best {line['best/top1']:.2f} @ {line['best/epoch']}  {line['images_per_second']:.0f} images/s"
    )
