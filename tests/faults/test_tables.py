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
from . import forked
from .table_kills import VICTIMS, Kill, plant

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tables")]

MODULE = '''
import numpy as np
from torch import nn

from mdistill.data import DATASETS, InMemoryDataset
from mdistill.models import MODELS


@DATASETS.register("noise")
def noise(root, download):
    """60 images of four classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(60) % 4
    return InMemoryDataset((pixels, labels), (pixels[:8], labels[:8]), num_classes=4, mean=(0.5,) * 3, std=(0.25,) * 3)


@MODELS.register("little")
def little(num_classes, *, width: int = 4):
    first = nn.Conv2d(3, width, 3, stride=8, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(16 * width, num_classes))
'''
TABLE = """
title: twelve runs
dataset: quickstart
imports: [little_parts]
pairs:
  - name: little_little
    teacher: {name: little, checkpoint: teacher.pt}
    student: {name: little}
    data: {name: noise, batch_size: 16}
    solver: {epochs: 3, milestones: []}
methods:
  - {name: alone, method: vanilla, settings: {ce_weight: 1.0}}
  - {name: hot, method: kd, settings: {ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}}
  - {name: all, method: kd, settings: {ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}, set: [distiller.ce_weight=1]}
  - {name: half, method: kd, settings: {ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}, set: [solver.lr=0.025]}
"""
RUNS, STEPS = 12, 4  # steps of each of three epochs
KILLS = 20


@pytest.fixture
def table(tmp_path: Path) -> Path:
    from torch import nn

    (tmp_path / "little_parts.py").write_text(MODULE)
    (tmp_path / "table.yaml").write_text(TABLE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=8, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4)
        )
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pt")
    return tmp_path / "table.yaml"


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
