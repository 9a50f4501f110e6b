"""One HTML file about many runs: tables, pictures and what stands behind each number, readable on a phone.

The file needs nothing beside it. Text is escaped; pictures are SVG files within it, each with its content in words.
"""

import base64
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from mdistill import __version__
from mdistill.errors import UserError, plural, printable
from mdistill.reporting import drawing, plots
from mdistill.reporting.figures import POINTS
from mdistill.reporting.html_page import head as _head
from mdistill.reporting.html_page import text as _text
from mdistill.reporting.records import Record, State, knowing_teachers
from mdistill.reporting.series import Series, by_pair
from mdistill.reporting.statistics import mean_std_text
from mdistill.reporting.table_show import COLLAPSED, FAILED

if TYPE_CHECKING:
    from mdistill.reporting.outputs import Networks

STATES: Mapping[State, str] = {
    "unfinished": "unfinished",
    "failed": "failed",
    "collapsed": "collapsed",
    "untested": "without an accuracy on the test split",
    "empty": "without an epoch",
}
SIGNS: Mapping[str, State] = {COLLAPSED: "collapsed", FAILED: "failed"}

STYLE = """
nav ul { columns: 16rem; padding-left: 1.2rem; }
table { border-collapse: collapse; width: 100%; max-width: 46rem; margin: .75rem 0; }
caption { text-align: left; color: var(--faint); font-size: .9rem; padding-bottom: .4rem; }
th, td { text-align: right; padding: .35rem .4rem; vertical-align: top; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid var(--faint); }
tbody tr:nth-child(even) { background: var(--band); }
tbody th { font-weight: normal; }
.best { font-weight: bold; }
.second { text-decoration: underline; text-underline-offset: .2em; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem; }
figure { margin: .5rem 0; }
figcaption { font-weight: bold; margin-bottom: .3rem; }
img { display: block; width: 100%; max-width: 40rem; height: auto; background: var(--paper); }
details { margin: .75rem 0; }
.runs { padding-left: 1.2rem; font-size: .9rem; }
.runs li { margin: .5rem 0; }
"""


@dataclass(frozen=True)
class Section:
    """The runs that compare with each other."""

    title: str
    key: str  # of its place in the page
    groups: Sequence[Series]  # the highest mean first
    pictures: Sequence[str]  # HTML


