"""A run's folder: who may write it, what is in it, and how it is cut back when a run resumes."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mdistill import __version__
from mdistill.engine.event_log import EventLog
from mdistill.errors import RunFailed, UserError
from mdistill.files import final_name, lock_folder, read_text, write_text

if TYPE_CHECKING:
    import torch
    from filelock import BaseFileLock

Mode = Literal["new", "resume", "overwrite"]

STANDARD_EXPORTS = ("student", "ema", "average")
ASIDE = ".replaced."  # begins the name of a folder that holds a run while the first files of another are written
DISCARDED = ".discarded."  # and of what becomes of it once they are there
MEND = "put the file back, or delete it: the run then goes on without the record of its earlier sessions"
CHOICES = "continue it with --resume, replace it with --overwrite, or choose another --output"


class RunFolder:
    """``config.yaml``, ``env.json``, ``metrics.jsonl``, ``tensorboard/``, ``last.pt`` and ``student.pt`` of one run.

    Further students lie beside the first under their names. Whatever else is in the folder is never touched.
    """

    def __init__(self, path: Path, mode: Mode) -> None:
        """Look at ``path`` without changing anything.

        Raises:
            UserError: a run is there already and ``mode`` is "new"; or it is "resume" and the checkpoint is gone; or
                something that no run writes is in the way of its files.
        """
        self.path = path
        self.mode = mode
        self.config = path / "config.yaml"
        self.environment = path / "env.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "last.pt"
        self.student = path / "student.pt"
        self.events = EventLog(path / "tensorboard")
        self._exports = ["student"]
        self._lock: BaseFileLock | None = None
        self._began = False
        if path.exists() and not path.is_dir():
            raise UserError(f"output {path} is a file, not a folder")
        self._refuse_if_taken()

    @property
    def resumable(self) -> bool:
        """Whether a checkpoint is there and may be continued."""
        return self.mode == "resume" and self.checkpoint.exists()

    def acquire(self, exports: Iterable[str] = ("student",)) -> None:
        """Lock the folder, so that nobody else writes it; it is still as it was.

        Args:
            exports: names of the networks that this run writes.

        Raises:
            UserError: another process has it, has just filled it, or it cannot be written; or a file that is not of the
                run that is there has the name of an export.
        """
        self._lock = lock_folder(self.path, "output folder")
        self._exports = list(exports)
        self._bring_back()
        self._refuse_if_taken()
        recorded = self._recorded_exports()
        there = [path for path in self._networks(self._exports) if os.path.lexists(path)]
        if not self._has_records:
            recorded = []
        foreign = [] if recorded is None else [path for path in there if path.stem not in recorded]
        if foreign:
            raise UserError(
                f"{foreign[0]} is not of a run in its folder, and this run would replace it: move it away, or choose"
                " another --output"
            )

    def prepare(self, config_yaml: str, environment: Mapping[str, Any], *, epochs_done: int) -> None:
        """Clear or cut back what is there, and write ``config.yaml`` and ``env.json``.

        Metrics and TensorBoard events beyond ``epochs_done`` are dropped; their epochs are about to run again.

        Raises:
            UserError: the metrics of an epoch that is done are missing, or ``env.json`` is damaged.
            RunFailed: the disk is full, or the like; a run that was to be replaced is as it was.
        """
        finished, sessions = [], []
        if self.resumable:
            finished = [line for line in read_metrics(self.path) if line["epoch"] <= epochs_done]
            if [line["epoch"] for line in finished] != list(range(1, epochs_done + 1)):
                raise UserError(
                    f"{self.metrics}: {epochs_done} epochs are done, but it holds {len(finished)} of their lines;"
                    " put the file back, or start again with --overwrite"
                )
            sessions = read_sessions(self.path, MEND)
        sessions.append({**environment, "exports": self._exports})
        with nullcontext() if self.resumable else self._replacing():
            write_text(self.metrics, "".join(_as_line(line) for line in finished))
            write_text(self.config, config_yaml)
            write_text(self.environment, json.dumps({"sessions": sessions}, indent=2, allow_nan=False) + "\n")
        self._began = True
        self._remove_leftovers()
        self.events.clear()  # written anew from the metrics, so that both agree
        for line in finished:
            self.events.add(line)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one epoch to ``metrics.jsonl`` (flushed to disk) and to TensorBoard."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(_as_line(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFailed(f"could not write {self.metrics}: {error}") from error
        self.events.add(line)

    def note_failure(self, reason: str) -> None:
        """Write into ``env.json`` what ended this session, as far as the file system lets it."""
        if not self._began:
            return
        with suppress(UserError):
            sessions = read_sessions(self.path)
            content = {"sessions": [*sessions[:-1], *({**own, "failed": reason[:1000]} for own in sessions[-1:])]}
            write_text(self.environment, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def close(self) -> None:
        """Give the folder up."""
        self.events.close()
        if self._began:
            self._remove_leftovers()  # again: what an error made the run leave here when it began
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _refuse_if_taken(self) -> None:
        asides = self._asides(ASIDE)
        if asides and self._lock is None:  # what is there shows once it is brought back
            if self.mode == "new":
                raise UserError(
                    f"output folder {self.path} already holds a run that was about to be replaced: {CHOICES}"
                )
            return
        for path in self._files_there():
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is no file, and a run writes a file of this name: move it away")
        if self.mode == "overwrite" or self.resumable:
            return
        epochs = len(read_metrics(self.path))
        if self.mode == "new" and (self._has_records or self.student.exists() or self.events.files()):
            done = f" with {epochs} epochs done" if epochs else ""
            raise UserError(f"output folder {self.path} already holds a run{done}: {CHOICES}")
        # One line alone may be a first epoch that was killed before its checkpoint was there: that starts again.
        if self.mode == "resume" and (epochs > 1 or self.student.exists()):
            raise UserError(
                f"output folder {self.path} holds a run with {epochs} epochs done but no {self.checkpoint.name} to"
                " resume from: replace it with --overwrite, or choose another --output"
            )
        if self.mode == "resume" and self.config.exists() and not self.metrics.exists():  # which a run writes first
            raise UserError(f"{self.config} is not of a run: move it away, or choose another --output")

    @property
    def _records(self) -> tuple[Path, ...]:
        return (self.metrics, self.config, self.environment)  # in the order of writing

    @property
    def _has_records(self) -> bool:
        return any(os.path.lexists(path) for path in (self.checkpoint, *self._records))

    def _networks(self, names: Iterable[str]) -> list[Path]:
        return [self.path / f"{name}.pt" for name in dict.fromkeys(names)]

    def _recorded_exports(self) -> list[str] | None:
        """What the run that is there exports, as it recorded it; None where it did not."""
        recorded: list[str] | None = None
        with suppress(UserError):  # a damaged record is told where it is needed
            for session in read_sessions(self.path):
                if "exports" in session:
                    recorded = [*(recorded or []), *session["exports"]]
        return recorded

    def _files_there(self) -> list[Path]:
        """The files of the run that is there; the checkpoint first: without it nothing half-moved is resumed."""
        if not self._has_records:
            return []
        recorded = self._recorded_exports()
        networks = self._networks((*STANDARD_EXPORTS, *self._exports) if recorded is None else recorded)
        return [path for path in (self.checkpoint, *networks, *self._records) if os.path.lexists(path)]

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        """Within, the files of the run that is there are out of the way; an error, or the next start, brings them back.

        The new run is begun when the folder that they are in gets its other name.
        """
        old = self._files_there()
        try:
            aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=self.path)) if old else None
        except OSError as error:
            raise RunFailed(f"could not write {self.path}: {error}") from error
        try:
            if aside is None:
                yield
            else:
                for path in old:
                    os.replace(path, aside / path.name)
                yield
                os.replace(aside, aside.with_name(aside.name.replace(ASIDE, DISCARDED)))
        except BaseException as error:
            for path in self._records:
                if path not in old or (aside is not None and os.path.lexists(aside / path.name)):  # the new run's
                    with suppress(OSError):
                        path.unlink()
            self._bring_back()
            if not isinstance(error, OSError):
                raise
            where = f"its files are in {aside}" if aside is not None and aside.exists() else "it is as it was"
            raise RunFailed(f"could not replace the run in {self.path}: {error}; {where}") from error

    def _asides(self, prefix: str) -> list[Path]:
        """Folders in this one whose names begin with ``prefix``."""
        with suppress(OSError):
            return [path for path in self.path.glob(f"{prefix}*") if path.is_dir() and not path.is_symlink()]
        return []

    def _bring_back(self) -> None:
        """Undo a replacement that was not completed, as far as the file system lets it."""
        for aside in self._asides(ASIDE):
            with suppress(OSError):
                for path in sorted(aside.iterdir(), key=lambda path: path.name == self.checkpoint.name):  # it goes last
                    if path.suffix == ".pt" or self.path / path.name in self._records:
                        os.replace(path, self.path / path.name)
                aside.rmdir()

    def _remove_leftovers(self) -> None:
        """What a process that was killed has left while it wrote a file of a run here, or after it replaced one."""
        recorded = self._recorded_exports()
        exports = (*STANDARD_EXPORTS, *self._exports) if recorded is None else recorded
        names = {path.name for path in (self.checkpoint, *self._records, *self._networks(exports))}
        for discarded in self._asides(DISCARDED):
            shutil.rmtree(discarded, ignore_errors=True)
        with suppress(OSError):
            for entry in self.path.iterdir():
                if final_name(entry) in names:
                    entry.unlink()


def code_folders(folder: Path) -> list[Path]:
    """Where the user modules of the run in ``folder`` were looked for: beside its configuration."""
    with suppress(UserError):  # nothing but this depends on it
        return [Path(session["config_folder"]) for session in read_sessions(folder) if session.get("config_folder")]
    return []


def run_mode(resume: bool, overwrite: bool) -> Mode:
    """The mode that the two flags ask for."""
    return "resume" if resume else "overwrite" if overwrite else "new"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The epochs in a run folder's ``metrics.jsonl``; a line cut short by a kill is left out."""
    from mdistill.file_schemas import EpochLine  # slow to import, as below

    path = folder / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in read_text(path).splitlines():
            with suppress(ValueError):
                values = EpochLine.model_validate_json(text).model_dump(exclude_unset=True)
                lines.append({key: values[key] for key in json.loads(text)})  # in its order, so that it is written back
    return lines


