"""``mdistill tune``: search the settings of a table's rows, each with as many trials, on held-out training images."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdistill.cli import common
from mdistill.cli.table import add_jobs, progress_of, run_flags, time_left
from mdistill.errors import RunFailed, Stopped

if TYPE_CHECKING:
    from mdistill.cli.table import State
    from mdistill.reporting.searching import Journal
    from mdistill.reporting.table_files import Table
    from mdistill.reporting.table_plan import Run
    from mdistill.reporting.table_runs import Outcome
    from mdistill.reporting.tuning import Search, Tuning

WRITING = 60.0  # seconds that other processes may take to write what they have chosen
DESCRIPTION = """Search the settings of those rows of a table that have a search: key, for each pair.

Every search has the same number of trials, the first with the table's own settings. A trial is a run with one seed,
scored by the last epoch's top-1 on training images that are held out; the test split is never evaluated. What is chosen
is written to TABLE.tuned.yaml (with --epochs N TABLE-epochsN.tuned.yaml) beside the table file, which uses it where it
says `tuned: TABLE.tuned.yaml`; all trials to OUTPUT/searches/TABLE.json. Any number of processes and machines may share
the work over a shared --output; what was stopped goes on with the same command."""

EXAMPLES = f"""  mdistill tune my_table.yaml --budget 20 --dry-run        what there is to do, and how long it takes
  mdistill tune my_table.yaml --budget 20 --jobs 2
  mdistill tune my_table.yaml --budget 20 --epochs 60      schedules shortened to 60 epochs, which the record tells
  mdistill table run my_table.yaml                         train the table with what was chosen

