"""The state of a run at a step boundary: saved whole or not at all, and never when it is not finite."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdistill import __version__
from mdistill.config import Config, differences, results_only, without_defaults
from mdistill.distillers import Distiller
from mdistill.engine.metrics import RunningMetrics
from mdistill.errors import RunFailed, UserError
from mdistill.files import atomic_write
from mdistill.models.weights import read_file
from mdistill.optim.averaging import AveragedNetwork
from mdistill.optim.solvers import Solver

FORMAT = 2
KEYS = {"format", "model", "averages", "solver", "progress", "metrics", "config", "fingerprints", "versions"}


@dataclass
class Progress:
    """Where a run is. Between epochs ``step`` is 0 and ``epoch`` the one to come."""

    epoch: int = 1  # in progress, counted from 1
    step: int = 0  # steps done in it
    seconds: float = 0.0  # training time spent in it so far
    best: dict[str, Any] = field(default_factory=dict)  # of the best epoch so far: epoch, split, top1


def state_of(
    distiller: Distiller,
    averages: Mapping[str, AveragedNetwork],
    solver: Solver,
    progress: Progress,
    metrics: RunningMetrics,
    *,
    config: Config,
    fingerprints: Mapping[str, str],
) -> dict[str, Any]:
    """All that the next step depends on, but the teacher; tensors are the live ones.

    Args:
        fingerprints: of what the run depends on and a checkpoint does not hold: the data, the teacher's weights.
    """
    return {
        "format": FORMAT,
        "model": _without_teacher(distiller),
        "averages": {name: average.state_dict() for name, average in averages.items()},
        "solver": solver.state_dict(),
        "progress": vars(progress).copy(),
        "metrics": metrics.state_dict(),
        "config": config.resolved(),
        "fingerprints": dict(fingerprints),
        "versions": {"mdistill": __version__, "torch": str(torch.__version__)},
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
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mdistill-write")
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


def read(path: Path, config: Config, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Read a checkpoint and make sure that it belongs to this run.

    Raises:
        UserError: unreadable or damaged; of a configuration with other results (names the keys; only solver.epochs may
            have grown, and not under a cosine schedule), other data or another teacher.
    """
    state = read_file(path)
    if isinstance(state, dict) and state.get("format") == 1:
        raise UserError(
            f"{path}: a training state in format 1, of an earlier version, cannot be resumed by mdistill {__version__}:"
            " finish the run with the version that began it (env.json names its commit), or start again with"
            " --overwrite or another --output"
        )
    if not isinstance(state, dict) or not state.keys() >= KEYS or state["format"] != FORMAT:
        raise UserError(f"{path}: not a training state in format {FORMAT}, the one that this version resumes from")
    before, now = state["config"], config.resolved()
    changed = differences(results_only(before), results_only(now)) | differences(
        {"seed": before.get("seed")}, {"seed": now["seed"]}
    )
    chosen = differences({}, without_defaults(config))
    changed = {  # a setting that the older version did not know, at its default, changes nothing
        key: values for key, values in changed.items() if values[0] is not None or key in chosen
    }
    grows = config.solver.schedule != "cosine"  # whose every epoch depends on their number
    if grows and "solver.epochs" in changed and changed["solver.epochs"][1] > changed["solver.epochs"][0]:
        del changed["solver.epochs"]
    if changed:
        listed = "; ".join(f"{key}: was {before!r}, now {after!r}" for key, (before, after) in changed.items())
        raise UserError(
            f"{path}: cannot resume with another configuration ({listed});"
            f" {'only solver.epochs may grow' if grows else 'under a cosine schedule not even solver.epochs may grow'}."
            " Undo the change, or start again with --overwrite or another --output"
        )
    for what, old in state["fingerprints"].items():
        new = fingerprints.get(what, "")
        if old != new:
            raise UserError(
                f"{path}: cannot resume with another {what}: its fingerprint was {old[:12]}, it is now {new[:12]}"
            )
    return state


def restore(
    state: Mapping[str, Any],
    distiller: Distiller,
    averages: Mapping[str, AveragedNetwork],
    solver: Solver,
    metrics: RunningMetrics,
) -> Progress:
    """Put a state from ``read`` back where it was.

    Raises:
        UserError: its parameters and buffers are not those of this method and network.
    """
    _load(distiller, state["model"])
    for name, average in averages.items():
        _load(average, state["averages"].get(name, {}))
    solver.load_state_dict(state["solver"])
    metrics.load_state_dict(state["metrics"])
    return Progress(**state["progress"])


def _without_teacher(distiller: Distiller) -> dict[str, Tensor]:
    """All parameters and buffers but the teacher's."""
    return {key: value for key, value in distiller.state_dict().items() if not key.startswith("teacher.")}


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # another shape
        raise UserError(f"saved state does not fit {type(module).__name__}: {' '.join(str(error).split())}") from None
    missing = [key for key in missing if not key.startswith("teacher.")]
    if missing or unexpected:
        raise UserError(f"saved state does not fit {type(module).__name__}: missing {missing}, unexpected {unexpected}")


def _require_finite(state: Mapping[str, Any], path: Path) -> None:
    bad = [name for name, tensor in _tensors(state) if not tensor.isfinite().all()]
    if bad:
        last_good = f"; {path} keeps the last good state" if path.exists() else ""
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        raise RunFailed(f"state is not finite, nothing is saved: {bad[0]}{more}{last_good}")


def _tensors(state: Any, name: str = "") -> Any:
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
