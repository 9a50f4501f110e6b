"""Tuning: spaces, what is tried next, the journal, searches whose runs are stood in for, and what comes of it."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mdistill.cli import common
from mdistill.cli import table as table_cli
from mdistill.cli import train as train_cli
from mdistill.cli import tune as tune_cli
from mdistill.data import InMemoryDataset
from mdistill.engine.run_folder import read_metrics
from mdistill.errors import RunFailed, UserError
from mdistill.file_schemas import SearchSpace
from mdistill.files import lock_folder, write_text
from mdistill.reporting import searching, table_runs
from mdistill.reporting.records import find_records
from mdistill.reporting.searching import Journal, Trial, member, size, suggest
from mdistill.reporting.table_cells import layout
from mdistill.reporting.table_files import read_table
from mdistill.reporting.table_plan import plan
from mdistill.reporting.table_show import build

from .. import runs
from ..conftest import TinyNet, refused
from ..tables import write_configs

RECIPE = """
data: {name: tiny, images: 100, batch_size: 50}
solver: {name: sgd, epochs: 2, lr: 0.05, milestones: [], gamma: 0.1, momentum: 0.9, weight_decay: 5e-4}
"""
TABLE = """
title: a table
dataset: small
pairs: [wide_narrow]
methods:
  - {name: alone, method: vanilla}
  - name: KD
    method: kd
    search: {distiller.temperature: {low: 1, high: 8}, distiller.kd_weight: {low: 0.1, high: 10.0, log: true}}
  - {name: mine, method: kd, settings: {ce_weight: 1.0, kd_weight: 1.0, temperature: 2.0}, set: [variant=mine],
     search: {solver.lr: {choices: [0.05, 0.1]}}}
seeds: [3, 4]
"""
PAIR = "--row", "KD", "--pair", "wide_narrow"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table file, configurations for it, and a teacher."""
    write_configs(tmp_path, RECIPE, teacher="expected_top1: 99")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        torch.save({"model": TinyNet(10, 32).state_dict()}, tmp_path / "teacher.pt")
    monkeypatch.setattr(common, "project_root", lambda: tmp_path)
    monkeypatch.setattr(table_runs, "POLL", 0)
    monkeypatch.setattr(table_runs, "SCAN", 0)
    (tmp_path / "table.yaml").write_text(TABLE)
    return tmp_path / "table.yaml"


