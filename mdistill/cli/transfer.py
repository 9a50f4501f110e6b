"""``mdistill transfer``: a linear classifier on the frozen features of a trained student, on another data set."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mdistill.cli import common
from mdistill.cli.eval import Precision, Subject, find_subject
from mdistill.errors import RunFailed, UserError, shown, suggestion
from mdistill.reporting.transfers import begun, is_done, path_of, write_transfer

if TYPE_CHECKING:
    import torch

    from mdistill.data import InMemoryDataset
    from mdistill.data.targets import Images, Target
    from mdistill.file_schemas import TransferRecord, TransferSettings
    from mdistill.reporting.records import Record

DESCRIPTION = """Freeze a trained student, compute the features before its classifier once for every image of another
data set, and train a linear classifier on them. What it reaches on that data set's test images after the last epoch
goes into the run folder, as transfer/<target>.json, and from there into tables.

key=value sets how: epochs, batch_size, lr, milestones, gamma, momentum, nesterov, weight_decay, standardize, mirror,
image_size, resize, normalize. docs/transfer.md says what they mean and where the defaults come from."""

EXAMPLES = """  mdistill transfer runs/cifar100/mcld/resnet32x4_resnet8x4/seed0 --target stl10 --download
  mdistill transfer runs/cifar100/mcld/resnet32x4_resnet8x4/seed* --target tiny_imagenet
  mdistill transfer runs/cifar100/kd/resnet56_resnet20/seed0 --target folder:photos epochs=50 lr=0.05
  mdistill transfer --table mcld_table8                      every complete run of a table, to every target it names
  mdistill transfer --model resnet20 --weights w.pth --target tiny_imagenet --record transfer.json"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("transfer", DESCRIPTION, EXAMPLES)
    parser.add_argument("items", nargs="*", metavar="RUN|key=value", help="run folders, and settings")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="stl10|tiny_imagenet|folder:PATH",
        help="the data set; may be given several times (the first two may have :PATH too)",
    )
    parser.add_argument("--seed", type=int, help="of the order of images (default: the run's, else 0)")
    parser.add_argument("--batch-size", type=int, help="images per forward pass (default: what suits the device)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="of the student: float32, with TF32 units where a GPU has them or without (default: as mdistill eval)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object for each result instead of a line")
    table = parser.add_argument_group("the runs of a table")
    table.add_argument("--table", help="a name in configs/tables, or a table file")
    table.add_argument("--output", type=common.path, default=Path("runs"), help="folder of its runs (%(default)s)")
    common.add_part(table)
    table.add_argument("--epochs", type=int, metavar="N", help="of runs whose schedules were shortened to N epochs")
    alone = parser.add_argument_group("a checkpoint that stands alone")
    alone.add_argument("--weights", type=common.path, help="its file; needs --model")
    alone.add_argument("--model", help="the network that --weights belong to, with its default settings")
    alone.add_argument("--role", choices=["student", "teacher"], help="whose, if a file has both")
    alone.add_argument("--data", default="cifar100", help="what it was trained on (%(default)s); as in mdistill eval")
    alone.add_argument("--record", type=common.path, metavar="OUT.json", help="write what came of it; replaces it")
    common.add_recorded_code(parser)
    args = parser.parse_intermixed_args(arguments)
    args.teacher, args.teacher_model, args.teacher_weights = False, None, None  # which ``find_subject`` asks for
    return args


@dataclass
class _Targets:
    """Targets that were read, and their images normalised."""

    args: argparse.Namespace
    device: "torch.device"
    images: "dict[tuple[Any, ...], Images]" = field(default_factory=dict)
    datasets: "dict[tuple[Any, ...], InMemoryDataset]" = field(default_factory=dict)
    fingerprints: dict[int, str] = field(default_factory=dict)

    def dataset(
        self, target: "Target", settings: "TransferSettings", subject: Subject
    ) -> "tuple[InMemoryDataset, Sequence[str]]":
        """On the device, normalised as ``settings`` say; and what there is to tell of it, once."""
        from mdistill.data.targets import load_target

        key = (target, settings.image_size, settings.resize)
        if key not in self.images:
            self.images[key] = load_target(
                target,
                self.args.data_root,
                download=self.args.download,
                size=settings.image_size,
                by=settings.resize,
            )
        images = self.images[key]
        statistics = self._statistics(images, settings, subject)
        dataset = self.datasets.get((key, statistics))
        if dataset is not None:
            return dataset, ()
        self.datasets[key, statistics] = images.normalized(*statistics).to(self.device)
        return self.datasets[key, statistics], images.notes

    def fingerprint(self, dataset: "InMemoryDataset") -> str:
        """Of ``dataset``, which takes a while, once."""
        if id(dataset) not in self.fingerprints:
            self.fingerprints[id(dataset)] = dataset.fingerprint()
        return self.fingerprints[id(dataset)]

    def _statistics(
        self, images: "Images", settings: "TransferSettings", subject: Subject
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        from mdistill.data.targets import FIXED

        if settings.normalize == "target":
            return images.statistics
        if settings.normalize in FIXED:
            return FIXED[settings.normalize]
        info = subject.dataset.info(1)
        if not (info.mean and info.std):
            raise UserError(
                "normalize: the student's data set does not say its mean and std (attributes of these names); give"
                " normalize=target"
            )
        return tuple(info.mean), tuple(info.std)


def run_transfer(args: argparse.Namespace) -> None:
    for flag, value in (("--batch-size", args.batch_size), ("--epochs", args.epochs)):
        if value is not None and value < 1:
            raise UserError(f"{flag}: should be at least 1, found {value}")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: should be from 0 to 2**63 - 1, found {args.seed}")
    runs, settings = _apart(args.items)
    if sum(bool(each) for each in (runs, args.table, args.weights)) != 1:
        raise UserError("name one thing to transfer: run folders, --table NAME, or --model NAME --weights FILE")
    if args.table is None:
        given = {"--methods": args.methods, "--pairs": args.pairs, "--seeds": args.seeds, "--epochs": args.epochs}
        stray = next((flag for flag, value in given.items() if value is not None), None)
        if stray is not None:
            raise UserError(f"{stray} goes with --table")
        if not args.target:
            raise UserError("--target: name a data set: stl10, tiny_imagenet or folder:PATH")
        targets = _targets(args.target)
        if args.record is not None and (len(runs) > 1 or len(targets) > 1):
            raise UserError("--record is one file: name one checkpoint and one --target")
        students: list[Path | None] = [*runs] or [None]
        _transfer_all(args, [(run, targets) for run in students], _settings(settings))
    elif settings or args.seed is not None or args.record is not None:
        what = settings[0] if settings else "--seed" if args.seed is not None else "--record"
        raise UserError(f"{what} does not go with --table: settings of a table stand in its file, under transfer:")
    else:
        _of_table(args)


def _apart(items: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Run folders and ``key=value``; what is there is a run folder."""
    runs = [item for item in items if "=" not in item or Path(item).exists()]
    return [common.path(item) for item in runs], [item for item in items if item not in runs]


def _targets(texts: Sequence[str]) -> "dict[str, Target]":
    """By name."""
    from mdistill.data.targets import parse_target

    found: dict[str, Target] = {}
    for text in texts:
        target = parse_target(text)
        if target.name in found:
            raise UserError(f"--target: {text} has the name {target.name}, as another one has; give one of them")
        found[target.name] = target
    return found


def _settings(given: Sequence[str]) -> "TransferSettings":
    """What ``key=value`` says, and the defaults.

    Raises:
        UserError: a key or a value is none.
    """
    from pydantic import ValidationError

    from mdistill.config.files import yaml_value
    from mdistill.file_schemas import TransferSettings
    from mdistill.registry import problem_lines

    known, values = tuple(TransferSettings.model_fields), dict[str, Any]()
    for text in given:
        key, _, value = text.partition("=")
        if key not in known:
            raise UserError(f"unknown setting {shown(key)}{suggestion(key, known)} (known: {', '.join(known)})")
        values[key] = yaml_value(value, text)
    try:
        return TransferSettings.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(problem_lines(error))) from None


def _of_table(args: argparse.Namespace) -> None:
    """Every complete run of a table, to every target; what is there already stays."""
    from mdistill.file_schemas import TransferSettings
    from mdistill.reporting.records import find_records
    from mdistill.reporting.table_cells import layout

    configs = common.project_root() / "configs"
    whole = layout(args.table, configs, args.output, imports=args.imports, epochs=args.epochs)
    wanted = whole.part(args.methods, args.pairs, args.seeds)
    if not whole.targets:
        raise UserError(f"{args.table}: no metric on a target, such as stl10/top1, among its metrics: nothing to do")
    targets = _targets(args.target or [name for name in whole.targets if not name.startswith("folder-")])
    other = next((name for name in targets if name not in whole.targets), None)
    if other is not None:
        raise UserError(f"--target: {other} is none of this table's (there is: {', '.join(whole.targets)})")
    for name in (name for name in whole.targets if name.startswith("folder-") and name not in targets):
        print(f"{name}: left out; say where it is with --target folder:PATH", file=sys.stderr)
    found = find_records([args.output]).records if args.output.is_dir() else []
    own = [record for record in found if wanted.holds(record)]
    complete = [record for record in own if record.complete and (record.folder / "student.pt").is_file()]
    settings = TransferSettings.model_validate(whole.transfer)
    todo = [(record, [name for name in targets if not is_done(record, name, whole.transfer)]) for record in complete]
    print(
        f"{args.table}: {len(complete)} of {len(wanted.cells) * len(wanted.seeds)} runs are complete below"
        f" {args.output}, {sum(bool(names) for _, names in todo)} of them to be transferred",
        file=sys.stderr,
    )
    _transfer_all(
        args, [(record.folder, {name: targets[name] for name in names}) for record, names in todo if names], settings
    )


def _transfer_all(
    args: argparse.Namespace,
    todo: "Sequence[tuple[Path | None, Mapping[str, Target]]]",
    settings: "TransferSettings",
) -> None:
    """Students and the targets of each; one that fails does not keep the others.

    Raises:
        UserError: the only one failed, by the user's mistake.
        RunFailed: some of several failed.
    """
    from mdistill.engine.build import pick_device

    read = _Targets(args, pick_device(args.device))
    found = [_failure(args, run, targets, settings, read, only=len(todo) == 1) for run, targets in todo]
    failed = [why for why in found if why]
    if failed:
        raise RunFailed(f"{len(failed)} of {len(todo)} failed: {failed[0]}{', ...' if failed[1:] else ''}")


def _failure(
    args: argparse.Namespace,
    run: Path | None,
    targets: "Mapping[str, Target]",
    settings: "TransferSettings",
    read: _Targets,
    *,
    only: bool,
) -> str:
    """Why the student of ``run`` could not be transferred, "" where it was; of the ``only`` one that is raised."""
    try:
        for line in _of_student(args, run, targets, settings, read):
            print(line, flush=True)
    except (UserError, RunFailed) as error:
        if only:
            raise
        why = f"{run}: {str(error).splitlines()[0]}"
        print(f"failed: {why}", file=sys.stderr)
        return why
    return ""


def _of_student(
    args: argparse.Namespace,
    run: Path | None,
    targets: "Mapping[str, Target]",
    settings: "TransferSettings",
    read: _Targets,
) -> Iterator[str]:
    """The student of ``run``, or the file that stands alone, on each target; a line each."""
    from mdistill.models.memory_format import move
    from mdistill.models.weights import load_weights
    from mdistill.precision import set_numerics
    from mdistill.reporting.records import read_record

    own = argparse.Namespace(**{**vars(args), "run": run})
    subject = find_subject(own)
    folder = None if run is None else run if run.is_dir() else run.parent if run.name == "student.pt" else None
    record = None if folder is None else read_record(folder)
    if record is not None and args.record is not None:
        raise UserError(f"--record: what comes of a run goes into its folder, {folder}; leave --record out")
    file = load_weights(subject.network, subject.weights, name=subject.name, role=args.role or "student")
    precision = args.precision or subject.precision
    set_numerics(precision, deterministic=False)
    move(subject.network, read.device, precision)
    for name, target in targets.items():
        dataset, notes = read.dataset(target, settings, subject)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        made = _measure(args, subject, file.sha256, record, name, dataset, settings, precision, read)
        path = args.record if record is None else path_of(record.folder, name)
        if path is not None:
            write_transfer(path, made)
        yield json.dumps(_as_dict(subject, path, made)) if args.json else _line(subject, path, made)


def _measure(
    args: argparse.Namespace,
    subject: Subject,
    sha256: str,
    record: "Record | None",
    target: str,
    dataset: "InMemoryDataset",
    settings: "TransferSettings",
    precision: Precision,
    read: _Targets,
) -> "TransferRecord":
    """Transfer and what there is to say of it."""
    from mdistill import file_schemas
    from mdistill.engine.run_folder import environment
    from mdistill.engine.transfer import LAYER, transfer

    seed = args.seed if args.seed is not None else 0 if record is None else record.seed
    result = transfer(
        subject.network,
        dataset,
        settings,
        seed=seed,
        name=subject.name,
        precision=precision,
        device=read.device,
        batch_size=args.batch_size,
    )
    modules = [] if record is None else [str(each) for each in record.config.get("imports") or ()]
    data = {
        "fingerprint": read.fingerprint(dataset),
        "classes": dataset.num_classes,
        "train_images": dataset.num_samples,
        "test_images": dataset.size("test"),
        "notes": dataset.notes,
    }
    return file_schemas.TransferRecord.model_validate(
        {
            "target": target,
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "train_top1": result.train_top1,
            "settings": settings,
            "seed": seed,
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "precision": precision,
            "feature": {"layer": LAYER, "width": result.width},
            "data": data,
            "student": {"name": subject.name, "file": subject.weights.name, "sha256": sha256},
            "run": None if record is None else {"started": begun(record.folder), "epoch": record.done},
            "seconds": {what: round(seconds, 3) for what, seconds in result.seconds.items()},
            "environment": environment(read.device, {}, modules=modules),
        }
    )


def _as_dict(subject: Subject, path: Path | None, made: "TransferRecord") -> dict[str, Any]:
    """For ``--json``: what the record says of the figures, and where it was written."""
    return {
        "weights": str(subject.weights),
        "record": None if path is None else str(path),
        **made.model_dump(mode="json", exclude={"environment", "format", "run"}),
    }


def _line(subject: Subject, path: Path | None, made: "TransferRecord") -> str:
    """What a person reads."""
    data, where = made.data, f"  {path}" if path is not None else "  (not recorded)"
    return (
        f"{subject.weights} ({subject.name}) to {made.target}: top-1 {made.top1:.2f}  top-5 {made.top5:.2f}"
        f"  loss {made.loss:.4f}  training top-1 {made.train_top1:.2f}  ({data.classes} classes,"
        f" {data.train_images:,} training and {data.test_images:,} test images, {made.feature.width} features,"
        f" {sum(made.seconds.values()):.0f} s){where}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(run_transfer, parse, arguments, when_stopped="what was done is recorded")
