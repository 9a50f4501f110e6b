"""The campaign: every fault in every group, each followed by what must hold; a table of how many survived.

python -m tests.faults.campaign [--only GROUP[/NAME]] [--sample N --seed S] [--jobs 2]
"""

import argparse
import collections
import concurrent.futures
import functools
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from . import file_cases, io_cases
from .cases import Case, Outcome

FILES = {  # by the first part of a case's name; all others are damage to files that the program wrote
    "pickle": "hostile checkpoints and pickles",
    "archive": "hostile checkpoints and pickles",
    "yaml": "absurd settings",
    "override": "absurd settings",
    "json": "absurd records",
    "planted_module": "planted code",
}
DAMAGED = "damaged files"
FILE_CASES = 2500


@functools.cache
def _file_cases() -> dict[str, file_cases.Case]:
    return dict(file_cases.cases(count=FILE_CASES))


def _survives(folder: Path, name: str) -> Outcome:
    problem = _file_cases()[name](folder)
    return Outcome("failed", problem) if problem else Outcome("survived")


def _of_files(group: str, folder: Path) -> Iterable[Case]:
    """Cases of ``file_cases``, which share no folder."""
    for name in _file_cases():
        if FILES.get(name.partition("/")[0], DAMAGED) == group:
            yield Case(group, name, functools.partial(_survives, name=name))


GROUPS: dict[str, Callable[[Path], Iterable[Case]]] = {
    **{f"io {job.name}": functools.partial(io_cases.faults, job) for job in io_cases.JOBS},
    "random kills": io_cases.random_kills,
    **{group: functools.partial(_of_files, group) for group in dict.fromkeys([*FILES.values(), DAMAGED])},
}
"""What makes the cases of each group, given a folder for what they share."""


def collect(folder: Path, only: str = "") -> list[Case]:
    """All cases whose ``group/name`` begins with ``only``; what they share lies in ``folder``."""
    cases: list[Case] = []
    for group, make in GROUPS.items():
        if group.startswith(only) or only.startswith(f"{group}/"):
            shared = folder / group.replace(" ", "_")
            shared.mkdir(parents=True)
            cases += [case for case in make(shared) if f"{group}/{case.name}".startswith(only)]
    return cases


def run(case: Case) -> Outcome:
    """A case in a folder of its own; an exception is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return case.run(Path(folder))
        except Exception as error:
            return Outcome("failed", f"{type(error).__name__}: {error}"[:800])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose group/name begins so")
    parser.add_argument("--sample", type=int, help="so many of the cases, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    begun, counts = time.monotonic(), collections.defaultdict[str, collections.Counter[str]](collections.Counter)
    with tempfile.TemporaryDirectory() as shared:
        cases = collect(Path(shared), args.only)
        if args.sample is not None:
            cases = random.Random(args.seed).sample(cases, min(args.sample, len(cases)))
        print(f"{len(cases)} cases", flush=True)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as workers:
            outcomes = {workers.submit(run, case): case for case in cases}
            for done, future in enumerate(concurrent.futures.as_completed(outcomes), 1):
                case, outcome = outcomes[future], future.result()
                counts[case.group][outcome.state] += 1
                if outcome.state == "failed":
                    repeat = f"python -m tests.faults.campaign --only '{case.group}/{case.name}'"
                    print(f"FAILED {repeat}\n    {outcome.detail}", flush=True)
                if done % 250 == 0:
                    print(f"{done} done, {time.monotonic() - begun:.0f} s", flush=True)
    print(f"\n{table(counts)}\n\n{time.monotonic() - begun:.0f} s")
    return 1 if any(counted["failed"] for counted in counts.values()) else 0


def table(counts: dict[str, "collections.Counter[str]"]) -> str:
    """In Markdown: a row for each group, and one of all."""
    columns = ("survived", "not reached", "failed")
    total = sum(counts.values(), collections.Counter[str]())
    lines = ["| group | tried | survived | not reached | failed |", "| --- | ---: | ---: | ---: | ---: |"]
    for group, counted in [*sorted(counts.items()), ("all", total)]:
        lines.append(f"| {group} | {counted.total()} | {' | '.join(str(counted[column]) for column in columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
