"""Training, read from top to bottom: one step, one epoch, the run.

A trial is one seed of a configuration; several advance step by step in turn. Epochs count over all phases of a run;
``trial.solver``, ``trial.averages`` and what the method computes are those of the phase under way. Nothing waits for
the device before the end of an epoch, and files are written in a thread while the next epoch trains.
"""

import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch

from mdistill import distributed
from mdistill.engine.active_trial import ActiveTrial, raise_errors
from mdistill.engine.build import Experiment
from mdistill.engine.class_distances import ClassDistances
from mdistill.engine.console import StepBar, StopRequest, peak_memory_line, print_line
from mdistill.engine.cuda_graph import Engine
from mdistill.engine.run_folder import RunFolder, read_metrics
from mdistill.engine.teacher import describe
from mdistill.errors import Stopped


def train_step(trial: ActiveTrial, size: int) -> None:
    """One step on the next ``size`` images. It reads and writes device memory alone, so it can be captured."""
    batch = trial.loader.batch(size)
    output = trial.distiller(batch, trial.epoch)
    trial.solver.step(output)
    with torch.no_grad():
        trial.distiller.after_step(output.signals)
        for average in trial.averages.values():
            average.update(trial.student, trial.epoch)
        trial.metrics.update(output)


def advance(trial: ActiveTrial, step: int) -> None:
    """Launch ``step`` (from 0) of the epoch under way."""
    size = trial.loader.fetch(step)
    trial.set_rate(step)
    trial.run(train_step, size)  # as one CUDA graph, once it is captured
    trial.step_done()


def train_epoch(trials: Sequence[ActiveTrial], epoch: int, stop: StopRequest) -> None:
    """Train every trial on what is left of ``epoch``, at most until a stop is asked for or a checkpoint is due."""
    for trial in trials:
        with trial.guarded():
            trial.begin_epoch(epoch)
    first = min(trial.progress.step for trial in trials)
    with StepBar(trials[0].loader.steps, first, f"epoch {epoch}", trials[0].device) as bar:
        for step in range(first, trials[0].loader.steps):
            save_due = step > first and trials[0].is_save_due()
            if distributed.highest(stop.number or save_due):  # on any process
                break
            for trial in trials:
                if trial.ended is None and trial.progress.step == step:  # one that was resumed further on waits
                    with trial.guarded():
                        advance(trial, step)
            with trials[0].stream:
                bar.advance()


def end_epoch(trial: ActiveTrial, epoch: int, stop: StopRequest) -> None:
    """Evaluate, log and save; in the middle of an epoch, which then goes on, only save.

    Raises:
        Stopped: a stop was asked for; everything is saved.
        RunFailed: a loss or a teacher's logit is not finite; the last good checkpoint stays.
    """
    finished = trial.progress.step == trial.loader.steps
    trial.end_training()
    evaluations = trial.launch_evaluations(epoch) if finished else {}
    if finished and epoch < trial.config.epochs:
        trial.loader.prepare(epoch + 1)  # while the device is at work
    results = trial.collect_results(epoch, evaluations)  # here the host waits for the epoch's last step
    if finished:
        trial.complete_epoch(results)  # after the last one of a phase, the next one begins, with a fresh solver
    trial.save(results if finished else None)
    asked = distributed.highest(stop.number)
    if asked and trial.progress.epoch <= trial.config.epochs:
        trial.writer.wait()
        done = f"step {trial.progress.step} of epoch {epoch}" if trial.progress.step else f"epoch {epoch}"
        when = "after" if finished or trial.progress.step else "before"
        name = signal.Signals(asked).name
        raise Stopped(f"{name}: stopped {when} {done}, saved to {trial.folder.checkpoint}; continue with --resume")


def provide_class_distances(source: ClassDistances, trials: Sequence[ActiveTrial], stop: StopRequest) -> None:
    """Write the distances of the teacher's classes to the methods of all trials that begin; others resumed with them.

    Raises:
        Stopped: a stop was asked for, of any process, before they were there.
    """

    def stopped() -> None:
        if stop.signal is not None:
            raise Stopped("before the distances were there")  # told below, by all processes

    beginning = [trial for trial in trials if (trial.progress.epoch, trial.progress.step) == (1, 0)]
    if not beginning:
        return
    with distributed.together(), suppress(Stopped):
        distances = source.provide(stopped=stopped)
    if asked := distributed.highest(stop.number):
        name = signal.Signals(asked).name
        raise Stopped(f"{name}: stopped before the first step, while class distances were computed")
    for trial in beginning:
        with trial.stream, torch.no_grad():
            trial.distiller.class_distances.copy_(distances)
            distributed.broadcast_([trial.distiller.class_distances])


