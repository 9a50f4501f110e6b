"""``mdistill import``: take runs that others published into tables, as rows of their own."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdistill.cli import common
from mdistill.errors import UserError, printable, suggestion

if TYPE_CHECKING:
    from mdistill.reporting.external import External

DESCRIPTION = """Read a run of another project: a folder that mdistiller or RLD wrote (worklog.txt, student_best and
student_latest), one of RepDistiller (ckpt_epoch_240.pth, resnet8x4_best.pth), or a log of either that stands alone.

What is found is written below --results; `mdistill table show` prints it in a row that says whose it is. Method and
networks are read off the folder's name or its config.txt; --method, --teacher and --student say what is not there.
Nothing that a file holds is run."""

EXAMPLES = f"""  mdistill import output/cifar100_baselines/dkd,res32x4,res8x4 --source "megvii-research/mdistiller"
  mdistill import "logs/KD/kd,resnet56,resnet20,2,9.txt" --source "sunshangquan/logit-standardization-KD"
  mdistill import save/student_model/S:resnet8x4_T:resnet32x4_cifar100_kd_r:0.1_a:0.9_b:0.0_1
  mdistill import save/.../S:resnet8_T:resnet56_cifar100_hint_... --method fitnet   a name that is not ours
  mdistill import output/cifar100_baselines/kd,res56,res20 --evaluate   measure its students on the test split

{common.EXIT_CODES}"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("import", DESCRIPTION, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=common.path, metavar="RUN", help="a run's folder, or its log")
    parser.add_argument("--method", help="a method as we call it (default: as the folder's name says)")
    parser.add_argument("--label", help="name of its row; a method that we do not have needs one")
    parser.add_argument("--teacher", help="a network as we call it; none: a network alone")
    parser.add_argument("--student", help="a network as we call it")
    parser.add_argument("--dataset", help="(default: as the folder says, else cifar100)")
    parser.add_argument("--trial", help="what sets it apart from other runs of its kind (default: as the folder says)")
    parser.add_argument("--source", help="who published it, for the row (default: the project)")
    parser.add_argument(
        "--evaluate", action="store_true", help="also measure its students, which replaces what it says"
    )
    results = common.project_root() / "results"
    parser.add_argument("--results", type=common.path, default=results, help="folder of published records (results)")
    return parser.parse_intermixed_args(arguments)


def take(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from mdistill.files import write_text
    from mdistill.reporting.external import FILE, read_external, told

    for run in args.runs:
        external, students = _read(args, run)
        pair = f"{external.teacher}_{external.student}" if external.teacher else external.student
        place = [external.dataset, external.method, pair, external.source, external.settings, external.trial]
        folder = args.results.joinpath("external", *(_folder_name(part) for part in place if part))
        there = read_external(folder) if (folder / FILE).is_file() else None
        if there is not None and not there.files.items() <= external.files.items():
            raise UserError(f"{folder} holds another run: tell them apart with --trial")
        if args.evaluate:
            external = _evaluated(args, external, students, run)
        elif there is not None:
            external = replace(external, measured=there.measured)
        if external.accuracy("last") is None and external.accuracy("best") is None:
            raise UserError(f"{run}: it tells no accuracy; --evaluate measures its students")
        write_text(folder / FILE, external.to_json())
        print(told(external, folder))


def _read(args: argparse.Namespace, run: Path) -> "tuple[External, dict[str, Path]]":
    from mdistill.distillers import DISTILLERS
    from mdistill.files import sha256_of
    from mdistill.models import MODELS
    from mdistill.reporting.external import External, best_of, names_of, network_name, read_folder, settings_of

    found = read_folder(run)
    names = {**names_of(run.resolve()), **settings_of(run)}
    method = args.method or names.get("method")
    if method is None:
        raise UserError(f"{run}: its name does not tell which method it is of: give --method, --student and --teacher")
    if args.label is None:
        known = {name.casefold(): name for name in DISTILLERS.names()}
        if method.casefold() not in known:
            raise UserError(
                f"{run}: {printable(method)!r} is none of our methods{suggestion(method.casefold(), known)} (--method"
                " says which one it is; --label names its row where we have none)"
            )
        method = known[method.casefold()]
    networks = {}
    for role in ("teacher", "student"):
        given = getattr(args, role) or names.get(role)
        if given is None and role == "student":
            raise UserError(f"{run}: its name does not tell its student: give --student")
        own = given is None or given.casefold() == "none"
        networks[role] = "" if own else MODELS.canonical(network_name(str(given)), f"--{role} of {run}")
    last = found.epochs[-1] if found.epochs else found.last
    best = best_of(found.epochs) or found.best
    ends = [each.epoch for each in (last, best) if each is not None]
    external = External(
        found.project,
        args.source or found.project,
        args.dataset or names.get("dataset", "cifar100"),
        method,
        networks["teacher"],
        networks["student"],
        args.trial or names.get("trial", "/".join(run.resolve().parts[-2:])),
        max(ends, default=0),
        last,
        best,
        {path.name: sha256_of(path) for path in found.files},
        args.label or "",
        settings=printable(names.get("settings", ""), 200),
    )
    return external, found.students


def _evaluated(args: argparse.Namespace, external: "External", students: "dict[str, Path]", run: Path) -> "External":
    from dataclasses import replace

    from mdistill.data import DATASETS
    from mdistill.engine.build import build_network, pick_device
    from mdistill.engine.evaluate import evaluate
    from mdistill.models.memory_format import move
    from mdistill.models.weights import load_weights
    from mdistill.precision import set_numerics
    from mdistill.reporting.external import Measured

    if not students:
        raise UserError(f"{run}: --evaluate: there are no students in it")
    device = pick_device(args.device)
    dataset = DATASETS.build(external.dataset, args.data_root, args.download, where="--dataset")
    set_numerics("fp32", deterministic=False)
    measured: dict[str, Measured] = {}
    for epoch, path in students.items():
        network = build_network("--student", external.student, {}, dataset.info(1), seed=0)
        record = load_weights(network, path, name=external.student, role="student")
        move(network, device, "fp32")
        top1 = evaluate(network, dataset.to(device), "test", batch_size=None, precision="fp32").top1
        measured[epoch] = Measured(file=path.name, sha256=record.sha256, top1=top1)
    return replace(external, measured=measured)


def _folder_name(text: str) -> str:
    return "".join(each if each.isalnum() or each in "._-+," else "-" for each in text)[:100].strip(".") or "-"


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(take, parse, arguments)
