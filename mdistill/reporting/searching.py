"""Searching settings: spaces, what to try next, and the journal in which processes of several machines share trials.

What to try next is a function of the trials before it, the seed and the trial's number alone, so that a search that was
stopped, by one process, goes on as if it had not been. Optuna is imported where it is needed.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mdistill.errors import RunFailed, UserError, printable
from mdistill.reporting.extras import extra

if TYPE_CHECKING:
    from mdistill.file_schemas import SearchSpace

DIGITS = 4  # significant ones of a number that is drawn from a range
RANDOM = 10  # trials that are drawn at random before the sampler looks at scores
ATTEMPTS = 20  # at settings that were not tried before
GRACE = 15  # seconds after which a lock on the journal is taken to be a dead process's

Spaces = Mapping[str, "SearchSpace"]
State = Literal["running", "complete", "failed"]


@dataclass(frozen=True)
class Trial:
    """Settings that are, or were, tried."""

    number: int  # from 0
    settings: Mapping[str, Any]  # by dotted key
    state: State
    top1: float | None = None  # of a complete one, percent
    record: Mapping[str, Any] = field(default_factory=dict)  # of one that has ended: where it is and what it ran on


# ---- spaces --------------------------------------------------------------------------------------------------------


def size(spaces: Spaces) -> int | None:
    """How many settings there are; None where a range is not of whole numbers."""
    sizes = [None if (values := points(space)) is None else len(values) for space in spaces.values()]
    return None if None in sizes else math.prod(each for each in sizes if each is not None)


def points(space: "SearchSpace") -> Sequence[Any] | None:
    """All values of ``space``; None where it is a range of numbers that are not whole."""
    if space.choices is not None:
        return space.choices
    return range(int(space.low or 0), int(space.high or 0) + 1) if space.whole else None


def ends(space: "SearchSpace") -> list[Any]:
    """Its choices; of a range the two ends."""
    return space.choices if space.choices is not None else [space.low, space.high]


def member(space: "SearchSpace", value: Any) -> Any:
    """``value`` as ``space`` has it.

    Raises:
        ValueError: it is not in there.
    """
    if space.choices is not None:
        for choice in space.choices:
            if _text(choice) == _text(value) or (_is_number(choice) and _is_number(value) and choice == value):
                return choice
    elif _is_number(value) and space.low is not None and space.high is not None and space.low <= value <= space.high:
        if not space.whole:
            return float(value)
        if value == int(value):
            return int(value)
    raise ValueError(f"{value!r} is not among {described(space)}")


def described(space: "SearchSpace") -> str:
    """For people."""
    if space.choices is not None:
        return ", ".join(_text(choice) for choice in space.choices)
    kind = "whole numbers " if space.whole else ""
    return f"{kind}{space.low:g} to {space.high:g}{' (log)' if space.log else ''}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _distributions(optuna: Any, spaces: Spaces) -> dict[str, Any]:
    """Of the sampler: choices are their JSON, so that 1, 1.0 and true differ."""
    made: dict[str, Any] = {}
    for key, space in spaces.items():
        if space.choices is not None:
            made[key] = optuna.distributions.CategoricalDistribution([_text(choice) for choice in space.choices])
        elif space.whole:
            made[key] = optuna.distributions.IntDistribution(space.low, space.high, log=space.log)
        else:
            made[key] = optuna.distributions.FloatDistribution(space.low, space.high, log=space.log)
    return made


def _encoded(spaces: Spaces, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _text(settings[key]) if space.choices is not None else settings[key] for key, space in spaces.items()}


def _decoded(spaces: Spaces, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, in the order of ``spaces``; numbers of ranges are rounded to ``DIGITS``."""
    settings: dict[str, Any] = {}
    for key, space in spaces.items():
        value = parameters[key]
        if space.choices is not None:
            settings[key] = member(space, json.loads(value))
        elif space.whole:
            settings[key] = member(space, value)
        else:
            assert space.low is not None
            assert space.high is not None
            settings[key] = min(max(float(f"{value:.{DIGITS}g}"), float(space.low)), float(space.high))
    return settings


# ---- what to try next ----------------------------------------------------------------------------------------------


def sampler_name() -> str:
    """What draws settings, for the record."""
    optuna = _optuna()
    return (
        f"TPESampler of optuna {optuna.__version__}, the first {RANDOM} trials the table's own settings and random ones"
    )


