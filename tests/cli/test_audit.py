"""``mdistill audit``: verdicts on records as they are and as they are not, and one clear line for each mistake."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mdistill.cli.audit import main
from mdistill.cli.train import main as train_main
from mdistill.data.loader import BatchLoader

from .. import runs
from ..conftest import refused

Capture = pytest.CaptureFixture[str]


def trained(folder: Path, method: str = "kd", *arguments: str, **sections: Any) -> Path:
    """The folder of a run of one epoch of ten steps, whose teacher is ``folder/teacher.pt``."""
    cfg = runs.write_config(folder, method, data={"batch_size": 10}, solver={"epochs": 1}, **sections)
    flags = ["--device", "cpu", "--output", str(folder / "runs"), "--checkpoint-root", str(folder), "--no-cache"]
    assert train_main(["--cfg", str(cfg), *flags, *arguments]) == 0
    (metrics,) = (folder / "runs").rglob("metrics.jsonl")
    return metrics.parent


def audit(run: Path, root: Path, *arguments: str) -> int:
    """Audit a run whose teacher is under ``root``."""
    return main([str(run), "--checkpoint-root", str(root), "--data-root", str(root), *arguments])


@pytest.fixture(scope="module")
def kd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a run that nobody changes."""
    folder = tmp_path_factory.mktemp("kd")
    trained(folder)
    return folder


@pytest.fixture
def kd_run(kd_folder: Path, tmp_path: Path, capsys: Capture) -> Path:
    """A copy of the run, its teacher in ``tmp_path``."""
    shutil.copytree(kd_folder, tmp_path, dirs_exist_ok=True)
    capsys.readouterr()
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    return metrics.parent


