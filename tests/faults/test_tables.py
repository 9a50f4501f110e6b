"""A table whose workers and runs are killed again and again ends as one that nothing happened to."""

import functools
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mdistill.engine.run_folder import read_metrics

from ..same import assert_same
from ..tables import STEPS, write_own
from . import forked
from .table_kills import VICTIMS, Kill, plant

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tables")]

METHODS = """
methods:
  - {name: alone, method: vanilla, settings: {ce_weight: 1.0}}
  - {name: hot, method: kd, settings: {ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}}
  - {name: all, method: kd, settings: {ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}, set: [distiller.ce_weight=1]}
  - {name: half, method: kd, settings: {ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}, set: [solver.lr=0.025]}
"""
RUNS = 12  # of three epochs
KILLS = 20


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_own(tmp_path, METHODS, epochs=3)


def arguments(table: Path, output: Path) -> list[str]:
    flags = {"--output": output, "--checkpoint-root": table.parent, "--cache-root": output / "cache"}
    return ["table", "run", str(table), *(str(part) for flag in flags.items() for part in flag), "--device", "cpu"]


def worker(table: Path, output: Path, kills: list[Kill]) -> list[int]:
    """The exit codes of a worker that is started again whenever it was killed, until nothing is left to do."""
    codes = []
    for kill in [*kills, None]:
        before = functools.partial(plant, kill, output.with_suffix(".ended"))
        codes.append(forked.command(arguments(table, output), before=before, timeout=300).code)
    return codes


def records(output: Path) -> dict[str, Any]:
    """The metrics and the network of every run below ``output``."""
    folders = [path.parent for path in sorted(output.rglob("metrics.jsonl"))]
    return {
        str(folder.relative_to(output)): (
            read_metrics(folder),
            torch.load(folder / "student.pt", weights_only=True),
        )
        for folder in folders
    }


def random_kills(seed: int) -> list[Kill]:
    """Twenty, of every kind: in a worker's first run or its second one, within as many steps as two epochs have."""
    rng = random.Random(seed)
    kinds = [VICTIMS[number % len(VICTIMS)] for number in range(KILLS)]
    rng.shuffle(kinds)
    return [Kill(kind, rng.choice((0, 0, 0, 1)), rng.randint(1, 2 * STEPS)) for kind in kinds]


@pytest.mark.parametrize("seed", [0])
def test_a_table_that_is_killed_twenty_times(table: Path, tmp_path: Path, seed: int) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    assert worker(table, quiet, []) == [0], "".join(path.read_text() for path in quiet.glob(".logs/*"))[-2000:]
    kills = random_kills(seed)
    with ThreadPoolExecutor(2) as pool:
        of_both = list(pool.map(functools.partial(worker, table, killed), [kills[::2], kills[1::2]]))
    codes = [code for codes in of_both for code in codes]
    codes.append(worker(table, killed, [])[0])  # what failed while the other worker had it
    assert codes[-1] == 0, codes
    assert set(codes) <= {0, 1, 75, -9}, codes
    assert sum(code != 0 for code in codes) >= 12, codes  # the others came when the table was complete
    left, right = records(quiet), records(killed)
    assert len(left) == RUNS
    assert list(left) == list(right)
    assert_same(left, right)
    for output in (quiet, killed):
        ended = Counter(output.with_suffix(".ended").read_text().split())
        assert max(ended.values()) == 1  # nothing is trained to its end twice
        assert len(ended) <= RUNS
    assert not list(killed.rglob(".replaced.*"))
