"""A table from the records of its runs: what each cell's trials say, and what is not in the cell and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from mdistill.errors import UserError, printable
from mdistill.reporting.external import External, read_external
from mdistill.reporting.published import Figure, disagreeing, figure_of
from mdistill.reporting.records import Found, Record
from mdistill.reporting.statistics import mean_std_text
from mdistill.reporting.table_cells import Layout, Wanted
from mdistill.reporting.transfers import find_transfer, split_metric

Epoch = Literal["last", "best"]
NAMES = {"top1": "top-1", "top5": "top-5"}
COLLAPSED, FAILED = "†", "‡"


def metric_name(metric: str) -> str:
    """``"top-1"``, or ``"top-1 on stl10"``."""
    target, accuracy = split_metric(metric)
    return f"{NAMES[accuracy]} on {target}" if target else NAMES[accuracy]


@dataclass(frozen=True)
class Trial:
    """A complete run of a cell."""

    seed: int
    value: float  # percent
    record: Record
    target: str = ""  # of a metric on one: fingerprint of its images


@dataclass(frozen=True)
class Result:
    """What the runs of a cell say."""

    wanted: Wanted
    seeds: tuple[int, ...]  # that there should be
    trials: tuple[Trial, ...] = ()  # in the order of ``seeds``
    failed: Mapping[int, str] = field(default_factory=dict)  # seed: why
    unfinished: Mapping[int, str] = field(default_factory=dict)  # seed: how far it is
    left_out: tuple[str, ...] = ()  # a line for each kind of run that is not of this cell
    further: frozenset[int] = frozenset()  # seeds that are there, and not asked for
    figure: Figure | None = None  # the published one
    shortened: bool = False
    epoch: Epoch = "last"  # of its values

    @property
    def values(self) -> list[float]:
        """Of its trials."""
        return [trial.value for trial in self.trials]

    @property
    def published(self) -> float | None:
        """Percent."""
        return None if self.figure is None else self.figure.value

    @property
    def same_epochs(self) -> bool:
        """As the published run."""
        return not self.shortened and (self.figure is None or self.figure.epochs in (None, self.wanted.epochs))

    @property
    def mean(self) -> float | None:
        """Over the seeds that are there."""
        return fmean(self.values) if self.trials else None

    @property
    def collapsed(self) -> list[int]:
        """Seeds of complete runs that have learnt nothing, or lost it again."""
        return [trial.seed for trial in self.trials if trial.record.collapsed]

    @property
    def difference(self) -> float | None:
        """Of the last epoch, from the published figure, where that is of as many epochs."""
        if self.mean is None or self.published is None or not self.same_epochs or self.epoch != "last":
            return None
        return self.mean - self.published

    @property
    def missing(self) -> str:
        """``"2 of 3"``, or nothing where every seed is there."""
        return "" if len(self.trials) == len(self.seeds) else f"{len(self.trials)} of {len(self.seeds)}"

    @property
    def mean_std(self) -> str:
        """Mean and sample standard deviation, or nothing."""
        return mean_std_text(self.values) if self.trials else ""

    @property
    def signs(self) -> str:
        """One where a run has collapsed, and one where a run has failed."""
        return " ".join(sign for sign, seeds in ((COLLAPSED, self.collapsed), (FAILED, self.failed)) if seeds)

    @property
    def text(self) -> str:
        """The figure, of how many seeds where some are missing, and the signs."""
        missing = f"({self.missing})" if self.mean_std and self.missing else self.missing
        return " ".join(part for part in (self.mean_std, missing, self.signs) if part)

    @property
    def difference_text(self) -> str:
        """``"+0.21"``, or nothing."""
        return "" if self.difference is None else f"{round(self.difference, 2) + 0.0:+.2f}"

    @property
    def label(self) -> str:
        """For lines below the table."""
        return f"{self.wanted.row} {self.wanted.pair}"


@dataclass(frozen=True)
class ExternalRow:
    """Runs of others: a row of its own."""

    name: str
    cells: Mapping[str, tuple[External, ...]]  # by pair

    def text(self, pair: str, epoch: Epoch, metric: str) -> str:
        """Mean and deviation over its runs, of which there may be one; nothing of a metric on a target."""
        if metric not in NAMES:
            return ""
        values = [value for each in self.cells.get(pair, ()) if (value := each.accuracy(epoch, metric)) is not None]
        return f"{mean_std_text(values)} (n = {len(values)})" if values else ""


@dataclass(frozen=True)
class Table:
    """All that is shown."""

    layout: Layout
    epoch: Epoch
    metrics: tuple[str, ...]  # of several each pair has a column for each
    results: Mapping[tuple[str, str], Result]  # by row and pair; none for ``layout.without``
    external: tuple[ExternalRow, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """With the number of epochs that schedules were shortened to."""
        shortened = self.layout.shortened
        return self.layout.title + (f", schedules shortened to {shortened} epochs" if shortened else "")

    @property
    def headline(self) -> str:
        """What its figures are."""
        names = [metric_name(metric) for metric in self.metrics]
        listed = " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
        return f"{listed}, {self.epoch} epoch"

    def metric(self, pair: str) -> str:
        """Of the column ``pair``."""
        return next((cell.metric for cell in self.layout.cells if cell.pair == pair), self.metrics[0])

    def networks(self, pair: str) -> tuple[str, str]:
        """Teacher ("" without one) and student of ``pair``."""
        keys = [cell.key for cell in self.layout.cells if cell.pair == pair]
        return next((key[2] for key in keys if key[2]), ""), keys[0][3] if keys else ""

    def ranks(self, pair: str) -> dict[str, int]:
        """1 for the best of a column, as printed, 2 for the second, by row.

        Of a column with two figures or more, all on the same copies of data and teacher.
        """
        of_pair = {row: self.results[row, pair] for row in self.layout.rows if (row, pair) in self.results}
        if _mixed(list(of_pair.values())):
            return {}
        means = {row: round(each.mean, 2) for row, each in of_pair.items() if each.mean is not None}
        best = sorted(set(means.values()), reverse=True)[:2]
        return {row: best.index(value) + 1 for row, value in means.items() if value in best} if len(means) > 1 else {}


def build(
    layout: Layout,
    found: Found,
    figures: Sequence[Figure],
    *,
    epoch: Epoch = "last",
    metrics: Sequence[str] = ("top1",),
) -> Table:
    """The table of ``layout`` from the records that were found.

    Args:
        figures: published ones, of any table.
        epoch: which one's accuracy; ``best`` is that of the best top-1, on the test split where a run has no other.
        metrics: ``top1`` and the like; of several, each pair has a column for each.

    Raises:
        UserError: a metric on a target is asked for, of the best epoch.
    """
    for metric in metrics:
        if "/" in metric and epoch == "best":
            raise UserError(f"--best: {metric} is of the student as its run ended; leave --best out")
    layout = layout.showing(metrics)
    results = {
        (cell.row, cell.pair): replace(_result(cell, layout, found.records, figures, epoch), epoch=epoch)
        for cell in layout.cells
    }
    external, problems = _external(layout, found.external)
    notes = _notes(layout, results, figures, epoch)
    notes += [f"{metric_name(other)}: --metric {other}" for other in layout.metrics if other not in metrics]
    return Table(layout, epoch, tuple(metrics), results, external, (*notes, *problems, *found.problems))


def _result(cell: Wanted, layout: Layout, records: Sequence[Record], figures: Sequence[Figure], epoch: Epoch) -> Result:
    of_pair = [record for record in records if record.key == cell.key]
    own: list[Record] = []
    strange: dict[str, list[Record]] = {}
    others = [other for other in (*layout.cells, *layout.rivals) if other is not cell and other.key == cell.key]
    for record in of_pair:
        why = layout.difference(cell, record)
        if why is None:
            own.append(record)
        elif all(layout.difference(other, record) is not None for other in others):
            strange.setdefault(why, []).append(record)
    own, foreign = _one_copy(own, layout.seeds)
    left_out = [f"{_runs(group)} of other settings ({why})" for why, group in strange.items()]
    left_out += [f"{_runs(group)} with {why}" for why, group in foreign]
    by_seed: dict[int, list[Record]] = {}
    for record in own:
        by_seed.setdefault(record.seed, []).append(record)
    trials: list[Trial] = []
    failed, unfinished = dict[int, str](), dict[int, str]()
    transferred = _transferred(cell, layout, by_seed, unfinished, left_out) if "/" in cell.metric else None
    for seed in layout.seeds:
        done = [record for record in by_seed.get(seed, ()) if record.complete]
        if done:
            if transferred is not None:
                trials += [transferred[seed]] if seed in transferred else []
            else:
                value = done[0].accuracy(cell.metric) if epoch == "last" else done[0].best_accuracy(cell.metric)
                if value is not None:
                    trials.append(Trial(seed, value, done[0]))
                else:
                    unfinished[seed] = f"records no {metric_name(cell.metric)} of the {epoch} epoch"
            other = [record for record in done[1:] if record.top1 != done[0].top1]
            left_out += [f"{_runs([record])}, a second run of this seed, in {record.folder}" for record in other]
        elif seed in by_seed:
            record = max(by_seed[seed], key=lambda record: record.done)
            if record.failure:
                failed[seed] = printable(record.failure, 300)
            elif record.done >= record.epochs:
                unfinished[seed] = "no accuracy on the test split"
            else:
                unfinished[seed] = f"{record.done} of {record.epochs} epochs"
    return Result(
        cell,
        layout.seeds,
        tuple(trials),
        failed,
        unfinished,
        tuple(left_out),
        frozenset(by_seed) - frozenset(layout.seeds),
        _published(cell, layout, figures),
        layout.shortened is not None,
    )


def _transferred(
    cell: Wanted,
    layout: Layout,
    by_seed: Mapping[int, Sequence[Record]],
    unfinished: dict[int, str],
    left_out: list[str],
) -> dict[int, Trial]:
    """The trials of a metric on a target, by seed: of equal settings, on the copy of the target that most of them have.

    What is missing is added to ``unfinished``, what is another one to ``left_out``.
    """
    target, accuracy = split_metric(cell.metric)
    copies: dict[str, dict[int, Trial]] = {}
    others: dict[str, list[str]] = {}
    for seed in layout.seeds:
        done = [record for record in by_seed.get(seed, ()) if record.complete]
        found = [(record, find_transfer(record, target, layout.transfer)) for record in done]
        usable = [(record, each) for record, each in found if each.values and not each.other]
        if usable:
            record, each = usable[0]
            copies.setdefault(each.data, {})[seed] = Trial(seed, each.values[accuracy], record, each.data)
        elif found:
            unfinished[seed] = next((each.why for _, each in found if each.why), f"no transfer to {target} like these")
        for _, each in found:
            if each.other:
                others.setdefault(f"of other settings ({each.other})", []).append(
                    f"seed {seed}: {each.values[accuracy]:.2f}"
                )
    largest = max(copies, key=lambda copy: len(copies[copy]), default="")
    for copy, trials in copies.items():
        if copy != largest:
            why = f"to another copy of {target} (fingerprint {copy[:12]} instead of {largest[:12]})"
            others[why] = [f"seed {seed}: {trial.value:.2f}" for seed, trial in trials.items()]
    for why, runs in others.items():
        left_out.append(f"{len(runs)} transfer{'s' if len(runs) > 1 else ''} ({', '.join(runs)}) {why}")
    return copies.get(largest, {})


def _one_copy(records: Sequence[Record], seeds: Sequence[int]) -> tuple[list[Record], list[tuple[str, list[Record]]]]:
    """The runs on the same data and teacher of which there are most, and the others with what sets them apart.

    Args:
        seeds: of the table; their complete runs count first.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.copies.items()), []).append(record)
    if len(groups) < 2:
        return list(records), []

    def rank(copies: tuple[tuple[str, str], ...]) -> tuple[bool, int, int]:
        group = groups[copies]
        complete = {record.seed for record in group if record.complete and record.seed in seeds}
        return len(copies) > 0, len(complete), len({record.seed for record in group})

    largest = max(groups, key=rank)
    apart = []
    for copies, group in groups.items():
        if copies == largest:
            continue
        usual, other = dict(largest), dict(copies)
        what = next((name for name in usual if usual[name] != other.get(name)), next(iter(other), "data"))
        found = f"fingerprint {other[what][:12]}" if what in other else "of which it records no fingerprint"
        apart.append((f"another copy of the {what} ({found} instead of {usual.get(what, 'none')[:12]})", group))
    return groups[largest], apart


