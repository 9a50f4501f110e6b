"""A shown table as one HTML file that needs nothing else, readable on a phone: there each row becomes a card."""

from collections.abc import Iterator
from html import escape

from mdistill.reporting.table_show import Result, Table, metric_name

_NAME, _COLUMN, _LEAST = 10, 9, 60  # rem: of a row's name, of a column, of all; a window with less room shows cards
_STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --soft: #555; --line: #ccc; --shade: #f3f5f8; --link: #0b4f9e; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1rem; color: var(--ink); background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
a { color: var(--link); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); overflow-wrap: normal; }
thead small, td small { display: block; font-size: .8rem; font-weight: normal; color: var(--soft); }
thead small { overflow-wrap: anywhere; }
tbody tr:hover { background: var(--shade); }
.best { font-weight: 700; } .second { text-decoration: underline; text-underline-offset: .2em; }
.cell { position: relative; display: inline-block; white-space: nowrap; }
.cell a { color: inherit; text-decoration: none; }
.cell .second { text-decoration: underline; }
.about { display: none; position: absolute; right: 0; top: 100%; z-index: 1; width: 20rem; padding: .5rem .7rem;
  white-space: normal; text-align: left; font-size: .85rem; font-weight: normal; color: #fff; background: #222;
  border-radius: .3rem; }
