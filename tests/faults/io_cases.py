"""Faults in the files of a run: at a numbered point of its I/O, or a signal at any moment.

A job is a command with what lies in its folder before. After a fault everything there is readable, and the command
that goes on brings the run to the end that it has undisturbed, bit for bit. What the user has put there stays.
"""

import functools
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
import torch
import yaml

from mdistill.data.loader import BatchLoader

from .. import runs
from ..pictures import write_stl10
from . import forked
from .cases import Case, Outcome
from .forked import Ended
from .io_points import SIGNALS, WRITING, Point, mark, plant, points

USER_FILES = ("best_backup.pt", ".mine.tmp", "notes.txt", "tensorboard/mine.txt")
CLEAN = re.compile(r"(error|warning|note): \S")  # how a line of a refusal or a failure begins


@dataclass(frozen=True)
class Job:
    """A command, what was there before it, and the flag with which it goes on."""

    name: str
    method: str = "kd"
    command: Literal["train", "cache", "eval", "transfer"] = "train"
    flags: tuple[str, ...] = ()
    again: tuple[str, ...] = ("--resume",)  # instead of the mode in ``flags``
    before: Literal["nothing", "half a run", "an old run", "the same run"] = "nothing"
    solver: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # further ones of ``runs.write_config``
    seeds: tuple[int, ...] = (0,)

    def arguments(self, shared: Path, output: Path, *, again: bool = False) -> list[str]:
        """The command line, of the first time or to go on."""
        network = ["--model", "tiny_net", "--weights", str(shared / "teacher.pt"), "--data", "tiny", "--device", "cpu"]
        if self.command == "eval":
            return ["eval", *network, "--predictions", str(output / "out.npz")]
        if self.command == "transfer":
            target = ["--target", "stl10", "--data-root", str(shared), "epochs=1"]
            return ["transfer", *network, *target, "--record", str(output / "transfer" / "out.json")]
        roots = ["--device", "cpu", "--output", str(output), "--checkpoint-root", str(shared)]
        seeds = ["--seeds", ",".join(map(str, self.seeds))] if self.seeds[1:] else []
        return [self.command, "--cfg", str(self.cfg(shared)), *roots, *seeds, *(self.again if again else self.flags)]

    def cfg(self, shared: Path) -> Path:
        """Its configuration."""
        return shared / f"{self.method}.yaml"

    def folder(self, output: Path) -> Path:
        """Where the runs of its seeds are."""
        return output / "tiny" / self.method / "tiny_net_tiny_net"

    def prepare(self, shared: Path) -> list[Point]:
        """Write to ``shared``: configuration, ``before`` and ``whole``, undisturbed; the points of its I/O."""
        sections: dict[str, Any] = {"teacher": {"name": "tiny_net", "checkpoint": "teacher.pt", **self.teacher}}
        sections |= self.sections
        if self.command == "transfer":
            write_stl10(shared, 20, 10)
        old = {"lr": 0.01} if self.before == "an old run" else self.solver
        runs.write_config(shared, self.method, solver=old, **sections)
        if self.before == "nothing":
            (shared / "before").mkdir()
        else:
            stop = functools.partial(_stop_at, 7) if self.before == "half a run" else mark
            ended = forked.command(
                [flag for flag in self.arguments(shared, shared / "before") if flag not in {"--resume", "--overwrite"}],
                before=stop,
            )
            assert ended.code == (75 if self.before == "half a run" else 0), ended
        runs.write_config(shared, self.method, solver=self.solver, **sections)
        shutil.copytree(shared / "before", shared / "whole")
        if self.before != "nothing":
            put_user_files(self, shared / "before")
        log = shared / "points"
        shutil.copytree(shared / "before", shared / "recorded")
        recording = functools.partial(plant, shared / "recorded", log)
        for output, first in ((shared / "whole", mark), (shared / "recorded", recording)):
            ended = forked.command(self.arguments(shared, output), before=first)
            assert ended.code == 0, ended
        return points(log)


