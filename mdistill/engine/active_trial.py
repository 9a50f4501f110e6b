"""A trial on its way through the epochs: where it is, and what it reads, writes and prints."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mdistill import distributed
from mdistill.config import Config, cell_identity
from mdistill.data.loader import BatchLoader
from mdistill.data.sampling import derive_seed
from mdistill.distributed import PeerLost
from mdistill.engine import checkpoint
from mdistill.engine.build import Experiment, Phase, Trial
from mdistill.engine.checkpoint import Snapshot, Writer
from mdistill.engine.console import Stopwatch, end_line, epoch_line, print_line, start_line
from mdistill.engine.cuda_graph import CapturedStep, Engine, choose_engine, compile_network, side_stream, uncompiled
from mdistill.engine.evaluate import LaunchedEvaluation, launch_evaluation
from mdistill.engine.first_steps import FirstSteps
from mdistill.engine.metrics import RunningMetrics
from mdistill.engine.run_folder import MEND, RunFolder, environment, read_metrics, read_sessions
from mdistill.engine.teacher import TeacherLogits
from mdistill.errors import RunFailed, Stopped, UserError
from mdistill.file_schemas import Best, Progress
from mdistill.models.layers import draws_in_training
from mdistill.models.memory_format import to_layout
from mdistill.models.weights import save_weights


class ActiveTrial:
    """A ``Trial`` with its batch loader, running metrics, place in the run, and run folder.

    As a context it holds the folder's lock; leaving it waits for what is being written.

    Args:
        folder: where it writes, and resumes from; None for steps alone.
        engine: how steps are launched; None for what the configuration asks.
        several: whether other trials run beside this one, so that lines name its seed.

    Attributes:
        phase: the stretch of epochs under way; ``solver``, ``metrics`` and ``averages`` are of it alone.
        epoch: (), the epoch under way, on the device.
        stream: a context in which the trial's work is launched, on CUDA a stream of its own.
        ended: what stopped the trial before its last epoch.
    """

    def __init__(
        self,
        experiment: Experiment,
        trial: Trial,
        folder: RunFolder | None = None,
        *,
        engine: Engine | None = None,
        several: bool = False,
    ) -> None:
        self.experiment, self.config, self.device = experiment, trial.config, experiment.device
        self.distiller, self.students, self._trial, self._folder = trial.distiller, trial.students, trial, folder
        self.student = next(iter(self.students.values()))
        self._label = f"seed {trial.config.seed}: " if several else ""
        self.progress = Progress()
        self.epoch: Tensor = torch.ones((), dtype=torch.int64, device=self.device)
        self.engine = engine or choose_engine(self.config.run.engine, self.device)
        make_logits = None
        if experiment.teacher is not None and experiment.logit_format is not None:
            make_logits = partial(
                TeacherLogits,
                experiment.teacher,
                experiment.dataset,
                form=experiment.logit_format,
                cache=experiment.cache,
                capture=self.engine.captures,
            )
        self.loader = BatchLoader(
            experiment.dataset,
            seed=self.config.seed,
            batch_size=self.config.data.batch_size,
            device=self.device,
            strong=self.distiller.needs.views > 1,
            mixing=self.config.data.mixing_settings,
            teacher_logits=make_logits,
        )
        self.first_steps = FirstSteps(self.device, self.loader.steps)
        self.writer = Writer(self.device)
        self.ended: UserError | Stopped | None = None
        self._draws = draws_in_training(self.distiller)
        self._clock = Stopwatch(self.device)
        self._saved_at = time.monotonic()
        self._saved: Progress | None = None  # where the checkpoint stands
        if self.engine.name == "compile":
            self._compile()
        self.enter(trial.phases[0])
        self.stream = side_stream(self.device)  # behind all of the above

    def enter(self, phase: Phase) -> None:
        """Begin a phase: its solver is fresh, its step is captured anew, and averages are of the last one alone."""
        self.phase, self.solver = phase, phase.solver
        self.averages = self._trial.averages if phase.name is None else {}
        self.metrics = RunningMetrics(self.device)
        self._step: CapturedStep | None = None  # what ``run`` was first given
        phase.enter(self.distiller)

    @property
    def folder(self) -> RunFolder:
        """Where it writes."""
        assert self._folder is not None
        return self._folder

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes, of several that train together."""
        return distributed.rank() == 0

    def __enter__(self) -> "ActiveTrial":
        """Lock the folder and read its checkpoint; the folder stays as it was."""
        with ExitStack() as undo:
            undo.push(self)  # a folder whose checkpoint is refused is given up again
            if self.writes:
                self.folder.acquire(self.students)
            if self.folder.resumable:
                path, steps = self.folder.checkpoint, self.loader.steps
                saved = checkpoint.read(path, self.config, self.experiment.fingerprints, steps=steps)
                self.enter(phase := self._trial.phase(saved.progress.epoch))
                checkpoint.restore(
                    saved,
                    path,
                    self.distiller,
                    self.averages,
                    self.solver,
                    self.metrics,
                    terms=phase.terms,
                    epochs_before=phase.before,
                    first_steps=self.first_steps,
                )
                self.progress, self._saved = saved.progress, saved.progress.model_copy()
                self._tell_what_differs(saved.versions.torch)
            undo.pop_all()
        self.stream = side_stream(self.device)  # behind what was restored
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = isinstance(error, PeerLost)  # after which a CUDA device may wait for the lost one for ever
        with ExitStack() as closing:  # the last one first, whatever goes wrong on the way
            closing.callback(self.folder.close)
            closing.callback(self.writer.close)
            closing.callback(self.loader.close, wait=not lost)
            closing.enter_context(suppress(UserError))  # already reported
            closing.enter_context(self.stream)
            if not lost:
                self.loader.finish()  # what the teacher has computed is not lost
                self._step = None  # NCCL's communicator cannot be destroyed while a captured graph uses it

    def set_rate(self, step: int) -> None:
        """The learning rate of ``step`` of the epoch under way, from 0, where a warm-up gives each step its own."""
        epoch, settings = self.progress.epoch - self.phase.before, self.phase.settings
        if epoch <= settings.lr_warmup_epochs:
            self.solver.set_lr(settings.rate(epoch, (step + 1) / self.loader.steps))

    def run(self, step: "Callable[[ActiveTrial, int], None]", size: int) -> None:
        """``step(self, size)``, always the same one; on CUDA it is captured after a few calls and then replayed.

        What a network draws by itself in a step (dropout) is a function of (seed, epoch, step, rank): torch's global
        generator, which it draws from, begins anew. A captured step reads that generator's seed when it is replayed.
        """
        if self._draws:
            stream = f"epoch {self.progress.epoch} step {self.progress.step} rank {distributed.rank()}"
            seed_generators(derive_seed(self.config.seed, stream), self.device)
        if self._step is None:
            self._step = CapturedStep(
                partial(step, self),
                self.loader.batch_size,
                capture=self.engine.captures,
                name="step",
                compiled=self.engine.name == "compile",
            )
        self._step(size)

    def step_done(self) -> None:
        """A step of the epoch under way has been launched."""
        self.progress.step += 1
        if self.progress.epoch == 1:
            self.first_steps.note(self.progress.step, self.metrics, self.distiller)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """On the trial's own stream; an error that ends the trial is noted, and other trials go on.

        Of several processes none goes on alone: the others would wait for it.
        """
        try:
            with self.stream:
                yield
        except (UserError, Stopped) as error:
            if isinstance(error, RunFailed) and self.writes:
                self.folder.note_failure(str(error))
            if distributed.world_size() > 1:
                raise
            self.ended = type(error)(f"{self._label}{error}")

    @contextmanager
    def telling_what_is_saved(self) -> Iterator[None]:
        """Within, the loss of another process is told with where the run can be resumed."""
        try:
            yield
        except PeerLost as error:
            saved = "nothing was saved before"
            if self._saved is not None:
                place = f"step {self._saved.step} of epoch {self._saved.epoch}"
                saved = f"{self.folder.checkpoint} has {place}; continue with --resume"
            raise PeerLost(f"{error}; {saved}") from error

    def prepare_folder(self) -> None:
        """Clear or cut back the folder and write what is known by now; nothing is written before."""
        if not self.writes:
            return
        noted = session(self.experiment, self.config, self.engine)
        self.folder.prepare(self.config.to_yaml(), noted, epochs_done=self.progress.epoch - 1)

    def agree(self) -> None:
        """Let processes that train together start from rank 0's state, which they have read or drawn themselves.

        Raises:
            UserError: they stand at different steps, so that they do not see the same files.
        """
        if distributed.world_size() == 1:
            return
        own, other = ((place.epoch, place.step) for place in (self.progress, distributed.of_rank_0(self.progress)))
        with distributed.together():
            if own != other:
                raise UserError(
                    f"{self.folder.checkpoint}: this process stands at step {own[1]} of epoch {own[0]}, process 0 at"
                    f" step {other[1]} of epoch {other[0]}: all machines have to see the same --output"
                )
        parameters = [value for name, value in self.distiller.named_parameters() if not name.startswith("teacher.")]
        distributed.broadcast_([*parameters, *self._buffers()])

    def print_start(self) -> None:
        """What this session begins with."""
        self._print(start_line(self.folder, self.progress, self.config.epochs, self.phase.name))

    # ---- an epoch ----

    def is_save_due(self) -> bool:
        """Whether the state that is saved is older than ``run.checkpoint_minutes``; asked on the rank that writes."""
        return self.writes and time.monotonic() - self._saved_at > 60 * self.config.run.checkpoint_minutes

    def begin_epoch(self, epoch: int) -> None:
        """Set rate, mode and batches for what is left of ``epoch``."""
        self.solver.set_lr(self.phase.settings.rate(epoch - self.phase.before))
        self.epoch.fill_(epoch)
        self.distiller.train()
        self.loader.begin(epoch, self.progress.step)
        self._images_before = self.progress.step * self.config.data.batch_size
        self._clock.start()

    def end_training(self) -> None:
        """The steps are launched: stop the clock, and let processes that train together agree on buffers.

        Their BatchNorm statistics differ; those of rank 0 are evaluated and saved, and training reads none.
        """
        self._clock.stop()
        distributed.broadcast_(self._buffers())

    def launch_evaluations(self, epoch: int) -> dict[str, LaunchedEvaluation]:
        """Every student on every split, where ``epoch`` is evaluated; the host does not wait.

        A first phase is not evaluated: nothing has trained the classifier yet. The first student is the headline; the
        keys of the others start with their name.
        """
        config = self.config
        if self.phase.name is not None or (epoch % config.run.evaluate_every and epoch != config.epochs):
            return {}
        launched = {}
        for number, (name, student) in enumerate(self.students.items()):
            prefix = f"{name}/" if number else ""
            for split in self.experiment.dataset.splits:
                with uncompiled() if self.engine.name == "compile" else nullcontext():
                    launched[f"{prefix}{split}"] = launch_evaluation(
                        student,
                        self.experiment.dataset,
                        split,
                        batch_size=config.data.eval_batch_size,
                        precision=config.run.precision,
                    )
        return launched

    def collect_results(self, epoch: int, evaluations: Mapping[str, LaunchedEvaluation]) -> dict[str, Any]:
        """The epoch's line of metrics so far. Here the host waits for the device.

        Raises:
            RunFailed: a loss, or a logit of the teacher, is not finite.
        """
        try:
            distributed.meet()
            with distributed.together():
                self.loader.finish()  # first: a teacher that overflows is the reason for a loss that does
            train = self.metrics.read(epoch)
            evaluated = {name: launched.read() for name, launched in evaluations.items()}
        except PeerLost:
            raise
        except RunFailed as error:
            raise RunFailed(f"{error}; {self._last_good()}") from None
        seconds = self._clock.seconds()
        self.progress.seconds += seconds
        results: dict[str, Any] = {
            "epoch": epoch,
            **({} if self.phase.name is None else {"phase": self.phase.name}),
            "lr": self.phase.settings.rate(epoch - self.phase.before),
            "train/loss": train.loss,
            **{f"train/loss_{name}": value for name, value in train.terms.items()},
            **({"train/top1": train.top1} if self.phase.name is None else {}),
            "images_per_second": (train.images - self._images_before) / max(seconds, 1e-9),
        }
        if epoch == 1 and (first_steps := self.first_steps.read(self.metrics)) is not None:
            results["first_steps"] = first_steps
        for name, evaluation in evaluated.items():
            results |= {f"{name}/{key}": getattr(evaluation, key) for key in ("top1", "top5", "loss")}
        return results | {"seconds/train": self.progress.seconds, "seconds/eval": self._clock.seconds_since_stop()}

    def complete_epoch(self, results: dict[str, Any]) -> None:
        """Note the best epoch in ``results``, and stand before the next epoch, which may begin another phase."""
        progress, headline = self.progress, self.experiment.dataset.splits[0]
        top1 = results.get(f"{headline}/top1")
        if top1 is not None and (progress.best is None or top1 > progress.best.top1):
            progress.best = Best(epoch=results["epoch"], split=headline, top1=top1)
        if progress.best is not None:
            results |= {"best/epoch": progress.best.epoch, "best/top1": progress.best.top1}
        self.progress = Progress(epoch=progress.epoch + 1, best=progress.best)
        self.metrics.reset()
        phase = self._trial.phase(self.progress.epoch)
        if phase is not self.phase:
            self.enter(phase)

    def save(self, results: Mapping[str, Any] | None) -> None:
        """Copy the state as it is; a thread logs ``results``, if there are any, and writes checkpoint and students.

        In this order: a kill between the two repeats the epoch and drops its line. An epoch that is printed is saved.

        Raises:
            RunFailed: what was to be written before could not be.
        """
        metrics = self.metrics.state_dict()
        first_steps = self.first_steps.state_dict() if self.progress.epoch == 1 else None
        self._saved_at, self._saved = time.monotonic(), self.progress.model_copy()
        if not self.writes:
            return
        state = checkpoint.state_of(
            self.distiller,
            self.averages,
            self.solver,
            self.progress,
            metrics,
            config=self.config,
            fingerprints=self.experiment.fingerprints,
            first_steps=first_steps,
        )
        trained = results is not None and "phase" not in results
        students = {name: student.state_dict() for name, student in self.students.items() if trained}
        self.writer.wait()  # one copy at a time in memory
        self.writer.submit(partial(self._write, Snapshot({"state": state, "students": students}), results))

    def finish(self) -> None:
        """Wait for what is being written, and tell how the run ended."""
        self.writer.wait()
        if not self.writes or self.ended is not None:
            return
        self._export({name: student.state_dict() for name, student in self.students.items()})
        metrics = read_metrics(self.folder.path)
        if metrics:
            self._print(end_line(metrics[-1], self.experiment.dataset.splits[0], self.folder))

    def _write(self, snapshot: Snapshot, results: Mapping[str, Any] | None) -> None:
        copied = snapshot.get()
        if results is not None:
            self.folder.log(results)
        checkpoint.write(self.folder.checkpoint, copied["state"])
        if results is not None:
            self._export(copied["students"])
            self._print(epoch_line(results, self.config.epochs, self.experiment.dataset.splits[0]))

    def _export(self, students: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, state in students.items():
            save_weights(self.folder.path / f"{name}.pt", state)

    def _buffers(self) -> list[Tensor]:
        own = [value for name, value in self.distiller.named_buffers() if not name.startswith("teacher.")]
        return [*own, *(value for average in self.averages.values() for value in average.state_dict().values())]

    def _compile(self) -> None:
        self._trial.phases[-1].enter(self.distiller)  # which trains the student
        size = self.experiment.dataset.image_size
        blank = torch.zeros(self.loader.own_batch_size, 3, size, size, device=self.device)
        compiled = compile_network(
            self.distiller.train().student,
            to_layout(self.distiller.student, blank),
            self.config.run.precision,
            features=self.distiller.needs_now.student_features,
        )
        if not compiled:
            self.engine = choose_engine("auto", self.device)

    def _print(self, message: str) -> None:
        print_line(f"{self._label}{message}")

    def _tell_what_differs(self, torch_before: str) -> None:
        """What makes the rest of a resumed run another than it would have been."""
        if torch_before != torch.__version__:
            self._print(f"note: started under torch {torch_before}; the last bits may differ from here on")
        sessions, now = read_sessions(self.folder.path, MEND), distributed.world_size()
        before = sessions[-1].get("processes", 1) if sessions else now
        if before != now:
            has_statistics = any(isinstance(each, _BatchNorm) for each in self.distiller.student.modules())
            how = (
                "BatchNorm normalises by the images of one process, so the result differs from here on"
                if has_statistics
                else "sums are ordered otherwise, so the last bits differ from here on"
            )
            self._print(f"note: processes that train together: {before} before, {now} now; {how}")

    def _last_good(self) -> str:
        if self._folder is None:
            return "nothing is written"
        if self.folder.checkpoint.exists():
            return f"{self.folder.checkpoint} keeps the last good state"
        return "there was no checkpoint yet; try a smaller solver.lr"


def session(experiment: Experiment, config: Config, engine: Engine) -> dict[str, Any]:
    """What a session of a run records of itself: its environment, data and teacher, and how steps are launched."""
    cell = cell_identity(config, experiment.fingerprints)
    metadata = {**experiment.metadata, "engine": engine.name, "cell": cell, "seed": config.seed}
    return environment(experiment.device, metadata, modules=config.imports)


def raise_errors(trials: Sequence[ActiveTrial]) -> None:
    """Raise the error that ended a trial, or one that names all of them."""
    ended = [trial.ended for trial in trials if trial.ended is not None]
    if len(ended) == 1:
        raise ended[0]
    if ended:
        failed = any(isinstance(error, UserError) for error in ended)
        raise (RunFailed if failed else Stopped)("\n".join(str(error) for error in ended))


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's global generators, that of the CPU and that of ``device``."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda" and torch.cuda.default_generators:
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
