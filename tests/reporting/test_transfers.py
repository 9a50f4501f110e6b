"""Transfers in tables: which count, which are left out and told, and what is published of them."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mdistill.config import Config, load
from mdistill.errors import UserError
from mdistill.file_schemas import TransferRecord, TransferSettings
from mdistill.reporting.published import figure_of, read_published
from mdistill.reporting.publishing import publish
from mdistill.reporting.records import find_records, read_record
from mdistill.reporting.table_cells import Layout, layout
from mdistill.reporting.table_formats import render
from mdistill.reporting.table_show import Table, build
from mdistill.reporting.transfers import begun, path_of, read_transfer, write_transfer

from .written_records import write_record

ROOT = Path(__file__).resolve().parents[2]
FIGURES = read_published(ROOT / "results" / "published.csv")
TABLE = """title: To others
source: MCLD paper
table: "9"
metrics: [stl10/top1, tiny_imagenet/top1]
transfer: {epochs: 20, milestones: [10]}
pairs: [res110_res20]
methods: [{name: alone, method: vanilla}, {name: MCLD, method: mcld}]
"""
SETTINGS = TransferSettings(epochs=20, milestones=(10,))


def write_transferred(folder: Path, target: str, top1: float, *, data: str = "d", **changes: Any) -> Path:
    """The record of a transfer of the run in ``folder``."""
    record = read_record(folder)
    content = {
        "target": target,
        "top1": top1,
        "top5": 90.0,
        "loss": 1.0,
        "train_top1": 80.0,
        "settings": SETTINGS,
        "seed": record.seed,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "precision": "fp32",
        "feature": {"layer": "pooled", "width": 64},
        "data": {"fingerprint": data * 64, "classes": 10, "train_images": 5000, "test_images": 8000},
        "student": {"name": "resnet20", "file": "student.pt", "sha256": "a" * 64},
        "run": {"started": begun(folder), "epoch": record.done},
        "seconds": {},
        "environment": {"command": ["mdistill", f"{folder.resolve()}"]},
    }
    path = path_of(folder, target)
    write_transfer(path, TransferRecord.model_validate(content | changes))
    return path


@cache
def config(method: str, seed: int) -> Config:
    file = "resnet20" if method == "vanilla" else "res110_res20"
    return load(ROOT / "configs" / "cifar100" / method / f"{file}.yaml", (), seed=seed)


def run(output: Path, method: str, seed: int) -> Path:
    """The record of a complete run."""
    return write_record(output, config(method, seed), [70.0 + seed], first=240)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    folder = tmp_path_factory.mktemp("table")
    (folder / "mine.yaml").write_text(TABLE)
    return layout(str(folder / "mine.yaml"), ROOT / "configs", folder)


def shown(whole: Layout, output: Path) -> Table:
    return build(whole, find_records([output]), FIGURES, metrics=whole.metrics)


def test_each_target_is_a_column(whole: Layout, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        folder = run(tmp_path, "mcld", seed)
        write_transferred(folder, "stl10", 65.0 + seed)
        if seed:
            write_transferred(folder, "tiny_imagenet", 28.0)
    run(tmp_path, "vanilla", 0)
    table = shown(whole, tmp_path)
    assert table.layout.pairs == ("res110_res20 stl10", "res110_res20 tiny_imagenet")
    stl10, tiny = (table.results["MCLD", pair] for pair in table.layout.pairs)
    assert (stl10.text, stl10.published, stl10.difference_text) == ("66.00 ± 1.00", 66.97, "-0.97")
    assert (tiny.text, tiny.published) == ("28.00 ± 0.00 (2 of 3)", 28.55)
    assert table.headline == "top-1 on stl10 and top-1 on tiny_imagenet, last epoch"
    told = "unfinished: alone res110_res20 stl10 seed 0: no transfer to stl10 yet"
    assert told in table.notes
    assert "unfinished: MCLD res110_res20 tiny_imagenet seed 0: no transfer to tiny_imagenet yet" in table.notes
    assert "66.00 ± 1.00" in render(table, "text")
    assert "<small>top-1 on tiny_imagenet</small>" in render(table, "html")
    assert r" & top-1 on stl10 & top-1 on tiny\_imagenet \\" in render(table, "latex")
    assert "run,last,stl10/top1,66.0000,1.0000,3" in render(table, "csv")


def test_one_metric_is_a_table_of_pairs(whole: Layout, tmp_path: Path) -> None:
    write_transferred(run(tmp_path, "mcld", 0), "stl10", 65.0)
    found = find_records([tmp_path])
    table = build(whole, found, [], metrics=["stl10/top5"])
    assert (table.layout.pairs, table.results["MCLD", "res110_res20"].text) == (("res110_res20",), "90.00 (1 of 3)")
    assert build(whole, found, [], metrics=["top1"]).results["MCLD", "res110_res20"].text == "70.00 (1 of 3)"
    with pytest.raises(UserError, match="--best: stl10/top1 is of the student as its run ended; leave --best out"):
        build(whole, found, [], epoch="best", metrics=["stl10/top1"])


def test_transfers_of_other_settings_images_and_runs_share_no_cell(whole: Layout, tmp_path: Path) -> None:
    runs = [run(tmp_path, "mcld", seed) for seed in (0, 1, 2)]
    write_transferred(runs[0], "stl10", 65.0)
    write_transferred(runs[1], "stl10", 66.0)
    write_transferred(runs[2], "stl10", 50.0, data="e")
    write_transferred(runs[0], "tiny_imagenet", 20.0, settings=TransferSettings())
    write_transferred(runs[1], "tiny_imagenet", 20.0, run={"started": "another day", "epoch": 240})
    write_transferred(runs[2], "tiny_imagenet", 20.0).write_text("{}")
    write_transferred(run(tmp_path, "vanilla", 0), "stl10", 60.0, data="f")
    table = shown(whole, tmp_path)
    assert table.results["MCLD", "res110_res20 stl10"].text == "65.50 ± 0.71 (2 of 3)"
    assert table.results["MCLD", "res110_res20 tiny_imagenet"].text == "0 of 3"
    notes = "\n".join(table.notes)
    assert (
        "left out of MCLD res110_res20 stl10: 1 transfer (seed 2: 50.00) to another copy of stl10 (fingerprint"
        " eeeeeeeeeeee instead of dddddddddddd)"
    ) in notes
    assert (
        "left out of MCLD res110_res20 tiny_imagenet: 1 transfer (seed 0: 20.00) of other settings (transfer.epochs 100"
        " instead of 20)"
    ) in notes
    assert "seed 0: no transfer to tiny_imagenet like these" in notes
    assert "tiny_imagenet.json is of an earlier run in its folder" in notes
    assert "tiny_imagenet.json is damaged: target: " in notes
    assert "rows were transferred to 2 copies of the target, so do not compare them" in notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2, "more": 1}', r"stl10.json is of format 2, which a newer version of mdistill wrote; .*update"),
        ("{", r"stl10.json is damaged: .*; run mdistill transfer again"),
        ("[1]", r"stl10.json is damaged: .*; run mdistill transfer again"),
    ],
)
def test_a_record_that_cannot_be_read_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "stl10.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_transfer(path)
    assert "\n" not in str(caught.value)


def test_a_record_under_another_name_is_refused(tmp_path: Path) -> None:
    path = write_transferred(run(tmp_path, "vanilla", 0), "stl10", 60.0)
    with pytest.raises(UserError, match=r"tiny_imagenet.json is damaged: it is of the target stl10"):
        read_transfer(path.rename(path.with_name("tiny_imagenet.json")))


def test_transfers_are_published_with_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run(tmp_path / "runs", "vanilla", 0)
    target = tmp_path / "results"
    publish(read_record(folder), target)
    write_transferred(folder, "stl10", 60.0)
    write_transferred(folder, "tiny_imagenet", 20.0, run={"started": "another day", "epoch": 240})
    assert publish(read_record(folder), target) is True
    assert publish(read_record(folder), target) is False
    assert [path.name for path in (target / "transfer").iterdir()] == ["stl10.json"]
    found = read_transfer(target / "transfer" / "stl10.json")
    assert found.environment["command"] == ["mdistill", str(folder.relative_to(tmp_path))]
    assert found.top1 == 60.0
    (folder / "transfer" / "stl10.json").write_text("{")
    with pytest.raises(UserError, match=r"stl10.json is damaged"):
        publish(read_record(folder), target)


@pytest.mark.parametrize(
    ("number", "method", "variant", "student", "stl10", "tiny"),
    [
        ("8", "vanilla", "", "resnet8x4", 65.18, 34.75),
        ("8", "dkd", "", "resnet8x4", 70.09, 35.52),
        ("8", "dkd", "dot", "resnet8x4", 68.88, 33.54),
        ("8", "mcld", "", "resnet8x4", 70.61, 36.19),
        ("8", "vanilla", "", "resnet32x4", 65.78, 29.65),
        ("9", "vanilla", "", "resnet20", 62.45, 26.75),
        ("9", "dkd", "dot", "resnet20", 64.79, 27.46),
        ("9", "dkd", "lskd", "resnet20", 65.40, 28.59),
        ("9", "mcld", "", "resnet20", 66.97, 28.55),
        ("9", "vanilla", "", "resnet110", 63.99, 26.77),
    ],
)
def test_the_papers_figures(number: str, method: str, variant: str, student: str, stl10: float, tiny: float) -> None:
    teacher = "" if method == "vanilla" else {"8": "resnet32x4", "9": "resnet110"}[number]
    for metric, value in (("stl10/top1", stl10), ("tiny_imagenet/top1", tiny)):
        cell = ("cifar100", method, variant, teacher, student)
        found = figure_of(FIGURES, cell, epochs=240, source="MCLD paper", table=number, metric=metric)
        assert found is not None
        assert (found.value, found.table) == (value, number)


def test_a_metric_that_is_none_is_refused(tmp_path: Path) -> None:
    for old, new, message in (
        ("tiny_imagenet/top1", "imagenet/top1", r"metrics.1: should be top1 or top5, or either on a target"),
        ("epochs: 20", "epoch: 20", r"transfer.epoch: unknown key; did you mean 'epochs'\? \(allowed: epochs, "),
        ("[10]", "[10, 5]", r"milestones should ascend, found \[10, 5\]"),
    ):
        (tmp_path / "mine.yaml").write_text(TABLE.replace(old, new))
        with pytest.raises(UserError, match=message):
            layout(str(tmp_path / "mine.yaml"), ROOT / "configs", tmp_path / "none")