SPARSE = {"distiller": {"temperature": 1.0}, "run": {"teacher_logits": "sparse", "teacher_top_k": 3}}
JOBS = (
    Job("kd"),
    Job("mcld", "mcld", teacher={"expected_top1": 15.0}),
    Job("seeds", solver={"ema_decay": 0.9}, seeds=(0, 1)),
    Job("resume", flags=("--resume",), before="half a run"),
    Job("overwrite", flags=("--overwrite",), again=("--overwrite",), before="an old run"),
    Job("repeat", flags=("--overwrite",), before="the same run"),  # what is half cleared must not be resumed
    Job("cache", command="cache", again=()),
    Job("sparse", sections=SPARSE),
    Job("distances", "wkd_l"),
    Job("predictions", command="eval"),
    Job("transfer", command="transfer"),
)


def faults(job: Job, shared: Path) -> Iterator[Case]:
    """Every fault, of the signals one, in every kind of operation on every file of a job; the points are drawn."""
    recorded, generator = job.prepare(shared), random.Random(0)
    numbers: dict[Point, list[int]] = {}
    for number, point in enumerate(recorded):
        numbers.setdefault(point, []).append(number)
    for point, places in numbers.items():
        of_disk = ("EIO", "ENOSPC", "full") if point.kind in WRITING else ("EIO",)
        for fault in ("kill", *of_disk, generator.choice(SIGNALS)):
            number = generator.choice(places)
            run = functools.partial(run_fault, job, shared, number, fault)
            yield Case(f"io {job.name}", f"{number}:{fault}:{point.kind}:{point.file}", run)


def run_fault(job: Job, shared: Path, number: int, fault: str, folder: Path) -> Outcome:
    """Plant one fault and check what is left, then go on to the end."""
    output, log = folder / "output", folder / "point"
    shutil.copytree(shared / "before", output)
    before = functools.partial(plant, output, log, fault=fault, at=number)
    ended = forked.command(job.arguments(shared, output), before=before)
    met = points(log)
    if not met:
        assert ended.code == 0, _told("without a fault", ended)
        return Outcome("not reached")
    check_end(ended, _codes(fault, met[0]))
    if ended.code >= 0 and met[0].kind != "unlink":
        left = [path.name for path in output.rglob(".*.*.tmp") if path.name not in USER_FILES]
        assert not left, _told(f"left behind: {left}", ended)
    check_rest(job, shared, output, ended)
    return Outcome("survived")


def random_kills(shared: Path, count: int = 60) -> Iterator[Case]:
    """Several signals at random moments, one after the other, in one run."""
    for job in JOBS[:3]:
        (shared / job.name).mkdir()
        job.prepare(shared / job.name)
    for seed in range(count):
        job = JOBS[seed % 3]
        yield Case("random kills", f"{seed}:{job.name}", functools.partial(run_kills, job, shared / job.name, seed))


def run_kills(job: Job, shared: Path, seed: int, folder: Path) -> Outcome:
    """Start a run and signal it, two to four times, and check what is left each time; then go on to the end."""
    generator, output = random.Random(seed), folder / "output"
    ended = None
    for number in range(generator.randint(2, 4)):
        name, delay = generator.choice(("SIGKILL", *SIGNALS)), generator.uniform(0.001, 0.3)
        begun = folder / f"begun{number}"
        arguments = job.arguments(shared, output, again=number > 0)
        with forked.started(arguments, before=functools.partial(mark, begun)) as running:
            while not begun.exists() and running.process.exitcode is None:
                running.process.join(0.002)
            running.process.join(delay)
            if running.process.exitcode is None:
                os.kill(running.pid, getattr(signal, name))
            ended = running.wait()
        check_end(ended, {0, -9} if name == "SIGKILL" else {0, 75})
        check_readable(output)
    assert ended is not None
    check_rest(job, shared, output, ended)
    return Outcome("survived")


def check_rest(job: Job, shared: Path, output: Path, ended: Ended) -> None:
    """What a disturbed command has left is readable and the user's; going on leads to the undisturbed end."""
    check_readable(output)
    if job.before != "nothing":
        check_user_files(job, output)
    if ended.code != 0:
        put_user_files(job, output)
        again = job.arguments(shared, output, again=True)
        ended = forked.command(again)
        check_end(ended, {0, 2} if job.before == "the same run" else {0})
        if ended.code == 2:  # not to be resumed
            check_end(forked.command([*again[:-1], "--overwrite"]), {0})
        check_readable(output)
        check_user_files(job, output)
    check_same(job, shared / "whole", output)