def _mixed(results: Sequence[Result]) -> dict[str, int]:
    """Of what the trials of a column have several copies, data, teacher or target, and how many."""
    trials = [trial for each in results for trial in each.trials]
    found = {
        what: {trial.record.copies[what] for trial in trials if what in trial.record.copies}
        for what in ("data", "teacher")
    }
    found["target"] = {trial.target for trial in trials}
    return {what: len(copies) for what, copies in found.items() if len(copies) > 1}


def _runs(records: Sequence[Record]) -> str:
    """``"2 runs (seed 0: 70.12, seed 1: 70.40)"``."""
    told = ", ".join(
        f"seed {each.seed}: {'unfinished' if not each.complete else f'{each.top1:.2f}'}" for each in records[:5]
    )
    more = ", ..." if len(records) > 5 else ""
    return f"{len(records)} run{'s' if len(records) > 1 else ''} ({told}{more})"


def _published(cell: Wanted, layout: Layout, figures: Sequence[Figure]) -> Figure | None:
    if not layout.source:
        return None
    dataset, method, teacher, student = cell.key
    key = (dataset, method, cell.published, teacher, student)
    return figure_of(figures, key, epochs=cell.epochs, source=layout.source, table=layout.number, metric=cell.metric)


def _told(figure: Figure) -> str:
    """``"71.08 (RLD paper, Table 3)"``."""
    table = f", Table {figure.table}" if figure.table else ""
    return f"{figure.value:.2f} ({figure.source}{table})"