def change_line(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the metrics of the first epoch."""
    line = json.loads((run / "metrics.jsonl").read_text())
    change(line)
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def change_session(run: Path, **more: Any) -> None:
    """Change what ``env.json`` says."""
    environment = json.loads((run / "env.json").read_text())
    environment["sessions"][0] |= more
    (run / "env.json").write_text(json.dumps(environment))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_bit_equal_to_its_record_and_nothing_is_written(kd_run: Path, tmp_path: Path, capsys: Capture) -> None:
    before = contents(tmp_path)
    assert audit(kd_run, tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"audit of {kd_run}",
        "fields that differ: none",
        "first 8 steps: every loss term is the same; the weights after them are the same",
        "bit-equal",
    ]
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mcld", "ft", "wkd_l", "crd", "vanilla"])
def test_methods_with_state_phases_and_distances_are_replayed(method: str, tmp_path: Path, capsys: Capture) -> None:
    run = trained(tmp_path, method)
    capsys.readouterr()
    assert audit(run, tmp_path, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["verdict"], result["steps"], result["fields"]) == ("bit-equal", 8, {})


def test_a_published_copy_of_the_record_is_enough(kd_run: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "results"
    copy.mkdir()
    for name in ("config.yaml", "env.json", "metrics.jsonl"):
        shutil.copy(kd_run / name, copy)
    shutil.rmtree(kd_run)
    assert audit(copy, tmp_path, "--first-epoch") == 0
    assert "metrics of the first epoch that differ: none\nbit-equal\n" in capsys.readouterr().out


def test_a_run_that_was_stopped_and_has_grown_is_replayed(tmp_path: Path, capsys: Capture) -> None:
    cfg = runs.write_config(tmp_path)
    flags = ["--device", "cpu", "--output", str(tmp_path / "runs"), "--checkpoint-root", str(tmp_path)]
    with runs.stopping(3):
        assert train_main(["--cfg", str(cfg), *flags, "solver.epochs=1"]) == 75
    assert train_main(["--cfg", str(cfg), *flags, "--resume"]) == 0
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    capsys.readouterr()
    assert audit(metrics.parent, tmp_path) == 0
    assert capsys.readouterr().out.endswith(
        "first 5 steps: every loss term is the same; the weights after them are the same\nbit-equal\n"
    )


def test_rounding_is_close_and_more_is_different(kd_run: Path, tmp_path: Path, capsys: Capture) -> None:
    def move(by: float) -> Callable[[dict[str, Any]], None]:
        def moved(line: dict[str, Any]) -> None:
            line["first_steps"]["terms"]["ce"][2] += by
            line["first_steps"]["weights"] = "0" * 16

        return moved

    threads = torch.get_num_threads()
    change_line(kd_run, move(1e-6))
    change_session(kd_run, threads=threads + 1)
    assert audit(kd_run, tmp_path, "--threads", str(threads)) == 0
    told = capsys.readouterr().out
    assert f"fields that differ: threads: was {threads + 1}, now {threads}\n" in told
    assert "first 8 steps: apart from step 3 on (ce), by 0 of the loss in step 1 and at most" in told
    assert told.endswith("; the weights after them are not the same\nclose\n")
    change_line(kd_run, move(1.0))
    assert audit(kd_run, tmp_path, "--threads", str(threads), "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["verdict"], result["first"], result["same_weights"]) == ("different", [3, "ce"], False)


def test_a_run_is_replayed_with_as_many_threads_as_it_had(
    kd_run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, fetch, before = set[int](), BatchLoader.fetch, torch.get_num_threads()

    def watched(loader: BatchLoader, step: int) -> int:
        seen.add(torch.get_num_threads())
        return fetch(loader, step)

    monkeypatch.setattr(BatchLoader, "fetch", watched)
    change_session(kd_run, threads=before + 1)
    audit(kd_run, tmp_path)
    assert "threads" not in capsys.readouterr().out
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


def test_a_run_of_captured_steps_is_replayed_on_a_cpu(kd_run: Path, tmp_path: Path, capsys: Capture) -> None:
    settings = yaml.safe_load((kd_run / "config.yaml").read_text())
    settings["run"]["engine"] = "graph"
    (kd_run / "config.yaml").write_text(yaml.safe_dump(settings))
    change_session(kd_run, engine="graph")
    assert audit(kd_run, tmp_path) == 0
    told = capsys.readouterr().out
    assert "fields that differ: engine: was graph, now eager\n" in told
    assert told.endswith("bit-equal\n")


def test_what_differs_is_named(kd_run: Path, tmp_path: Path, capsys: Capture) -> None:
    (session,) = json.loads((kd_run / "env.json").read_text())["sessions"]
    assert set(session["code"]) == {"mdistill"}
    change_session(kd_run, versions=session["versions"] | {"torch": "1.0\x1b[2J"}, code={"mdistill": "f" * 64})
    assert audit(kd_run, tmp_path) == 0
    told = capsys.readouterr().out
    assert f"code.mdistill: was ffffffffffff, now {session['code']['mdistill'][:12]}; versions.torch: was 1.0" in told
    assert "\x1b" not in told
    assert told.endswith("bit-equal\n")


def test_another_teacher_is_told_without_a_replay(kd_run: Path, tmp_path: Path, capsys: Capture) -> None:
    state = torch.load(tmp_path / "teacher.pt", weights_only=True)
    state["model"]["classifier.bias"] += 1
    torch.save(state, tmp_path / "teacher.pt")
    assert audit(kd_run, tmp_path) == 1
    told = capsys.readouterr().out
    assert "fields that differ: cell: was " in told
    assert "teacher.fingerprint: was " in told
    assert told.endswith("different: the run had another teacher, so nothing was replayed\n")


@pytest.mark.parametrize(
    ("section", "key", "value", "why"),
    [("solver", "lr", 0.06, "other settings than config.yaml has now"), (None, "seed", 7, "another seed")],
)
def test_another_setting_is_told_without_a_replay(
    section: str | None, key: str, value: float, why: str, kd_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    settings = yaml.safe_load((kd_run / "config.yaml").read_text())
    (settings if section is None else settings[section])[key] = value
    (kd_run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert audit(kd_run, tmp_path) == 1
    assert capsys.readouterr().out.endswith(f"different: the run had {why}, so nothing was replayed\n")


def test_another_term_is_told(kd_run: Path, tmp_path: Path, capsys: Capture) -> None:
    def rename(line: dict[str, Any]) -> None:
        terms = line["first_steps"]["terms"]
        terms["old"] = terms.pop("kd")

    change_line(kd_run, rename)
    assert audit(kd_run, tmp_path) == 1
    told = "different: the loss had the terms ce, old of 8 steps and has ce, kd of 8 steps\n"
    assert capsys.readouterr().out.endswith(told)


def test_an_earlier_versions_run_tells_its_fields_and_on_request_its_first_epoch(
    kd_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    change_line(kd_run, lambda line: line.pop("first_steps"))
    environment = json.loads((kd_run / "env.json").read_text())
    for key in ("code", "kernels", "cell"):
        del environment["sessions"][0][key]
    (kd_run / "env.json").write_text(json.dumps(environment))
    assert audit(kd_run, tmp_path) == 1
    *_, fields, last = capsys.readouterr().out.splitlines()
    assert fields == "fields that the run did not record: code.mdistill, kernels, cell"
    assert last.startswith("unknown: an earlier version, which recorded no first steps, began the run, so fields alone")
    assert audit(kd_run, tmp_path, "--first-epoch") == 0
    assert capsys.readouterr().out.endswith("metrics of the first epoch that differ: none\nbit-equal\n")
    change_line(kd_run, lambda line: line.update({"train/loss_ce": 9.0}))
    assert audit(kd_run, tmp_path, "--first-epoch", "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert result["epoch"]["verdict"] == result["verdict"] == "different"
    assert [*result["epoch"]["apart"]] == ["train/loss_ce"]


def test_code_that_a_run_names_is_compared_and_run_only_when_it_is_asked_for(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "audited_code.py").write_text("value = 1\n")
    run = trained(tmp_path, "vanilla", imports=["audited_code"])
    monkeypatch.delitem(sys.modules, "audited_code")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(tmp_path)])
    capsys.readouterr()
    assert "imports: it names code, audited_code" in refused(capsys, audit(run, tmp_path))
    (tmp_path / "audited_code.py").write_text("value = 2\n")
    assert audit(run, tmp_path, "--trust") == 0
    assert "fields that differ: code.audited_code: was " in capsys.readouterr().out


Breakage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("breakage", "pattern"),
    [
        (shutil.rmtree, "no run folder at "),
        (lambda run: (run / "config.yaml").unlink(), "no config.yaml in it; an audit needs config.yaml, env.json and"),
        (lambda run: (run / "env.json").unlink(), "no env.json in it"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no metrics.jsonl in it"),
        (lambda run: (run / "env.json").write_text('{"sessions": []}'), "env.json tells of no session"),
        (lambda run: (run / "env.json").write_text("x"), "env.json is damaged"),
        (
            lambda run: (run / "metrics.jsonl").write_text(""),
            "has no line of a first epoch; what is compared is recorded",
        ),
        (lambda run: change_line(run, lambda line: line.update(epoch=2)), "has no line of a first epoch"),
        (lambda run: (run.parents[4] / "teacher.pt").unlink(), "teacher.checkpoint: no tiny_net weights at"),
    ],
)
def test_what_is_needed_and_missing_is_one_line(
    breakage: Breakage, pattern: str, kd_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    breakage(kd_run)
    assert pattern in refused(capsys, audit(kd_run, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--threads", "0"], "--threads: should be from 1 to 1,024, found 0"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_flags_that_cannot_be_are_one_line(
    arguments: Sequence[str], pattern: str, kd_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert pattern in refused(capsys, audit(kd_run, tmp_path, *arguments))


def test_data_that_is_not_there_is_one_line(kd_run: Path, tmp_path: Path, capsys: Capture) -> None:
    settings = yaml.safe_load((kd_run / "config.yaml").read_text())
    settings["data"] = {"name": "cifar100", "batch_size": 10}
    (kd_run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "--download" in refused(capsys, audit(kd_run, tmp_path))
