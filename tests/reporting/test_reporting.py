"""Plain-text tables."""

from mdistill.reporting.tables import text_table


def test_columns_line_up() -> None:
    lines = text_table(["a", "b"], [["long name", "1"], ["x", "22.5"]]).splitlines()
    assert lines == ["a             b", "---------------", "long name     1", "x          22.5"]
