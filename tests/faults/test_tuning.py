"""A search whose workers and trials are killed has the trials of one that nothing happened to, each trained once."""

import functools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..tables import write_own
from . import forked
from .table_kills import Kill, plant

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tables")]

forked._PRELOADED += ["mdistill.cli.tune", "optuna.samplers", "optuna.storages.journal"]

METHODS = """
tune: {holdout: 12}
methods:
  - {name: alone, method: vanilla, settings: {ce_weight: 1.0}, search: {solver.lr: {low: 0.001, high: 1.0, log: true}}}
  - name: KD
    method: kd
    settings: {ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}
    search: {distiller.temperature: {low: 1, high: 8}}
"""
BUDGET = 3
KILLS = [Kill("run", 0, 2), Kill("worker", 0, 4), Kill("both", 0, 1), Kill("claim", 1, 1), Kill("stop", 0, 3)]


def worker(table: Path, output: Path, kills: list[Kill]) -> list[int]:
    """The exit codes of a worker that is started again whenever it was killed, until nothing is left to do."""
    flags = {"--budget": BUDGET, "--output": output, "--checkpoint-root": table.parent, "--device": "cpu"}
    arguments = ["tune", str(table), *(str(part) for flag in flags.items() for part in flag)]
    codes = []
    for kill in [*kills, None]:
        before = functools.partial(plant, kill, output.with_suffix(".ended"))
        codes.append(forked.command(arguments, before=before, timeout=300).code)
    return codes


def trials(output: Path) -> list[Any]:
    """What is the same however long it took."""
    searches = json.loads((output / "searches/table.json").read_text())["searches"]
    return [
        (search["row"], [(each["trial"], each["settings"], each["top1"], each["folder"]) for each in search["trials"]])
        for search in searches
    ]


def test_two_workers_that_are_killed(tmp_path: Path) -> None:
    table, quiet, killed = write_own(tmp_path, METHODS, epochs=2), tmp_path / "quiet", tmp_path / "killed"
    assert worker(table, quiet, []) == [0], "".join(path.read_text() for path in quiet.rglob(".logs/*"))[-2000:]
    chosen = (tmp_path / "table.tuned.yaml").read_text()
    (tmp_path / "table.tuned.yaml").unlink()
    with ThreadPoolExecutor(2) as pool:
        of_both = list(pool.map(functools.partial(worker, table, killed), [KILLS[::2], KILLS[1::2]]))
    codes = [*(code for codes in of_both for code in codes), worker(table, killed, [])[0]]
    assert codes[-1] == 0, codes
    assert set(codes) <= {0, 1, 75, -9}, codes
    assert sum(code != 0 for code in codes) >= 3, codes
    left, right = trials(quiet), trials(killed)
    assert [(row, len(listed)) for row, listed in left] == [("alone", BUDGET), ("KD", BUDGET)]
    assert left == right
    assert (tmp_path / "table.tuned.yaml").read_text() == chosen
    ended = Counter(killed.with_suffix(".ended").read_text().split())
    assert max(ended.values()) == 1  # nothing is trained to its end twice
    assert len(ended) <= 2 * BUDGET