class Ended:
    """A process that has done its run by the time it is asked; or one that ends when it is asked to."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.code = 75


Score = Callable[[Mapping[str, Any]], float | None]
Tune = Callable[..., int]


def of_kd(settings: Mapping[str, Any]) -> float:
    """Best at a temperature of 6 and a weight of 1, whose logarithm counts."""
    distance = abs(settings["temperature"] - 6) + abs(float(torch.tensor(settings["kd_weight"]).log()))
    return 60.0 - 3 * distance


@pytest.fixture
def tune(file: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """``mdistill tune``, whose trials are done at once with a score by their settings; None fails, and ``started`` gets
    the configuration of each."""

    def call(
        *flags: str,
        budget: int = 4,
        output: str = "runs",
        score: Score = of_kd,
        started: list[Any] | None = None,
        stop_at: int | None = None,
    ) -> int:
        begun = [] if started is None else started

        def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Ended:
            args = train_cli.parse(arguments)
            (config,) = common.load_configs(args, [args.seed])
            begun.append(config)
            if len(begun) == stop_at:
                raise KeyboardInterrupt
            folder = args.output / config.run_folder()
            folder.mkdir(parents=True)
            value = score(config.distiller.arguments)
            session = {"commit": "c" * 40, "data": {"fingerprint": "f" * 64}, "device": "cpu"}
            if value is None:
                log.write_text("error: the loss is nan\n")
                session["failed"] = "the loss is nan"
            (folder / "env.json").write_text(json.dumps({"sessions": [session]}))
            (folder / "config.yaml").write_text(config.to_yaml())
            lines = [{"epoch": epoch + 1, "val/top1": value, "seconds/train": 1.0} for epoch in range(config.epochs)]
            text = "" if value is None else "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text)
            (folder / "student.pt").write_text("")
            return Ended(1 if value is None else 0)

        monkeypatch.setattr(table_runs, "_start", start)
        roots = ["--output", str(file.parent / output), "--checkpoint-root", str(file.parent)]
        return tune_cli.main([str(file), "--budget", str(budget), *roots, *flags])

    return call


def trials_of(output: Path, row: str = "KD") -> list[dict[str, Any]]:
    """As they are recorded."""
    (search,) = (
        each for each in json.loads((output / "searches/table.json").read_text())["searches"] if each["row"] == row
    )
    listed: list[dict[str, Any]] = search["trials"]
    return listed


def space(**given: Any) -> SearchSpace:
    return SearchSpace.model_validate(given)


# ---- spaces and what is tried next ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "value", "found"),
    [
        ({"low": 0.1, "high": 10}, 1, 1.0),
        ({"low": 1, "high": 8}, 4.0, 4),
        ({"low": 1, "high": 8}, 4.5, None),
        ({"low": 1, "high": 8}, 9, None),
        ({"low": 1, "high": 8}, True, None),
        ({"low": 1, "high": 8}, None, None),
        ({"choices": [None, True, 1, [20, 30]]}, 1.0, 1),
        ({"choices": [None, True, 1, [20, 30]]}, True, True),
        ({"choices": [None, True, 1, [20, 30]]}, [20, 30], [20, 30]),
        ({"choices": [None, True]}, 1, None),
    ],
)
def test_what_is_in_a_space(given: dict[str, Any], value: Any, found: Any) -> None:
    if found is None:
        with pytest.raises(ValueError, match="is not among"):
            member(space(**given), value)
    else:
        got = member(space(**given), value)
        assert (got, type(got)) == (found, type(found))


def test_how_many_settings_there_are() -> None:
    whole = {"a": space(low=2, high=4), "b": space(choices=[1, 2])}
    assert size(whole) == 6
    assert size(whole | {"c": space(low=2.0, high=4)}) is None


def test_a_suggestion_is_a_function_of_what_was_tried_and_never_comes_twice() -> None:
    spaces = {"a": space(low=0.01, high=100, log=True), "b": space(choices=["x", None, 3]), "c": space(low=1, high=9)}
    tried: list[Trial] = []
    for number in range(14):
        settings = suggest(spaces, tried, seed=1, label="s", number=number)
        assert settings == suggest(spaces, tried[::-1], seed=1, label="s", number=number)
        assert list(settings) == ["a", "b", "c"]
        assert all(member(each, settings[key]) == settings[key] for key, each in spaces.items())
        assert float(f"{settings['a']:.4g}") == settings["a"]
        state: searching.State = "failed" if number == 3 else "running" if number == 5 else "complete"
        tried.append(Trial(number, settings, state, -settings["a"] if state == "complete" else None))
    assert suggest(spaces, tried, seed=2, label="s", number=14) != suggest(spaces, tried, seed=1, label="s", number=14)
    few = {"b": space(choices=[1, 2]), "c": space(low=1, high=3)}
    tried = []
    for number in range(6):
        tried.append(Trial(number, suggest(few, tried, seed=0, label="s", number=number), "complete", 1.0))
    assert len({str(trial.settings) for trial in tried}) == 6


# ---- the journal ---------------------------------------------------------------------------------------------------


def test_two_processes_share_a_journal_and_a_line_cut_short_is_mended(tmp_path: Path) -> None:
    path, spaces = tmp_path / "a" / "journal.log", {"a": space(low=1, high=3)}
    one = Journal(path)
    one.note("s", budget=3)
    one.begin("s", spaces, 0, {"a": 1})
    with open(path, "a") as file:
        file.write('{"op_code": 4, "work')  # as a kill, or a full disk, leaves it
    other = Journal(path)
    assert [trial.state for trial in other.trials("s", spaces)] == ["running"]
    other.end("s", 0, 50.0, {"folder": "x"})
    one.end("s", 0, 40.0, {"folder": "y"})  # too late
    assert other.begin("s", spaces, 1, {"a": 2}).settings == {"a": 2}
    assert one.begin("s", spaces, 1, {"a": 3}).settings == {"a": 2}
    one.end("s", 1, None, {"failure": "nan"})
    for journal in (one, other, Journal(path)):
        assert journal.notes("s") == {"budget": 3}
        assert journal.trials("s", spaces) == [
            Trial(0, {"a": 1}, "complete", 50.0, {"folder": "x"}),
            Trial(1, {"a": 2}, "failed", None, {"failure": "nan"}),
        ]


@pytest.mark.parametrize("how", ["json", "type", "parameter", "number", "binary"])
def test_a_damaged_journal_is_one_line(how: str, tmp_path: Path) -> None:
    path, spaces = tmp_path / "journal.log", {"a": space(low=1, high=3)}
    journal = Journal(path)
    journal.begin("s", spaces, 0, {"a": 1})
    journal.begin("s", spaces, 1, {"a": 2})
    text = path.read_text()
    broken = {
        "json": text.replace('"op_code"', "op", 1),
        "type": text.replace('"op_code":4', '"op_code":[4]', 1),
        "parameter": text.replace('"params":{"a":1.0}', '"params":{}', 1),
        "number": text.replace('"trial":1', '"trial":"x"', 1),
        "binary": "\x00\n" + text,
    }[how]
    assert broken != text
    path.write_text(broken)
    with pytest.raises(
        UserError, match=r"journal\.log is damaged \(.*\); put it back, or move .* away to begin anew$"
    ) as caught:
        Journal(path).trials("s", spaces)
    assert "\n" not in str(caught.value)


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/journal\.log cannot be written: "):
        Journal(tmp_path / "file" / "journal.log")


# ---- whole searches ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_from_the_table_file_to_the_table(
    tune: Tune, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Any] = []
    assert tune(budget=12, started=started) == 0
    told = capsys.readouterr().out.splitlines()
    trials, others = trials_of(tmp_path / "runs"), trials_of(tmp_path / "runs", "mine")
    assert [len(trials), len(others), len(started)] == [12, 2, 14]  # no more settings are in the other's space
    assert trials[0]["settings"] == {"distiller.temperature": 4, "distiller.kd_weight": 0.9}
    assert others[0]["settings"] == {"solver.lr": 0.05}
    for config in started:
        assert (config.seed, config.data.holdout, config.run.evaluate_test) == (3, 10, False)
        assert config.variant.startswith(("KD-wide_narrow-trial0", "mine-wide_narrow-trial0"))
    assert [str(config.variant).split("-")[0] for config in started[:4]] == ["KD", "mine"] * 2  # in turn
    for trial in trials:
        given = {key.partition(".")[2]: value for key, value in trial["settings"].items()}
        assert trial["top1"] == pytest.approx(of_kd(given))
        assert (trial["state"], trial["commit"], trial["epochs"]) == ("complete", "c" * 40, 2)
        assert read_metrics(tmp_path / "runs/.tune/table" / trial["folder"])
    best = max(trials, key=lambda trial: trial["top1"])
    assert best["top1"] > trials[0]["top1"]
    (kd, mine) = yaml.safe_load((tmp_path / "table.tuned.yaml").read_text())["chosen"]
    assert (kd["settings"], kd["top1"], kd["trial"]) == (best["settings"], best["top1"], best["trial"])
    assert (kd["own_top1"], kd["holdout"], kd["budget"], kd["trials"]) == (trials[0]["top1"], 10, 12, 12)
    assert (mine["settings"], mine["whole_space"]) == ({"solver.lr": 0.05}, True)  # of two that are as good the own
    assert told[-1] == f"{file} uses them once it has the line `tuned: table.tuned.yaml`"
    assert not find_records([tmp_path / "runs"]).records  # no trial gets into a table

    output = tmp_path / "runs"
    flags = ["--output", str(output), "--results", str(tmp_path / "results")]
    assert table_cli.main(["publish", str(file), *flags]) == 0
    assert trials_of(tmp_path / "results") == trials
    before = layout(str(file), tmp_path / "configs", output)
    file.write_text(TABLE + "tuned: table.tuned.yaml\n")
    after = layout(str(file), tmp_path / "configs", output)
    temperature = [cell.settings["distiller.temperature"] for each in (before, after) for cell in each.cells[1:2]]
    assert temperature == [4.0, float(best["settings"]["distiller.temperature"])]
    held_out = "of 2 epochs with seed 3, scored by top-1 after the last epoch on 10 held-out training images, never on"
    assert [note for note in build(after, find_records([output]), []).notes if "tuned" in note] == [
        "alone: not tuned: no search space",
        f"KD: tuned with a budget of 12: 12 trials {held_out} the test split",
        f"mine: tuned with a budget of 12: all 2 settings of its space {held_out} the test split",
    ]
    assert (
        "KD, mine: not tuned: the table file names no tuned settings" in build(before, find_records([output]), []).notes
    )

    given = {"output": output, "checkpoint_root": tmp_path, "configs": tmp_path / "configs", "train_teachers": False}
    planned = plan(read_table(file, tmp_path / "configs", seeds=[0]), **given)
    (run,) = (run for run in planned if run.cell.row.name == "KD")
    assert run.config.data.holdout == 0
    assert run.config.run.evaluate_test
    assert run.config.distiller.arguments["kd_weight"] == best["settings"]["distiller.kd_weight"]
    assert "temperature=" in str(run.folder)  # not that of an untuned run


def print_config(file: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert train_cli.main(["--cfg", str(file), *arguments, "--print-config"]) == 0
    printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return printed


@pytest.mark.slow
def test_a_single_run_has_the_tuned_settings_unless_told_otherwise(
    tune: Tune, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = print_config(file, capsys, *PAIR)
    assert tune("--pairs", "wide_narrow", score=lambda settings: 10 * settings["kd_weight"]) == 0
    file.write_text(TABLE + "tuned: table.tuned.yaml\n")
    capsys.readouterr()
    (chosen, _) = yaml.safe_load((file.parent / "table.tuned.yaml").read_text())["chosen"]
    assert chosen["trial"] > 0
    config = print_config(file, capsys, *PAIR)
    assert config["distiller"]["kd_weight"] == chosen["settings"]["distiller.kd_weight"]
    assert print_config(file, capsys, *PAIR, "--untuned") == own


@pytest.mark.slow
def test_pairs_may_be_tuned_one_after_the_other(tune: Tune, file: Path, tmp_path: Path) -> None:
    other = "{name: wide_wide, teacher: {name: tiny_net, width: 32, checkpoint: teacher.pt}, student: {name: tiny_net,"
    file.write_text(TABLE.replace("[wide_narrow]", f"[wide_narrow, {other} width: 32}}}}]"))
    started: list[Any] = []
    for pair in ("wide_wide", "wide_narrow"):
        assert tune("--pairs", pair, budget=1, started=started) == 0
    assert [config.student.arguments["width"] for config in started] == [32, 32, 16, 16]
    listed = yaml.safe_load((tmp_path / "table.tuned.yaml").read_text())["chosen"]
    places = [("KD", "wide_narrow"), ("KD", "wide_wide"), ("mine", "wide_narrow"), ("mine", "wide_wide")]
    assert [(each["row"], each["pair"]) for each in listed] == places
    recorded = json.loads((tmp_path / "runs/searches/table.json").read_text())["searches"]
    assert sorted((each["row"], each["pair"]) for each in recorded) == places


def test_what_is_chosen_for_other_pairs_is_not_read_while_another_process_writes(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, written = tmp_path / "runs/.tune/table", list[str]()

    def write_locked(path: Path, text: str) -> None:
        with pytest.raises(UserError, match=r"folder of searches .* is in use by another running process"):
            lock_folder(folder, "folder of searches")
        written.append(path.name)
        write_text(path, text)

    monkeypatch.setattr("mdistill.reporting.tuning.write_text", write_locked)
    assert tune(budget=1) == 0
    assert written == ["table.json", "table.tuned.yaml"]
    lock_folder(folder, "folder of searches").release()


@pytest.mark.slow
def test_a_search_that_is_stopped_or_grows_tries_the_same(tune: Tune, tmp_path: Path) -> None:
    assert tune(budget=6, output="whole") == 0
    assert tune(budget=3, output="parts") == 0
    with contextlib.suppress(KeyboardInterrupt):
        tune(budget=6, output="parts", stop_at=2)  # when its settings are written down, before it has begun
    started: list[Any] = []
    assert tune(budget=6, output="parts", started=started) == 0
    assert len(started) == 2
    assert tune(budget=6, output="parts", started=started) == 0
    assert len(started) == 2  # nothing is left to do
    assert trials_of(tmp_path / "whole") == trials_of(tmp_path / "parts")
    journal = tmp_path / "parts/.tune/table/journal.log"
    journal.unlink()  # its runs are found again
    assert tune(budget=6, output="parts", started=started) == 0
    assert len(started) == 2
    assert trials_of(tmp_path / "whole") == trials_of(tmp_path / "parts")


@pytest.mark.slow
def test_a_trial_that_diverges_counts_and_is_not_chosen(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def score(settings: Mapping[str, Any]) -> float | None:
        return None if settings["kd_weight"] < 0.9 else of_kd(settings)

    assert tune(budget=6, score=score) == 0
    trials = trials_of(tmp_path / "runs")
    failed = [trial for trial in trials if trial["state"] == "failed"]
    assert failed
    assert {trial["failure"] for trial in failed} == {"the loss is nan"}
    assert len(trials) == 6
    (kd, _) = yaml.safe_load((tmp_path / "table.tuned.yaml").read_text())["chosen"]
    assert kd["failed"] == len(failed)
    assert "failed: KD wide_narrow trial " in capsys.readouterr().out

    def never(settings: Mapping[str, Any]) -> float | None:
        return of_kd(settings) if settings["ce_weight"] == 1.0 else None  # the other row's

    assert tune(budget=2, score=never, output="never") == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "error: KD wide_narrow: all 2 trials have failed, so nothing is chosen"


@pytest.mark.slow
def test_the_plan_is_printed_and_nothing_is_written(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert tune("--dry-run") == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert capsys.readouterr().out.splitlines() == [
        "KD wide_narrow: 0 of 4 trials done, of 2 epochs with one in 10 of the training images held out;"
        " distiller.temperature whole numbers 1 to 8; distiller.kd_weight 0.1 to 10 (log)",
        "mine wide_narrow: 0 of 2 trials done, of 2 epochs with one in 10 of the training images held out;"
        " solver.lr 0.05, 0.1",
        "not tuned, it has no search space: alone",
        "6 trials, 0 done; 12 epochs to do, of pairs that nobody has timed",
    ]
    assert tune() == 0
    capsys.readouterr()
    assert tune("--dry-run", budget=5) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("7 trials, 6 done; ")


@pytest.mark.slow
def test_a_shortened_search_is_one_of_its_own(tune: Tune, file: Path, tmp_path: Path) -> None:
    file.write_text(TABLE.replace("seeds:", "tune: {holdout: 20}\nseeds:"))
    started: list[Any] = []
    assert tune("--epochs", "1", budget=1, started=started) == 0
    assert [(config.epochs, config.data.holdout) for config in started] == [(1, 20)] * 2
    (kd, _) = yaml.safe_load((tmp_path / "table-epochs1.tuned.yaml").read_text())["chosen"]
    assert (kd["epochs"], kd["own_epochs"], kd["trial"]) == (1, 2, 0)
    assert not (tmp_path / "table.tuned.yaml").exists()
    assert (tmp_path / "runs/searches/table-epochs1.json").is_file()
    assert tune(budget=1, started=started) == 0
    assert [config.epochs for config in started[2:]] == [2, 2]


@pytest.mark.slow
def test_what_is_counted_in_epochs_is_scaled_in_trials_as_in_the_shortened_table(
    tune: Tune, file: Path, tmp_path: Path
) -> None:
    counted = "search: {distiller.warmup_epochs: {choices: [0, 2]}, "
    file.write_text(TABLE.replace("search: {", counted, 1) + "epochs: 1\n")
    started: list[Any] = []
    assert tune(budget=4, started=started, score=lambda settings: 50.0 + settings["warmup_epochs"]) == 0
    values = {config.distiller.arguments["warmup_epochs"] for config in started if config.variant.startswith("KD")}
    assert values == {0, 1}
    assert {config.epochs for config in started} == {1}
    file.write_text(file.read_text() + "tuned: table.tuned.yaml\n")
    given = {"output": tmp_path / "runs", "checkpoint_root": tmp_path, "configs": tmp_path / "configs"}
    planned = plan(read_table(file, tmp_path / "configs", seeds=[0]), **given, train_teachers=False)
    (run,) = (run for run in planned if run.cell.row.name == "KD")
    assert run.config.distiller.arguments["warmup_epochs"] == 1
    assert run.epochs == 1


# ---- mistakes ------------------------------------------------------------------------------------------------------

KD = "search: {distiller.temperature: {low: 1, high: 8}, distiller.kd_weight: {low: 0.1, high: 10.0, log: true}}"
SETTING = "distiller.temperature: {low: 1, high: 8}"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (SETTING, "distiller.temprature: {low: 1, high: 8}", "distiller.temprature is no setting here; did you mean "),
        (SETTING, "solver.epochs: {low: 1, high: 8}", "solver.epochs is not to be tuned"),
        (SETTING, "data.holdout: {low: 1, high: 8}", "data.holdout is not to be tuned"),
        (SETTING, "run.precision: {choices: [fp32, tf32]}", "run.precision is not to be tuned"),
        (
            SETTING,
            "distiller.temperature: {low: 5, high: 8}",
            "the table's own 4.0 (wide_narrow), which is tried first",
        ),
        (
            SETTING,
            "distiller.temperature: {low: -1, high: 8}",
            "distiller.temperature: should be greater than 0, found ",
        ),
        (
            SETTING,
            "distiller.temperature: {choices: [4, x]}",
            "distiller.temperature: should be a valid number, found ",
        ),
        (SETTING, "distiller.temperature: {low: 8, high: 1}", "distiller.temperature: low should be below high, found"),
        (SETTING, "distiller.temperature: {low: 0, high: 8, log: true}", "low should be above 0 where log is true"),
        (SETTING, "distiller.temperature: {low: 1}", "should have low and high, such as {low: 0.1, "),
        (SETTING, "distiller.temperature: {low: 1, hi: 8}", "hi: unknown key"),
        (SETTING, "distiller.temperature: {low: 1, choices: [1, 2]}", "should have either choices, or low and high"),
        (SETTING, "distiller.temperature: {choices: [4, 4]}", "a choice is given twice"),
        (SETTING, "distiller.temperature: {choices: [4, 2020-01-01]}", "choices should be numbers, words, true"),
        (KD, "search: [a]", "methods.1.search: "),
        ("seeds:", "tune: {holdot: 5}\nseeds:", "tune.holdot: unknown key; did you mean 'holdout'"),
        ("dataset: small", "dataset: small\ntuned: ../a.yaml", ""),
    ],
)
def test_a_mistake_in_a_search_is_one_line(
    old: str, new: str, line: str, tune: Tune, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in TABLE
    file.write_text(TABLE.replace(old, new))
    code = tune()
    if not line:
        assert code == 0  # what is tuned is not what was
        with pytest.raises(UserError, match="tuned: should be the name of a file beside this one"):
            read_table(file, file.parent / "configs")
        return
    told = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line in told[0]
    assert str(file) in told[0]
    assert len(told) == 1 or "hi: unknown key" in line


@pytest.mark.slow
def test_a_table_without_a_space_a_smaller_budget_and_another_search_are_told(
    tune: Tune, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(budget=3) == 0
    capsys.readouterr()
    line = refused(capsys, tune(budget=2))
    assert line == "error: --budget: KD wide_narrow has one of 3 already, found 2; give 3 or more"
    work = tmp_path / "runs/.tune/table"
    recipe = tmp_path / "configs/small/_recipe.yaml"
    recipe.write_text(RECIPE.replace("lr: 0.05", "lr: 0.05, ema_decay: 0.9"))
    assert "its search was begun with solver.ema_decay None, and it is 0.9 now" in refused(capsys, tune(budget=3))
    recipe.write_text(RECIPE)
    file.write_text(TABLE.replace("high: 8", "high: 9"))
    line = refused(capsys, tune(budget=3))
    assert line == (
        "error: KD wide_narrow: its search was begun with space.distiller.temperature.high 8, and it is 9 now; move"
        f" {work} away to begin anew"
    )
    file.write_text(TABLE.replace("seeds:", "tune: {holdout: 20}\nseeds:"))
    assert "its search was begun with holdout 10, and it is 20 now" in refused(capsys, tune(budget=3))
    file.write_text(
        TABLE.replace("method: kd", "method: kd, without: {wide_narrow: no need}").replace(
            "    method: kd, ", "    method: kd\n    "
        )
    )
    assert "--pairs: no row with a search: key has a cell of wide_narrow" in refused(capsys, tune())
    file.write_text("title: a\ndataset: small\npairs: [wide_narrow]\nmethods: [kd]\n")
    assert "table.yaml: no row has a search: key; give one such as {name: KD, " in refused(capsys, tune())
    with pytest.raises(SystemExit):
        tune_cli.main([str(file)])
    assert "--budget" in capsys.readouterr().err


def test_tuned_settings_of_another_table_are_refused(tune: Tune, file: Path, tmp_path: Path) -> None:
    named, configs, tuned = TABLE + "tuned: table.tuned.yaml\n", tmp_path / "configs", tmp_path / "table.tuned.yaml"
    file.write_text(named)
    with pytest.raises(UserError, match=r"tuned: no such file .*; `mdistill tune .*table.yaml --budget N` writes"):
        read_table(file, configs)
    assert tune(budget=2) == 0
    read_table(file, configs)
    file.write_text(named.replace("temperature: 2.0", "temperature: 3.0"))
    with pytest.raises(
        UserError, match=r"table.tuned.yaml was chosen before this file's 'mine' or 'wide_narrow' was ch"
    ):
        read_table(file, configs)
    read_table(file, configs, methods=["KD"])
    file.write_text(named.replace("name: KD", "name: KDD"))
    with pytest.raises(UserError, match=r"table.tuned.yaml: row 'KD' is none of .*; did you mean 'KDD'\?"):
        read_table(file, configs)
    file.write_text(named)
    text = tuned.read_text()
    for broken in (text.replace("top1: ", "top1: a"), text[: len(text) // 2], "", text.replace("trial:", "trail:")):
        tuned.write_text(broken)
        with pytest.raises(UserError, match=r"table.tuned.yaml"):
            read_table(file, configs)


def test_what_is_missing_is_one_line(
    tune: Tune, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "teacher.pt").unlink()
    assert tune() == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("failed: KD wide_narrow trial 0, mine wide_narrow trial 0, KD wide_narrow trial 1, mine")
    assert "teacher.checkpoint: no tiny_net weights at" in told[0]
    assert told[0].endswith("with mdistill table run --train-teachers")
    assert told[1].startswith("error: KD wide_narrow: 0 of 4 trials have ended")
    assert not (tmp_path / "table.tuned.yaml").exists()
    monkeypatch.setitem(sys.modules, "optuna", None)
    line = refused(capsys, tune())
    assert line.startswith("error: mdistill tune needs optuna, which cannot be imported (")
    assert line.endswith("pip install 'mdistill[tune]'")


# ---- the test split ------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Data sets whose test split must not be evaluated."""
    evaluate = InMemoryDataset.eval_batches

    def refuse(dataset: InMemoryDataset, split: str, *args: Any, **given: Any) -> Any:
        if split == "test":
            raise RunFailed("the test split was read")
        return evaluate(dataset, split, *args, **given)

    monkeypatch.setattr(InMemoryDataset, "eval_batches", refuse)
    return


