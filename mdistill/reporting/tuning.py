"""Tuning the rows of a table: the same number of trials for each, scored on training images that are held out.

A search is of a row and a pair. Its first trial has the table's own settings, so that what is chosen is no worse than
they are on the held-out images. Trials are runs like others, in a folder of their own and without the test split; who
trains which is settled by claims, and a trial that was stopped is resumed.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistill.engine.run_folder import read_metrics, read_sessions
from mdistill.errors import UserError, shown, suggestion
from mdistill.files import write_text
from mdistill.reporting import searching
from mdistill.reporting.searching import Journal, Trial, described, ends, member, size
from mdistill.reporting.table_files import Cell, Table, as_overrides, read_tuned, short, tuned_file
from mdistill.reporting.table_plan import Run, plan
from mdistill.reporting.table_runs import Agenda
from mdistill.settings import differences, leaves, results_only

if TYPE_CHECKING:
    from mdistill.config import Config
    from mdistill.file_schemas import ChosenSettings, SearchSpace

FOLDER = ".tune"  # below the runs, of trials
SHARE = 10  # one training image in so many is held out where the table file does not say how many
SCORE = "top-1 on the held-out training images after the last epoch, percent"
RULE = "chosen evenly over the classes, the same images for every run and seed (data.holdout)"
FIXED = re.compile(r"(distiller|solver)\.name|solver\.epochs|phases\.[^.]+\.(name|epochs)|data\.mixing\.name")
SEARCHED = re.compile(r"(distiller|solver|phases|data\.mixing)\.|data\.batch_size$")


@dataclass(frozen=True)
class Search:
    """Of settings for a row and a pair."""

    cell: Cell  # with the table's own settings
    spaces: Mapping[str, "SearchSpace"]
    own: Mapping[str, Any]  # settings, of the first trial
    seed: int  # of every trial's run, and of the sampler
    budget: int
    holdout: int | None  # training images; None for a share that is not known yet
    short_epochs: int | None  # what the schedules of trials are shortened to
    table_epochs: int | None  # and those of the table's runs
    folder: Path  # of all searches of the table
    missing: str | None = None  # why its teacher cannot be had
    _configs: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def label(self) -> str:
        """For people, and of the journal."""
        return f"{self.cell.row.name} {self.cell.pair}"

    @property
    def count(self) -> int:
        """Of its trials: as many as the budget, or as its space has settings."""
        number = size(self.spaces)
        return self.budget if number is None else min(number, self.budget)

    @property
    def whole(self) -> bool:
        """Whether every setting of the space is tried."""
        return size(self.spaces) == self.count

    @property
    def config(self) -> "Config":
        """Of the table's own run."""
        if "own" not in self._configs:
            cell = self.cell if self.table_epochs is None else short(self.cell, self.table_epochs)
            self._configs["own"] = cell.config(self.seed)
        found: Config = self._configs["own"]
        return found

    def slot(self, number: int) -> "TrialRun":
        """Trial ``number``, whose settings are not known yet."""
        if "slot" not in self._configs:
            self._configs["slot"] = self.run(0, self.own)
        run: TrialRun = self._configs["slot"]
        key = self._key(number)
        return replace(run, number=number, key=key, folder=self.folder / ".unsettled" / key, _seen={})

    def run(self, number: int, settings: Mapping[str, Any]) -> "TrialRun":
        """Trial ``number``, with ``settings``."""
        overrides = [*as_overrides(settings), f"data.holdout={self.holdout or 1}", "run.evaluate_test=false"]
        variant = f"{_slug(self.cell.row.name)}-{self.cell.pair}-trial{number:03d}"  # of two pairs of the same networks
        cell = replace(self.cell, overrides=(*self.cell.overrides, *overrides, f"variant={variant}"))
        if (
            epochs := self.short_epochs or self.table_epochs
        ):  # so that what is counted in epochs is scaled as it is then
            cell = short(cell, epochs)
        config = cell.config(self.seed)
        folder = self.folder / config.run_folder()
        return TrialRun(cell, self.seed, config, folder, self._key(number), missing=self.missing, number=number)

    def notes(self) -> dict[str, Any]:
        """What a search that goes on must share with the one that was begun."""
        return {
            "row": self.cell.row.name,
            "pair": self.cell.pair,
            "of": self.cell.of,
            "space": {key: space.model_dump(exclude_defaults=True) for key, space in self.spaces.items()},
            "settings": _plain(results_only(self.config.resolved())),
            "holdout": self.holdout,
            "seed": self.seed,
        }

    def _key(self, number: int) -> str:
        """Of the claim on a trial."""
        return f"{_slug(self.cell.row.name)}--{self.cell.pair}--trial{number:03d}"


