"""The state of a run at a step boundary: saved whole or not at all, and never when it is not finite."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdistill import __version__, distributed
from mdistill.config import Config, changes, differences
from mdistill.distillers import Distiller
from mdistill.engine.first_steps import FirstSteps
from mdistill.engine.metrics import RunningMetrics
from mdistill.errors import RunFailed, UserError, printable, shown
from mdistill.file_schemas import Checkpoint, Progress, checked
from mdistill.files import atomic_write
from mdistill.models.torch_files import read_file
from mdistill.models.weights import tensor_misfit
from mdistill.optim.averaging import AveragedNetwork
from mdistill.optim.solvers import Solver

FORMAT = 2


def state_of(
    distiller: Distiller,
    averages: Mapping[str, AveragedNetwork],
    solver: Solver,
    progress: Progress,
    metrics: Mapping[str, Any],
    *,
    config: Config,
    fingerprints: Mapping[str, str],
    first_steps: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """All that the next step depends on, but the teacher; tensors are the live ones.

    Args:
        metrics: the state of the running ones.
        fingerprints: of what the run depends on and a checkpoint does not hold: the data, the teacher's weights.
        first_steps: what is recorded of them so far, in the middle of the first epoch.
    """
    return {
        "format": FORMAT,
        "model": _without_teacher(distiller),
        "averages": {name: average.state_dict() for name, average in averages.items()},
        "solver": solver.state_dict(),
        "progress": progress.model_dump(),
        "metrics": dict(metrics),
        "config": config.resolved(),
        "fingerprints": dict(fingerprints),
        "versions": {"mdistill": __version__, "torch": str(torch.__version__)},
        **({} if first_steps is None else {"first_steps": dict(first_steps)}),
    }


class Snapshot:
    """A copy of a nest of containers with its tensors on the host; on CUDA they arrive while the device goes on."""

    def __init__(self, state: Any) -> None:
        self._event: torch.cuda.Event | None = None
        self._state = self._copy(state)
        if self._event is not None:
            self._event.record()

    def get(self) -> Any:
        """The copy, once it is complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._state

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device.type != "cuda":
                return value.detach().clone()
            self._event = self._event or torch.cuda.Event()  # type: ignore[no-untyped-call]
            host = torch.empty_like(value, device="cpu", pin_memory=True)
            return host.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._copy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item) for item in value)
        return value


class Writer:
    """Writes files in a thread, one job after the other, while training goes on.

    What a job raises is raised again by the next ``submit`` or ``wait``.

    Args:
        device: what the jobs wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, "mdistill-write", distributed.begin_helper_thread, (device,))
        self._last: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Do ``job`` once the one before it has ended well."""
        self.wait()
        self._last = self._thread.submit(job)

    def wait(self) -> None:
        """Until everything is written."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """End the thread, after the job at hand."""
        self._thread.shutdown(wait=True)


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a ``state_of`` whose tensors are on the host, all or nothing.

    Raises:
        RunFailed: a parameter, buffer or optimiser state is not finite (the old file stays), or the disk is full.
    """
    _require_finite({key: state[key] for key in ("model", "averages", "solver")}, path)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:  # by name, torch hides why a write failed
        torch.save(state, file)


def read(path: Path, config: Config, fingerprints: Mapping[str, str], *, steps: int) -> Checkpoint:
    """Read a checkpoint and make sure that it belongs to this run.

    Args:
        steps: in an epoch.

    Raises:
        UserError: unreadable or damaged; beyond the run or the epoch; of a configuration with other results (names the
            keys; only solver.epochs may have grown, and not under a cosine schedule), other data or another teacher.
    """
    state = read_file(path)
    if isinstance(state, dict) and state.get("format") == 1:
        raise UserError(
            f"{path}: a training state in format 1, of an earlier version, cannot be resumed by mdistill {__version__}:"
            " finish the run with the version that began it (env.json names its commit), or start again with"
            " --overwrite or another --output"
        )
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a training state in format {FORMAT}, the one that this version resumes from")
    saved = checked(Checkpoint, state, path, "start again with --overwrite, or put back a copy of it")
    changed = changes(saved.config, config) | differences({"seed": saved.config.get("seed")}, {"seed": config.seed})
    grows = config.solver.schedule != "cosine"  # whose every epoch depends on their number
    epochs = changed.get("solver.epochs", (None, None))[0]
    if grows and isinstance(epochs, int) and epochs < config.solver.epochs:
        del changed["solver.epochs"]
    if changed:
        listed = "; ".join(f"{key}: was {shown(was)}, now {shown(now)}" for key, (was, now) in [*changed.items()][:8])
        raise UserError(
            f"{path}: cannot resume with another configuration ({listed});"
            f" {'only solver.epochs may grow' if grows else 'under a cosine schedule not even solver.epochs may grow'}."
            " Undo the change, or start again with --overwrite or another --output"
        )
    for what in sorted({*saved.fingerprints, *fingerprints}):
        old, new = saved.fingerprints.get(what, "none"), fingerprints.get(what, "none")
        if old != new:
            raise UserError(
                f"{path}: cannot resume with another {what}: its fingerprint was {old[:12]}, it is now {new[:12]}"
            )
    epoch, step = saved.progress.epoch, saved.progress.step
    if epoch > config.epochs + 1 or step >= (steps if epoch <= config.epochs else 1):
        raise UserError(
            f"{path} is damaged: it stands at step {step} of epoch {epoch}, and the run has {config.epochs}"
            f" epochs of {steps} steps"
        )
    return saved


