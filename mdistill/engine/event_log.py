"""Scalars for TensorBoard, beside the metrics; nothing that goes wrong here ends a run."""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mdistill.engine.console import print_line

PREFIX = "events.out.tfevents."


class EventLog:
    """An event file in ``folder``, written as it is told; the first failure switches it off with one line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[bytes] | None = None
        self._off = False

    def add(self, line: Mapping[str, Any]) -> None:
        """One epoch: every number in ``line`` as a scalar of the step ``line["epoch"]``.

        Before those of a first phase stands its name.
        """
        if self._off:
            return
        try:
            self._write(line)
        except Exception as error:  # a full disk, a link in the folder's place, another package of TensorBoard's name
            self._off = True
            reason = " ".join(str(error).split()) or type(error).__name__
            print_line(
                f"warning: no more TensorBoard events are written to {self.folder} ({reason});"
                " metrics and checkpoints go on"
            )
            self.close()

    def files(self) -> list[Path]:
        """The event files that are there."""
        with suppress(OSError):
            return [] if self.folder.is_symlink() else sorted(self.folder.glob(f"{PREFIX}*"))
        return []

    def clear(self) -> None:
        """Remove the event files that are there, and nothing else; a link in the folder's place is taken away."""
        with suppress(OSError):
            if self.folder.is_symlink():
                self.folder.unlink()
            for file in self.files():
                file.unlink()

    def close(self) -> None:
        """Give the file up."""
        file, self._file = self._file, None
        with suppress(OSError):
            if file is not None:
                file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # slow to import
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        records: list[Any] = []
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{PREFIX}{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
            self._file = open(self.folder / name, "xb")  # noqa: SIM115  (closed by ``close``)
            records.append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        scalars = {key: value for key, value in line.items() if isinstance(value, (int, float)) and key != "epoch"}
        phase = f"{line['phase']}/" if line.get("phase") else ""
        summary = Summary(value=[Summary.Value(tag=phase + key, simple_value=value) for key, value in scalars.items()])
        records.append(Event(wall_time=time.time(), step=line["epoch"], summary=summary))
        for record in records:
            RecordWriter(self._file).write(record.SerializeToString())
        self._file.flush()
