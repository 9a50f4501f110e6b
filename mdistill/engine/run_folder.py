"""A run's folder: who may write it, what is in it, and how it is cut back when a run resumes."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mdistill import __version__
from mdistill.errors import RunFailed, UserError
from mdistill.files import lock_folder, write_text

if TYPE_CHECKING:
    import torch
    from filelock import BaseFileLock

Mode = Literal["new", "resume", "overwrite"]


class RunFolder:
    """``config.yaml``, ``env.json``, ``metrics.jsonl``, ``tensorboard/``, ``last.pt`` and ``student.pt`` of one run.

    Further students lie beside the first under their names.
    """

    def __init__(self, path: Path, mode: Mode) -> None:
        """Look at ``path`` without changing anything.

        Raises:
            UserError: a run is there already and ``mode`` is "new"; or it is "resume" and the checkpoint is gone.
        """
        self.path = path
        self.mode = mode
        self.config = path / "config.yaml"
        self.environment = path / "env.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "tensorboard"
        self.checkpoint = path / "last.pt"
        self.student = path / "student.pt"
        self._lock: BaseFileLock | None = None
        self._writer: Any = None
        if path.exists() and not path.is_dir():
            raise UserError(f"output {path} is a file, not a folder")
        self._refuse_if_taken()

    @property
    def resumable(self) -> bool:
        """Whether a checkpoint is there and may be continued."""
        return self.mode == "resume" and self.checkpoint.exists()

    def acquire(self) -> None:
        """Lock the folder, so that nobody else writes it; it is still as it was.

        Raises:
            UserError: another process has it, has just filled it, or it cannot be written.
        """
        self._lock = lock_folder(self.path, "output folder")
        self._refuse_if_taken()

    def prepare(self, config_yaml: str, environment: Mapping[str, Any], *, epochs_done: int) -> None:
        """Clear or cut back what is there, and write ``config.yaml`` and ``env.json``.

        Metrics and TensorBoard events beyond ``epochs_done`` are dropped; their epochs are about to run again.

        Raises:
            UserError: the metrics of an epoch that is done are missing.
        """
        finished, sessions = [], []
        if self.resumable:
            finished = [line for line in read_metrics(self.path) if line.get("epoch", 0) <= epochs_done]
            if [line.get("epoch") for line in finished] != list(range(1, epochs_done + 1)):
                raise UserError(
                    f"{self.metrics}: {epochs_done} epochs are done, but it holds {len(finished)} of their lines;"
                    " put the file back, or start again with --overwrite"
                )
            sessions = _read_json(self.environment).get("sessions", [])
        else:
            self.checkpoint.unlink(missing_ok=True)  # first: without it, nothing half-cleared can be resumed
            for entry in self._entries():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        for leftover in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.events, ignore_errors=True)  # written anew from the metrics, so that both agree
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in finished))
        write_text(self.config, config_yaml)
        write_text(self.environment, json.dumps({"sessions": [*sessions, environment]}, indent=2) + "\n")
        for line in finished:
            self._log_events(line)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one epoch to ``metrics.jsonl`` (flushed to disk) and to TensorBoard."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFailed(f"could not write {self.metrics}: {error}") from error
        self._log_events(line)

    def close(self) -> None:
        """Flush TensorBoard and give the folder up."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _refuse_if_taken(self) -> None:
        if self.mode == "overwrite" or self.resumable:
            return
        epochs = len(read_metrics(self.path))
        if self.mode == "new" and any(entry.exists() for entry in self._entries()):
            raise UserError(
                f"output folder {self.path} already holds a run{f' with {epochs} epochs done' if epochs else ''}:"
                " continue it with --resume, replace it with --overwrite, or choose another --output"
            )
        # One line alone may be a first epoch that was killed before its checkpoint was there: that starts again.
        if self.mode == "resume" and (epochs > 1 or self.student.exists()):
            raise UserError(
                f"output folder {self.path} holds a run with {epochs} epochs done but no {self.checkpoint.name} to"
                " resume from: replace it with --overwrite, or choose another --output"
            )

    def _entries(self) -> list[Path]:
        return [self.config, self.environment, self.metrics, self.events, *self.path.glob("*.pt")]

    def _log_events(self, line: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is needed

            self._writer = SummaryWriter(str(self.events))
        try:
            for key, value in line.items():
                if isinstance(value, (int, float)) and key != "epoch":
                    self._writer.add_scalar(key, value, line["epoch"])
            self._writer.flush()
        except OSError as error:
            self._writer = None  # its thread has ended; closing it would raise the error again
            raise RunFailed(f"could not write {self.events}: {error}") from error


def code_folders(folder: Path) -> list[Path]:
    """Where the user modules of the run in ``folder`` were looked for: beside its configuration."""
    sessions = _read_json(folder / "env.json").get("sessions", [])
    return [Path(session["config_folder"]) for session in sessions if "config_folder" in session]


def run_mode(resume: bool, overwrite: bool) -> Mode:
    """The mode that the two flags ask for."""
    return "resume" if resume else "overwrite" if overwrite else "new"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The epochs in a run folder's ``metrics.jsonl``; a line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                line = json.loads(text)
                lines += [line] if isinstance(line, dict) else []
    return lines


def environment(device: "torch.device", metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to trust or repeat a number: versions, hardware, commit, command, and ``metadata``."""
    import numpy
    import torch
    import torchvision

    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "mdistill": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if device.type == "cuda" else None,
        },
        **metadata,
    }


def _commit() -> str | None:
    """The commit this package was run from, with ``+changes`` when files differ from it; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