def check_end(ended: Ended, codes: Iterable[int]) -> None:
    """One of the exit codes, and messages that are meant for people."""
    lines = ended.err.splitlines()
    assert ended.code in codes, _told(f"not one of {sorted(codes)}", ended)
    assert not any(words in ended.err for words in ("Traceback", "Exception ignored")), _told("a traceback", ended)
    assert lines or ended.code not in {1, 2, 75}, _told("no message", ended)
    if ended.code in {1, 2}:
        assert all(CLEAN.match(line) for line in lines), _told("not a clean message", ended)


def check_readable(output: Path) -> None:
    """Every file with a final name can be read whole."""
    readers = {
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".yaml": lambda path: dict(yaml.safe_load(path.read_text())),
        ".json": lambda path: dict(json.loads(path.read_text())),
        ".jsonl": lambda path: [
            json.loads(line, parse_constant=_refuse)
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ],
        ".safetensors": safetensors.numpy.load_file,
        ".npz": _arrays,
    }
    theirs = {Path(name).name for name in USER_FILES}
    for path in sorted(output.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path.name not in theirs:
            try:
                readers.get(path.suffix, lambda _: None)(path)
            except Exception as error:
                raise AssertionError(f"{path.relative_to(output)} is not readable: {error}") from error


def put_user_files(job: Job, output: Path) -> None:
    """Files of the user in the folder of every seed, where they are missing."""
    for seed in job.seeds if job.command == "train" else ():
        for name in USER_FILES:
            path = job.folder(output) / f"seed{seed}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"mine: {name}")


def check_user_files(job: Job, output: Path) -> None:
    """They are as they were put there."""
    for seed in job.seeds if job.command == "train" else ():
        folder = job.folder(output) / f"seed{seed}"
        lost = [name for name in USER_FILES if not _holds(folder / name, f"mine: {name}")]
        assert not lost, f"the user's files are gone or changed: {lost}"


def check_same(job: Job, whole: Path, output: Path) -> None:
    """The undisturbed run, bit for bit, and nothing beside it but the user's files."""
    if job.command == "cache":
        left, right = (_entries(path / "teacher_cache") for path in (whole, output))
        assert left == right, f"the caches differ: {len(left)} and {len(right)} entries"
        return
    if job.command == "eval":
        assert (whole / "out.npz").read_bytes() == (output / "out.npz").read_bytes(), "the predictions differ"
        return
    if job.command == "transfer":
        left, right = (json.loads((path / "transfer" / "out.json").read_text()) for path in (whole, output))
        for key in ("seconds", "environment"):
            del left[key], right[key]
        assert left == right, "the records of the transfer differ"
        return
    for seed in job.seeds:
        folder = job.folder(output) / f"seed{seed}"
        for name in USER_FILES:
            (folder / name).unlink(missing_ok=True)
        runs.assert_same_runs(job.folder(whole), job.folder(output), seed=seed)
        beside = {path.name for path in folder.iterdir()}
        beside -= {path.name for path in (job.folder(whole) / f"seed{seed}").iterdir()}
        assert not beside, f"left behind: {sorted(beside)}"


def _codes(fault: str, point: Point) -> set[int]:
    if fault == "kill":
        return {-9}
    if fault in SIGNALS:
        return {0, 75}
    if fault != "full" and point.kind in WRITING and "tensorboard" in point.file:
        return {0}  # the curves are in metrics.jsonl
    return {0, 1, 2}


def _told(what: str, ended: Ended) -> str:
    return f"{what}: exit code {ended.code}, " + " | ".join(ended.err.splitlines()[-4:])


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def _entries(root: Path) -> dict[int, bytes]:
    """The logits of a cache, by entry."""
    entries: dict[int, bytes] = {}
    for path in root.rglob("[!.]*.safetensors"):
        chunk = safetensors.numpy.load_file(path)
        entries |= {int(n): row.tobytes() for n, row in zip(chunk["entries"], chunk["logits"], strict=True)}
    return entries


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _stop_at(step: int) -> None:
    """Let this process get SIGTERM as it fetches that batch of its training, from 1."""
    BatchLoader.fetch = runs.stopping_fetch(step)