{common.EXIT_CODES}"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("tune", DESCRIPTION, EXAMPLES)
    parser.add_argument("table", type=common.path, help="a table file with search: keys")
    parser.add_argument("--budget", type=common.count, required=True, metavar="N", help="trials of each row and pair")
    parser.add_argument("--pairs", type=common.names, help="some of its pairs (default: all)")
    parser.add_argument("--epochs", type=common.count, metavar="N", help="shorten every schedule in proportion")
    add_jobs(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the time it takes, train nothing")
    common.add_roots(parser)
    common.add_cache_root(parser)
    common.add_imports(parser)
    return parser.parse_intermixed_args(arguments)


def tune(args: argparse.Namespace) -> None:
    from mdistill.reporting.searching import Journal
    from mdistill.reporting.table_files import read_table
    from mdistill.reporting.tuning import searches, with_holdout, work_folder

    configs = common.project_root() / "configs"
    table = read_table(args.table, configs, pairs=args.pairs, imports=args.imports, tuned=False)
    found = searches(
        table,
        budget=args.budget,
        output=args.output,
        checkpoint_root=args.checkpoint_root,
        configs=configs,
        epochs=args.epochs,
    )
    folder = work_folder(table, args.output, args.epochs)
    path = folder / "journal.log"
    journal = None if args.dry_run and not path.is_file() else Journal(path)
    if args.dry_run:
        _print_plan(args, table, found, journal)
        return
    assert journal is not None
    found = with_holdout(found, journal, data_root=args.data_root, download=args.download)
    whole = read_table(args.table, configs, imports=args.imports, tuned=False)
    _search(args, whole, found, journal, folder)


def _print_plan(args: argparse.Namespace, table: "Table", found: "Sequence[Search]", journal: "Journal | None") -> None:
    from mdistill.reporting.searching import described
    from mdistill.reporting.table_runs import threads_of
    from mdistill.reporting.table_speeds import Speeds
    from mdistill.reporting.tuning import SHARE, Tuning

    known = [] if journal is None else journal.names()
    left: list[Run] = []
    for search in found:
        ended: set[int] = set()
        if journal is not None and search.label in known:
            ended = {each.number for each in Tuning([search], journal).trials(search) if each.state != "running"}
        left += [search.slot(number) for number in range(search.count) if number not in ended]
        space = "; ".join(f"{key} {described(each)}" for key, each in search.spaces.items())
        holdout = f"one in {SHARE}" if search.holdout is None else f"{search.holdout:,}"
        print(
            f"{search.label}: {len(ended)} of {search.count} trials done, of {search.slot(0).epochs} epochs with"
            f" {holdout} of the training images held out; {space}"
        )
        if search.missing:
            print(f"no teacher: {search.missing}")
    for row in table.rows:
        if not row.search:
            print(f"not tuned, it has no search space: {row.name}")
    outputs = [args.output, *{search.folder for search in found}]
    seconds, unknown = Speeds(left, outputs, threads_of(args.jobs)).left(left)
    trials = sum(search.count for search in found)
    print(f"{trials} trials, {trials - len(left)} done; {time_left(seconds, unknown, args.jobs)}")


def _search(
    args: argparse.Namespace, table: "Table", found: "Sequence[Search]", journal: "Journal", folder: Path
) -> None:
    from mdistill.engine.claims import Claims
    from mdistill.engine.console import StopRequest
    from mdistill.reporting.table_runs import train
    from mdistill.reporting.tuning import agenda_of, enter

    enter(found, journal)
    runs, tuning = agenda_of(found, journal)
    claims = Claims(folder / ".claims")
    total = sum(search.count * search.slot(0).epochs for search in found)
    try:
        with StopRequest() as stop, progress_of(total, _state_of(found, tuning, total)) as progress:
            outcome = train(
                runs,
                claims,
                logs=folder / ".logs",
                jobs=args.jobs,
                flags=run_flags(args, folder, args.device),
                asked_to_stop=lambda: stop.signal is not None,
                report=progress.report,
                tell=progress.tell,
                agenda=tuning,
            )
            name = stop.signal
    finally:
        claims.close()
    for line in outcome.failures():
        print(f"failed: {line}", file=sys.stderr)
    others = _write(args, table, found, tuning, journal)
    if name is not None and outcome.stopped:
        raise Stopped(f"{name}: stopped; what was running is saved, run the same command again to go on")
    if outcome.failed or others:
        why = f"; what they printed is in {folder / '.logs'}" if outcome.failed else ""
        raise RunFailed("\n".join([*others[:-1], f"{others[-1]}{why}"]) if others else f"runs failed{why}")


def _write(
    args: argparse.Namespace, table: "Table", found: "Sequence[Search]", tuning: "Tuning", journal: "Journal"
) -> list[str]:
    """Write the record and what is chosen, and print it; a line for each search that is not done."""
    from mdistill.files import lock_folder
    from mdistill.reporting.publishing import SEARCHES
    from mdistill.reporting.tuning import findings, write_chosen, write_record

    folder, ended = found[0].folder, -1
    lock = lock_folder(folder, "folder of searches", wait=WRITING)  # what is chosen for other pairs is read and stays
    try:
        while ended != tuning.ended():  # another process may have ended a trial while this one wrote
            ended = tuning.ended()
            done, others = findings(found, tuning)
            record = args.output / SEARCHES / f"{folder.name}.json"
            write_record(record, table, journal, args.epochs)
            file = write_chosen(table, done, args.epochs) if done else None
    finally:
        lock.release()
    for each in done:
        print(each.line)
    print(f"all trials: {record}")
    if file is not None:
        print(f"chosen settings: {file}")
        if table.names_tuned != file.name:
            print(f"{table.path} uses them once it has the line `tuned: {file.name}`")
    return others


def _state_of(found: "Sequence[Search]", tuning: "Tuning", total: int) -> "State":
    """How far the searches are, of ``total`` epochs."""
    trials = sum(search.count for search in found)

    def state(active: "Sequence[Run]", outcome: "Outcome") -> tuple[int, str, str]:
        ended = tuning.ended()
        epochs = round(ended * total / max(1, trials)) + sum(run.epochs_done for run in active)
        return epochs, f"{ended} of {trials} trials done", ""

    return state


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(tune, parse, arguments, when_stopped="run it again to go on")
