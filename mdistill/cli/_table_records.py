"""``mdistill table show``, ``compare`` and ``publish``: what run records say; none of them trains anything."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdistill.cli import common
from mdistill.errors import RunFailed, UserError, printable, suggestion

if TYPE_CHECKING:
    from mdistill.reporting.records import Found, Record
    from mdistill.reporting.table_cells import Layout
    from mdistill.reporting.table_show import Table

DESCRIPTIONS = {
    "show": """Print a table from the run records below --output and --results: mean and sample standard deviation of
the last epoch's top-1 over the seeds, the published figure, and the difference. Runs of other settings, precisions,
teachers or copies of the data are left out of a cell, and a line says so; failed and collapsed runs are told.""",
    "compare": """Compare methods of a table with a baseline, seed by seed and pair by pair: the mean difference, its
95 % interval (Student's t), and p values adjusted by Holm's procedure where there are several.""",
    "publish": """Copy the records of runs (config.yaml, env.json, metrics.jsonl, no weights, nothing above 1 MB) into
the folder of results, without absolute paths. Name run folders, or a table for all its runs that have ended.""",
}

EXAMPLES = {
    "show": """  mdistill table show mcld_table2
  mdistill table show mcld_table2 --methods KD,MCLD --pairs res56_res20 --seeds 0,1,2,3,4
  mdistill table show my_table.yaml --format html > table.html""",
    "compare": """  mdistill table compare mcld_table2 --baseline KD --methods MCLD,DKD
  mdistill table compare my_table.yaml --baseline KD --format markdown""",
    "publish": """  mdistill table publish my_table.yaml
  mdistill table publish runs/cifar100/kd/resnet56_resnet20/seed0""",
}

ACTIONS = tuple(DESCRIPTIONS)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    action, *rest = sys.argv[1:] if arguments is None else arguments
    parser = common.plain_parser(f"table {action}", DESCRIPTIONS[action], f"{EXAMPLES[action]}\n\n{common.EXIT_CODES}")
    if action == "publish":
        parser.add_argument("names", nargs="+", metavar="RUN|TABLE", help="run folders, or tables")
    else:
        parser.add_argument("table", help="a name in configs/tables, or a table file")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, after the table's own")
    common.add_part(parser)
    common.add_imports(parser)
    parser.add_argument(
        "--epochs", type=common.count, metavar="N", help="of runs whose schedules were shortened to N epochs"
    )
    parser.add_argument("--output", type=common.path, default=Path("runs"), help="folder of all runs (%(default)s)")
    results = common.project_root() / "results"
    parser.add_argument("--results", type=common.path, default=results, help="folder of published records (results)")
    if action == "publish":
        told = "folder of teachers: paths below it or --output are published relative to it (%(default)s)"
        common.add_checkpoint_root(parser, told)
    if action == "compare":
        parser.add_argument("--baseline", required=True, metavar="METHOD", help="the row that others are compared with")
    if action != "publish":
        from mdistill.reporting.table_formats import FORMATS

        forms = FORMATS if action == "show" else ("text", "markdown")
        parser.add_argument("--format", choices=forms, default="text", help="(%(default)s)")
        parser.add_argument("--metric", help="top1, top5 or one of the table's (default: those that it is about)")
        parser.add_argument("--best", action="store_true", help="the best epoch's accuracy instead of the last one's")
    args = parser.parse_intermixed_args(rest)
    args.action = action
    return args


def act(args: argparse.Namespace) -> None:
    if args.action == "publish":
        return _publish(args)
    table = _table(args)
    if args.action == "show":
        from mdistill.reporting.table_formats import render

        print(render(table, args.format))
        return None
    from mdistill.reporting.comparison import compare, text

    print(text(compare(table, args.baseline, args.methods), markdown=args.format == "markdown"))
    return None


def _table(args: argparse.Namespace) -> "Table":
    from mdistill.reporting.published import read_published
    from mdistill.reporting.table_show import build

    layout = _layout(args, args.table, None if args.action == "compare" else args.methods)
    published = common.project_root() / "results" / "published.csv"
    figures = read_published(published) if layout.source else []
    metrics = _metrics(layout, args.metric, several=args.action == "show")
    return build(layout, _found(args), figures, epoch="best" if args.best else "last", metrics=metrics)


def _metrics(layout: "Layout", asked: str | None, *, several: bool) -> "Sequence[str]":
    """What a table shows: what is asked for; else of one about targets all of its metrics, of another the first."""
    known = tuple(dict.fromkeys([*layout.metrics, "top1", "top5"]))
    if asked is not None and asked not in known:
        raise UserError(f"--metric: unknown {asked!r}{suggestion(asked, known)} (of this table: {', '.join(known)})")
    if asked is not None:
        return [asked]
    return layout.metrics if several and layout.targets else layout.metrics[:1]


def _layout(args: argparse.Namespace, table: str, methods: "Sequence[str] | None") -> "Layout":
    from mdistill.reporting.table_cells import layout

    overrides = () if args.action == "publish" else tuple(args.overrides)
    configs = common.project_root() / "configs"
    whole = layout(table, configs, args.output, overrides=overrides, imports=args.imports, epochs=args.epochs)
    return whole.part(methods, args.pairs, args.seeds)


def _found(args: argparse.Namespace) -> "Found":
    from mdistill.reporting.records import find_records

    roots = [root for root in (args.output, args.results) if root.is_dir()]
    if not roots:
        raise UserError(f"no run records: neither --output {args.output} nor --results {args.results} is a folder")
    return find_records(roots)


def _publish(args: argparse.Namespace) -> None:
    """Copy all that is named; what is refused does not keep the others.

    Raises:
        UserError: a name is none of a table's, or the only record was refused.
        RunFailed: some of several were.
    """
    todo = [each for name in args.names for each in _named(args, name)]
    refused = [each for each in todo if not _copy(args, each, only=len(todo) == 1)]
    if refused:
        raise RunFailed(f"{len(todo) - len(refused)} of {len(todo)} records are published, the others were refused")


def _named(args: argparse.Namespace, name: str) -> "Sequence[Path | Record]":
    """What there is to publish under a name: a run folder, or searches and runs of a table."""
    from mdistill.reporting.publishing import searches_of
    from mdistill.reporting.records import find_records

    if Path(name).is_dir():
        return [Path(name)]
    layout = _layout(args, name, args.methods)
    found = find_records([args.output] if args.output.is_dir() else [])
    records = [record for record in found.records if layout.holds(record)]
    ended = [record for record in records if record.complete or record.failure]
    print(f"{name}: {len(ended)} runs have ended, {len(records) - len(ended)} have not, below {args.output}")
    for problem in found.problems:
        print(f"left out: {problem}")
    return [*searches_of(Path(name).stem, args.output), *ended]


def _copy(args: argparse.Namespace, each: "Path | Record", *, only: bool) -> bool:
    """Copy a run's record, the one in a run folder or that of a search; whether that could be done.

    Raises:
        UserError: it is the ``only`` one and was refused.
    """
    from mdistill.reporting.publishing import destination, publish, publish_search
    from mdistill.reporting.records import read_record

    try:
        if isinstance(each, Path) and each.is_file():
            print(publish_search(each, args.results))
            return True
        record = read_record(each) if isinstance(each, Path) else each
        target = args.results / destination(record, args.output)
        changed = publish(record, target, (args.checkpoint_root, args.output))
        print(f"{target}{'' if changed else ', as it was'}")
    except UserError as error:
        if only:
            raise
        print(f"not published: {printable(str(error).splitlines()[0], 900)}", file=sys.stderr)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(act, parse, arguments)
