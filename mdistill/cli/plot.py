"""``mdistill plot``: a picture of runs, as papers print them."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mdistill.cli import common
from mdistill.errors import UserError
from mdistill.reporting.drawing import picture_format, save
from mdistill.reporting.plots import KINDS, Options, draw, kind_of
from mdistill.reporting.records import HEADLINE, read_records

if TYPE_CHECKING:
    from mdistill.reporting.outputs import Networks

DESCRIPTION = """Draw a picture of runs and print the numbers in it. RUN is a run folder, or a folder with runs below.

kinds:
{kinds}

Runs that differ in their seed alone are one line with a band, or one bar. What the networks compute is computed anew,
in float32, from student.pt and the teacher's weights."""

EXAMPLES = """  mdistill plot curves runs/cifar100
  mdistill plot time runs/cifar100 -o cost.svg
  mdistill plot tsne runs/cifar100/kd/resnet32x4_resnet8x4/seed0 runs/cifar100/dkd/resnet32x4_resnet8x4/seed0
  mdistill plot correlation runs/cifar100/dkd/resnet32x4_resnet8x4/seed0 --matrix means --scale 3
  mdistill plot classes runs/cifar100/vanilla/resnet110/seed0 --classes leopard,television,dinosaur"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    kinds = "\n".join(f"  {name:<12} {kind.line}" for name, kind in KINDS.items())
    parser = common.machine_parser("plot", DESCRIPTION.format(kinds=kinds), EXAMPLES)
    parser.add_argument("kind", metavar="KIND", help="one of the kinds above")
    parser.add_argument("runs", metavar="RUN", type=common.path, nargs="+", help="a run folder, or a folder of runs")
    parser.add_argument(
        "-o", "--output", type=common.path, help="the picture: .png, .svg or .pdf (default: KIND.png here)"
    )
    parser.add_argument("--title", default="", help="above the picture (default: none)")
    parser.add_argument("--split", default="test", help="of networks: test, or val where images were held out")
    common.add_checkpoint_root(parser)
    chosen = parser.add_argument_group("of one kind or another")
    chosen.add_argument("--metric", default=HEADLINE, help="curves: a key of metrics.jsonl (%(default)s)")
    chosen.add_argument("--classes", type=common.names, default=[], help="tsne, classes: names or numbers, by commas")
    chosen.add_argument("--image", type=int, help="classes: number of an image of the split, in a panel of its own")
    chosen.add_argument(
        "--top", type=common.count, default=10, help="classes: how many of the highest logits (%(default)s)"
    )
    chosen.add_argument(
        "--matrix",
        choices=["correlation", "means"],
        default="correlation",
        help="correlation: of the classes' logits over images, or the mean logits of each class (%(default)s)",
    )
    chosen.add_argument("--scale", type=common.positive, help="correlation, logits: the end of the scale of colours")
    chosen.add_argument("--bins", type=_bins, default=15, help="reliability: of confidence (%(default)s)")
    chosen.add_argument(
        "--role", choices=["student", "teacher"], default="student", help="reliability, classes: whose (%(default)s)"
    )
    chosen.add_argument(
        "--temperature", type=common.positive, default=1.0, help="agreement: of both networks (%(default)s)"
    )
    chosen.add_argument("--perplexity", type=common.positive, default=30.0, help="tsne (%(default)s)")
    chosen.add_argument("--seed", type=int, default=0, help="tsne: of the optimisation (%(default)s)")
    common.add_recorded_code(parser)
    return parser.parse_intermixed_args(arguments)


def _bins(text: str) -> int:
    if (bins := common.count(text)) > 10_000:
        raise argparse.ArgumentTypeError(f"should be a number from 1 to 10000, found {text!r}")
    return bins


def networks_of(args: argparse.Namespace) -> "Networks":
    """What loads the networks of runs, as the flags say."""
    from mdistill.engine.build import pick_device
    from mdistill.reporting.outputs import Networks

    return Networks(
        device=pick_device(args.device),
        data_root=args.data_root,
        checkpoint_root=args.checkpoint_root,
        download=args.download,
        configuration=partial(common.recorded_config, args),
        split=args.split,
    )


def plot(args: argparse.Namespace) -> None:
    kind = kind_of(args.kind)
    path = args.output or Path(f"{args.kind}.png")
    picture_format(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; -o takes the name of a picture")
    records = read_records(args.runs)
    shared = {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__}
    picture = draw(args.kind, records, Options(**shared), networks_of(args) if kind.networks else None)
    save(picture.figure, path)
    for line in picture.lines:
        print(line)
    for line in picture.left_out:
        print(f"left out: {line}", file=sys.stderr)
    print(f"picture: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(plot, parse, arguments, when_stopped="no picture was written")
