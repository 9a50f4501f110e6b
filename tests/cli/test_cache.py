"""``mdistill cache``, as a user meets it: what it fills, what it prints, one clear line for each mistake."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mdistill.cli.cache import main
from mdistill.data.sampling import epoch_plan
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.engine.logit_cache import LogitCache
from mdistill.engine.teacher import BATCH, FrozenTeacher
from mdistill.errors import RunFailed

from ..conftest import refused

VIEWS, IMAGES, SMALL = 162, 30, 16
ENTRIES = IMAGES * VIEWS
MEASURED = 8  # teacher batches that the tool times before it fills anything
Tool = Callable[..., int]


@DISTILLERS.register("reads_features")
class ReadsFeatures(Distiller):
    """A method that no cache can serve."""

    needs = Needs(teacher="features")

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        return {"gap": signals.student_logits.square().mean()}


@pytest.fixture(autouse=True)
def _alike_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, small teacher batches, and nothing of the caller's environment."""
    monkeypatch.delenv("MDISTILL_CACHE", raising=False)
    monkeypatch.setitem(BATCH, "cpu", SMALL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cfg(kd_cfg: Path, teacher_file: Path) -> Path:
    """``kd_cfg`` on 30 images, which is 4,860 entries."""
    return altered(kd_cfg, data={"name": "tiny", "images": IMAGES, "batch_size": 16, "eval_batch_size": 60})


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    """The command in this process, with the folders that the ``train`` fixture has."""

    def call(cfg: Path, *arguments: str) -> int:
        flags = ["--device", "cpu", "--output", str(tmp_path / "runs"), "--checkpoint-root", str(tmp_path)]
        return main(["--cfg", str(cfg), *flags, *arguments])

    return call


def altered(cfg: Path, **sections: Any) -> Path:
    """A copy of ``cfg`` beside it with other sections; None takes one out."""
    tree = yaml.safe_load(cfg.read_text()) | sections
    path = cfg.with_name(f"altered_{cfg.name}")
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    return path


def filled(root: Path) -> list[int]:
    """The entries of the only cache below ``root``, each once."""
    (folder,) = root.iterdir()
    chunks = [load_file(path)["entries"].tolist() for path in folder.iterdir()]
    return sorted(entry for entries in chunks for entry in entries)


def read_by(*seeds: int, epochs: int) -> list[int]:
    plans = [epoch_plan(seed, epoch, IMAGES, VIEWS) for seed in seeds for epoch in range(1, epochs + 1)]
    return [int(number) for number in np.unique(np.concatenate([plan.index * VIEWS + plan.view for plan in plans]))]


def batches(entries: int) -> int:
    return -(-entries // SMALL)


def test_help_teaches(capsys: pytest.CaptureFixture[str], tool: Tool) -> None:
    with pytest.raises(SystemExit):
        tool(Path("x"), "--help")
    text = capsys.readouterr().out
    for word in ("--estimate", "--epochs", "--seeds", "--cache-root", "MDISTILL_CACHE", "examples:"):
        assert word in text


@pytest.mark.parametrize(
    ("dtype", "flags", "entries", "size"),
    [
        ("float16", (), ENTRIES, "0.14"),
        ("float32", (), ENTRIES, "0.24"),
        ("float16", ("--epochs", "2"), 59, "0.00"),  # one of 60 comes twice
    ],
)
def test_an_estimate_prints_the_size_and_writes_nothing(
    dtype: str,
    flags: tuple[str, ...],
    entries: int,
    size: str,
    cfg: Path,
    tool: Tool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each entry takes ten logits and 9 bytes more."""
    before = sorted(tmp_path.rglob("*"))
    assert tool(cfg, "--estimate", f"run.teacher_logits={dtype}", *flags) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert line.startswith(f"{entries:,} entries: {size} MB under {tmp_path / 'runs' / 'teacher_cache'}, 0:0")
    assert line.endswith(" if all are missing")
    assert captured.err == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_after_a_full_fill_no_run_asks_the_teacher(
    cfg: Path, tool: Tool, train: Tool, tmp_path: Path, shown: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(cfg) == 0
    assert shown == [SMALL] * (MEASURED + batches(ENTRIES))
    root = tmp_path / "runs" / "teacher_cache"
    assert filled(root) == list(range(ENTRIES))
    captured = capsys.readouterr()
    size, found, end = captured.out.splitlines()
    assert size.startswith("4,860 entries: 0.14 MB under ")
    assert found.startswith(f"{root}/")
    assert ": 4,860 entries to compute, about 0:0" in found
    assert end.startswith("teacher cache: 4,860 of 4,860 entries; rounding to float16 changes ")
    assert captured.err == ""
    shown.clear()
    assert train(cfg, "--seeds", "0,7") == 0
    assert shown == []
    assert "(float16, 100.0 % of 4,860 entries)" in capsys.readouterr().out
    assert tool(cfg) == 0
    assert shown == [SMALL] * MEASURED
    assert ": 0 entries to compute, about 0:00:00\n" in capsys.readouterr().out


def test_runs_read_what_the_tool_wrote_as_if_they_had_asked(cfg: Path, tool: Tool, train: Tool, tmp_path: Path) -> None:
    assert train(cfg, "--no-cache") == 0
    (last,) = (tmp_path / "runs").rglob("last.pt")
    alone = torch.load(last, weights_only=True)
    assert tool(cfg, "--epochs", "3") == 0
    assert train(cfg, "--overwrite") == 0
    within = torch.load(last, weights_only=True)
    assert alone["model"].keys() == within["model"].keys()
    assert all(torch.equal(value, within["model"][key]) for key, value in alone["model"].items())


@pytest.mark.parametrize(
    ("words", "seeds"), [(("--seeds", "0,1"), (0, 1)), ((), (0,)), (("seed=4",), (4,)), (("--seeds", "3"), (3,))]
)
def test_epochs_of_seeds_fill_exactly_what_these_read(
    words: tuple[str, ...], seeds: tuple[int, ...], cfg: Path, tool: Tool, tmp_path: Path, shown: list[int]
) -> None:
    assert tool(cfg, "--epochs", "2", *words) == 0
    expected = read_by(*seeds, epochs=2)
    assert filled(tmp_path / "runs" / "teacher_cache") == expected
    assert len(shown) == MEASURED + batches(len(expected))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_fill_that_stops_half_way_keeps_its_entries_and_the_next_does_the_rest(
    number: signal.Signals,
    cfg: Path,
    tool: Tool,
    tmp_path: Path,
    shown: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By Ctrl-C, or by the SIGTERM of a job scheduler."""
    ask = FrozenTeacher.__call__

    def stopped(teacher: FrozenTeacher, image: Tensor) -> Tensor:
        if len(shown) == MEASURED + 5:
            os.kill(os.getpid(), number)
        return ask(teacher, image)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenTeacher, "__call__", stopped)
        assert tool(cfg) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{number.name}: stopped, what was computed stays"
    root = tmp_path / "runs" / "teacher_cache"
    assert filled(root) == list(range(6 * SMALL))
    shown.clear()
    assert tool(cfg) == 0
    assert len(shown) == MEASURED + batches(ENTRIES - 6 * SMALL)
    assert f": {ENTRIES - 6 * SMALL:,} entries to compute, about " in capsys.readouterr().out
    assert filled(root) == list(range(ENTRIES))


def test_the_folder_of_caches_comes_from_flag_and_environment(
    cfg: Path, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MDISTILL_CACHE", str(tmp_path / "of_environment"))
    assert tool(cfg, "--epochs", "1", "--cache-root", str(tmp_path / "of_flag")) == 0
    assert not (tmp_path / "of_environment").exists()
    assert tool(cfg, "--epochs", "1") == 0
    assert filled(tmp_path / "of_environment") == filled(tmp_path / "of_flag") == read_by(0, epochs=1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epochs", "0"), "error: --epochs: should be at least 1, found 0"),
        (("--epochs", "-1"), "error: --epochs: should be at least 1, found -1"),
        (("--seeds", "0,1"), "error: --seeds goes with --epochs: without it every view of every image is computed"),
        (("--seeds", "0", "--estimate"), "error: --seeds goes with --epochs: without it every view of every image is"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_line(
    words: tuple[str, ...], message: str, cfg: Path, tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, tool(cfg, *words)).startswith(message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--seeds", "1,1", "--epochs", "1"),
            "argument --seeds: 1 is given twice in '1,1'; each seed is one run (see --help)",
        ),
        (
            ("--seeds", "1;2", "--epochs", "1"),
            "argument --seeds: '1;2' in '1;2' is not a seed; write whole numbers, 0,1,2 (see --help)",
        ),
        (("--epochs", "two"), "argument --epochs: invalid int value: 'two' (see --help)"),
        (("--estimated",), "unrecognized arguments: --estimated; did you mean '--estimate'? (see --help)"),
    ],
)
def test_flags_that_cannot_be_read_are_refused_in_one_line(
    words: tuple[str, ...], message: str, cfg: Path, tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        tool(cfg, *words)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_configuration_without_a_teacher_is_refused_in_one_line(
    student_cfg: Path, tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, tool(student_cfg))
    assert line == f"error: {student_cfg}: teacher: missing; this configuration has no teacher to ask"
    assert not (tmp_path / "runs").exists()


def test_a_method_that_reads_features_is_refused_in_one_line(
    cfg: Path, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = altered(cfg, distiller={"name": "reads_features", "ce_weight": 1.0})
    line = refused(capsys, tool(reader))
    assert line.startswith(
        f"error: {reader}: this run reads no cache: its teacher runs in every step: this method reads"
    )
    assert not (tmp_path / "runs").exists()


def test_views_that_cannot_be_enumerated_are_refused_in_one_line(
    cfg: Path, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mdistill.data.augment.count", lambda padding, flip: None)
    line = refused(capsys, tool(cfg))
    assert line == "error: the views of this data set cannot be enumerated: there is no cache of them"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [(), ("--epochs", "1")])
def test_a_cache_root_that_is_a_file_is_refused_in_one_line(
    flags: tuple[str, ...], cfg: Path, tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cache"
    file.write_text("mine")
    line = refused(capsys, tool(cfg, "--cache-root", str(file), *flags))
    assert line.startswith(f"error: --cache-root: {file} cannot be written")
    assert file.read_text() == "mine"


def test_a_disk_without_room_is_one_line_before_anything_is_computed(
    cfg: Path,
    tool: Tool,
    tmp_path: Path,
    shown: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mdistill.engine.logit_cache.shutil.disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    line = refused(capsys, tool(cfg), expected=1)
    assert line.startswith("error: the teacher's outputs need 0.14 MB on disk, and 1,074 MB must stay free beside them")
    assert line.endswith(" has 2 MB free")
    assert len(shown) == MEASURED
    assert filled(tmp_path / "runs" / "teacher_cache") == []


def test_a_disk_that_fills_up_half_way_is_one_line_and_ends_the_work(
    cfg: Path,
    tool: Tool,
    tmp_path: Path,
    shown: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, written = LogitCache.write, [0]

    def fill_the_disk(cache: LogitCache, ids: Any, *rest: Any) -> None:
        if written[0] == 4 * SMALL:
            raise RunFailed("could not write: the disk is full")
        written[0] += len(ids)
        write(cache, ids, *rest)

    monkeypatch.setattr("mdistill.engine.teacher.CHUNK", 4 * SMALL)
    monkeypatch.setattr(LogitCache, "write", fill_the_disk)
    line = refused(capsys, tool(cfg, "--epochs", "3"), expected=1)
    assert line == "error: could not write: the disk is full"
    assert len(filled(tmp_path / "runs" / "teacher_cache")) == 4 * SMALL


def test_logits_beyond_float16_are_one_line(
    cfg: Path, teacher_file: Path, tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(teacher_file, weights_only=True)
    state["model"]["classifier.bias"][3] = 1e5
    torch.save(state, teacher_file)
    line = refused(capsys, tool(cfg), expected=1)
    assert line.endswith("float16 holds 65504: set run.teacher_logits=float32")
    assert not (tmp_path / "runs").exists()
