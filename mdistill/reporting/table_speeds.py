"""How long the runs of a table take, by what was recorded."""

import json
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from mdistill.engine.run_folder import read_sessions
from mdistill.errors import UserError
from mdistill.files import read_text
from mdistill.reporting.table_plan import Run

RECENT = 20  # epochs of a record by which the speed of a run is judged, its last ones


class Speeds:
    """Seconds that an epoch takes.

    An epoch is taken to last as long as the last ones of the same cell; else of its pair, whatever the method.

    Args:
        outputs: folders of runs, among them those of shortened schedules.
        threads: that each run will have on a CPU: what was recorded there with others is taken to be as much faster or
            slower as they were more or fewer. None to take it as it is.
    """

    def __init__(self, runs: Sequence[Run], outputs: Iterable[Path], threads: int | None = None) -> None:
        self._outputs, self._threads = list(dict.fromkeys(outputs)), threads
        self._pairs = sorted({_cell_place(run)[::2] for run in runs})
        self.read()

    def read(self) -> None:
        """Look at the records anew."""
        self._cells: dict[tuple[str, str, str], list[float]] = {}
        for dataset, pair in self._pairs:
            self._read(dataset, pair)

    def epoch(self, run: Run) -> float | None:
        """Seconds of an epoch of ``run``; None where nobody has timed its pair."""
        dataset, method, pair = _cell_place(run)
        own = self._cells.get((dataset, method, pair))
        others = [
            seconds
            for (other_dataset, _, other_pair), all_seconds in self._cells.items()
            if (other_dataset, other_pair) == (dataset, pair)
            for seconds in all_seconds
        ]
        known = own or others
        return statistics.median(known) if known else None

    def left(self, runs: Sequence[Run]) -> tuple[float, int]:
        """Seconds that are left, one run after the other, and how many epochs nobody has timed."""
        total, unknown = 0.0, 0
        for run in runs:
            left = 0 if run.state in {"complete", "other"} or run.missing else run.epochs - run.epochs_done
            each = self.epoch(run) if left else None
            if each is not None:
                total += left * each
            else:
                unknown += left
        return total, unknown

    def _read(self, dataset: str, pair: str) -> None:
        for output in self._outputs:
            for path in sorted(output.glob(f"{dataset}/*/{pair}/**/metrics.jsonl")):
                method = path.relative_to(output).parts[1]
                share = _threads(path.parent) / self._threads if self._threads else 0.0
                seconds = [each * (share or 1.0) for each in _seconds(path)]
                self._cells.setdefault((dataset, method, pair), []).extend(seconds)


def _seconds(path: Path) -> list[float]:
    """Of each of the last epochs in a run's metrics, but for a first phase's."""
    seconds: list[float] = []
    try:
        lines = read_text(path).splitlines()[-RECENT:]
    except UserError:  # it has gone this moment
        return seconds
    for text in lines:
        with suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            if "phase" not in line:
                seconds.append(float(line["seconds/train"]) + float(line["seconds/eval"]))
    return seconds


def _threads(folder: Path) -> int:
    """Of the run in ``folder``, where it was on a CPU; else 0."""
    with suppress(UserError):  # no more than a time depends on it
        for session in reversed(read_sessions(folder)):
            if session.get("kernels"):
                return int(session.get("threads") or 0)
    return 0


def _cell_place(run: Run) -> tuple[str, str, str]:
    dataset, method, pair, *_ = run.config.run_folder().parts
    return dataset, method, pair
