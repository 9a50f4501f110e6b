"""``mdistill COMMAND ...``: find the command and hand it the rest; its module alone is imported."""

import argparse
import importlib
import keyword
import sys
from collections.abc import Sequence

from mdistill import __version__
from mdistill.cli.common import EXIT_CODES, run
from mdistill.errors import UserError, suggestion

COMMANDS = {
    "train": "train a student from a teacher, or a network alone",
    "eval": "evaluate a run folder or a checkpoint",
    "transfer": "train a linear classifier on a student's features, on STL-10, Tiny ImageNet or your images",
    "audit": "replay the first steps of a run and say whether they are the same",
    "plot": "draw a picture of runs: curves, time, t-SNE, logits, calibration, agreement",
    "report": "write one HTML page about many runs",
    "watch": "follow running work on a local page",
    "cache": "compute a teacher's logits ahead of training",
    "table": "train what the table of a paper is missing, show it, compare its methods",
    "tune": "search the settings of a table's rows, each with as many trials, on held-out training images",
    "data": "look through a folder of images, or make a smaller copy",
    "import": "take runs that others published into tables",
    "methods": "list the methods: paper, loss, needs, settings and their sources",
    "quickstart": "the main job on the embedded data set, in minutes on a CPU",
}

HELP = """usage: mdistill COMMAND ...

Logit distillation of image classifiers.

commands:
{commands}

options:
  --help       show this text; `mdistill COMMAND --help` shows a command's flags and examples
  --version    show the version

{exit_codes}
"""


def dispatch(args: argparse.Namespace) -> int:
    name, *rest = args.arguments or ["--help"]
    if name in {"-h", "--help"}:
        commands = "\n".join(f"  {command:<12} {line}" for command, line in COMMANDS.items())
        print(HELP.format(commands=commands, exit_codes=EXIT_CODES), end="")
        return 0 if args.arguments else 2
    if name == "--version":
        print(f"mdistill {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{suggestion(name, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    module = f"{name}_" if keyword.iskeyword(name) else name
    return int(importlib.import_module(f"mdistill.cli.{module}").main(rest))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return argparse.Namespace(arguments=sys.argv[1:] if arguments is None else arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(dispatch, parse, arguments)
