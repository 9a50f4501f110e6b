"""The page of ``mdistill watch``: parts of HTML made here, and a script that puts those in place that have changed."""

import base64
import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mdistill.errors import plural
from mdistill.reporting.drawing import COLOURS
from mdistill.reporting.html_page import head, text
from mdistill.reporting.watching import STATES, Cell, Run, View, Worker

EVERY = 3.0  # seconds between two looks of the page
TITLE = "Runs"
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # of lines whose colours repeat, and beside them for who sees no colours
WIDTH, HEIGHT = 340, 150  # of a chart; its text is then read at its size on a phone
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 22, 20  # around what is drawn
FARTHEST = 1e300  # from 0, of what is drawn: twice as much is a number still

STYLE = """
h2 { grid-column: 1 / -1; margin: 1rem 0 0; }
#status:empty { display: none; }
h3 { font-size: 1.05rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }
#parts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem;
  align-items: start; }
#parts > * { min-width: 0; }
.wide { grid-column: 1 / -1; }
.wide p, .cell p { margin: 0; }
.cell { background: var(--band); border-radius: .4rem; padding: .75rem; }
.runs { list-style: none; margin: .5rem 0 0; padding: 0; }
.runs li { padding: .45rem 0; border-top: 1px solid var(--faint); font-variant-numeric: tabular-nums; }
.runs b, .workers b { font-weight: 600; }
.runs svg { width: 1.9rem; height: .6rem; margin-right: .35rem; }
.chart { display: block; width: 100%; max-width: 30rem; height: auto; margin-top: .5rem; background: var(--paper); }
.chart text { font: 12px system-ui, sans-serif; fill: var(--faint); }
.chart .title { fill: var(--ink); font-weight: 600; }
progress { display: block; width: 100%; height: .6rem; margin: .3rem 0; accent-color: var(--link); }
.workers li { overflow-wrap: anywhere; }
"""

SCRIPT = """
"use strict";
const parts = document.getElementById("parts"), status = document.getElementById("status");
let version = Number(parts.dataset.version), shift = 0, reached = Date.now();

function duration(seconds) {
  const s = Math.max(0, Math.round(seconds)), pad = n => String(n).padStart(2, "0");
  return `${Math.floor(s / 3600)}:${pad(Math.floor(s / 60) % 60)}:${pad(s % 60)}`;
}
function tick() {
  const now = Date.now() / 1000 + shift;
  for (const each of document.querySelectorAll("[data-until]")) {
    const left = each.dataset.until - now;
    each.textContent = left > 0 ? `about ${duration(left)} left` : "about to end";
  }
  for (const each of document.querySelectorAll("[data-since]"))
    each.textContent = `${duration(now - each.dataset.since)} ago`;
}
function made(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  return template.content.firstElementChild;
}
function renew(old, html) {
  const fresh = made(html), focus = old.contains(document.activeElement);
  for (const each of old.querySelectorAll("details[open]")) {
    const same = fresh.querySelector(`#${each.id}`);
    if (same) same.open = true;
  }
  old.replaceWith(fresh);
  if (focus) fresh.querySelector("summary")?.focus();
  return fresh;
}
function apply(changes) {
  version = changes.version;
  shift = changes.now - Date.now() / 1000;
  changes.order.forEach((id, place) => {
    let part = document.getElementById(id);
    if (id in changes.parts) part = part ? renew(part, changes.parts[id]) : made(changes.parts[id]);
    if (part && parts.children[place] !== part) parts.insertBefore(part, parts.children[place] ?? null);
  });
  while (parts.children.length > changes.order.length) parts.lastElementChild.remove();
}
async function poll() {
  if (!document.hidden) {
    try {
      const answer = await fetch(`changes?since=${version}`, {cache: "no-store"});
      if (!answer.ok) throw new Error(answer.statusText);
      apply(await answer.json());
      reached = Date.now();
      if (status.textContent) status.textContent = "";
    } catch {
      const words = "mdistill watch does not answer: what follows is not up to date any more.";
      if (Date.now() - reached > 2000 * EVERY && status.textContent !== words) status.textContent = words;
    }
    tick();
  }
}
document.addEventListener("visibilitychange", poll);
tick();
poll();
setInterval(poll, 1000 * EVERY);
setInterval(tick, 1000);
""".replace("EVERY", f"{EVERY:g}")


