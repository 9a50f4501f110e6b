"""``mdistill table``: train what a paper's table is missing, and show it."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistill.cli import _table_records, common
from mdistill.errors import RunFailed, Stopped, UserError

if TYPE_CHECKING:
    from mdistill.engine.claims import Claims
    from mdistill.reporting.table_files import Table
    from mdistill.reporting.table_plan import Run
    from mdistill.reporting.table_runs import Outcome, Process, Start
    from mdistill.reporting.table_speeds import Speeds

    State = Callable[[Sequence[Run], Outcome], tuple[int, str, str]]

DESCRIPTION = """A table is pairs x methods x seeds, as a table file says: one of configs/tables, or your own.

run    trains what is missing, resumes what was stopped and leaves alone what is complete. A run that fails does not
       keep the others; failures are listed at the end. Any number of processes and machines may work on one table over
       a shared --output.
show, compare and publish read the records of runs; each explains itself with `mdistill table show --help`."""

EXAMPLES = f"""  mdistill table run mcld_table2 --dry-run                     what there is to do, and how long it takes
  mdistill table run mcld_table2 --methods KD,MCLD --pairs res56_res20
  mdistill table run mcld_table2 --epochs 2 --jobs 2           a smoke run: schedules shortened, in their own folder
  mdistill table run my_table.yaml --train-teachers
  mdistill table run my_table.yaml --ray head:6379 --gpus-per-run 0.5     in a Ray cluster
  mdistill table show mcld_table2
  mdistill table compare mcld_table2 --baseline KD --methods MCLD
  mdistill table publish mcld_table2                           copy the records of its runs into results/