def suggest(spaces: Spaces, history: Sequence[Trial], *, seed: int, label: str, number: int) -> dict[str, Any]:
    """Settings for trial ``number``, others than those of ``history``, as long as there are others.

    Args:
        history: the trials so far; what is running is taken to be bad, so that two processes do not try the same.
        label: of the search.
    """
    optuna = _optuna()
    distributions = _distributions(optuna, spaces)
    state = optuna.trial.TrialState
    states = {"running": state.RUNNING, "complete": state.COMPLETE, "failed": state.FAIL}
    past = [
        optuna.trial.create_trial(
            state=states[trial.state],
            value=trial.top1,
            params=_encoded(spaces, trial.settings),
            distributions=distributions,
        )
        for trial in sorted(history, key=lambda trial: trial.number)
    ]
    tried = {_text(dict(trial.settings)) for trial in history}
    for attempt in range(ATTEMPTS):
        text = f"{seed} {label} {number} {attempt}"
        word = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
        sampler = optuna.samplers.TPESampler(seed=word, n_startup_trials=RANDOM, constant_liar=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(past)
        settings = _decoded(spaces, study.ask(distributions).params)
        if _text(settings) not in tried:
            return settings
    values = [points(space) for space in spaces.values()]
    if None not in values:
        for point in itertools.product(*(each for each in values if each is not None)):
            other = dict(zip(spaces, point, strict=True))
            if _text(other) not in tried:
                return other
    return settings


def _optuna() -> Any:
    optuna = extra("optuna", "optuna", "mdistill tune", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


# ---- the journal ---------------------------------------------------------------------------------------------------


class Journal:
    """The searches below one folder and their trials, in a file that is only ever appended to.

    Raises:
        UserError: it cannot be written, is damaged, or optuna is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._optuna = path, _optuna()
        journal = extra("optuna.storages.journal", "optuna", "mdistill tune", "tune")
        lock = journal.JournalFileOpenLock if os.name == "nt" else journal.JournalFileSymlinkLock
        with self._telling():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = str(path.resolve())  # a symbolic link to it is the lock
            backend = journal.JournalFileBackend(file, lock_obj=_Lock(path, lock(file, grace_period=GRACE)))
            self._storage = self._optuna.storages.JournalStorage(backend)

    def names(self) -> list[str]:
        """Of the searches."""
        with self._telling():
            return [str(study.study_name) for study in self._storage.get_all_studies()]

    def notes(self, search: str) -> dict[str, Any]:
        """What was noted of it."""
        with self._telling():
            return dict(self._study(search).user_attrs)

    def note(self, search: str, **notes: Any) -> None:
        """Note what is not noted yet, or otherwise."""
        with self._telling():
            study = self._study(search)
            known = study.user_attrs
            for key, value in notes.items():
                if key not in known or known[key] != value:
                    study.set_user_attr(key, value)

    def trials(self, search: str, spaces: Spaces) -> list[Trial]:
        """By number; of two of one number the first."""
        with self._telling():
            return [trial for _, trial in sorted(self._found(search, spaces).items())]

    def begin(self, search: str, spaces: Spaces, number: int, settings: Mapping[str, Any]) -> Trial:
        """Write down that trial ``number`` has ``settings``; the trial, which may be an earlier one of that number."""
        optuna = self._optuna
        with self._telling():
            self._study(search).add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING,
                    params=_encoded(spaces, settings),
                    distributions=_distributions(optuna, spaces),
                    user_attrs={"trial": number},
                )
            )
            return self._found(search, spaces)[number]

    def end(self, search: str, number: int, top1: float | None, record: Mapping[str, Any]) -> None:
        """Write down how trial ``number`` ended: None for one that failed. Of several such lines the first counts."""
        state = self._optuna.trial.TrialState
        with self._telling():
            study = self._study(search)
            own = next(trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get("trial") == number)
            if own.state.is_finished():
                return
            try:
                self._storage.set_trial_user_attr(own._trial_id, "record", dict(record))
                values = None if top1 is None else [top1]
                study.tell(own.number, values, state=state.FAIL if top1 is None else None, skip_if_finished=True)
            except self._optuna.exceptions.UpdateFinishedTrialError:  # by another process, a moment ago
                pass

    def _study(self, name: str) -> Any:
        if name in (study.study_name for study in self._storage.get_all_studies()):  # else it would write a line
            return self._optuna.load_study(storage=self._storage, study_name=name)
        given = {"storage": self._storage, "study_name": name, "direction": "maximize"}
        return self._optuna.create_study(**given, load_if_exists=True)

    def _found(self, search: str, spaces: Spaces) -> dict[int, Trial]:
        state = self._optuna.trial.TrialState
        states: dict[Any, State] = {state.RUNNING: "running", state.COMPLETE: "complete", state.FAIL: "failed"}
        found: dict[int, Trial] = {}
        for each in self._study(search).get_trials(deepcopy=False):
            number, settings = int(each.user_attrs["trial"]), _decoded(spaces, each.params)
            trial = Trial(number, settings, states[each.state], each.value, dict(each.user_attrs.get("record", {})))
            found.setdefault(number, trial)
        return found

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Within, what optuna makes of a damaged journal, or of a folder that cannot be written, is one line."""
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            raise RunFailed(f"{self.path} cannot be written: {error.strerror or error}") from None
        except Exception as error:
            why = printable(f"{type(error).__name__}: {' '.join(str(error).split())}", 200)
            raise UserError(
                f"{self.path} is damaged ({why}); put it back, or move {self.path.parent} away to begin anew"
            ) from None


class _Lock:
    """Of the journal. Whoever has it first takes away what a kill has left of a line; optuna would read on for ever."""

    def __init__(self, path: Path, inner: Any) -> None:
        self._path, self._inner = path, inner

    def acquire(self) -> bool:
        held = bool(self._inner.acquire())
        try:
            with open(self._path, "r+b") as file:
                content = file.read()
                if content and not content.endswith(b"\n"):
                    file.truncate(content.rfind(b"\n") + 1)
        except BaseException:
            self._inner.release()
            raise
        return held

    def release(self) -> None:
        self._inner.release()