class Parts:
    """The parts of the page as they are, and in which version each has changed; for one thread at a time."""

    def __init__(self) -> None:
        self.version = int(time.time() * 1000)  # later than of any server before, whose page may still be open
        self._html: dict[str, str] = {}
        self._changed: dict[str, int] = {}
        self._cells: dict[str, tuple[Cell, str]] = {}  # as they were, and their HTML

    def update(self, view: View) -> None:
        """Take in what there is now."""
        fresh = dict(self._parts(view))
        self._cells = {key: cell for key, cell in self._cells.items() if key in fresh}
        if fresh == self._html and [*fresh] == [*self._html]:
            return
        self.version += 1
        self._changed = {
            name: self._changed[name] if self._html.get(name) == part else self.version for name, part in fresh.items()
        }
        self._html = fresh

    def since(self, version: int) -> dict[str, Any]:
        """What a page of ``version`` has to change: its parts in their order, and those that are not what they were."""
        changed = {name: part for name, part in self._html.items() if self._changed[name] > version}
        return {"version": self.version, "now": time.time(), "order": [*self._html], "parts": changed}

    def page(self) -> str:
        """The whole page."""
        return "\n".join(
            [
                head(TITLE, STYLE),
                "<body>",
                "<main>",
                f"<h1>{TITLE}</h1>",
                '<p class="warn" id="status" role="status"></p>',
                f'<div id="parts" data-version="{self.version}">',
                *self._html.values(),
                "</div>",
                "</main>",
                f"<script>{SCRIPT}</script>",
                "</body>",
                "</html>",
                "",
            ]
        )

    def _parts(self, view: View) -> Iterable[tuple[str, str]]:
        """Each part's id and HTML, which stays the same until something has changed: no time that passes is in it."""
        yield "summary", _summary(view)
        for name, title, running in (("now", "Running", True), ("lately", "Lately", False)):
            if view.workers and not running:
                yield "workers", _workers(view.workers)
            cells = [cell for cell in view.cells if cell.running is running]
            if cells:
                yield name, f'<h2 id="{name}">{title}</h2>'
            for cell in cells:
                key = f"c{hashlib.sha256(cell.key.encode(errors='replace')).hexdigest()[:12]}"
                if key not in self._cells or self._cells[key][0] != cell:
                    self._cells[key] = (cell, _cell(key, cell))
                yield key, self._cells[key][1]
        if view.problems:
            yield "problems", _problems(view.problems)


