"""``results/published.csv`` is one tidy file, and a mistake in it is one line."""

from pathlib import Path

import pytest

from mdistill.errors import UserError
from mdistill.reporting.published import COLUMNS, Figure, read_published

FILE = Path(__file__).resolve().parents[2] / "results" / "published.csv"
HEAD = ",".join(COLUMNS)


def test_reads_typed_figures(tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    path.write_text(f'{HEAD}\ncifar100,kd,lskd,resnet56,resnet20,,top1,70.50,README of x,,"one, two"\n')
    assert read_published(path) == [
        Figure("cifar100", "kd", "lskd", "resnet56", "resnet20", None, "top1", 70.5, "README of x", "", "one, two")
    ]


def test_the_file_is_tidy() -> None:
    text = FILE.read_bytes()
    assert not text.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in text
    assert text.endswith(b"\n")
    figures = read_published(FILE)
    assert len(figures) >= 357
    keys = [
        (f.dataset, f.method, f.variant, f.teacher, f.student, f.metric, f.source, f.table, f.epochs or 0)
        for f in figures
    ]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)
    assert all(0 < figure.value < 100 for figure in figures)
    assert all(figure.teacher or figure.method == "vanilla" for figure in figures)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", f"the first line should be {HEAD}, found "),
        ("a,b\n", f"the first line should be {HEAD}, found a,b"),
        (f"{HEAD}\na,b\n", "line 2: should hold 11 values, found 2"),
        (
            f"{HEAD}\nd,kd,,t,s,240,top1,high,x,,\n",
            "line 2: epochs and value should be numbers, found '240' and 'high'",
        ),
        (f"{HEAD}\nd,kd,,t,s,2.5,top1,70,x,,\n", "line 2: epochs and value should be numbers, found '2.5' and '70'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "published.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_published(path)
    assert str(caught.value) == f"{path}: {line}"


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"published.csv: cannot be read as a CSV file: "):
        read_published(tmp_path / "published.csv")