def _external(layout: Layout, folders: Sequence[Path]) -> tuple[tuple[ExternalRow, ...], list[str]]:
    """Rows of runs of one recipe each, as far as is told, and a line for each folder that could not be read.

    A run without a teacher stands in the columns of all pairs with its student.
    """
    rows: dict[str, dict[str, list[External]]] = {}
    pairs: dict[tuple[str, str, str], dict[str, int]] = {}  # and how many epochs the table's runs have
    names = {cell.key[1]: cell.row for cell in reversed(layout.cells)}
    for cell in layout.cells:
        dataset, _, teacher, student = cell.key
        for of in (teacher, ""):
            pairs.setdefault((dataset, of, student), {}).setdefault(cell.pair, cell.epochs)
    problems = []
    for folder in folders:
        try:
            external = read_external(folder)
        except UserError as error:
            problems.append(str(error).splitlines()[0])
            continue
        for pair, epochs in pairs.get((external.dataset, external.teacher, external.student), {}).items():
            usual = external.last is not None and external.epochs == epochs
            told = [external.source, external.settings, "" if usual else external.length]
            name = external.label or names.get(external.method, external.method)
            name += f" (external: {', '.join(part for part in told if part)})"
            rows.setdefault(name, {}).setdefault(pair, []).append(external)
    made = [
        ExternalRow(name, {pair: tuple(each) for pair, each in cells.items()}) for name, cells in sorted(rows.items())
    ]
    return tuple(made), problems


