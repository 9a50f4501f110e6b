"""Methods of a table compared with one of them, seed by seed and pair by pair."""

from collections.abc import Sequence
from dataclasses import dataclass

from mdistill.errors import UserError
from mdistill.reporting.statistics import Comparison, holm, paired, stratified
from mdistill.reporting.table_files import known_to_table
from mdistill.reporting.table_show import Result, Table, metric_name
from mdistill.reporting.tables import escaped, markdown_table, text_table

ALL_PAIRS = "over {} pairs, further seeds on these"
OTHER_PAIRS = "over {} pairs, other pairs like these"


@dataclass(frozen=True)
class Line:
    """One comparison."""

    method: str
    what: str  # the pair, or what it is over
    comparison: Comparison
    adjusted: float | None  # p, by Holm's procedure over all lines of its kind; None where the comparison has none


@dataclass(frozen=True)
class Compared:
    """Methods against a baseline."""

    baseline: str
    epoch: str
    metric: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def compare(table: Table, baseline: str, methods: Sequence[str] | None = None) -> Compared:
    """Every one of ``methods`` (None: all rows but the baseline) against the row ``baseline``; of one metric.

    Only runs of the same seed and pair, on the same copy of the data and the same teacher, are compared.

    Raises:
        UserError: a row is none of the table's, or there are no two seeds of a pair that both have.
    """
    rows = table.layout.rows
    for name, flag in [(baseline, "--baseline"), *((method, "--methods") for method in methods or ())]:
        known_to_table(name, rows, flag)
    chosen = [row for row in (rows if methods is None else methods) if row != baseline]
    notes: list[str] = []
    kinds: list[list[tuple[str, str, Comparison]]] = [[], [], []]
    for method in chosen:
        groups = []
        for pair in table.layout.pairs:
            if (method, pair) not in table.results or (baseline, pair) not in table.results:
                continue
            gaps = _gaps(table.results[method, pair], table.results[baseline, pair], notes)
            groups.append(gaps)
            own = paired(gaps)
            if own is not None:
                kinds[0].append((method, pair, own))
        groups = [group for group in groups if group]
        if len(groups) > 1:
            over = stratified(groups)
            if over is not None:
                kinds[1].append((method, ALL_PAIRS.format(len(groups)), over))
            beyond = paired([sum(group) / len(group) for group in groups])
            if beyond is not None:
                kinds[2].append((method, OTHER_PAIRS.format(len(groups)), beyond))
    if not any(kinds):
        raise UserError(
            f"nothing to compare with {baseline!r}: no pair of which it and another row have complete runs of two seeds"
            " or more in common"
        )
    lines = [
        Line(*each, None if each[-1].p is None else adjusted)
        for kind in kinds
        for each, adjusted in zip(kind, holm([1.0 if each.p is None else each.p for *_, each in kind]), strict=True)
    ]
    order = {method: number for number, method in enumerate(chosen)}
    lines.sort(key=lambda line: order[line.method])
    return Compared(baseline, table.epoch, table.metrics[0], tuple(lines), tuple(notes))


def _gaps(one: Result, other: Result, notes: list[str]) -> list[float]:
    """Differences of the seeds that both have; a line in ``notes`` where they cannot be compared."""
    base = {trial.seed: trial for trial in other.trials}
    gaps = []
    for trial in one.trials:
        if trial.seed not in base:
            continue
        mine, theirs = trial.record.copies, base[trial.seed].record.copies
        kinds = ("data", "teacher")
        apart: list[str] = [what for what in kinds if what in mine and what in theirs and mine[what] != theirs[what]]
        apart += ["target"] if trial.target != base[trial.seed].target else []
        if apart:
            notes.append(
                f"not compared: {one.label} and {other.label} seed {trial.seed}, another copy of the {apart[0]}"
            )
        else:
            gaps.append(trial.value - base[trial.seed].value)
    return gaps


def text(compared: Compared, *, markdown: bool = False) -> str:
    """A table of all lines, with what its columns mean below it."""
    header = [f"above {compared.baseline}", "", "n", "difference", "95 % interval", "p", "p, Holm"]
    rows = [
        [
            line.method,
            line.what,
            str(line.comparison.count),
            f"{line.comparison.difference:+.2f}",
            _interval(line.comparison),
            _p(line.comparison.p),
            _p(line.adjusted),
        ]
        for line in compared.lines
    ]
    notes = [
        f"{metric_name(compared.metric)} of the {compared.epoch} epoch, percentage points; n counts differences, each"
        " of two runs with the same seed and pair, and for other pairs like these it counts pairs; Student's t",
        "p, Holm: adjusted for the number of comparisons of its kind in this table (single pairs; over pairs, further"
        " seeds; over pairs, other pairs)",
    ]
    if any(line.comparison.count < 5 for line in compared.lines):
        notes.append(
            "where n is below 5 an interval that holds 0 does not say that methods are equal, only that this does not"
            " tell"
        )
    if any(line.comparison.p is None for line in compared.lines):
        notes.append(
            "equal differences: nothing of how far they vary can be told from them, so there is no interval and no p"
        )
    notes += compared.notes
    if markdown:
        header, *rows = [[escaped(text) for text in line] for line in (header, *rows)]
        lines = markdown_table(header, rows, ["---", "---", *["---:"] * 5])
        return "\n".join([*lines, "", *(f"- {escaped(note)}" for note in notes)])
    return "\n".join([text_table(header, rows), "", *notes])


def _interval(comparison: Comparison) -> str:
    if comparison.low is None or comparison.high is None:
        return "equal differences"
    return f"{comparison.low:+.2f} to {comparison.high:+.2f}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