def content_policy(page: str) -> str:
    """What a browser may do with ``page``: run its own script, use its own style, ask where it came from."""
    style = page.partition("<style>")[2].partition("</style>")[0]
    return (
        f"default-src 'none'; script-src '{_digest(SCRIPT)}'; style-src '{_digest(style)}'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(code: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}"


def _summary(view: View) -> str:
    counts = [f"{view.count(state)} {state}" for state in STATES if view.count(state)]
    words = ", ".join(counts) or "No run is there yet"
    older = f"; {plural(view.older, 'older run')} not shown" if view.older else ""
    return f'<p id="summary" class="wide">{text(words)}{older}.</p>'


def _problems(problems: Sequence[str]) -> str:
    lines = "".join(f"<li>{text(line)}</li>" for line in problems)
    return f'<section id="problems" class="wide"><h2>Records that cannot be read</h2><ul>{lines}</ul></section>'


def _workers(workers: Sequence[Worker]) -> str:
    lines = []
    for each in workers:
        state = "<b>alive</b>" if each.alive else '<b class="warn">dead: its runs are taken over by others</b>'
        sign = f'last sign <span data-since="{each.sign:.0f}">at {_clock(each.sign)}</span>'
        runs = "".join(f"<li>{text(run)}</li>" for run in each.runs)
        lines.append(f"<li>{text(each.name)}: {state}, {sign}<ul>{runs}</ul></li>")
    return (
        '<section id="workers" class="wide"><h2>Tables being trained</h2>'
        f'<ul class="workers">{"".join(lines)}</ul></section>'
    )


def _cell(key: str, cell: Cell) -> str:
    charts = _charts(cell)
    if charts and not cell.running:
        charts = f'<details id="{key}-curves"><summary>Curves</summary>{charts}</details>'
    runs = "".join(_run(number, run, alone=len(cell.runs) == 1) for number, run in enumerate(cell.runs))
    return (
        f'<section id="{key}" class="cell"><h3>{text(cell.name)}</h3><p class="faint">{text(cell.place)}</p>'
        f'<ul class="runs">{runs}</ul>{charts}</section>'
    )


def _run(number: int, run: Run, *, alone: bool) -> str:
    state = f'<b class="warn">{run.state}</b>' if run.state == "failed" else f"<b>{run.state}</b>"
    if run.ends is not None:
        state += f', <span data-until="{run.ends:.0f}">until about {_clock(run.ends)}</span>'
    elif run.state != "complete":
        sign = "begun" if run.state == "running" else "last sign"
        state += f', {sign} <span data-since="{run.changed:.0f}">at {_clock(run.changed)}</span>'
    facts = []
    if run.top1 is not None:
        best = f" (best {run.best:.2f})" if run.best is not None and run.best != run.top1 else ""
        facts.append(f"{run.split} top-1 {run.top1:.2f} %{best}")
    facts += [f"loss {run.loss:.4g}"] if run.loss is not None else []
    facts += [f"{run.rate:,.0f} images/s"] if run.rate is not None else []
    facts += [run.device] if run.device else []
    done = f"epoch {run.epoch} of {run.epochs}"
    sample = "" if alone else f'<svg viewBox="0 0 30 10" aria-hidden="true"><path d="M0 5H30" {_line(number)}/></svg>'
    bar = (
        f'<progress value="{min(run.epoch, run.epochs)}" max="{run.epochs}" aria-label="seed {run.seed}, {done}">'
        f"{done}</progress>"
    )
    why = f'<br><span class="warn">{text(run.failure)}</span>' if run.failure else ""
    return (
        f"<li>{sample}seed {run.seed}: {state}, {done}{bar if run.state != 'complete' else '<br>'}"
        f'<span class="faint">{text(", ".join(facts))}</span>{why}</li>'
    )


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


# ---- charts --------------------------------------------------------------------------------------------------------

Points = Sequence[tuple[int, float]]


def _charts(cell: Cell) -> str:
    split = "validation" if any(run.split == "val" for run in cell.runs) else "test"
    accuracy = {run.seed: _points(run, 1) for run in cell.runs}
    loss = {run.seed: _points(run, 2) for run in cell.runs}
    return _chart(f"Top-1, {split} (%)", accuracy) + _chart("Training loss", loss)


def _points(run: Run, which: int) -> Points:
    found = [(point[0], point[which]) for point in run.points]
    return [(epoch, value) for epoch, value in found if value is not None and abs(value) <= FARTHEST]


def _chart(title: str, lines: Mapping[int, Points]) -> str:
    """Lines over epochs by seed; "" where there are none."""
    values = [value for line in lines.values() for _, value in line]
    if not values:
        return ""
    epochs = max(2, *(epoch for line in lines.values() for epoch, _ in line))
    ticks = _ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)

    def across(epoch: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / (epochs - 1)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = [
        f'<text class="title" x="{LEFT}" y="14">{text(title)}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 5}">epoch 1</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{epochs}</text>',
        *(
            f'<path d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}" stroke="#d9d9d9" fill="none"/>'
            f'<text x="{LEFT - 5}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
            for tick in ticks
        ),
    ]
    for number, line in enumerate(lines.values()):
        path = "L".join(f"{across(epoch):.1f} {up(value):.1f}" for epoch, value in line)
        if line:
            dot = f"M{across(line[-1][0]):.1f} {up(line[-1][1]):.1f}h0"  # where it is now, and all of a first epoch
            parts.append(f'<path d="M{path}" {_line(number)}/>')
            parts.append(f'<path d="{dot}" {_line(number, 5)} stroke-linecap="round"/>')
    words = "; ".join(
        f"seed {seed} from {line[0][1]:.4g} in epoch {line[0][0]} to {line[-1][1]:.4g} in epoch {line[-1][0]}"
        for seed, line in lines.items()
        if line
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(f"{title}: {words}")}">'
        f"{''.join(parts)}</svg>"
    )


def _line(number: int, width: float = 2) -> str:
    dash = DASHES[number % len(DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash and width < 3 else ""
    return f'fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="{width:g}"{dashes}'


def _ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``most`` of them at most and two at least."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * max(1.0, size):  # the same to the eye
        wide = max(0.5, 1e-3 * size)
        low, high = low - wide, high + wide
    step = _round_up((high - low) / most)
    first = math.floor(low / step)
    return [round(step * number, 10) for number in range(first, math.ceil(high / step) + 1)]


def _round_up(value: float) -> float:
    size: float = 10 ** math.floor(math.log10(value))
    return next(factor * size for factor in (1, 2, 5, 10) if factor * size >= value * 0.999)