.cell:hover .about, .cell:focus-within .about { display: block; }
.runs td { font-size: .9rem; white-space: nowrap; } .runs td:last-child { white-space: normal; }
.runs td, .runs th { text-align: left; } .runs th { overflow-wrap: normal; }
:target { background: #fff3c4; }
@media (max-width: WIDTHrem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, caption, tbody, tr, td, tbody th { display: block; width: 100%; }
  tr { border: 1px solid var(--line); border-radius: .4rem; margin-bottom: .8rem; padding: .3rem 0; }
  td, tbody th { border: 0; padding: .2rem .7rem; }
  tbody th { font-size: 1.05rem; }
  td { display: flex; justify-content: space-between; gap: 1rem; text-align: right; }
  td::before { content: attr(data-label); flex: none; max-width: 55%; text-align: left; color: var(--soft); }
  .runs td { text-align: right; white-space: normal; }
  td:first-child { text-align: right; }
  .about { width: min(18rem, 80vw); }
}
"""


def page(table: Table) -> str:
    """The page: the table, notes, and an appendix with the runs behind each figure."""
    heading = escape(table.title)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{heading}</title>",
            f"<style>{_STYLE.replace('WIDTH', str(max(_LEAST, _NAME + _COLUMN * len(table.layout.pairs))))}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{heading}</h1>",
            '<table role="table">',
            f"<caption>{escape(table.headline.capitalize())}, percent. Best of a column bold, second underlined."
            f" {_published(table)}Each figure leads to the runs behind it.</caption>",
            *_head(table),
            '<tbody role="rowgroup">',
            *_body(table),
            "</tbody>",
            "</table>",
            "<h2>Notes</h2>",
            "<ul>",
            *(f"<li>{escape(note)}</li>" for note in table.notes),
            "</ul>",
            *_appendix(table),
            *_external(table),
            "</main>",
            "</body>",
            "</html>",
        ]
    )


def _published(table: Table) -> str:
    return "Below it the published figure and, in brackets, the difference from it. " if table.layout.source else ""


def _head(table: Table) -> Iterator[str]:
    yield '<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">method</th>'
    for pair in table.layout.pairs:
        teacher, student = table.networks(pair)
        below = [student, pair, *([metric_name(table.metric(pair))] if len(table.metrics) > 1 else [])]
        names = "".join(f"<small>{escape(name)}</small>" for name in below)
        yield f'<th scope="col" role="columnheader">{escape(teacher)}{names}</th>'
    yield "</tr></thead>"


def _body(table: Table) -> Iterator[str]:
    ranks = {pair: table.ranks(pair) for pair in table.layout.pairs}
    for row in table.layout.rows:
        yield f'<tr role="row"><th scope="row" role="rowheader">{escape(row)}</th>'
        for pair in table.layout.pairs:
            yield _cell(table, row, pair, ranks[pair].get(row, 0))
        yield "</tr>"
    for external in table.external:
        yield f'<tr role="row"><th scope="row" role="rowheader">{escape(external.name)}</th>'
        for pair in table.layout.pairs:
            yield _td(pair, f"<span>{escape(external.text(pair, table.epoch, table.metric(pair)))}</span>")
        yield "</tr>"


def _cell(table: Table, row: str, pair: str, rank: int) -> str:
    each = table.results.get((row, pair))
    if each is None:
        why = table.layout.without.get(row, {}).get(pair, "")
        return _td(pair, f'<span class="cell" title="{escape(why)}">&ndash;</span>')
    style = {0: "", 1: ' class="best"', 2: ' class="second"'}[rank]
    figure = escape(" ".join(part for part in (each.mean_std, each.signs) if part))
    text = f"<span{style}>{figure}</span>" if figure else ""
    if each.trials:
        lines = [f"seed {trial.seed}: {trial.value:.2f}" for trial in each.trials]
        commits = dict.fromkeys(trial.record.short_commit for trial in each.trials)
        lines += [f"commit {commit}" for commit in commits if commit]
        lines += [f"config {cell}" for cell in dict.fromkeys(trial.record.identity for trial in each.trials) if cell]
        about = "<br>".join(map(escape, lines))
        anchor = _anchor(table, each)
        text = f'<a href="#{anchor}" aria-describedby="about-{anchor}">{text}</a>'
        text += f'<span class="about" role="tooltip" id="about-{anchor}">{about}</span>'
    below = f"<small>{each.missing} seeds</small>" if each.missing else ""
    if each.published is not None:
        gap = f" ({each.difference_text})" if each.difference is not None else ""
        below += f"<small>{each.published:.2f}{gap}</small>"
    return _td(each.wanted.pair, f'<span class="cell">{text}{below}</span>')


def _td(label: str, content: str) -> str:
    """A cell; ``label`` says on a phone what it is."""
    return f'<td role="cell" data-label="{escape(label)}">{content}</td>'


def _anchor(table: Table, each: Result) -> str:
    return f"c{table.layout.rows.index(each.wanted.row)}-{table.layout.pairs.index(each.wanted.pair)}"


def _appendix(table: Table) -> Iterator[str]:
    columns = ("method, pair", "seed", "last", "best", "commit", "config", "data", "device", "record")
    yield "<h2>Runs</h2>"
    if not any(each.trials for each in table.results.values()):
        yield "<p>No run of this table is complete.</p>"
        return
    head = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in columns)
    yield from (
        '<table class="runs" role="table">',
        "<caption>Every run behind a figure: top-1 of its last and best epoch, percent; commit of the code; config: a",
        "hash of all settings, data and teacher, the same for trials of one cell; data: its fingerprint.</caption>",
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>',
        '<tbody role="rowgroup">',
    )
    for each in table.results.values():
        for number, trial in enumerate(each.trials):
            record = trial.record
            best = record.best_accuracy("top1")
            values = (
                str(trial.seed),
                f"{record.top1:.2f}" if record.top1 is not None else "",
                f"{best:.2f}" if best is not None else "",
                record.short_commit,
                record.identity,
                record.copies.get("data", "")[:12],
                str(record.noted("device") or ""),
                str(record.folder),
            )
            anchor = "" if number else f' id="{_anchor(table, each)}"'
            cells = zip(columns[1:], values, strict=True)
            yield (
                f'<tr role="row"{anchor}><th scope="row" role="rowheader">{escape(each.label)}</th>'
                + "".join(_td(name, f"<span>{escape(value)}</span>") for name, value in cells)
                + "</tr>"
            )
    yield "</tbody></table>"


def _external(table: Table) -> Iterator[str]:
    runs = [(row, pair, each) for row in table.external for pair, several in row.cells.items() for each in several]
    if not runs:
        return
    yield "<h2>Runs of others</h2>"
    yield (
        "<p>As their logs and checkpoints tell them; of their settings no more is known than the row says, and nothing"
        " of their data.</p><ul>"
    )
    for row, pair, each in runs:
        files = ", ".join(f"{name} (SHA-256 {digest[:12]})" for name, digest in each.files.items())
        best = each.accuracy("best")
        told = f"{each.epochs} epochs" + (f", best {best:.2f}" if best is not None else "")
        yield f"<li>{escape(f'{row.name}, {pair}, trial {each.trial}: {told}; {files}')}</li>"
    yield "</ul>"