def fit(experiment: Experiment, folders: Sequence[RunFolder]) -> list[list[dict[str, Any]]]:
    """Run (or continue) every trial and return its metrics, one dictionary per epoch; one may fail alone.

    Of several processes rank 0 writes and prints, and its metrics alone are complete when this returns.

    Args:
        folders: one for each trial, in the order of ``experiment.trials``.

    Raises:
        Stopped: SIGTERM, SIGHUP or Ctrl-C; the state of every trial is saved at a step boundary.
        RunFailed: a loss or the state is not finite, or the disk is full; the last good checkpoint stays.
    """
    with ExitStack() as stack:
        with distributed.together():
            trials = [
                stack.enter_context(ActiveTrial(experiment, trial, folder, several=len(folders) > 1))
                for trial, folder in zip(experiment.trials, folders, strict=True)
            ]
        for trial in trials:
            trial.agree()
        with distributed.together():
            for trial in trials:  # only now: one trial that cannot be continued leaves the folders of all as they were
                trial.prepare_folder()
        stop = stack.enter_context(StopRequest())  # before the first printed line
        if experiment.teacher_note:
            print_line(f"teacher: {experiment.teacher_note}")
        layout = experiment.metadata.get("memory_format", "as built")
        print_line(f"engine: {trials[0].engine}; precision {trials[0].config.run.precision}; memory format {layout}")
        if experiment.class_distances is not None:
            provide_class_distances(experiment.class_distances, trials, stop)
            experiment.class_distances = None  # and its copy of the teacher
        for trial in trials:
            trial.print_start()
        epochs = trials[0].config.epochs
        for epoch in range(min(trial.progress.epoch for trial in trials), epochs + 1):
            while running := [trial for trial in trials if trial.ended is None and trial.progress.epoch == epoch]:
                with trials[0].telling_what_is_saved():
                    train_epoch(running, epoch, stop)
                    for trial in running:
                        if trial.ended is None:
                            with trial.guarded():
                                end_epoch(trial, epoch, stop)
        for trial in trials:
            with trial.guarded():
                trial.finish()
        print_line(peak_memory_line(experiment.device))
        if experiment.cache is not None and experiment.logit_format is not None:
            print_line(describe(experiment.cache, experiment.logit_format))
        raise_errors(trials)
        return [read_metrics(folder.path) for folder in folders]


def first_epoch(experiment: Experiment, *, whole: bool) -> dict[str, Any]:
    """Do the first steps of the first trial again, or its ``whole`` first epoch, and write nothing.

    Returns:
        the line that a run would log of that epoch; ``first_steps`` is complete in either case.

    Raises:
        RunFailed: a loss or a teacher's logit is not finite.
    """
    trial = ActiveTrial(experiment, experiment.trials[0])
    try:
        trial.agree()
        if experiment.class_distances is not None:
            provide_class_distances(experiment.class_distances, [trial], StopRequest())
        with trial.stream:
            trial.begin_epoch(1)
            for step in range(trial.loader.steps if whole else trial.first_steps.count):
                advance(trial, step)
            trial.end_training()
            return trial.collect_results(1, trial.launch_evaluations(1) if whole else {})
    finally:
        trial.loader.close()
        trial.writer.close()


def dry_run(experiment: Experiment) -> str:
    """Do the first step of each phase of the first trial, write nothing, and describe what it computed.

    Raises:
        RunFailed: a loss term is not finite.
    """
    trial = ActiveTrial(experiment, experiment.trials[0], engine=Engine("eager", "one step"))
    told = []
    for phase in experiment.trials[0].phases:
        trial.enter(phase)
        trial.begin_epoch(phase.before + 1)
        train_step(trial, trial.loader.fetch(0))
        trial.loader.finish()
        result = trial.metrics.read(epoch=phase.before + 1)
        terms = ", ".join(f"{name} {value:.4g}" for name, value in result.terms.items())
        told.append(f"{f'{phase.name}: ' if phase.name else ''}loss {result.loss:.4g} ({terms})")
    trial.loader.close()
    left_out = "" if experiment.class_distances is None else "distances between classes were left at 0 and "
    steps = "one step" if len(told) == 1 else "one step of each phase,"
    return (
        f"dry run: {steps} of {result.images} images on {experiment.device}, {', '.join(told)};"
        f" {left_out}nothing was written"
    )