def report(
    records: Sequence[Record], *, title: str, problems: Sequence[str] = (), networks: "Networks | None" = None
) -> str:
    """The page about ``records``, as HTML.

    Args:
        title: of the page.
        problems: a line for each record that could not be read.
        networks: what runs the networks for further pictures; None for pictures from the records alone.

    Raises:
        UserError: there are no records, or what draws is not installed.
    """
    if not records:
        raise UserError("a report needs a run at least, found none")
    begun = knowing_teachers([record for record in records if record.done])
    if begun:
        drawing.library()
    sections = [
        _section(number, name, groups, networks)
        for number, (name, groups) in enumerate(by_pair(begun).items(), start=1)
    ]
    parts = [_head(title, STYLE), "<body>", "<main>", f"<h1>{_text(title)}</h1>", _summary(records)]
    if len(sections) > 2:
        links = (f'<li><a href="#{each.key}">{_text(each.title)}</a></li>' for each in sections)
        parts.append(f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>')
    parts += [_teachers(begun), *map(_section_html, sections)]
    silent = [record for record in records if not record.done]
    if silent:
        parts.append(f'<h2 id="silent">Runs without a finished epoch</h2>{_run_list(silent)}')
    if problems:
        lines = "".join(f"<li>{_text(problem)}</li>" for problem in problems)
        parts.append(f'<h2 id="unread">Records that could not be read</h2><ul class="runs">{lines}</ul>')
    parts += [_notes(), "</main>", "</body>", "</html>", ""]
    return "\n".join(part for part in parts if part)


def _section(number: int, title: str, groups: Sequence[Series], networks: "Networks | None") -> Section:
    ordered = sorted(groups, key=lambda each: -mean(each.values) if each.values else 0.0)
    records = [run for each in ordered for run in each.runs]
    drawn = [_picture("curves", "Learning curves", title, records)]
    if sum(bool(each.values) for each in ordered) > 1 and any(run.teacher for run in records):
        drawn.append(_picture("time", "Time of a batch and accuracy", title, records))
    if networks is not None:
        drawn += _of_networks(title, ordered, networks)
    return Section(title, f"pair{number}", ordered, drawn)


def _of_networks(title: str, groups: Sequence[Series], networks: "Networks") -> list[str]:
    """Pictures of what networks of finished runs compute; but for agreement, of one run of each of the best series."""
    finished = [run for each in groups for run in each.finished]
    first = {each.label: each.finished[0] for each in groups[: plots.MOST_PANELS] if each.finished}
    taught = {label: run for label, run in first.items() if run.teacher}
    drawn = []
    if taught:
        drawn.append(_picture("agreement", "Agreement with the teacher", title, finished, networks))
    for label, run in first.items():
        drawn.append(_picture("reliability", f"Calibration: {label}", title, [run], networks))
    for kind, caption in (("correlation", "Correlations of logits"), ("logits", "Logits of each class")):
        largest = []
        for run in taught.values():
            with suppress(UserError):  # the picture of this run says why
                (found,) = plots.differences(kind, [run], plots.Options(), networks).values()
                largest.append(float(found.max()))
        scale = max(largest, default=None)
        for label, run in taught.items():
            drawn.append(_picture(kind, f"{caption}: {label}", title, [run], networks, scale))
    return drawn


def _teachers(records: Sequence[Record]) -> str:
    """Student accuracy by teacher accuracy, for each student that several teachers taught."""
    students: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.teacher and record.teacher_top1 is not None and record.complete:
            students.setdefault((record.dataset, record.student), []).append(record)
    several = {key: runs for key, runs in students.items() if len({run.teacher for run in runs}) > 1}
    if not several:
        return ""
    drawn = [
        _picture("teachers", f"{student} by its teachers", f"{student} on {dataset}", runs)
        for (dataset, student), runs in sorted(several.items())
    ]
    return f'<h2 id="teachers">Teachers and students</h2><div class="pictures">{"".join(drawn)}</div>'


def _picture(
    kind: str,
    caption: str,
    subject: str,
    records: Sequence[Record],
    networks: "Networks | None" = None,
    scale: float | None = None,
) -> str:
    """A picture as HTML; where it cannot be made, a line that says why."""
    try:
        picture = plots.draw(kind, records, plots.Options(epochs=POINTS, scale=scale), networks)
    except UserError as error:
        return f'<p class="warn">{_text(caption)} left out: {_text(printable(str(error).splitlines()[0], 300))}</p>'
    svg = drawing.as_svg(picture.figure)
    width, height = (round(72 * inches) for inches in picture.figure.get_size_inches())
    words = f"{caption}, {subject}: {plots.describe(picture.lines)}"
    notes = "".join(f"<li>{_text(printable(line, 300))}</li>" for line in picture.left_out)
    left_out = f'<p class="faint">Left out:</p><ul class="runs">{notes}</ul>' if notes else ""
    return (
        f"<figure><figcaption>{_text(caption)}</figcaption>"
        f'<img alt="{_text(words)}" width="{width}" height="{height}" decoding="async"'
        f' src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">{left_out}</figure>'
    )


def _summary(records: Sequence[Record]) -> str:
    count = Counter(record.state for record in records)
    methods = len({record.method for record in records})
    lines = [f"{plural(len(records), 'run')} of {plural(methods, 'method')}: {count['complete']} complete"]
    lines += [f'<span class="warn">{count[state]} {words}</span>' for state, words in STATES.items() if count[state]]
    made = f"Made by mdistill {_text(__version__)} on {time.strftime('%Y-%m-%d')}."
    return f'<p>{", ".join(lines)}.</p><p class="faint">{made}</p>'


def _section_html(section: Section) -> str:
    pictures = f'<div class="pictures">{"".join(section.pictures)}</div>'
    runs = [run for each in section.groups for run in each.runs]
    details = (
        f"<details><summary>The {plural(len(runs), 'run')} behind these numbers</summary>{_run_list(runs)}</details>"
    )
    return f'<h2 id="{section.key}">{_text(section.title)}</h2>{_table(section.groups)}{pictures}{details}'


def _table(groups: Sequence[Series]) -> str:
    ranks = _ranks([mean(each.values) if each.values else None for each in groups])
    rows = []
    for each, rank in zip(groups, ranks, strict=True):
        times = [run.step_ms for run in each.runs if run.step_ms is not None]
        seeds = f"{len(each.finished)}" + (f" of {len(each.runs)}" if len(each.finished) < len(each.runs) else "")
        top1 = mean_std_text(each.values) if each.values else "-"
        states = {run.state for run in each.runs}
        marks = "".join(f" {sign}" for sign, state in SIGNS.items() if state in states)
        cells = [(f'<span class="{rank}">{top1}</span>' if rank else top1) + marks]
        cells += [seeds, f"{mean(times):.1f}" if times else "-"]
        rows.append(f'<tr><th scope="row">{_text(each.label)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("method", "top-1 (%)", "runs", "ms a batch"))
    known = {run.teacher: run.teacher_top1 for each in groups for run in each.runs if run.teacher_top1 is not None}
    teacher = "".join(f" Teacher {name}: {top1:.2f} %." for name, top1 in known.items())
    states = {run.state for each in groups for run in each.runs}
    signs = "".join(f" {sign} with a run that {state}." for sign, state in SIGNS.items() if state in states)
    caption = f"Test top-1 of the last epoch, mean ± sample standard deviation over finished runs.{signs}{teacher}"
    return (
        f"<table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _ranks(means: Sequence[float | None]) -> list[str]:
    """The class of the best mean and of the second, as they are printed; "" for all others, and where one is alone."""
    printed = sorted({round(value, 2) for value in means if value is not None}, reverse=True)
    names: Mapping[float, str] = dict(zip(printed, ("best", "second"), strict=False)) if len(printed) > 1 else {}
    return ["" if value is None else names.get(round(value, 2), "") for value in means]


def _run_list(records: Iterable[Record]) -> str:
    return f'<ul class="runs">{"".join(map(_run, records))}</ul>'


def _run(record: Record) -> str:
    best = record.best_accuracy("top1")
    accuracy = "" if record.top1 is None else f": {record.top1:.2f} %"
    accuracy += "" if best is None or not accuracy else f" (best epoch {best:.2f} %)"
    state = f"{record.done} of {record.epochs} epochs"
    if record.state in STATES:
        state = f'<span class="warn">{STATES[record.state]}, {state}</span>'
    if record.failure:
        state += f", {_text(printable(record.failure, 300))}"
    told = [("cell", record.identity), ("commit", record.short_commit)]
    told += [(key, printable(record.noted(key) or "", 80)) for key in ("device", "started")]
    facts = ", ".join(f"{name} {_text(value)}" for name, value in told if value)
    name = f"{record.name} seed {record.seed}"
    return f"<li>{_text(name)}{accuracy}, {state}<br>{facts}<br><code>{_text(record.folder)}</code></li>"


def _notes() -> str:
    return (
        '<h2 id="notes">How to read this</h2><ul>'
        "<li>A run counts where its last epoch is done. Runs of one cell differ in their seed alone: other settings,"
        " data or teacher weights are another row.</li>"
        "<li>Bands and ± are one sample standard deviation over seeds. Bold is the best mean, underlined the second;"
        " with few seeds neighbours do not differ.</li>"
        "<li>A run collapsed if its last accuracy is less than half of its best, or no better than a guess.</li>"
        "<li>Times are of the machine that each run had, and compare only where that was the same.</li></ul>"
    )