def restore(
    saved: Checkpoint,
    path: Path,
    distiller: Distiller,
    averages: Mapping[str, AveragedNetwork],
    solver: Solver,
    metrics: RunningMetrics,
    *,
    terms: Sequence[str],
    epochs_before: int = 0,
    first_steps: FirstSteps,
) -> None:
    """Put a state from ``read`` back where it was; all of it is compared with where it goes before any is loaded.

    Args:
        terms: names of the loss terms.
        epochs_before: in the phases before the one that ``solver`` is of.
        first_steps: where the record of them goes on, if there is one.

    Raises:
        UserError: names, shapes or types are not those of this method, network and solver; or a value is not finite.
    """
    content = vars(saved)
    own = {name: average.state_dict() for name, average in averages.items()}
    problem = (
        _misfit("model", saved.model, _without_teacher(distiller))
        or _misfit("averages", saved.averages, own)
        or solver.misfit(saved.solver, stepped=(saved.progress.epoch, saved.progress.step) > (epochs_before + 1, 0))
        or metrics.misfit(vars(saved.metrics), terms)
    )
    record = None if saved.first_steps is None else vars(saved.first_steps)
    if record is not None:
        problem = problem or first_steps.misfit(record, saved.progress, len(saved.metrics.names))
    if problem:
        raise UserError(f"{path} does not fit this run, or is damaged: {problem}")
    parts = ("model", "averages", "solver")
    bad = _not_finite(
        {**{key: content[key] for key in parts}, "metrics": vars(saved.metrics), "first_steps": record or {}}
    )
    if bad:
        raise UserError(f"{path} is damaged: NaN or infinite values in {bad}")
    distiller.load_state_dict(saved.model, strict=False)  # all but the teacher's
    for name, average in averages.items():
        average.load_state_dict(saved.averages[name])
    solver.load_state_dict(saved.solver)
    metrics.load_state_dict(vars(saved.metrics))
    if record is not None:
        first_steps.load_state_dict(record)


def _without_teacher(distiller: Distiller) -> dict[str, Tensor]:
    """All parameters and buffers but the teacher's."""
    return {key: value for key, value in distiller.state_dict().items() if not key.startswith("teacher.")}


def _misfit(place: str, saved: Any, live: Any) -> str | None:
    """The first difference in names, shapes or types between what was ``saved`` and what it goes into."""
    if isinstance(live, Tensor):
        return tensor_misfit(place, saved, live)
    if not isinstance(saved, Mapping):
        return f"{place} is a {type(saved).__name__}, not a mapping"
    missing = [str(key) for key in live if key not in saved]
    unexpected = [printable(key) for key in saved if key not in live]
    if missing or unexpected:
        return f"{place}: missing {_few(missing)}, unexpected {_few(unexpected)}"
    return next((found for key in live if (found := _misfit(f"{place}.{key}", saved[key], live[key]))), None)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return f"{', '.join(names[:3]) or 'nothing'}{more}"


def _not_finite(state: Mapping[str, Any]) -> str | None:
    """The tensors in ``state`` that are NaN or infinite somewhere, in words."""
    bad = [name for name, tensor in _tensors(state) if not tensor.isfinite().all()]
    return f"{bad[0]}{f' and {len(bad) - 1} more' if bad[1:] else ''}" if bad else None


def _require_finite(state: Mapping[str, Any], path: Path) -> None:
    bad = _not_finite(state)
    if bad:
        last_good = f"; {path} keeps the last good state" if path.exists() else ""
        raise RunFailed(f"state is not finite, nothing is saved: {bad}{last_good}")


def _tensors(state: Any, name: str = "") -> Any:
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