{common.EXIT_CODES}"""

EVERY = 600.0  # seconds between two lines on how far a table is, where there is no terminal
LOOK = 2.0  # seconds between two looks at how far it is
MEASURE = 60.0  # and at how long an epoch takes


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 10**4 or (share > 1 and share != int(share)):
        raise argparse.ArgumentTypeError(f"should be a fraction, or a whole number, found {text!r}")
    return share


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("table", DESCRIPTION, EXAMPLES)
    parser.add_argument("action", choices=("run", *_table_records.ACTIONS))
    parser.add_argument("table", help="a name in configs/tables, or a table file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, after the table's own")
    common.add_part(parser)
    parser.add_argument(
        "--epochs", type=common.count, help="shorten every schedule in proportion; such runs lie in OUTPUT/epochs<N>"
    )
    add_jobs(parser, None, "1; of Ray no limit")
    parser.add_argument("--train-teachers", action="store_true", help="train teachers whose file is missing")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the time it takes, train nothing")
    common.add_roots(parser)
    common.add_cache_root(parser)
    common.add_imports(parser)
    ray = parser.add_argument_group("a Ray cluster (extra ray)")
    ray.add_argument("--ray", metavar="ADDRESS", help="train there: HOST:PORT, ray://HOST:PORT or auto")
    ray.add_argument("--gpus-per-run", type=_share, help="such as 0.5 (default: 1 on CUDA, else 0)")
    ray.add_argument("--cpus-per-run", type=_share, help="(default: 1)")
    args = parser.parse_intermixed_args(arguments)
    if args.ray is None and (args.gpus_per_run is not None or args.cpus_per_run is not None):
        parser.error("--gpus-per-run and --cpus-per-run are of --ray ADDRESS, which is not given")
    return args


def add_jobs(parser: argparse.ArgumentParser, default: int | None = 1, told: str = "1") -> None:
    """The flag that says how many runs are trained at a time."""
    words = f"runs at a time; on a CPU each gets its share of cores (default: {told})"
    parser.add_argument("--jobs", type=common.count, default=default, help=words)


def table(args: argparse.Namespace) -> None:
    from mdistill.reporting.table_files import find_table, read_table

    configs = common.project_root() / "configs"
    found = read_table(
        find_table(args.table, configs),
        configs,
        methods=args.methods,
        pairs=args.pairs,
        seeds=args.seeds,
        overrides=args.overrides,
        imports=args.imports,
        epochs=args.epochs,
    )
    output = args.output / f"epochs{found.epochs}" if found.epochs else args.output
    _run(args, found, output, configs)


def _run(args: argparse.Namespace, found: "Table", output: Path, configs: Path) -> None:
    from mdistill.reporting.table_plan import plan

    runs = plan(
        found,
        output=output,
        checkpoint_root=args.checkpoint_root,
        configs=configs,
        train_teachers=args.train_teachers,
    )
    if args.dry_run:
        _print_plan(found, runs, args, output)
        return
    _train(args, runs, output, configs)
    _tell_transfers(args, found, runs)


def _tell_transfers(args: argparse.Namespace, found: "Table", runs: "Sequence[Run]") -> None:
    """What is to be done next, where a table has figures on other data and they are not all there."""
    from mdistill.reporting.records import read_record
    from mdistill.reporting.transfers import is_done, targets_of

    targets = targets_of(found.metrics)
    records = [read_record(run.folder) for run in runs if run.cell.row in found.rows and targets]
    lacking = [each for each in records if not all(is_done(each, target, found.transfer) for target in targets)]
    if lacking:
        place = "" if args.output == Path("runs") else f" --output {args.output}"
        place += f" --epochs {args.epochs}" if args.epochs else ""
        place += "".join(f" --import {module}" for module in args.imports)
        print(
            f"{len(lacking)} of them are still to be transferred to {' or '.join(targets)}:"
            f" mdistill transfer --table {args.table}{place}"
        )


def _recorded(args: argparse.Namespace, output: Path) -> list[Path]:
    """Folders of runs whose records tell how long an epoch takes."""
    return [output, args.output, *sorted(args.output.glob("epochs[0-9]*"))]


def _print_plan(found: "Table", runs: "Sequence[Run]", args: argparse.Namespace, output: Path) -> None:
    from mdistill.reporting.table_runs import threads_of
    from mdistill.reporting.table_speeds import Speeds

    for run in runs:
        words = {
            "complete": "complete",
            "begun": f"{run.epochs_done} of {run.epochs} epochs done",
            "missing": f"{run.epochs} epochs to do",
            "other": f"a run of other settings is there ({run.difference})",
        }
        print(f"{run.label}: {words[run.state]}{', no teacher' if run.missing else ''}  {run.folder}")
    for why in dict.fromkeys(run.missing for run in runs if run.missing):
        print(f"no teacher: {why}")
    for row in found.rows:
        for pair in set(row.without) & set(found.pairs):
            print(f"left out: {row.name} {pair}: {row.without[pair]}")
    complete = sum(run.state == "complete" for run in runs)
    cannot = sum(bool(run.missing or run.state == "other") for run in runs)
    threads = None if args.ray else threads_of(args.jobs or 1)
    seconds, unknown = Speeds(runs, _recorded(args, output), threads).left(runs)
    print(
        f"{len(runs)} runs, {complete} complete{f', {cannot} cannot be trained' if cannot else ''};"
        f" {time_left(seconds, unknown, args.jobs or 1)}"
    )


def time_left(seconds: float, unknown: int, jobs: int) -> str:
    """How long what is left takes, in words.

    Args:
        unknown: epochs that nobody has timed.
    """
    if not seconds:
        return f"{unknown} epochs to do, of pairs that nobody has timed" if unknown else "nothing to do"
    rest = f", and {unknown} epochs of pairs that nobody has timed" if unknown else ""
    how = "one run after the other" if jobs == 1 else f"{jobs} runs at a time, of which each has its share of a CPU"
    return f"about {timedelta(seconds=round(seconds / jobs))}, {how}, by the epochs that are recorded{rest}"


def _train(args: argparse.Namespace, runs: "Sequence[Run]", output: Path, configs: Path) -> None:
    from mdistill.engine.console import StopRequest
    from mdistill.reporting.table_cells import layout
    from mdistill.reporting.table_runs import threads_of, train
    from mdistill.reporting.table_speeds import Speeds

    threads = None if args.ray else threads_of(args.jobs or 1)
    state = _state_of(runs, Speeds(runs, _recorded(args, output), threads))
    with (
        _workers(args, output) as (claims, start, device),
        StopRequest() as stop,
        progress_of(sum(run.epochs for run in runs), state) as progress,
    ):
        outcome = train(
            runs,
            claims,
            logs=output / ".logs",
            jobs=args.jobs or (len(runs) if args.ray else 1),
            flags=run_flags(args, output, device),
            asked_to_stop=lambda: stop.signal is not None,
            report=progress.report,
            tell=progress.tell,
            start=start,
        )
        name = stop.signal
    for line in outcome.failures():
        print(f"failed: {line}", file=sys.stderr)
    done = f"{len(outcome.complete)} of {len(runs)} runs are complete"
    if name is not None and outcome.stopped:
        raise Stopped(f"{name}: stopped, {done}; what was running is saved, run the same command again to go on")
    if outcome.failed:
        raise RunFailed(f"{done}, {len(outcome.failed)} failed; what they printed is in {output / '.logs'}")
    with suppress(UserError):  # of a row or pair that was not asked for; `show` tells of it
        layout(  # so that it is quick
            args.table, configs, args.output, overrides=args.overrides, imports=args.imports, epochs=args.epochs
        )
    print(done)


def run_flags(args: argparse.Namespace, output: Path, device: str | None) -> list[str]:
    """Of ``mdistill train`` for every run that writes below ``output``."""
    flags = ["--output", str(output), "--checkpoint-root", str(args.checkpoint_root)]
    flags += ["--data-root", str(args.data_root), "--cache-root", str(common.cache_root(args))]
    return [*flags, *(["--device", device] if device else []), *(["--download"] if args.download else [])]


@contextmanager
def _workers(args: argparse.Namespace, output: Path) -> "Iterator[tuple[Claims, Start | None, str | None]]":
    """The claims, what begins a run (None: a process of this machine), and the device of runs."""
    from mdistill.engine.claims import Claims

    if args.ray is None:
        with closing(Claims(output / ".claims")) as claims:
            yield claims, None, args.device
        return
    from mdistill.reporting.ray_runs import Cluster, HandedOut, Share

    if args.device not in (None, "cpu", "cuda"):
        raise UserError(f"--device: found {args.device!r}; with --ray it is cpu or cuda, and Ray says which one")
    with closing(Cluster(args.ray)) as cluster, closing(HandedOut(output / ".claims")) as claims:
        on_cuda = args.device == "cuda" or (args.device is None and cluster.has_gpus())
        gpus = float(on_cuda) if args.gpus_per_run is None else args.gpus_per_run
        share = Share(1.0 if args.cpus_per_run is None else args.cpus_per_run, gpus)
        if not cluster.fits(share):
            print(
                f"no node of the cluster has {share.cpus:g} CPUs and {share.gpus:g} GPUs; runs wait for one", flush=True
            )

        def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> "Process":
            code = "from mdistill.reporting.table_runs import claiming_child; claiming_child()"
            key = log.name.removesuffix(".log")
            return cluster.begin(share, ["-c", code, str(output / ".claims"), key, *arguments], log)

        yield claims, start, args.device or ("cuda" if gpus else "cpu")


class Progress:
    """One bar over the epochs of all runs, those that others train too; lines instead where there is no terminal."""

    def __init__(self, bar: Any, state: "State") -> None:
        self._bar, self._state = bar, state
        self._looked, self._printed = -LOOK, time.monotonic()

    def report(self, active: "Sequence[Run]", outcome: "Outcome") -> None:
        """How far they are."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        epochs, done, left = self._state(active, outcome)
        words = [done, f"{len(active)} running"]
        words += [f"{len(outcome.failed)} failed"] if outcome.failed else []
        words += [left] if left else []
        self._bar.n = min(self._bar.total, epochs)
        self._bar.set_postfix_str(", ".join(words), refresh=False)
        if not self._bar.disable:
            self._bar.refresh()
        elif now - self._printed >= EVERY:
            self._printed = now
            print(f"{self._bar.n} of {self._bar.total} epochs, {', '.join(words)}", flush=True)

    def tell(self, line: str) -> None:
        """Print ``line`` above the bar."""
        self._bar.write(line)
        sys.stdout.flush()


