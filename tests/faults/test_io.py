"""A sample of the campaign: every kind of operation and every fault, each in one case; see ``campaign.py`` for all."""

import random
from collections import Counter
from pathlib import Path

import pytest

from . import campaign
from .cases import Case, Outcome
from .io_cases import JOBS, Job, run_fault
from .io_points import Point

SAMPLE = [
    *(("kd", kind, "kill") for kind in ("mkdir", "replace", "mmap")),
    *(("kd", kind, "EIO") for kind in ("create", "fsync", "list", "unlink")),
    *(("kd", kind, "ENOSPC") for kind in ("write", "flush", "close")),
    *(("kd", kind, "full") for kind in ("write", "fsync")),
    *(("resume", "open", fault) for fault in ("kill", "EIO", "SIGTERM")),
    *(("resume", kind, "SIGINT") for kind in ("write", "replace")),
    ("resume", "create", "SIGHUP"),
    ("predictions", "write", "ENOSPC"),
    ("predictions", "replace", "kill"),
    ("transfer", "write", "ENOSPC"),
    ("transfer", "replace", "kill"),
    *(("overwrite", kind, fault) for kind, fault in (("unlink", "kill"), ("list", "SIGTERM"))),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, Path, list[Point]]]:
    """The jobs of the sample, with what their cases share and the points of their I/O."""
    names, jobs = {name for name, _, _ in SAMPLE}, {}
    for job in JOBS:
        if job.name in names:
            shared = tmp_path_factory.mktemp(job.name)
            jobs[job.name] = (job, shared, job.prepare(shared))
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "fault"), SAMPLE)
def test_a_fault_costs_nothing_that_was_saved(
    prepared: dict[str, tuple[Job, Path, list[Point]]], name: str, kind: str, fault: str, tmp_path: Path
) -> None:
    job, shared, points = prepared[name]
    places = [number for number, point in enumerate(points) if point.kind == kind]
    number = random.Random(f"{kind} {fault}").choice(places)
    assert run_fault(job, shared, number, fault, tmp_path).state == "survived"


def _broken(folder: Path) -> Outcome:
    raise AssertionError("last.pt is not readable")


def test_what_a_case_raises_is_its_failure() -> None:
    outcome = campaign.run(Case("io", "1:kill", _broken))
    assert outcome == Outcome("failed", "AssertionError: last.pt is not readable")


def test_the_table_counts_each_group_and_all() -> None:
    table = campaign.table({"io": Counter(survived=3, failed=1), "files": Counter({"not reached": 2})})
    assert table.splitlines()[2:] == ["| files | 2 | 0 | 2 | 0 |", "| io | 4 | 3 | 0 | 1 |", "| all | 6 | 3 | 2 | 1 |"]
