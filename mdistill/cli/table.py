"""``mdistill table``: train what a paper's table is missing, and show it."""

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mdistill.cli import common
from mdistill.errors import RunFailed, Stopped, UserError

if TYPE_CHECKING:
    from mdistill.reporting.table_files import Table
    from mdistill.reporting.table_runs import Outcome, Run

DESCRIPTION = """A table is pairs x methods x seeds, as a table file says: one of configs/tables, or your own.

run    trains what is missing, resumes what was stopped and leaves alone what is complete. A run that fails does not
       keep the others; failures are listed at the end. Any number of processes and machines may work on one table over
       a shared --output.
show   prints the table from the records under --output: mean and standard deviation of the last epoch over the seeds,
       beside the published figure."""

EXAMPLES = f"""  mdistill table run mcld_table2 --dry-run                     what there is to do, and how long it takes
  mdistill table run mcld_table2 --methods kd,mcld --pairs res56_res20
  mdistill table run mcld_table2 --epochs 2 --jobs 2           a smoke run: schedules shortened, in a folder of their own
  mdistill table run my_table.yaml --train-teachers
  mdistill table show mcld_table2
  mdistill table show my_table.yaml --format markdown

{common.EXIT_CODES}"""


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"found {text!r}; write names, such as kd,mcld")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a number from 1, found {text!r}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("table", DESCRIPTION, EXAMPLES)
    parser.add_argument("action", choices=("run", "show"))
    parser.add_argument("table", help="a name in configs/tables, or a table file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, after the table's own")
    parser.add_argument("--methods", type=_names, help="some of its rows (default: all)")
    parser.add_argument("--pairs", type=_names, help="some of its pairs (default: all)")
    parser.add_argument("--seeds", type=common.seeds, help="such as 0,1,2 (default: the table's)")
    parser.add_argument(
        "--epochs", type=_count, help="shorten every schedule in proportion; such runs lie in OUTPUT/epochs<N>"
    )
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text", help="of show (%(default)s)")
    parser.add_argument("--jobs", type=_count, default=1, help="runs at a time; on a CPU each gets its share of cores")
    parser.add_argument("--train-teachers", action="store_true", help="train teachers whose file is missing")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the time it takes, train nothing")
    common.add_roots(parser)
    common.add_cache_root(parser)
    return parser.parse_intermixed_args(arguments)


def table(args: argparse.Namespace) -> int | None:
    from mdistill.reporting.table_files import find_table, read_table

    configs = common.project_root() / "configs"
    chosen = {"methods": args.methods, "pairs": args.pairs, "seeds": args.seeds, "overrides": args.overrides}
    found = read_table(find_table(args.table, configs), configs, **chosen)
    output = args.output / f"epochs{args.epochs}" if args.epochs else args.output
    if args.action == "show":
        from mdistill.reporting.table_show import show

        print(show(found, output, common.project_root() / "results" / "published.csv", args.format, args.epochs))
        return None
    return _run(args, found, output, configs)


def _run(args: argparse.Namespace, found: "Table", output: Path, configs: Path) -> int | None:
    from mdistill.reporting.table_runs import plan

    runs = plan(
        found,
        output=output,
        checkpoint_root=args.checkpoint_root,
        configs=configs,
        train_teachers=args.train_teachers,
        epochs=args.epochs,
    )
    if args.dry_run:
        _print_plan(runs)
        return None
    return _train(args, runs, output)


def _print_plan(runs: "Sequence[Run]") -> None:
    from mdistill.reporting.table_runs import seconds_left

    for run in runs:
        done, epochs, state = run.epochs_done, run.config.solver.epochs, run.state
        words = {"complete": "complete", "begun": f"{done} of {epochs} epochs", "missing": f"{epochs} epochs to do"}
        print(f"{run.label}: {words[state]}{', no teacher' if run.missing else ''}   {run.folder}")
    for why in dict.fromkeys(run.missing for run in runs if run.missing):
        print(f"no teacher: {why}")
    complete = sum(run.state == "complete" for run in runs)
    print(f"{len(runs)} runs, {complete} complete; {_time_left(*seconds_left(runs))}")


def _time_left(seconds: float | None, unknown: int) -> str:
    if seconds is None:
        return f"{unknown} epochs to do, none of whose pairs has been timed" if unknown else "nothing to do"
    rest = f", and {unknown} epochs of pairs that nobody has timed" if unknown else ""
    return f"about {timedelta(seconds=round(seconds))} one after the other, by the epochs that are done{rest}"


def _train(args: argparse.Namespace, runs: "Sequence[Run]", output: Path) -> int | None:
    from tqdm import tqdm

    from mdistill.engine.claims import Claims
    from mdistill.engine.console import StopRequest
    from mdistill.reporting.table_runs import train

    flags = ["--output", str(output), "--checkpoint-root", str(args.checkpoint_root)]
    flags += ["--data-root", str(args.data_root), "--cache-root", str(common.cache_root(args))]
    flags += [*(["--device", args.device] if args.device else []), *(["--download"] if args.download else [])]
    total = sum(run.config.solver.epochs for run in runs)
    begun = sum(run.epochs_done for run in runs)
    claims = Claims(output / ".claims")
    try:
        with StopRequest() as stop, tqdm(total=total, initial=begun, unit="epoch", dynamic_ncols=True) as bar:

            def report(active: "Sequence[Run]", outcome: "Outcome") -> None:
                bar.n = min(total, sum(run.epochs_done for run in runs))
                bar.set_postfix_str(f"{len(active)} running, {len(outcome.failed)} failed", refresh=False)
                bar.refresh()

            outcome = train(
                runs,
                claims,
                logs=output / ".logs",
                jobs=args.jobs,
                flags=flags,
                asked_to_stop=lambda: stop.signal is not None,
                report=report,
            )
            name = stop.signal
    finally:
        claims.close()
    for run, why in outcome.failed.values():
        print(f"failed: {run.label}: {why}", file=sys.stderr)
    done = f"{len(outcome.complete)} of {len(runs)} runs are complete"
    if name is not None:
        raise Stopped(f"{name}: stopped, {done}; what was running is saved, run the same command again to go on")
    if outcome.failed:
        raise RunFailed(f"{done}, {len(outcome.failed)} failed; what they printed is in {output / '.logs'}")
    print(done)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(table, parse, arguments, when_stopped="run it again to go on")
