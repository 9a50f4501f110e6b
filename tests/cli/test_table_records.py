"""``mdistill table show``, ``compare`` and ``publish`` as commands."""

import csv
from pathlib import Path

import pytest

from mdistill.cli.main import main
from mdistill.config import load

from ..conftest import refused
from ..reporting.written_records import write_record

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "cifar100"
KD = "runs/cifar100/kd/resnet56_resnet20"
TABLE = """title: Mine
pairs: [res56_res20]
methods: [{name: alone, method: vanilla}, {name: KD, method: kd}]
"""


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A table and flags that name its runs and results, in an empty folder; it has runs of two seeds."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(TABLE)
    for method, file, top1 in (("vanilla", "resnet20", 69.0), ("kd", "res56_res20", 70.0)):
        for seed in (0, 1):
            config = load(CONFIGS / method / f"{file}.yaml", seed=seed)
            write_record(Path("runs"), config, [top1 + seed / (1 + (method == "kd"))], first=240)
    return ["mine.yaml", "--results", "results"]


def test_show_compare_and_publish(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "show", *given]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "Mine"
    assert [line.split()[:3] for line in shown[4:6]] == [["alone", "69.50", "±"], ["KD", "70.25", "±"]]
    assert main(["table", "compare", *given, "--baseline", "alone"]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split()[:4] == ["KD", "res56_res20", "2", "+0.75"]  # by 1 and 0.5
    assert main(["table", "publish", *given, "--methods", "KD"]) == 0
    published = [str(Path("results/cifar100/kd/resnet56_resnet20", f"seed{seed}")) for seed in (0, 1)]
    told = "mine.yaml: 2 runs have ended, 0 have not, below runs"
    assert capsys.readouterr().out.splitlines() == [told, *published]
    assert main(["table", "publish", f"runs/{published[0].removeprefix('results/')}", "--results", "results"]) == 0
    assert capsys.readouterr().out == f"{published[0]}, as it was\n"
    assert main(["table", "show", *given, "--output", "nowhere", "--format", "csv"]) == 0
    rows = {row["method"]: row["runs"] for row in csv.DictReader(capsys.readouterr().out.splitlines())}
    assert rows == {"alone": "0", "KD": "2"}  # those that were published
    there = Path(published[0], "env.json")
    there.write_text(there.read_text().replace("2026-01-01", "2025-01-01"))
    assert main(["table", "publish", *given]) == 1
    result = capsys.readouterr()
    assert len(result.out.splitlines()) == 4  # how many there are, and where three of them are
    refused, ended = result.err.splitlines()
    assert refused.startswith(f"not published: {published[0]} holds another run, begun 2025-01-01")
    assert ended == "error: 3 of 4 records are published, the others were refused"


def test_what_cannot_be_published_is_told(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    damaged = Path("runs/cifar100/kd/resnet56_resnet20/seed1")
    (damaged / "metrics.jsonl").write_text("no\nlines\n")
    assert main(["table", "publish", *given, "--methods", "KD"]) == 0
    told = "mine.yaml: 1 runs have ended, 0 have not, below runs"
    line = f"left out: {damaged}/metrics.jsonl is damaged: it has no line of an epoch"
    assert capsys.readouterr().out.splitlines()[:2] == [told, line]


def test_a_run_folder_that_is_refused_does_not_keep_the_others(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(KD) / "seed0" / "env.json").unlink()
    assert main(["table", "publish", "runs", f"{KD}/seed0", f"{KD}/seed1", *given[1:]]) == 1
    told = capsys.readouterr()
    assert told.out == f"{KD.replace('runs', 'results')}/seed1\n"
    assert [line.partition(", ")[0] for line in told.err.splitlines()] == [
        "not published: runs holds no config.yaml",
        f"not published: {KD}/seed0 has no env.json",
        "error: 1 of 3 records are published",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["show", "--import", "no_parts"], "imports: no module 'no_parts' in "),
        (["compare", "--import", "no_parts", "--baseline", "KD"], "imports: no module 'no_parts' in "),
        (["publish", "mine.yaml", "--import", "no_parts"], "imports: no module 'no_parts' in "),
        (["show", "--methods", "KDD"], "--methods: unknown 'KDD'; did you mean 'KD'? (in this table: alone, KD)"),
        (
            ["show", "--pairs", "res56_res2"],
            "--pairs: unknown 'res56_res2'; did you mean 'res56_res20'? (in this table",
        ),
        (["show", "--output", "nowhere"], "no run records: neither --output nowhere nor --results results is a folder"),
        (["compare", "--baseline", "al"], "--baseline: unknown 'al'"),
        (["publish", "empty"], "empty holds no config.yaml, so it is no record of a run"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], line: str, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    action, *rest = arguments
    table = [] if action == "publish" else given[:1]
    assert line in refused(capsys, main(["table", action, *table, *rest, *given[1:]]))


def test_a_table_that_is_none(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, main(["table", "show", "mcld_table3x", *given[1:]]))
    assert line.startswith("error: unknown table 'mcld_table3x'; did you mean 'mcld_table")