@dataclass(frozen=True)
class TrialRun(Run):
    """The run of a trial."""

    number: int = 0

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.cell.row.name} {self.cell.pair} trial {self.number}"


def _slug(name: str) -> str:
    """``name`` as a part of a folder's name, others than those of other names."""
    plain = re.sub(r"[^A-Za-z0-9_.]+", "_", name)[:40]
    return plain if plain == name else f"{plain}~{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


# ---- the plan ------------------------------------------------------------------------------------------------------


def work_folder(table: Table, output: Path, epochs: int | None) -> Path:
    """Where the trials of ``table`` are."""
    return output / FOLDER / f"{table.path.stem}{f'-epochs{epochs}' if epochs else ''}"


def searches(
    table: Table, *, budget: int, output: Path, checkpoint_root: Path, configs: Path, epochs: int | None = None
) -> list[Search]:
    """Every search of ``table``, which has its own settings.

    Args:
        budget: trials of each.
        epochs: what every schedule is shortened to.

    Raises:
        UserError: no row has a space, or one does not fit its method.
    """
    rows = [row for row in table.rows if row.search]
    if not rows:
        raise UserError(
            f"{table.path}: no row has a search: key; give one such as {{name: KD, method: kd, search:"
            " {solver.lr: {low: 0.01, high: 0.1, log: true}}}"
        )
    found, problems = [], []
    for row in rows:
        of_row = replace(
            table, rows=(row,), seeds=table.seeds[:1], cells=tuple(cell for cell in table.cells if cell.row == row)
        )
        runs = plan(of_row, output=output, checkpoint_root=checkpoint_root, configs=configs, train_teachers=False)
        for run in runs:
            if run.cell.row != row:  # a teacher's, which is complete
                continue
            cell = table.cell(row, run.cell.pair)
            teacher = [each for each in run.cell.overrides if each.startswith("teacher.")]  # trained below ``output``
            search = Search(
                replace(cell, overrides=(*cell.overrides, *teacher)),
                row.search,
                {},
                run.seed,
                budget,
                table.holdout or run.config.data.holdout or None,
                epochs,
                table.epochs,
                work_folder(table, output, epochs),
                run.missing
                and run.missing.replace("with --train-teachers", "with mdistill table run --train-teachers"),
            )
            own, wrong = _own(search, f"{table.path}: methods: {row.name}: search")
            problems += wrong
            found.append(replace(search, own=own))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    if not found:
        raise UserError(f"--pairs: no row with a search: key has a cell of {', '.join(table.pairs)}")
    return found


def _own(search: Search, place: str) -> tuple[dict[str, Any], list[str]]:
    """The table's own values of what is searched; and a line for each space that does not fit."""
    settings = {
        ".".join(key): value
        for key, value in leaves(results_only(search.cell.config(search.seed).resolved()))
        if SEARCHED.match(".".join(key)) and not FIXED.fullmatch(".".join(key))
    }
    own, problems = {}, []
    for key, space in search.spaces.items():
        if key not in settings:
            near = suggestion(key, settings)
            why = "is not to be tuned" if FIXED.fullmatch(key) or not SEARCHED.match(key) else "is no setting here"
            problems.append(f"{place}: {key} {why}{near} (allowed: {', '.join(settings)})")
            continue
        try:
            own[key] = member(space, settings[key])
        except ValueError:
            problems.append(
                f"{place}: {key}: the table's own {shown(settings[key])} ({search.cell.pair}), which is tried first, is"
                f" not among {described(space)}"
            )
            continue
        for value in ends(space):
            cell = replace(search.cell, overrides=(*search.cell.overrides, *as_overrides({key: value})))
            try:
                cell.config(search.seed)
            except UserError as error:
                problems.append(f"{place}: {key}: {str(error).splitlines()[0].removeprefix('command line: ')}")
                break
    return own, problems


