"""Comparisons of methods over seeds and pairs, from the cells of a table."""

from dataclasses import replace
from pathlib import Path

import pytest

from mdistill.errors import UserError
from mdistill.reporting.comparison import Compared, compare, text
from mdistill.reporting.records import Record
from mdistill.reporting.statistics import holm, paired, stratified
from mdistill.reporting.table_cells import Layout, Wanted
from mdistill.reporting.table_show import Result, Table, Trial

A, B = {"data": "a", "teacher": "t"}, {"data": "b", "teacher": "t"}
VALUES = {
    ("base", "one"): {0: 70.0, 1: 71.0, 2: 72.0},
    ("base", "two"): {0: 60.0, 1: 60.0},
    ("better", "one"): {0: 71.0, 1: 74.0, 2: 74.0},  # by 1, 3 and 2
    ("better", "two"): {0: 64.0, 1: 65.0, 2: 99.0},  # by 4 and 5
    ("other", "one"): {0: 70.5, 1: 71.0, 2: 71.5},  # by 0.5, 0 and -0.5
    ("other", "two"): {},
}


def record(seed: int, copies: dict[str, str]) -> Record:
    session = {"data": {"fingerprint": copies["data"]}, "teacher": {"fingerprint": copies["teacher"]}}
    return Record(Path("runs"), {"seed": seed}, [session], None, 0)


def table(copies: dict[str, str] = A, given: dict[tuple[str, str], dict[int, float]] = VALUES) -> Table:
    """``copies`` are those of the row "better"."""
    results = {}
    for (row, pair), values in given.items():
        wanted = Wanted(row, pair, ("cifar100", row, "teacher", "student"), "", 240, {}, ())
        own = copies if row == "better" else A
        trials = tuple(Trial(seed, top1, record(seed, own)) for seed, top1 in values.items())
        results[row, pair] = Result(wanted, (0, 1, 2), trials)
    cells = tuple(result.wanted for result in results.values())
    layout = Layout("title", "", "", ("base", "better", "other"), ("one", "two"), (0, 1, 2), cells)
    return Table(layout, "last", ("top1",), results, (), ())


def test_differences_are_of_the_seeds_that_both_have() -> None:
    compared = compare(table(), "base")
    lines = {(line.method, line.what): line for line in compared.lines}
    assert [line.method for line in compared.lines] == ["better"] * 4 + ["other"]
    assert lines["better", "one"].comparison == paired([1.0, 3.0, 2.0])
    assert lines["better", "two"].comparison == paired([4.0, 5.0])
    assert lines["other", "one"].comparison == paired([0.5, 0.0, -0.5])
    singles = [line for line in compared.lines if line.what in {"one", "two"}]
    p_values = [line.comparison.p for line in singles if line.comparison.p is not None]
    assert [line.adjusted for line in singles] == holm(p_values)
    over, beyond = (line for line in compared.lines if line.what.startswith("over"))
    assert over.comparison == stratified([[1.0, 3.0, 2.0], [4.0, 5.0]])
    assert beyond.comparison == paired([2.0, 4.5])
    assert (over.what, beyond.what) == ("over 2 pairs, further seeds on these", "over 2 pairs, other pairs like these")


def test_copies_of_the_data_are_not_compared() -> None:
    compared = compare(table(B), "base", ["better", "other"])
    assert {line.method for line in compared.lines} == {"other"}
    assert "not compared: better one and base one seed 0, another copy of the data" in compared.notes


def test_a_row_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match=r"--baseline: unknown 'bas'; did you mean 'base'\? \(in this table: base, "):
        compare(table(), "bas")
    with pytest.raises(UserError, match="--methods: unknown 'betterr'; did you mean 'better'"):
        compare(table(), "base", ["betterr"])
    with pytest.raises(UserError, match="nothing to compare with 'base': no pair of which it and another row have"):
        compare(table(B), "base", ["better"])


def test_equal_differences_are_no_certainty() -> None:
    """They count among the comparisons that Holm's procedure adjusts for: 2 x 0.5 of "other"."""
    raised = {seed: top1 + 1 for seed, top1 in VALUES["base", "one"].items()}
    compared = compare(table(given={**VALUES, ("better", "one"): raised, ("better", "two"): {}}), "base")
    better, other = compared.lines
    assert (better.comparison.p, better.adjusted) == (None, None)
    assert other.adjusted == holm([other.comparison.p or 0, 1.0])[0]
    lines = text(compared).splitlines()
    assert lines[2].split() == ["better", "one", "3", "+1.00", "equal", "differences", "-", "-"]
    assert any(line.startswith("equal differences: nothing of how far they vary") for line in lines)


def test_markdown_is_escaped() -> None:
    line = compare(table(), "base", ["better"]).lines[0]
    shown = text(
        Compared("ba|se", "last", "top1", (replace(line, method="a*b", what="res56_res20"),), ()), markdown=True
    )
    assert shown.splitlines()[0].startswith("| above ba\\|se |")
    assert shown.splitlines()[2].startswith("| a\\*b | res56\\_res20 | 3 |")


def test_as_text_and_markdown() -> None:
    lines = text(compare(table(), "base", ["better"])).splitlines()
    assert lines[0].split() == ["above", "base", "n", "difference", "95", "%", "interval", "p", "p,", "Holm"]
    assert lines[2].split() == ["better", "one", "3", "+2.00", "-0.48", "to", "+4.48", "0.074", "0.141"]
    notes = " ".join(lines[7:])
    assert "each of two runs with the same seed and pair, and for other pairs like these it counts pairs;" in notes
    assert "in this table (single pairs; over pairs, further seeds; over pairs, other pairs)" in notes
    assert "where n is below 5 an interval that holds 0" in notes
    row = text(compare(table(), "base", ["better"]), markdown=True).splitlines()[2]
    assert row == "| better | one | 3 | +2.00 | -0.48 to +4.48 | 0.074 | 0.141 |"