def _tuning(layout: Layout) -> list[str]:
    """A line for each way in which cells were tuned, or were not, with the rows, or the cells, that were."""
    ways: dict[str, list[str]] = {}
    for row in layout.rows:
        of_row = {pair: how for pair, how in layout.tuned.get(row, {}).items() if pair in layout.pairs}
        for how in dict.fromkeys(of_row.values()):
            pairs = [pair for pair in of_row if of_row[pair] == how]
            ways.setdefault(how, []).append(row if len(pairs) == len(of_row) else f"{row} ({', '.join(pairs)})")
    return [f"{', '.join(rows)}: {how}" for how, rows in ways.items()]


def _notes(
    layout: Layout, results: Mapping[tuple[str, str], Result], figures: Sequence[Figure], epoch: Epoch
) -> list[str]:
    seeds = ", ".join(map(str, layout.seeds))
    notes = [f"mean ± sample standard deviation over seeds {seeds}; a cell without all of them says how many there are"]
    if epoch == "best":
        chosen = {
            chosen for each in results.values() for trial in each.trials if (chosen := trial.record.best_of) is not None
        }
        if "test" in chosen:
            notes.append("best epoch, chosen on the test split: no result to report")
        if "val" in chosen:
            notes.append("best epoch, chosen on the validation split, of runs that have one")
    if layout.source:
        table = f", Table {layout.number}" if layout.number else ""
        notes.append(f"published: {layout.source}{table}")
        for each in results.values():
            other = disagreeing(figures, each.figure) if each.figure is not None else []
            if other:
                notes.append(f"published otherwise: {each.label}: {', '.join(map(_told, other))}")
        if epoch == "best":
            notes.append("no difference from published figures is given for best epochs")
        elif any(each.published is not None and not each.same_epochs for each in results.values()):
            notes.append("no difference is given where the published run was of another number of epochs")
    notes += layout.notes
    notes += _tuning(layout)
    for row, pairs in layout.without.items():
        if row in layout.rows:
            notes += [f"no {row} {pair}: {why}" for pair, why in pairs.items() if pair in layout.pairs]
    for each in results.values():
        names = [pair for trial in each.trials for pair in each.wanted.other_names(trial.record).values()]
        notes += [f"{each.label}: its teacher is {printable(it)}, not {own}" for it, own in dict.fromkeys(names)]
    for pair in layout.pairs:
        of_pair = [results[row, pair] for row in layout.rows if (row, pair) in results]
        for what, number in _mixed(of_pair).items():
            done = "transferred to" if what == "target" else "trained on"
            notes.append(
                f"{pair}: its rows were {done} {number} copies of the {what}, so do not compare them; none is marked as"
                " best"
            )
    further = sorted(frozenset[int]().union(*(each.further for each in results.values())))
    if further:
        notes.append(f"runs of further seeds are there, {', '.join(map(str, further))}: --seeds takes them in")
    for each in results.values():
        notes += [
            f"{COLLAPSED} {each.label} seed {trial.seed} collapsed to {trial.record.top1:.2f} top-1;"
            " it counts in the mean"
            for trial in each.trials
            if trial.record.collapsed
        ]
        notes += [f"{FAILED} {each.label} seed {seed} failed: {why}" for seed, why in each.failed.items()]
        notes += [f"unfinished: {each.label} seed {seed}: {how}" for seed, how in each.unfinished.items()]
        notes += [f"left out of {each.label}: {why}" for why in each.left_out]
    return notes