def read_sessions(folder: Path, advice: str = "") -> list[dict[str, Any]]:
    """What each session of the run in ``folder`` recorded in ``env.json``; nothing where there is no such file.

    Args:
        advice: what to do where it is damaged.

    Raises:
        UserError: the file is damaged, or of a newer version.
    """
    path = folder / "env.json"
    if not path.is_file():
        return []
    from mdistill.file_schemas import Environment, read_json

    return [session.model_dump(exclude_unset=True) for session in read_json(Environment, path, advice).sessions]


def environment(device: "torch.device", metadata: Mapping[str, Any], *, modules: Iterable[str] = ()) -> dict[str, Any]:
    """What a reader needs to trust or repeat a number: versions, hardware, code, command, and ``metadata``.

    Args:
        modules: the user's, which were imported.
    """
    import numpy
    import torch
    import torchvision

    from mdistill import distributed
    from mdistill.precision import cpu_kernels
    from mdistill.user_code import code_fingerprint

    on_cuda = device.type == "cuda"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "code": {module: code_fingerprint(module) for module in ("mdistill", *modules)},
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or "cpu",
        "kernels": None if on_cuda else cpu_kernels(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "versions": {
            "mdistill": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if on_cuda else None,
            "cudnn": str(torch.backends.cudnn.version()) if on_cuda else None,  # type: ignore[no-untyped-call]
        },
        **metadata,
    }


@cache
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


def _as_line(metrics: Mapping[str, Any]) -> str:
    return json.dumps(metrics, allow_nan=False) + "\n"
