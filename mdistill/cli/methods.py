"""``mdistill methods``: every method with its paper, loss, what it needs, its settings and where they come from."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mdistill.cli import common
from mdistill.errors import RunFailed, UserError
from mdistill.files import write_text
from mdistill.reporting.methods import Method, describe, markdown_section, markdown_table, replaced, text

DESCRIPTION = """List every method: paper, year, loss, what it needs, whether the teacher's logits can be cached, its
settings, and whether these are certainly the published ones, inferred, or ours.

The same is written into docs/methods.md; a test sees to it that it is up to date."""

EXAMPLES = """  mdistill methods
  mdistill methods kd dkd              these alone, with settings and how they differ from their papers
  mdistill methods --import my_method  with your own
  mdistill methods --write             after a change: bring docs/methods.md up to date"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.plain_parser("methods", DESCRIPTION, EXAMPLES)
    parser.add_argument("names", nargs="*", metavar="METHOD", help="these alone, in full (default: all)")
    common.add_imports(parser)
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--write", action="store_true", help="write docs/methods.md")
    exclusive.add_argument("--check", action="store_true", help="only tell whether it is up to date; exits with 1")
    return parser.parse_intermixed_args(arguments)


def updated(page: str, methods: Sequence[Method]) -> str:
    """``page``, the text of docs/methods.md, with its generated parts as they should be."""
    sections = "\n".join(markdown_section(method) for method in methods)
    return replaced(replaced(page, "table", markdown_table(methods)), "sections", sections)


def show(args: argparse.Namespace) -> None:
    if args.names and (args.write or args.check):
        raise UserError("--write and --check are for the page of all methods: name none")

    from mdistill.distillers import DISTILLERS
    from mdistill.user_code import import_user_module

    for module in args.imports:
        import_user_module(module, [Path.cwd()])
    root = common.project_root()
    names = [DISTILLERS.canonical(name) for name in args.names] or DISTILLERS.names()
    if args.write or args.check:
        names = [name for name in names if DISTILLERS.get(name).__module__.startswith("mdistill.")]
    methods = [describe(name, root / "configs" / "cifar100") for name in names]
    if args.write or args.check:
        path = root / "docs" / "methods.md"
        page = path.read_text(encoding="utf-8")
        if updated(page, methods) == page:
            return
        if args.check:
            raise RunFailed("docs/methods.md should be written anew: python tools/methods.py --write")
        write_text(path, updated(page, methods))
        return
    print("\n\n".join(text(method, in_full=bool(args.names)) for method in methods))
    if not args.names:
        print("\nmdistill methods METHOD also shows how its code differs from its paper")


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(show, parse, arguments)
