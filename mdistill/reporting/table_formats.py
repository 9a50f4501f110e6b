"""A shown table as text, Markdown, LaTeX and CSV; ``table_page`` makes the HTML."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mdistill.reporting.statistics import mean_std
from mdistill.reporting.table_page import page
from mdistill.reporting.table_show import NAMES, Table, metric_name
from mdistill.reporting.tables import escaped, markdown_table, text_table

Format = Literal["text", "markdown", "latex", "csv", "html"]
FORMATS: tuple[str, ...] = get_args(Format)

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


@dataclass(frozen=True)
class _Cell:
    text: str
    rank: int = 0  # 1 the best of its column, 2 the second


def render(table: Table, form: Format) -> str:
    """``table`` in ``form``, without a newline at the end."""
    makers: Mapping[str, Callable[[Table], str]] = {
        "text": _text,
        "markdown": _markdown,
        "latex": _latex,
        "csv": _csv,
        "html": page,
    }
    return makers[form](table)


def _rows(table: Table) -> list[list[_Cell]]:
    """Name and figures of every row; published figures and differences below each."""
    rows = []
    ranks = {pair: table.ranks(pair) for pair in table.layout.pairs}
    for row in table.layout.rows:
        results = [table.results.get((row, pair)) for pair in table.layout.pairs]
        figures = [
            _Cell("-") if each is None else _Cell(each.text, ranks[pair].get(row, 0))
            for pair, each in zip(ranks, results, strict=True)
        ]
        rows.append([_Cell(row), *figures])
        if table.layout.source:
            published = ["" if each is None or each.published is None else f"{each.published:.2f}" for each in results]
            differences = ["" if each is None else each.difference_text for each in results]
            rows.append([_Cell("  published"), *map(_Cell, published)])
            rows.append([_Cell("  difference"), *map(_Cell, differences)])
    for external in table.external:
        texts = [external.text(pair, table.epoch, table.metric(pair)) for pair in table.layout.pairs]
        rows.append([_Cell(external.name), *map(_Cell, texts)])
    return rows


def _text(table: Table) -> str:
    marks = {0: "  ", 1: " *", 2: " '"}
    rows = [
        [name.text, *(f"{cell.text}{marks[cell.rank]}" if cell.text else "" for cell in cells)]
        for name, *cells in _rows(table)
    ]
    header = [table.headline, *(f"{pair}  " for pair in table.layout.pairs)]
    notes = ["* best of its column, ' second", *table.notes]
    return "\n".join([table.title, "", text_table(header, rows), "", *notes])


def _markdown(table: Table) -> str:
    wrap = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}
    rows = [
        [escaped(name.text), *(wrap[cell.rank].format(escaped(cell.text)) for cell in cells)]
        for name, *cells in _rows(table)
    ]
    header = [escaped(name) for name in (table.headline, *table.layout.pairs)]
    lines = markdown_table(header, rows, ["---", *["---:"] * len(table.layout.pairs)])
    notes = ["best of a column bold, second underlined", *table.notes]
    return "\n".join([f"**{escaped(table.title)}**", "", *lines, "", *(f"- {escaped(note)}" for note in notes)])


def _latex(table: Table) -> str:
    wrap = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(table.title)}. {_tex(table.headline.capitalize())}, percent.}}",
        rf"\begin{{tabular}}{{l{'c' * len(table.layout.pairs)}}}",
        r"\toprule",
    ]
    networks = [table.networks(pair) for pair in table.layout.pairs]
    for role, column in (("teacher", 0), ("student", 1)):
        lines.append(" & ".join([role, *(_tex(pair[column]) for pair in networks)]) + r" \\")
    if len({(*pair, table.metric(name)) for pair, name in zip(networks, table.layout.pairs, strict=True)}) < len(
        networks
    ):
        lines.append(" & ".join(["pair", *map(_tex, table.layout.pairs)]) + r" \\")
    if len(table.metrics) > 1:
        names = [metric_name(table.metric(pair)) for pair in table.layout.pairs]
        lines.append(" & ".join(["", *map(_tex, names)]) + r" \\")
    lines.append(r"\midrule")
    for name, *cells in _rows(table):
        first = r"\quad " + _tex(name.text.strip()) if name.text.startswith(" ") else _tex(name.text)
        first = f"{{}}{first}" if first.startswith(("[", "*")) else first  # else an argument of the last line's \\
        lines.append(" & ".join([first, *(wrap[cell.rank].format(_tex(cell.text)) for cell in cells)]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([*lines, *(f"% {' '.join(note.split())}" for note in table.notes)])


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


CSV_COLUMNS = (
    "method",
    "pair",
    "dataset",
    "teacher",
    "student",
    "kind",
    "epoch",
    "metric",
    "mean",
    "std",
    "runs",
    "wanted",
    "failed",
    "published",
    "difference",
    "values",
    "commits",
    "configs",
)


def _csv(table: Table) -> str:
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for (row, pair), each in table.results.items():
        dataset, _, teacher, student = each.wanted.key
        numbers = [_number(each.published, 2), _number(each.difference, 4)]
        failed, wanted = str(len(each.failed)), str(len(each.seeds))
        values = {str(trial.seed): trial.value for trial in each.trials}
        commits = _unique([trial.record.commit for trial in each.trials])
        configs = _unique([trial.record.identity for trial in each.trials])
        figures = [*_figures(list(values.values())), wanted, failed, *numbers, _values(values), commits, configs]
        writer.writerow([row, pair, dataset, teacher, student, "run", table.epoch, each.wanted.metric, *figures])
    for external in table.external:
        for pair, runs in external.cells.items():
            first = runs[0]
            metric = table.metric(pair)
            if metric not in NAMES:
                continue
            values = {each.trial: value for each in runs if (value := each.accuracy(table.epoch, metric)) is not None}
            figures = [*_figures(list(values.values())), "", "", "", "", _values(values), "", ""]
            what = [first.dataset, first.teacher, first.student, "external", table.epoch, metric]
            writer.writerow([external.name, pair, *what, *figures])
    return output.getvalue().rstrip("\n")


def _figures(values: Sequence[float]) -> list[str]:
    mean, std = mean_std(values) if values else (None, None)
    return [_number(mean, 4), _number(std, 4), str(len(values))]


def _values(values: Mapping[str, float]) -> str:
    return " ".join(f"{seed}:{value:.4f}" for seed, value in values.items())


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _unique(texts: Sequence[str]) -> str:
    return " ".join(dict.fromkeys(text for text in texts if text))
