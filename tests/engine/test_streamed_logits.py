"""Teacher logits of streamed images, dense and sparse: the same whether live, stored, captured, or block by block."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mdistill.cli.cache import main as cache_main
from mdistill.config import load
from mdistill.distillers import DISTILLERS
from mdistill.engine import build
from mdistill.engine import teacher as engine_teacher
from mdistill.engine.logit_formats import Sparse
from mdistill.engine.teacher import BATCH, MOST_ENTRIES, Filler
from mdistill.errors import UserError
from mdistill.optim import solvers

from .. import runs
from ..conftest import refused
from ..distillers.examples import HOOKS, METHODS, SETTINGS
from ..replay import emulated
from ..streamed import StreamedBlobs

VIEWS, SMALL = 4, 16
DATA = {"name": "streamed_blobs", "views": VIEWS}
EXACT, SPARSE = ("run.teacher_logits=float32",), ("run.teacher_logits=sparse", "run.teacher_top_k=3")
READERS = ["dkd", "kd", "la", "nkd", "rc", "rld"]


@pytest.fixture(autouse=True)
def _alike_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small teacher batches, and the rate in a tensor, as on CUDA."""
    monkeypatch.delenv("MDISTILL_CACHE", raising=False)
    monkeypatch.setitem(BATCH, "cpu", SMALL)
    monkeypatch.setattr(solvers, "rate_tensor", lambda device, value=0.0: torch.tensor(value, dtype=torch.float64))


def write(folder: Path, method: str = "kd", **sections: Any) -> Path:
    at_one = DISTILLERS.get(method).needs.sparse_logits or ()
    distiller = dict.fromkeys(at_one, 1.0) if method in READERS else {}
    return runs.write_config(folder, method, data=DATA, distiller=distiller, **sections)


def prefill(made: build.Experiment, ids: Any) -> None:
    assert made.teacher is not None
    assert made.cache is not None
    assert made.logit_format is not None
    filler = Filler(made.teacher, made.dataset, form=made.logit_format)
    filler.fill(made.cache, ids, advance=lambda count: None)
    filler.close()