@contextmanager
def progress_of(total: int, state: "State") -> Iterator[Progress]:
    """The progress of ``total`` epochs.

    Args:
        state: of the runs that are training and of what became of the others: how many epochs are done, and in words
            what is done and what is left, "" where that is not told.
    """
    from tqdm import tqdm

    form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs [{elapsed}{postfix}]"
    with tqdm(total=total, bar_format=form, dynamic_ncols=True, disable=None) as bar:
        bar.total = total  # which a bar that is not shown leaves out
        yield Progress(bar, state)


def _state_of(runs: "Sequence[Run]", speeds: "Speeds") -> "State":
    """How far a table is."""
    measured = time.monotonic()

    def state(active: "Sequence[Run]", outcome: "Outcome") -> tuple[int, str, str]:
        nonlocal measured
        if time.monotonic() - measured >= MEASURE:
            measured = time.monotonic()
            speeds.read()
        seconds, unknown = speeds.left([run for run in runs if run.key not in outcome.failed])
        left = f"about {timedelta(seconds=round(seconds / max(1, len(active))))} left" if seconds else ""
        done = f"{len(outcome.complete)} of {len(runs)} complete"
        return sum(run.epochs_done for run in runs), done, f"{left} and more" if left and unknown else left

    return state


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in _table_records.ACTIONS:
        return _table_records.main(arguments)
    return common.run(table, parse, arguments, when_stopped="run it again to go on")
