"""Training: ``fit`` runs trials, epoch by epoch and step by step; ``train_step`` is one step."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mdistill.data import Batch
from mdistill.distillers import Distiller
from mdistill.engine import checkpoint
from mdistill.engine.build import Experiment, Trial
from mdistill.engine.checkpoint import Progress
from mdistill.engine.console import StepBar, StopRequest, say
from mdistill.engine.cuda_graph import Engine, choose_engine, cuda_graph, own_stream, uncompiled
from mdistill.engine.evaluate import evaluate
from mdistill.engine.metrics import EpochSums
from mdistill.engine.run_folder import RunFolder, environment, read_metrics
from mdistill.engine.stepper import MakeRows, Stepper
from mdistill.engine.teacher import KEPT, TeacherRows, describe
from mdistill.errors import RunFailed, Stopped, UserError
from mdistill.models.weights import save_weights
from mdistill.optim.solvers import Solver


def train_step(distiller: Distiller, solver: Solver, batch: Batch, epoch: Tensor, sums: EpochSums) -> None:
    """One step: forward, backward and update, method state, metrics. Nothing here waits for the device."""
    output = distiller(batch, epoch)
    solver.step(output)
    with torch.no_grad():
        distiller.finish_step()
        sums.update(output)


def fit(run: Experiment, folders: Sequence[RunFolder]) -> list[list[dict[str, Any]]]:
    """Run (or go on with) every trial, step by step in turn, and return its metrics, one dictionary per epoch.

    A trial that fails leaves the others running. ``folders`` are in the order of ``run.trials``.

    Raises:
        Stopped: SIGTERM or Ctrl-C; the state of every trial is saved at a step boundary.
        RunFailed: a loss or the state is not finite, or the disk is full; the last good checkpoint stays.
    """
    with ExitStack() as stack:
        if run.table is not None:
            stack.callback(run.table.close)
        for folder in folders:
            folder.acquire()
            stack.callback(folder.close)
        courses = [
            _Course(run, trial, folder, label=f"seed {trial.config.seed}: " if folders[1:] else "")
            for trial, folder in zip(run.trials, folders, strict=True)
        ]
        for course in courses:  # only now: one trial that cannot go on leaves the folders of all as they were
            course.prepare()
        if run.teacher_note:
            say(f"teacher: {run.teacher_note}")
        engine = courses[0].engine
        say(f"engine: {engine.name} ({engine.reason}); precision {courses[0].config.run.precision}")
        ended = _in_turn(courses)
        say(_memory_line(run.device))
        if run.table is not None:
            say(describe(run.table))
    if len(ended) == 1:
        raise ended[0]
    if ended:
        failed = any(isinstance(error, UserError) for error in ended)
        raise (RunFailed if failed else Stopped)("\n".join(str(error) for error in ended))
    return [course.metrics() for course in courses]


def dry_run(run: Experiment) -> str:
    """Do the first step of the first trial, write nothing, and say what came out.

    Raises:
        RunFailed: a loss term is not finite.
    """
    trial = run.trials[0]
    sums = EpochSums(run.device)
    stepper = make_stepper(run, trial, sums, Engine("eager", "one step"))
    trial.solver.set_lr(trial.config.solver.lr)
    trial.distiller.train()
    stepper.begin(epoch=1, step=0)
    stepper.step(0)
    stepper.finish()
    result = sums.read(epoch=1)
    terms = ", ".join(f"{name} {value:.4g}" for name, value in result.terms.items())
    return (
        f"dry run: one step of {result.images} images on {run.device}, loss {result.loss:.4g} ({terms});"
        " nothing was written"
    )


def make_stepper(run: Experiment, trial: Trial, sums: EpochSums, engine: Engine) -> Stepper:
    """The steps of ``trial``, whose metrics go to ``sums``."""

    def step(batch: Batch, epoch: Tensor) -> None:
        train_step(trial.distiller, trial.solver, batch, epoch, sums)

    make_rows: MakeRows | None = None
    if run.teacher is not None:
        kept = KEPT[trial.config.run.teacher_logits]
        record = cuda_graph() if engine.captures else None
        make_rows = partial(TeacherRows, run.teacher, run.dataset, kept=kept, table=run.table, record=record)
    return Stepper(
        trial.distiller,
        step,
        run.dataset,
        seed=trial.config.seed,
        batch_size=trial.config.data.batch_size,
        mixing=trial.config.data.mixing_settings,
        device=run.device,
        engine=engine,
        make_rows=make_rows,
        say=say,
    )


class _Course:
    """The way of one trial through its epochs, each step a point where others may go on."""

    def __init__(self, run: Experiment, trial: Trial, folder: RunFolder, label: str) -> None:
        self.run, self.trial, self.folder, self.label = run, trial, folder, label
        self.config, self.distiller, self.solver = trial.config, trial.distiller, trial.solver
        progress = Progress(EpochSums(run.device))
        if folder.resumable:
            state = checkpoint.read(folder.checkpoint, self.config, run.fingerprints)
            progress = checkpoint.restore(state, self.distiller, self.solver, run.device)
            if state["versions"]["torch"] != torch.__version__:
                say(f"note: begun under torch {state['versions']['torch']}, so the last bits may differ from here on")
        self.progress = progress
        self.engine = choose_engine(self.config.run.engine, run.device, self.distiller.generators.values())
        self.stepper = make_stepper(run, trial, progress.sums, self.engine)
        self.stream = own_stream(run.device)

    def prepare(self) -> None:
        """Clear or cut back the folder and write what is known by now; nothing is written before."""
        facts, done = {**self.run.facts, "engine": self.engine.name}, self.progress.epoch - 1
        self.folder.prepare(self.config.to_yaml(), environment(self.run.device, facts), epochs_done=done)

    def metrics(self) -> list[dict[str, Any]]:
        """All epochs so far."""
        return read_metrics(self.folder.path)

    def epochs(self, request: StopRequest, *, bar: bool) -> Iterator[None]:
        """Train to the end; yields wherever the device has been given work.

        Raises:
            Stopped, RunFailed: as ``fit``.
        """
        self._say(_start_line(self.folder, self.progress, self.config.solver.epochs))
        while self.progress.epoch <= self.config.solver.epochs:
            yield from self._epoch(request, bar=bar)
        self._export()
        metrics = self.metrics()
        if metrics:
            self._say(_end_line(metrics[-1], self.run.dataset.splits[0], self.folder))

    def _epoch(self, request: StopRequest, *, bar: bool) -> Iterator[None]:
        """One epoch and all that follows it: metrics, evaluation, log line, checkpoint."""
        progress, epoch = self.progress, self.progress.epoch
        lr = self._begin(epoch)
        resumed_images, seconds_before = progress.step * self.config.data.batch_size, progress.seconds
        started = time.perf_counter()
        yield from train_epoch(self.stepper, progress, request, bar=bar, device=self.run.device)
        finished = progress.step == self.stepper.steps
        if finished and epoch < self.config.solver.epochs:
            self.stepper.look_ahead(epoch + 1)  # while the device is at work
        try:
            self.stepper.finish()  # first: a teacher that overflows is the reason for a loss that does
            train = progress.sums.read(epoch)  # here at the latest the host waits for the epoch's last step
        except RunFailed as error:
            raise RunFailed(f"{error}; {_last_good(self.folder)}") from None
        trained = time.perf_counter()
        progress.seconds = seconds_before + trained - started
        if not finished:
            self._save()
            raise Stopped(
                f"{request.signal}: stopped after step {progress.step} of epoch {epoch}, saved to"
                f" {self.folder.checkpoint}; go on with --resume"
            )
        line: dict[str, Any] = {
            "epoch": epoch,
            "lr": lr,
            "train/loss": train.loss,
            **{f"train/loss_{name}": value for name, value in train.terms.items()},
            "train/top1": train.top1,
            "images_per_second": (train.images - resumed_images) / (trained - started),
            **self._evaluate(epoch),
            "seconds/train": progress.seconds,
            "seconds/eval": time.perf_counter() - trained,
        }
        headline = self.run.dataset.splits[0]
        top1 = line.get(f"{headline}/top1")
        if top1 is not None and (not progress.best or top1 > progress.best["top1"]):
            progress.best = {"epoch": epoch, "split": headline, "top1": top1}
        if progress.best:
            line |= {"best/epoch": progress.best["epoch"], "best/top1": progress.best["top1"]}
        progress.next_epoch()
        self.folder.log(line)  # before the checkpoint: a kill between the two repeats the epoch and drops this line
        self._save()
        self._export()
        self._say(_epoch_line(line, self.config.solver.epochs, headline))
        if request.signal is not None and epoch < self.config.solver.epochs:
            raise Stopped(
                f"{request.signal}: stopped after epoch {epoch}, saved to {self.folder.checkpoint}; go on with --resume"
            )

    def _begin(self, epoch: int) -> float:
        lr = self.config.solver.rate(epoch)
        self.solver.set_lr(lr)
        self.distiller.train()
        self.stepper.begin(epoch, self.progress.step)
        return lr

    def _evaluate(self, epoch: int) -> dict[str, float]:
        """Every student on every split; the first is the headline, the keys of the others start with their name."""
        results: dict[str, float] = {}
        config = self.config
        if epoch % config.run.evaluate_every and epoch != config.solver.epochs:
            return results
        for number, (name, student) in enumerate(self.distiller.students().items()):
            prefix = f"{name}/" if number else ""
            for split in self.run.dataset.splits:
                with uncompiled() if self.engine.name == "compile" else nullcontext():
                    result = evaluate(
                        student,
                        self.run.dataset,
                        split,
                        batch_size=config.data.eval_batch_size,
                        precision=config.run.precision,
                    )
                results |= {f"{prefix}{split}/{key}": getattr(result, key) for key in ("top1", "top5", "loss")}
        return results

    def _save(self) -> None:
        checkpoint.save(
            self.folder.checkpoint,
            self.distiller,
            self.solver,
            self.progress,
            config=self.config,
            fingerprints=self.run.fingerprints,
        )

    def _export(self) -> None:
        for name, student in self.distiller.students().items():
            save_weights(self.folder.path / f"{name}.pt", student.state_dict())

    def _say(self, message: str) -> None:
        say(f"{self.label}{message}")


def train_epoch(
    stepper: Stepper, progress: Progress, request: StopRequest, *, bar: bool, device: torch.device
) -> Iterator[None]:
    """Train on what is left of the epoch, at most until a stop is asked for; yields after each step.

    The host never waits for the device.
    """
    shown = StepBar(stepper.steps, progress.step, f"epoch {progress.epoch}", device) if bar else None
    try:
        while progress.step < stepper.steps and request.signal is None:
            stepper.step(progress.step)
            progress.step += 1
            if shown is not None:
                shown.advance()
            yield
    finally:
        if shown is not None:
            shown.close()


def _in_turn(courses: Sequence[_Course]) -> list[UserError | Stopped]:
    """Let every course do one step after the other; returns what ended those that did not reach their end."""
    ended: list[UserError | Stopped] = []
    with StopRequest() as request:
        live = [(course, course.epochs(request, bar=number == 0)) for number, course in enumerate(courses)]
        while live:
            for member in tuple(live):
                course, steps = member
                try:
                    with course.stream:
                        next(steps)
                except StopIteration:
                    live.remove(member)
                except (UserError, Stopped) as error:
                    live.remove(member)
                    ended.append(type(error)(f"{course.label}{error}"))
    return ended


def _memory_line(device: torch.device) -> str:
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = f"peak memory: {host / 2**20:.0f} MiB on the host"
    if device.type == "cuda":
        line += f", {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the device"
    return line


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
    evaluated = ""
    if f"{headline}/top1" in line:
        further = [key.split("/")[0] for key in line if key.endswith(f"/{headline}/top1")]  # students
        beside = "".join(f"  {name} {line[f'{name}/{headline}/top1']:.2f}" for name in further)
        evaluated = (
            f"  {headline} top-1 {line[f'{headline}/top1']:.2f}  top-5 {line[f'{headline}/top5']:.2f}"
            f"{beside}  best {line['best/top1']:.2f} @ {line['best/epoch']}"
        )
    return (
        f"epoch {line['epoch']}/{epochs}  lr {line['lr']:g}  loss {line['train/loss']:.4f} ({terms})"
        f"  train top-1 {line['train/top1']:.2f}{evaluated}  {line['images_per_second']:.0f} images/s"
    )