# ---- dense ----


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "dist", "mcld"])
def test_stored_logits_train_as_a_live_teacher_does(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit: the teacher in every step, with a cache that is empty, full or none, eager and captured."""
    cfg = write(tmp_path, method, solver={"epochs": 2})
    with monkeypatch.context() as patch:
        patch.setattr(build, "_why_in_every_step", lambda *_: "the test wants it so")
        runs.train(cfg, tmp_path / "live", *EXACT)
    assert "teacher: runs in every step: the test wants it so" in capsys.readouterr().out
    runs.train(cfg, tmp_path / "computed", *EXACT, cache=False)
    assert "no cache was asked for; images are read a second time for that" in capsys.readouterr().out
    runs.train(cfg, tmp_path / "stored", *EXACT)
    with emulated() as recorder:
        runs.train(cfg, tmp_path / "captured", *EXACT)
    assert len(recorder.replays) == 2  # the step and the teacher's batch
    for other in ("computed", "stored", "captured"):
        runs.assert_same_runs(tmp_path / "live", tmp_path / other)


@pytest.mark.slow
@pytest.mark.parametrize("form", [EXACT, SPARSE])
def test_a_full_cache_asks_no_teacher_and_changes_no_bit(
    form: tuple[str, ...], tmp_path: Path, shown: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled backwards, with the neighbours of other epochs; then read by an eager, a captured and a resumed run."""
    cfg = write(tmp_path)
    runs.train(cfg, tmp_path / "without", *form, cache=False)
    assert shown == [SMALL] * 3 * -(-runs.IMAGES // SMALL)
    made = runs.experiment(cfg, *form, output=tmp_path / "with", cache=True)
    prefill(made, np.arange(runs.IMAGES * VIEWS)[::-1].copy())
    shown.clear()
    read: list[int] = []
    original = StreamedBlobs.read
    monkeypatch.setattr(StreamedBlobs, "read", lambda *given: read.append(len(given[1])) or original(*given))
    runs.train(cfg, tmp_path / "with", *form)
    assert sum(read) == 3 * runs.IMAGES  # none of them for the teacher
    runs.assert_same_runs(tmp_path / "without", tmp_path / "with")
    (tmp_path / "captured").mkdir()
    (tmp_path / "captured" / "cache").symlink_to(tmp_path / "with" / "cache")
    with emulated() as recorder:
        runs.train(cfg, tmp_path / "captured", *form, stop_at=8)
        runs.train(cfg, tmp_path / "captured", *form, mode="resume")
    assert len(recorder.replays) == 2  # steps alone
    runs.assert_same_runs(tmp_path / "without", tmp_path / "captured")
    assert shown == []


@pytest.mark.slow
def test_seeds_share_what_either_has_computed(tmp_path: Path, shown: list[int]) -> None:
    cfg = write(tmp_path)
    runs.train(cfg, tmp_path, "solver.epochs=9")
    first = len(shown)
    shown.clear()
    runs.train(cfg, tmp_path, "solver.epochs=9", seeds=(1,))
    assert 0 < len(shown) < first / 2


@pytest.mark.slow
@pytest.mark.parametrize("data", [DATA, {"name": "tiny"}])
@pytest.mark.parametrize("form", [("run.teacher_logits=float16",), SPARSE])
def test_an_epoch_in_many_blocks_is_as_in_one(
    form: tuple[str, ...],
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shown: list[int],
) -> None:
    """Two batches a block: with nothing stored, with some and with all, captured, and resumed within a block."""
    cfg = runs.write_config(tmp_path, data=data, distiller={"temperature": 1.0})
    runs.train(cfg, tmp_path / "whole", *form)
    monkeypatch.setattr(engine_teacher, "BLOCK_BYTES", 2 * runs.BATCH * 20)
    shown.clear()
    runs.train(cfg, tmp_path / "none", *form, cache=False)
    assert len(shown) == 3 * (3 + 3 + 1)  # of 48, 48 and 4 images
    with emulated():
        runs.train(cfg, tmp_path / "blocks", *form, stop_at=9)
        assert runs.place(tmp_path / "blocks") == (2, 4)
        runs.train(cfg, tmp_path / "blocks", *form, mode="resume")
    for other in ("none", "blocks"):
        runs.assert_same_runs(tmp_path / "whole", tmp_path / other)
    caches = [runs.experiment(cfg, *form, output=tmp_path / name, cache=True).cache for name in ("whole", "blocks")]
    assert caches[0] is not None
    assert caches[1] is not None
    there = np.flatnonzero(~caches[0].missing(np.arange(caches[0].entries)))
    assert caches[1].filled == len(there)
    assert torch.equal(caches[0].read(there), caches[1].read(there))
    shown.clear()
    runs.train(cfg, tmp_path / "blocks", *form, mode="overwrite")
    assert shown == []
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "blocks")


def test_a_file_that_cannot_be_read_for_the_teacher_ends_the_run_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StreamedBlobs.read

    def broken(self: StreamedBlobs, index: Any, view: Any) -> Any:
        if len(index) == SMALL:  # of the teacher's batches
            raise UserError("photos/ant/7.jpg: no image that can be read")
        return original(self, index, view)

    monkeypatch.setattr(StreamedBlobs, "read", broken)
    with pytest.raises(UserError, match=r"^photos/ant/7.jpg: no image that can be read$"):
        runs.train(write(tmp_path), tmp_path)


def test_more_views_than_a_cache_can_have_entries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        runs.experiment(write(tmp_path), f"data.views={2**31 - 1}", output=tmp_path)
    assert str(caught.value) == (
        "data.views: 2,147,483,647 views of 100 images are more than the 1,073,741,824 entries that a cache can have;"
        f" take at most {MOST_ENTRIES // 100:,}"
    )


# ---- sparse ----


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS + HOOKS)
def test_every_method_reads_sparse_logits_or_is_refused_in_a_line(method: str, tmp_path: Path) -> None:
    needs = DISTILLERS.get(method).needs
    if needs.teacher == "none":
        return  # nothing to read
    data = {**DATA, "name": "streamed_blobs"} if needs.views == 1 else {"name": "tiny"}
    at_one = dict.fromkeys(needs.sparse_logits or (), 1.0)
    cfg = runs.write_config(tmp_path, method, data=data, distiller=at_one)
    if method in READERS:
        made = runs.experiment(cfg, *SPARSE)
        assert isinstance(made.logit_format, Sparse)
        for key in at_one:
            with pytest.raises(UserError) as caught:
                runs.experiment(cfg, *SPARSE, f"distiller.{key}=4.0")
            assert str(caught.value) == (
                f"run.teacher_logits: the method {method!r} cannot read 'sparse' logits here: that takes"
                f" distiller.{key} 1, found 4.0; take run.teacher_logits=float16"
            )
        with pytest.raises(UserError, match=r"that takes distiller.standardize_logits false, found true; take"):
            runs.experiment(cfg, *SPARSE, "distiller.standardize_logits=true")
        with pytest.raises(UserError, match="its teacher runs in every step, since images are streamed"):
            runs.experiment(cfg, *SPARSE, "data.views=null")
    else:
        assert needs.sparse_logits is None
        with pytest.raises(UserError) as caught:
            runs.experiment(cfg, *SPARSE)
        assert str(caught.value) == (
            f"run.teacher_logits: the method {method!r} cannot read 'sparse' logits here: it reads more of the teacher"
            " than its largest probabilities; take run.teacher_logits=float16"
        )


