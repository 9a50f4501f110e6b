import json
from pathlib import Path

import pytest

from mdistill.errors import UserError
from mdistill.reporting.curves import learning_curves
from mdistill.reporting.runs import RunRecord, read_run
from mdistill.reporting.tables import comparison_table, paired_table, text_table


def write_run(folder: Path, top1: list[float]) -> Path:
    folder.mkdir()
    lines = [
        {"epoch": i + 1, "test/top1": value, "test/top5": 90.0, "seconds/train": 2.0, "seconds/eval": 0.5}
        for i, value in enumerate(top1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_headline_is_the_last_epoch(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "a", [10.0, 40.0, 30.0]), "student", 1_234_567)
    assert record.seconds == 7.5
    _, _, row = comparison_table([record]).splitlines()
    assert row.split() == ["student", "1,234,567", "30.00", "90.00", "8"]


def test_an_empty_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished epoch"):
        read_run(tmp_path, "x", 0)


def test_columns_line_up() -> None:
    lines = text_table(["a", "b"], [["long name", "1"], ["x", "22.5"]]).splitlines()
    assert lines == ["a             b", "---------------", "long name     1", "x          22.5"]


def test_paired_difference_by_hand() -> None:
    """Gaps 1, 3 and 2: mean 2, standard deviation 1, standard error 1 / sqrt(3) = 0.58."""
    table = paired_table({"alone": {0: 50.0, 1: 52.0, 2: 51.0}, "taught": {0: 51.0, 1: 55.0, 2: 53.0}}, "alone")
    header, _, alone, taught = table.splitlines()
    assert "over 3 seeds" in header
    assert alone.split() == ["alone", "51.00", "1.00"]
    assert taught.split() == ["taught", "53.00", "2.00", "+2.00", "0.58"]


def test_unpaired_seeds_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"taught: seeds \[0\]; a paired comparison needs the same two or more, \[0, 1\]"
    ):
        paired_table({"alone": {0: 1.0, 1: 2.0}, "taught": {0: 1.0}}, "alone")


@pytest.mark.slow
def test_curves_are_a_png(tmp_path: Path) -> None:
    records = [read_run(write_run(tmp_path / name, [10.0, 20.0]), name, 1) for name in ("a", "b")]
    picture = tmp_path / "out" / "curves.png"
    learning_curves(records, picture, title="t")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_shows_the_epochs_that_were_evaluated(tmp_path: Path) -> None:
    lines = [{"epoch": 1}, {"epoch": 2, "test/top1": 40.0}, {"epoch": 3}, {"epoch": 4, "test/top1": 50.0}]
    learning_curves([RunRecord("a", 1, lines)], tmp_path / "curves.png", title="every other epoch")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