def with_holdout(found: Sequence[Search], journal: Journal, *, data_root: Path, download: bool) -> list[Search]:
    """``found``, each with the number of images that it holds out: what it was begun with, or a share of them."""
    from mdistill.engine.build import build_dataset

    known, counts, settled = set(journal.names()), dict[str, int](), []
    for search in found:
        holdout = search.holdout
        if holdout is None and search.label in known:
            holdout = journal.notes(search.label).get("holdout")
        if holdout is None:
            data = json.dumps(_plain(search.config.data.model_dump()), sort_keys=True)
            if data not in counts:
                images = build_dataset(search.config, data_root=data_root, download=download).num_samples
                counts[data] = max(1, images // SHARE)
            holdout = counts[data]
        settled.append(replace(search, holdout=holdout))
    return settled


def enter(found: Sequence[Search], journal: Journal) -> None:
    """Note every search in ``journal``, or see that it is the one that is noted there.

    Raises:
        UserError: it was begun with other settings, or with a larger budget.
    """
    known = set(journal.names())
    for search in found:
        notes = search.notes()
        before = journal.notes(search.label) if search.label in known else {}
        noted = {".".join(key) for key, _ in leaves(before)}  # an earlier version noted fewer settings
        changed = {key: values for key, values in differences(before, notes).items() if key in noted}
        changed.pop("budget", None)
        if changed:
            key = next(reversed(changed))  # ``of`` comes before what it is of
            old, new = (shown(value, 60) for value in changed[key])
            what = f"{key.removeprefix('settings.')} {old}, and it is {new} now"
            what = "what the table file said of it then" if key == "of" else what
            raise UserError(
                f"{search.label}: its search was begun with {what}; move {search.folder} away to begin anew"
            )
        larger = before.get("budget", 0)
        if larger > search.budget:
            raise UserError(
                f"--budget: {search.label} has one of {larger} already, found {search.budget}; give {larger} or more"
            )
    for search in found:
        journal.note(search.label, **search.notes(), budget=search.budget)


def agenda_of(found: Sequence[Search], journal: Journal) -> "tuple[list[Run], Tuning]":
    """What is left to do: the first trials of all searches, then the second ones, and so on; and what settles them."""
    tuning = Tuning(found, journal)
    runs: list[Run] = []
    by_label = {search.label: {each.number: each for each in tuning.trials(search)} for search in found}
    for number in range(max(search.count for search in found)):
        for search in found:
            trial = by_label[search.label].get(number)
            if number >= search.count or (trial is not None and trial.state != "running"):
                continue
            run = search.slot(number)
            if trial is not None:
                with suppress(UserError):  # told when it is claimed
                    run = search.run(number, trial.settings)
            runs.append(run)
    return runs, tuning


class Tuning(Agenda):
    """Settles what a trial tries when it is claimed, and writes down how it ended."""

    def __init__(self, found: Sequence[Search], journal: Journal) -> None:
        self._journal = journal
        self._searches = {search.label: search for search in found}

    def trials(self, search: Search) -> list[Trial]:
        """Of ``search``, by number."""
        return self._journal.trials(search.label, search.spaces)

    def ended(self) -> int:
        """How many trials have, of all searches."""
        return sum(trial.state != "running" for search in self._searches.values() for trial in self.trials(search))

    def settled(self, run: Run) -> Run | None:
        """With the settings that it was begun with, or new ones, which are written down."""
        search, number = self._of(run)
        trials = self.trials(search)
        trial = next((each for each in trials if each.number == number), None)
        if trial is not None and trial.state != "running":
            return None
        if trial is None:
            settings = dict(search.own)
            if number:
                settings = searching.suggest(search.spaces, trials, seed=search.seed, label=search.label, number=number)
            trial = self._journal.begin(search.label, search.spaces, number, settings)
        try:
            return search.run(number, trial.settings)
        except UserError as error:  # settings that do not go together
            self._journal.end(search.label, number, None, {"failure": str(error).splitlines()[0]})
            return None

    def complete(self, run: Run) -> None:
        """Its score is that of its last epoch."""
        search, number = self._of(run)
        metrics = read_metrics(run.folder)
        top1 = metrics[-1].get("val/top1") if metrics else None
        if top1 is None:
            raise UserError(f"{run.folder}/metrics.jsonl has no val/top1 in its last line; move the folder away")
        self._journal.end(search.label, number, float(top1), _record(run, search.folder, metrics))

    def failed(self, run: Run) -> bool:
        """Whether the run itself was at fault, as where a loss is not finite: then that is its trial's end."""
        why = _failure(run.folder)
        if not why:
            return False
        search, number = self._of(run)
        record = _record(run, search.folder, read_metrics(run.folder))
        self._journal.end(search.label, number, None, record | {"failure": why})
        return True

    def _of(self, run: Run) -> tuple[Search, int]:
        assert isinstance(run, TrialRun)
        return self._searches[f"{run.cell.row.name} {run.cell.pair}"], run.number


def _failure(folder: Path) -> str:
    """What ended the run in ``folder``, where it was no file that could not be written."""
    sessions = read_sessions(folder)
    why = str(sessions[-1].get("failed", "")) if sessions else ""
    return "" if why.startswith("could not") else why


def _record(run: Run, folder: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where a run is below ``folder``, how long it took and what it ran on."""
    sessions = read_sessions(run.folder)
    session = sessions[-1] if sessions else {}
    data = session.get("data")
    seconds = sum(float(line.get(f"seconds/{part}", 0.0)) for line in metrics for part in ("train", "eval"))
    return {
        "folder": str(run.folder.relative_to(folder)),
        "epochs": run.epochs,
        "seconds": round(seconds, 1),
        "commit": session.get("commit"),
        "device": session.get("device"),
        "data": str(data.get("fingerprint", "")) if isinstance(data, Mapping) else "",
    }


# ---- what comes of it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A search whose trials have all ended, and the best of them."""

    search: Search
    trials: tuple[Trial, ...]
    best: Trial

    @property
    def line(self) -> str:
        """For people."""
        own = self.trials[0].top1
        settings = ", ".join(as_overrides(self.best.settings))
        told = "failed" if own is None else f"{own:.2f}"
        which = "its own settings" if self.best.number == 0 else f"trial {self.best.number}, {settings}"
        return f"{self.search.label}: {self.best.top1:.2f} with {which} (own: {told}; {len(self.trials)} trials)"


def findings(found: Sequence[Search], tuning: Tuning) -> tuple[list[Finding], list[str]]:
    """The searches that are done, and a line for each that is not, or has nothing to choose."""
    done, others = [], []
    for search in found:
        trials = [trial for trial in tuning.trials(search) if trial.number < search.count]
        ended = [trial for trial in trials if trial.state != "running"]
        scored = [trial for trial in ended if trial.top1 is not None]
        if len(ended) < search.count:
            others.append(f"{search.label}: {len(ended)} of {search.count} trials have ended")
        elif not scored:
            others.append(f"{search.label}: all {search.count} trials have failed, so nothing is chosen")
        else:
            best = max(scored, key=lambda trial: (trial.top1 or 0.0, -trial.number))
            done.append(Finding(search, tuple(ended), best))
    return done, others


def write_record(path: Path, table: Table, journal: Journal, epochs: int | None) -> None:
    """All trials of all searches in ``journal``, as JSON.

    Args:
        epochs: what schedules were shortened to.
    """
    from mdistill.file_schemas import SearchSpace

    listed = []
    for name in journal.names():
        notes = journal.notes(name)
        spaces = {key: SearchSpace.model_validate(space) for key, space in notes.get("space", {}).items()}
        trials = [
            {"trial": each.number, "state": each.state, "top1": each.top1, "settings": each.settings, **each.record}
            for each in journal.trials(name, spaces)
        ]
        told = {key: notes.get(key) for key in ("row", "pair", "of", "space", "budget", "holdout", "seed")}
        listed.append({**told, "trials": trials})
    content = {
        "format": 1,
        "table": table.path.name,
        "title": table.title,
        "score": SCORE,
        "holdout": RULE,
        "shortened_to_epochs": epochs,
        "sampler": searching.sampler_name(),
        "searches": listed,
    }
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_chosen(table: Table, done: Sequence[Finding], epochs: int | None) -> Path:
    """The settings of ``done``, in a file beside the table's; what that has of other searches stays. Its path.

    Args:
        table: all of it.
        epochs: what schedules were shortened to, of which there is a file of its own.
    """
    import yaml  # slow to import

    file, sampler = tuned_file(table.path, epochs), searching.sampler_name()
    entries = {(each.row, each.pair): each for each in read_tuned(file)} if file.is_file() else {}
    entries |= {(each.search.cell.row.name, each.search.cell.pair): _chosen(each, sampler) for each in done}
    order = [(row.name, pair) for row in table.rows for pair in table.pairs]
    digests = {(cell.row.name, cell.pair): cell.of for cell in table.cells}
    kept = [entries[place] for place in order if place in entries and entries[place].of == digests.get(place)]
    content = {"format": 1, "chosen": [each.model_dump(mode="json") for each in kept]}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    head = f"# Written by `mdistill tune`. {table.path.name} uses it where it says tuned: {file.name}\n"
    write_text(file, head + text)
    return file


def _chosen(done: Finding, sampler: str) -> "ChosenSettings":
    from mdistill.file_schemas import ChosenSettings

    search, best = done.search, done.best
    return ChosenSettings(
        row=search.cell.row.name,
        pair=search.cell.pair,
        settings=dict(best.settings),
        own_settings=dict(search.own),
        top1=best.top1 or 0.0,
        own_top1=done.trials[0].top1,
        trial=best.number,
        trials=len(done.trials),
        failed=sum(trial.state == "failed" for trial in done.trials),
        budget=search.budget,
        whole_space=search.whole,
        holdout=search.holdout or 0,
        data=str(best.record.get("data", "")),
        epochs=int(best.record.get("epochs", 0)),
        own_epochs=search.config.epochs,
        seed=search.seed,
        sampler=sampler,
        commit=str(best.record.get("commit") or ""),
        of=search.cell.of,
    )