def test_the_methods_that_read_sparse_logits_are_those_that_are_known_to(tmp_path: Path) -> None:
    assert sorted(name for name in METHODS if DISTILLERS.get(name).needs.sparse_logits is not None) == READERS
    cfg = runs.write_config(tmp_path, "rld", distiller={"temperature": 1.0})
    assert SETTINGS["rld"]["sc_temperature"] is None  # is the same as the other
    assert isinstance(runs.experiment(cfg, *SPARSE).logit_format, Sparse)


@pytest.mark.slow
@pytest.mark.parametrize("method", READERS)
def test_a_method_that_reads_sparse_logits_trains_the_same_eager_and_captured(method: str, tmp_path: Path) -> None:
    cfg = write(tmp_path, method)
    runs.train(cfg, tmp_path / "eager", *SPARSE, "solver.epochs=2", cache=False)
    with emulated() as recorder:
        runs.train(cfg, tmp_path / "captured", *SPARSE, "solver.epochs=2")
    assert len(recorder.replays) == 2
    runs.assert_same_runs(tmp_path / "eager", tmp_path / "captured")


def test_the_settings_of_sparse_logits_are_checked(tmp_path: Path) -> None:
    cfg = write(tmp_path)
    with pytest.raises(UserError, match=r"run.teacher_top_k: should be below the number of classes, 10, found 50"):
        runs.experiment(cfg, "run.teacher_logits=sparse")
    with pytest.raises(UserError) as caught:
        load(cfg, ["run.teacher_top_k=3"])
    assert "run.teacher_top_k: counts the classes of run.teacher_logits 'sparse', found 3 with 'float16'" in str(
        caught.value
    )
    with pytest.raises(UserError, match=r"run.teacher_top_k: .* greater than 0, found 0"):
        load(cfg, ["run.teacher_logits=sparse", "run.teacher_top_k=0"])


def test_a_damaged_chunk_of_sparse_rows_is_told_of_and_computed_again(
    tmp_path: Path, shown: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, one = write(tmp_path), ("solver.epochs=1",)
    runs.train(cfg, tmp_path / "whole", *SPARSE, *one)
    asked = len(shown)
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "cache").rename(tmp_path / "again" / "cache")
    (chunk,) = (tmp_path / "again" / "cache").rglob("*.safetensors")
    data = bytearray(chunk.read_bytes())
    data[-150] ^= 1
    chunk.write_bytes(data)
    capsys.readouterr()
    runs.train(cfg, tmp_path / "again", *SPARSE, *one)
    assert f"teacher: 1 chunk files in {chunk.parent} are not used, such as {chunk.name}: " in capsys.readouterr().out
    assert len(shown) == 2 * asked
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "again")


# ---- the command ----


@pytest.fixture
def tool(tmp_path: Path) -> Callable[..., int]:
    def call(cfg: Path, *arguments: str) -> int:
        flags = ["--device", "cpu", "--output", str(tmp_path), "--checkpoint-root", str(tmp_path)]
        return cache_main(["--cfg", str(cfg), "--cache-root", str(tmp_path / "cache"), *flags, *arguments])

    return call


@pytest.mark.parametrize(("form", "size", "loss"), [((), "0.01", "rounding to float16"), (SPARSE, "0.01", "keeping")])
def test_the_command_fills_the_cache_of_a_streamed_data_set(
    form: tuple[str, ...],
    size: str,
    loss: str,
    tmp_path: Path,
    tool: Callable[..., int],
    shown: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = write(tmp_path)
    assert tool(cfg, *form, "--estimate") == 0
    assert capsys.readouterr().out.startswith(f"400 entries: {size} MB under ")
    assert not (tmp_path / "cache").exists()
    assert tool(cfg, *form) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"teacher cache: 400 of 400 entries; {loss} ")
    shown.clear()
    runs.train(cfg, tmp_path, *form, "seed=3")
    assert shown == []
    out = capsys.readouterr().out
    assert ", 100.0 % of 400 entries); missing ones are computed; images are read a second time for that\n" in out


def test_the_command_says_what_has_no_cache(
    tmp_path: Path, tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = write(tmp_path)
    line = refused(capsys, tool(cfg, "data.views=null"))
    assert "this run reads no cache: its teacher runs in every step: images are streamed, in views that cannot" in line
    assert line.endswith("; data.views sets a number of them")
    line = refused(capsys, tool(cfg, *SPARSE, "distiller.temperature=2"))
    assert line.endswith("that takes distiller.temperature 1, found 2.0; take run.teacher_logits=float16")


def test_a_run_says_in_its_record_what_it_read(tmp_path: Path) -> None:
    runs.train(write(tmp_path), tmp_path, *SPARSE, "solver.epochs=1")
    settings = yaml.safe_load((tmp_path / "seed0" / "config.yaml").read_text())["run"]
    assert (settings["teacher_logits"], settings["teacher_top_k"]) == ("sparse", 3)
    recorded = json.loads((tmp_path / "seed0" / "env.json").read_text())
    assert str(tmp_path / "cache") in json.dumps(recorded)