@pytest.mark.slow
@pytest.mark.usefixtures("sealed")
def test_a_whole_search_never_evaluates_the_test_split(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of trials that are trained: neither of the student, nor of the teacher, whose expected accuracy is given."""
    codes = []

    def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Ended:
        with contextlib.redirect_stdout(io.StringIO()):
            codes.append(train_cli.main([*arguments, "--device", "cpu"]))
        return Ended(codes[-1])

    monkeypatch.setattr(table_runs, "_start", start)
    roots = ["--output", str(tmp_path / "runs"), "--checkpoint-root", str(tmp_path), "--device", "cpu"]
    assert tune_cli.main([str(file), "--budget", "2", *roots]) == 0, capsys.readouterr().err
    assert codes == [0] * 4
    lines = [line for path in sorted((tmp_path / "runs").rglob("metrics.jsonl")) for line in read_metrics(path.parent)]
    assert len(lines) == 8
    assert not [key for line in lines for key in line if "test" in key]
    trials = trials_of(tmp_path / "runs")
    ends = [read_metrics(tmp_path / "runs/.tune/table" / trial["folder"])[-1]["val/top1"] for trial in trials]
    assert [trial["top1"] for trial in trials] == ends
    assert not (tmp_path / "runs/.tune/table/teachers.json").exists()
    capsys.readouterr()
    of_the_table = ["--cfg", str(file), *PAIR, *roots, "teacher.expected_top1=null"]
    assert train_cli.main(of_the_table) == 1
    assert "the test split was read" in capsys.readouterr().err


def test_leaving_out_the_test_split_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = runs.write_config(tmp_path)
    (both,) = runs.train(cfg, tmp_path / "both", "data.holdout=20")
    (alone,) = runs.train(cfg, tmp_path / "alone", "data.holdout=20", "run.evaluate_test=false")
    for line, other in zip(both, alone, strict=True):
        kept = [key for key in line if "test" not in key and "second" not in key]
        assert [other[key] for key in kept] == [line[key] for key in kept]
        assert set(line) - set(other) == {"test/top1", "test/top5", "test/loss"}
    for name in ("student.pt", "last.pt"):
        states = [torch.load(tmp_path / folder / "seed0" / name, weights_only=True) for folder in ("both", "alone")]
        model = [state.get("model", state) for state in states]
        assert all(torch.equal(value, model[1][key]) for key, value in model[0].items())
    with pytest.raises(
        UserError, match=r"run\.evaluate_test: false evaluates the held-out images alone, and data\.hold"
    ):
        runs.experiment(cfg, "run.evaluate_test=false")
    assert os.listdir(tmp_path / "alone")
