"""``mdistill report``: one HTML file about many runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mdistill.cli import common
from mdistill.cli.plot import networks_of
from mdistill.errors import UserError, plural
from mdistill.files import write_text
from mdistill.reporting.records import find_named
from mdistill.reporting.report import report as page

DESCRIPTION = """Write a page about runs: a table, learning curves and cost for each pair of teacher and student,
students by their teachers, and what stands behind each number. RUN is a run folder, or a folder with runs below. The
page is one file that needs nothing beside it. It is made from the runs' records alone, unless --networks asks for
pictures of what networks compute: agreement with the teacher, calibration, correlations and logits of each class."""

EXAMPLES = """  mdistill report runs
  mdistill report runs/cifar100 results -o report.html --title "CIFAR-100, three seeds"
  mdistill report runs/cifar100 --networks --data-root data"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("report", DESCRIPTION, EXAMPLES)
    parser.add_argument("runs", metavar="RUN", type=common.path, nargs="+", help="a run folder, or a folder of runs")
    parser.add_argument("-o", "--output", type=common.path, default=Path("report.html"), help="the page (%(default)s)")
    parser.add_argument("--title", default="Distillation runs", help="of the page (%(default)s)")
    parser.add_argument("--networks", action="store_true", help="run the networks too, for further pictures")
    parser.add_argument("--split", default="test", help="of --networks: test, or val where images were held out")
    common.add_checkpoint_root(parser)
    common.add_recorded_code(parser)
    return parser.parse_intermixed_args(arguments)


def report(args: argparse.Namespace) -> None:
    if args.output.is_dir():
        raise UserError(f"{args.output} is a folder; -o takes the name of a page")
    found = find_named(args.runs)
    networks = networks_of(args) if args.networks else None
    write_text(args.output, page(found.records, title=args.title, problems=found.problems, networks=networks))
    for problem in found.problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"{plural(len(found.records), 'run')}: {args.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(report, parse, arguments, when_stopped="no page was written")
