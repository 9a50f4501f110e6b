"""The state of a run at a step boundary: saved whole or not at all, and never when it is not finite."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdistill import __version__
from mdistill.config import Config, differences
from mdistill.distillers import Distiller
from mdistill.engine.metrics import EpochSums
from mdistill.errors import RunFailed, UserError
from mdistill.files import atomic_write
from mdistill.models.weights import read_file
from mdistill.optim.solvers import Solver

FORMAT = 1
KEYS = {"format", "model", "solver", "generators", "progress", "config", "fingerprints", "versions"}


@dataclass
class Progress:
    """Where a run is. Between epochs ``step`` is 0 and ``epoch`` the one to come."""

    sums: EpochSums
    epoch: int = 1  # in progress, counted from 1
    step: int = 0  # steps done in it
    seconds: float = 0.0  # training time spent in it so far
    best: dict[str, Any] = field(default_factory=dict)  # of the best epoch so far: epoch, split, top1

    def next_epoch(self) -> None:
        """Stand before the first step of the next epoch."""
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.reset()


def save(
    path: Path,
    distiller: Distiller,
    solver: Solver,
    progress: Progress,
    *,
    config: Config,
    fingerprints: Mapping[str, str],
) -> None:
    """Write the checkpoint atomically.

    Args:
        fingerprints: of what the run depends on and the file does not hold: the data, the teacher's weights.

    Raises:
        RunFailed: a parameter, buffer or optimiser state is not finite (the old file stays), or the disk is full.
    """
    model = distiller.training_state()
    state = {
        "format": FORMAT,
        "model": model,
        "solver": solver.state_dict(),
        "generators": {name: generator.get_state() for name, generator in distiller.generators.items()},
        "progress": {
            "epoch": progress.epoch,
            "step": progress.step,
            "seconds": progress.seconds,
            "best": progress.best,
            "sums": progress.sums.state_dict(),
        },
        "config": config.resolved(),
        "fingerprints": dict(fingerprints),
        "versions": {"mdistill": __version__, "torch": str(torch.__version__)},
    }
    _require_finite({"model": model, "solver": state["solver"]}, path)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:  # by name, torch hides why a write failed
        torch.save(state, file)


def read(path: Path, config: Config, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Read a checkpoint and make sure that it belongs to this run.

    Raises:
        UserError: unreadable or damaged; of another configuration (names the keys; only solver.epochs may have grown,
            and not under a cosine schedule), other data or another teacher.
    """
    state = read_file(path)
    if not isinstance(state, dict) or not state.keys() >= KEYS or state["format"] != FORMAT:
        raise UserError(f"{path}: not a training state in format {FORMAT}, the one that this version resumes from")
    changed = differences(state["config"], config.resolved())
    chosen = differences({}, config.model_dump(mode="json", exclude_defaults=True))
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


def restore(state: Mapping[str, Any], distiller: Distiller, solver: Solver, device: torch.device) -> Progress:
    """Put a state from ``read`` back into the distiller and the solver."""
    distiller.load_training_state(state["model"])
    solver.load_state_dict(state["solver"])
    for name, generator in distiller.generators.items():
        generator.set_state(state["generators"][name])
    saved = state["progress"]
    sums = EpochSums(device)
    sums.load_state_dict(saved["sums"])
    return Progress(sums, saved["epoch"], saved["step"], saved["seconds"], dict(saved["best"]))


def _require_finite(state: Mapping[str, Any], path: Path) -> None:
    bad = []
    tensors = list(_tensors(state))
    for device in {tensor.device for _, tensor in tensors}:  # one transfer a device
        here = [(name, tensor.isfinite().all()) for name, tensor in tensors if tensor.device == device]
        finite = torch.stack([flag for _, flag in here]).tolist()
        bad += [name for (name, _), good in zip(here, finite, strict=True) if not good]
    if bad:
        kept = f"; {path} keeps the last good state" if path.exists() else ""
        raise RunFailed(f"state is not finite, nothing is saved: {bad[0]} and {len(bad) - 1} more{kept}")


def _tensors(state: Any, name: str = "") -> Any:
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
