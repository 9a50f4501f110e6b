#!/usr/bin/env python3
"""List every method: paper, loss, what it needs and its published settings."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mdistill import cli, config
from mdistill.distillers import DISTILLERS
from mdistill.errors import RunFailed, UserError
from mdistill.files import write_text
from mdistill.reporting.methods import Method, describe, markdown_section, markdown_table, replaced, text

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "methods.md"

DESCRIPTION = """List every method: paper, year, loss, what it needs, whether the teacher's logits can come from a table
(cache) and whether its step can be captured (graph), and its settings as published.

The same is written into README.md and docs/methods.md; the tests see to it that both are up to date."""

EXAMPLES = """  python tools/methods.py
  python tools/methods.py kd dkd              these alone, with settings and readings
  python tools/methods.py --import my_method  with your own
  python tools/methods.py --write             after a change: bring README.md and docs/methods.md up to date"""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.plain_parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("names", nargs="*", metavar="METHOD", help="these alone, with readings (default: all)")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="your code")
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--write", action="store_true", help="write README.md and docs/methods.md")
    exclusive.add_argument("--check", action="store_true", help="only say whether they are up to date; exits with 1")
    return parser.parse_intermixed_args(words)


def pages(methods: Sequence[Method]) -> dict[Path, str]:
    """The two pages as they should be."""
    table = markdown_table(methods)
    sections = "\n".join(markdown_section(method) for method in methods)
    page = replaced(PAGE.read_text(encoding="utf-8"), "table", table)
    return {
        README: replaced(README.read_text(encoding="utf-8"), "methods", table),
        PAGE: replaced(page, "sections", sections),
    }


def show(args: argparse.Namespace) -> None:
    for module in args.imports:
        config.import_user_module(module, [Path.cwd()])
    if args.names and (args.write or args.check):
        raise UserError("--write and --check are for the pages of all methods: name none")
    names = [DISTILLERS.canonical(name) for name in args.names] or DISTILLERS.names()
    if args.write or args.check:
        names = [name for name in names if DISTILLERS.get(name).__module__.startswith("mdistill.")]
    methods = [describe(name, ROOT / "configs" / "cifar100") for name in names]
    if args.write or args.check:
        stale = {path: page for path, page in pages(methods).items() if path.read_text(encoding="utf-8") != page}
        if args.check and stale:
            found = " and ".join(str(path.relative_to(ROOT)) for path in stale)
            raise RunFailed(f"{found} should be written anew: python tools/methods.py --write")
        for path, page in stale.items():
            write_text(path, page)
        return
    print("\n\n".join(text(method, readings=bool(args.names)) for method in methods))
    if not args.names:
        print("\npython tools/methods.py METHOD also shows how its code differs from its paper")


def main(words: Sequence[str] | None = None) -> int:
    return cli.run(show, parse(words))


if __name__ == "__main__":
    sys.exit(main())
