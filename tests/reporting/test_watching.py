"""What ``mdistill watch`` sees of runs, and the page that it makes of it."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from mdistill.config import load
from mdistill.engine.claims import STALE, Claims
from mdistill.errors import UserError
from mdistill.files import is_locked, lock_folder, locked_files
from mdistill.reporting import html_page, watching
from mdistill.reporting.table_plan import claim_key
from mdistill.reporting.watch_page import SCRIPT, STYLE, Parts, _ticks, content_policy
from mdistill.reporting.watching import Run, View, Watch

from .page_check import problems
from .written_records import write_record

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "cifar100"


class Write(Protocol):
    """Writes the record of a run of twenty epochs."""

    def __call__(
        self,
        seed: int = ...,
        top1: Sequence[float] = ...,
        *,
        variant: str = ...,
        session: Mapping[str, Any] | None = ...,
    ) -> Path: ...


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def write(runs: Path) -> Write:
    def write(
        seed: int = 0,
        top1: Sequence[float] = (10.0, 20.0),
        *,
        variant: str = "",
        session: Mapping[str, Any] | None = None,
    ) -> Path:
        overrides = ["solver.epochs=20", "solver.milestones=[15]", *([f"variant={variant}"] if variant else [])]
        config = load(CONFIGS / "kd" / "res56_res20.yaml", overrides, seed=seed)
        return write_record(runs, config, top1, session=session)

    return write


@pytest.fixture
def claims(runs: Path) -> Iterator[Claims]:
    held = Claims(runs / ".claims")
    yield held
    held.close()


def only(view: View) -> Run:
    """The run of a view that has one."""
    ((run,),) = [cell.runs for cell in view.cells]
    return run


def elsewhere(claims: Claims, key: str, silent: float) -> None:
    """Make a claim that of a process of another machine, of which nothing has been heard for some seconds."""
    claim = claims.last(key)
    assert claim is not None
    owner = claim.path / "owner.json"
    owner.write_text(json.dumps({**dataclasses.asdict(claims.owner), "host": "far", "process": 7}))
    then = owner.stat().st_mtime - silent
    os.utime(owner, (then, then))


def test_a_run_is_running_while_its_folder_is_locked(runs: Path, write: Write) -> None:
    folder, watch = write(), Watch([runs])
    lock = lock_folder(folder, "run folder")
    run = only(watch.view())
    assert (run.state, run.epoch, run.epochs, run.seed) == ("running", 2, 20, 0)
    assert (run.top1, run.best, run.loss, run.rate, run.device) == (20.0, 20.0, 1.5, 100.0, "cpu")
    assert run.ends == pytest.approx((folder / "metrics.jsonl").stat().st_mtime + 18 * 1.1, abs=2)
    assert run.points == [(1, 10.0, 1.5), (2, 20.0, 1.5)]
    lock.release()
    run = only(watch.view())
    assert (run.state, run.ends) == ("stopped", None)


def test_a_lock_is_seen_where_the_file_system_names_another_device(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path, "run folder")
    locked = locked_files()
    assert locked is not None
    assert is_locked(tmp_path, locked)
    elsewhere = {inode: {(device + 1, process) for device, process in owners} for inode, owners in locked.items()}
    assert is_locked(tmp_path, elsewhere)  # the process has it open
    inode = (tmp_path / ".lock").stat().st_ino
    assert not is_locked(tmp_path, {inode: {(-1, 2**22 + 1)}})  # of another file, by a process that is none
    lock.release()
    assert not is_locked(tmp_path, locked_files() or {})


def test_how_runs_ended(runs: Path, write: Write) -> None:
    write(0, [float(epoch) for epoch in range(20)])
    write(1, session={"failed": "loss term 'kd' is not finite"})
    write(2)
    held = write(3, [float(epoch) for epoch in range(20)]) / "metrics.jsonl"
    held.write_text(held.read_text().replace("test/", "val/"))  # evaluated on held-out images alone
    (cell,) = Watch([runs]).view().cells
    assert [(run.seed, run.state, run.failure) for run in cell.runs] == [
        (0, "complete", ""),
        (1, "failed", "loss term 'kd' is not finite"),
        (2, "stopped", ""),
        (3, "complete", ""),
    ]
    assert (cell.name, cell.place, cell.running) == ("kd, milestones=15", "cifar100, resnet56 → resnet20", False)


def test_claims_tell_who_works_on_what(runs: Path, write: Write, claims: Claims) -> None:
    key = claim_key(write().relative_to(runs))
    watch = Watch([runs])
    assert claims.take(key) is None
    view = watch.view()
    assert only(view).state == "waiting"  # its process has not locked it yet
    (worker,) = view.workers
    assert (worker.name, worker.alive) == (str(claims.owner), True)
    assert worker.runs == ["cifar100 kd resnet56_resnet20 milestones=15 seed0"]
    elsewhere(claims, key, 60)
    assert only(watch.view()).state == "running"  # its lock cannot be seen from here
    elsewhere(claims, key, STALE + 60)
    view = watch.view()
    assert only(view).state == "stopped"
    assert [(worker.name, worker.alive) for worker in view.workers] == [("process 7 on far", False)]
    claims.release(key)
    assert not watch.view().workers


def test_a_run_whose_lock_cannot_be_seen_runs_while_it_writes(
    runs: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    device = folder.stat().st_dev
    monkeypatch.setattr(watching, "_network_devices", lambda: {device})
    written = (folder / "metrics.jsonl").stat().st_mtime
    assert only(Watch([runs], clock=lambda: written + 100).view()).state == "running"
    assert only(Watch([runs], clock=lambda: written + 200).view()).state == "stopped"


def test_a_record_is_read_again_when_it_has_changed_alone(
    runs: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write(seed) for seed in range(3)]
    read: list[Path] = []
    real = watching.read_record
    monkeypatch.setattr(watching, "read_record", lambda folder: read.append(folder) or real(folder))
    watch = Watch([runs, runs])
    for _ in range(3):
        watch.view()
    assert sorted(read) == sorted(folders)
    with open(folders[1] / "metrics.jsonl", "a") as metrics:
        metrics.write('{"epoch": 3, "test/top1": 30.0}\n{"epoch": 4, "test/t')
    (cell,) = watch.view().cells
    assert read[3:] == [folders[1]]
    assert [(run.epoch, run.top1) for run in cell.runs] == [(2, 20.0), (3, 30.0), (2, 20.0)]


@pytest.mark.parametrize("name", ["config.yaml", "env.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "solver: 3", '{"format": 99, "sessions": []}', "\0\xff"])
def test_a_damaged_record_leaves_what_was_known(runs: Path, write: Write, name: str, content: str) -> None:
    folder, watch = write(), Watch([runs])
    watch.view()
    good = (folder / name).read_text()
    (folder / name).write_text(content, encoding="latin-1")
    for view in (watch.view(), Watch([runs]).view()):
        (problem,) = view.problems
        assert str(folder) in problem
        parts = Parts()
        parts.update(view)
        assert "Records that cannot be read" in parts.page()
    assert only(watch.view()).epoch == 2
    (folder / name).write_text(good)
    assert not watch.view().problems


def test_old_runs_are_counted(runs: Path, write: Write) -> None:
    folders = [write(seed) for seed in range(2)]
    for folder in folders:
        for name in ("metrics.jsonl", "env.json"):
            os.utime(folder / name, (1e9, 1e9))
    lock = lock_folder(folders[1], "run folder")
    view = Watch([runs]).view()
    assert (only(view).seed, view.older) == (1, 1)
    lock.release()


def test_new_runs_are_found_and_nothing_is_written(runs: Path, write: Write) -> None:
    now = [1000.0]
    watch = Watch([runs], clock=lambda: now[0], hours=1e9)
    assert watch.view() == View([], [], [], 0)
    write()
    before = sorted(runs.rglob("*"))
    assert not watch.view().cells
    now[0] += watching.SEARCH
    assert len(watch.view().cells) == 1
    assert sorted(runs.rglob("*")) == before


def test_runs_below_a_link_are_seen(runs: Path, write: Write, tmp_path: Path) -> None:
    write()
    (runs / "cifar100").rename(tmp_path / "big")
    (runs / "cifar100").symlink_to(tmp_path / "big")
    assert only(Watch([runs, tmp_path]).view()).folder.is_relative_to(runs)


def test_folders_that_are_none_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, line in (("runz", "no such folder: .*runz$"), ("file", "file is a file, not a folder of runs$")):
        with pytest.raises(UserError, match=line):
            Watch([tmp_path / name])


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(runs: Path, write: Write, claims: Claims) -> Parts:
    write(0, variant="<i>")
    write(1, (10.0, 30.0, 25.0), variant="<i>", session={"failed": "<script>alert(1)</script>", "device": "<b>"})
    write(0, [float(epoch) for epoch in range(20)])
    claims.take("one--seed0")
    found = Parts()
    lock = lock_folder(next(runs.glob("*/*/*/*/seed0")), "run folder")
    found.update(Watch([runs]).view())
    lock.release()
    return found


def test_the_page_can_be_read_by_everybody(parts: Parts) -> None:
    page = parts.page()
    assert problems(page) == ["script is not needed here"]
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<i>" not in page
    for words in (
        "1 running, 1 failed, 1 complete.",
        'aria-label="seed 0, epoch 2 of 20"',
        "Top-1, test (%): seed 0 from 10 in epoch 1 to 20 in epoch 2; seed 1 from 10 in epoch 1 to 25 in epoch 3",
        "test top-1 25.00 % (best 30.00), loss 1.5, 100 images/s, &lt;b&gt;",
        '<b class="warn">failed</b>',
        "<summary>Curves</summary>",
        f"process {os.getpid()} on ",
    ):
        assert words in page
    assert set(re.findall(r"var\(--(\w+)\)", html_page.STYLE + STYLE)) <= set(html_page.PALETTE)
    assert not re.search(r"#[0-9a-f]{3}", STYLE)


def test_the_page_runs_its_own_script_alone(parts: Parts) -> None:
    policy = content_policy(parts.page())
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in SCRIPT
    assert " style=" not in parts.page()
    assert not re.search(r"\son\w+=", parts.page())


def test_only_what_has_changed_is_sent(runs: Path, write: Write) -> None:
    first = write(0)
    write(0, variant="other")
    watch, parts = Watch([runs]), Parts()
    parts.update(watch.view())
    begun = parts.version
    assert [*parts.since(0)["parts"]] == parts.since(0)["order"] == ["summary", "lately", *parts.since(0)["order"][2:]]
    parts.update(watch.view())
    assert (parts.version, parts.since(begun)["parts"]) == (begun, {})
    with open(first / "metrics.jsonl", "a") as metrics:
        metrics.write('{"epoch": 3, "test/top1": 33.0}\n')
    parts.update(watch.view())
    (changed,) = parts.since(begun)["parts"].values()
    assert "top-1 33.00 %" in changed
    assert len(parts.since(begun)["order"]) == 4


def test_no_finite_number_takes_the_page_down(runs: Path, write: Write) -> None:
    folder, parts = write(0), Parts()
    watch = Watch([runs])
    for values in ({"train/loss": 3e16}, {"train/loss": -1.7e308, "test/top1": 1.7e308}, {"seconds/train": 1e300}):
        line = {"epoch": 1, **values}
        (folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
        lock = lock_folder(folder, "run folder")
        parts.update(watch.view())
        lock.release()
        assert "epoch 1 of 20" in parts.page()


def test_cells_that_are_gone_are_forgotten(runs: Path, write: Write) -> None:
    write(0)
    parts = Parts()
    parts.update(Watch([runs]).view())
    assert len(parts._cells) == 1
    parts.update(View([], [], [], 0))
    assert not parts._cells


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 50, 100]),
        (11.23, 11.23, [10.5, 11, 11.5, 12]),
        (3.1, 3.94, [3, 3.5, 4]),
        (-1e-7, 1e-7, [-1e-07, -5e-08, 0, 5e-08, 1e-07]),
        (3e16, 3e16, [2.996e16, 2.998e16, 3e16, 3.002e16, 3.004e16]),
        (0, 5e-324, [-0.5, 0, 0.5]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert _ticks(low, high) == pytest.approx(ticks)
