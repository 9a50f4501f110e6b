"""``mdistill data``: look through a folder of images, or make a smaller copy of it."""

import argparse
from collections.abc import Sequence

from mdistill.cli import common
from mdistill.errors import UserError, printable

MOST_CHARACTERS = 5000  # of a line

DESCRIPTION = """Look through a folder of images, train/<class>/ and val/<class>/, or make a smaller copy of it.

check reads every image: it counts them and their sizes, and names what is odd (grey, CMYK, 16 bits, turned, a format
that the name does not say), what is in train and val at once, and every file that cannot be read. It ends with exit
code 2 if anything would stop a run.

shrink copies the images as JPEG whose short side has at most so many pixels. They take less time to decode, and
training on them is another task: images get less sharp. An interrupted copy is called OUT.partial and goes on where it
stopped when the command is given again."""

EXAMPLES = """  mdistill data check photos
  mdistill data shrink imagenet imagenet256 --short-side 256"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.plain_parser("data", DESCRIPTION, EXAMPLES)
    actions = parser.add_subparsers(dest="action", metavar="check | shrink", required=True)
    check = actions.add_parser("check", help="count, and name what is broken or odd")
    check.add_argument("root", type=common.path, metavar="ROOT", help="the folder that holds train/ and val/")
    shrink = actions.add_parser("shrink", help="make a smaller copy")
    shrink.add_argument("root", type=common.path, metavar="ROOT", help="the folder that holds train/ and val/")
    shrink.add_argument("out", type=common.path, metavar="OUT", help="the new folder")
    shrink.add_argument("--short-side", type=int, default=256, help="pixels at most; none is enlarged (%(default)s)")
    shrink.add_argument("--quality", type=int, default=90, help="of JPEG, from 1 to 100 (%(default)s)")
    return parser.parse_args(arguments)


def run_data(args: argparse.Namespace) -> None:
    if args.action == "check":
        check(args)
    else:
        shrink(args)


def check(args: argparse.Namespace) -> None:
    from mdistill.data.survey import survey

    for line in survey(args.root):
        print(printable(line, MOST_CHARACTERS), flush=True)  # names of files may hold anything


def shrink(args: argparse.Namespace) -> None:
    if args.short_side < 1:
        raise UserError(f"--short-side: should be at least 1, found {args.short_side}")
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality: should be from 1 to 100, found {args.quality}")
    from mdistill.data import shrink as copies

    done = copies.shrink(
        args.root,
        args.out,
        short_side=args.short_side,
        quality=args.quality,
        announce=lambda line: print(line, flush=True),
    )
    earlier = f", {done.kept:,} of them by an earlier run" if done.kept else ""
    print(
        f"{args.out}: {done.images:,} images{earlier}, {copies.size_text(done.before)} before,"
        f" {copies.size_text(done.after)} after"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(
        run_data, parse, arguments, when_stopped="an interrupted copy goes on when the command is given again"
    )
