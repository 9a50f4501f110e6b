"""``mdistill eval``: accuracy, loss and calibration of a trained network, and how near it is to its teacher."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mdistill.cli import common
from mdistill.errors import UserError, printable
from mdistill.files import atomic_write
from mdistill.reporting.tables import text_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mdistill.config import Config
    from mdistill.data import Dataset
    from mdistill.engine.evaluate import Evaluation
    from mdistill.engine.fidelity import Observer

DESCRIPTION = """Evaluate a run folder, one of its checkpoints, or any checkpoint of a known network.

A run folder, and a student.pt, ema.pt, average.pt or last.pt in one, says by itself which network and data it was
trained on; for any other file name the network with --model. --teacher compares its predictions with those of the run's
teacher: the share of images for which both predict the same class, and the mean KL(teacher || student)."""

EXAMPLES = """  mdistill eval runs/cifar100/mcld/resnet32x4_resnet8x4/seed0
  mdistill eval runs/cifar100/mcld/resnet32x4_resnet8x4/seed0/last.pt --json
  mdistill eval --model resnet32x4 --weights checkpoints/cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth
  mdistill eval runs/cifar100/mcld/resnet32x4_resnet8x4/seed0 --teacher --per-class --predictions out.npz
  mdistill eval --model resnet8x4 --weights w.pth --teacher-model resnet32x4 --teacher-weights teacher.pth
  mdistill eval --model torchvision/resnet18 --weights w.pth --data '{name: folder, root: photos, image_size: 128}'"""

Precision = Literal["fp32", "tf32"]
"""What a network is evaluated in: float32, whatever it was trained in."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("eval", DESCRIPTION, EXAMPLES)
    parser.add_argument("run", type=common.path, nargs="?", help="a run folder or a checkpoint in one")
    parser.add_argument("--weights", type=common.path, help="a checkpoint that stands alone; needs --model")
    parser.add_argument("--model", help="the network that --weights belong to, with its default settings")
    parser.add_argument("--role", choices=["student", "teacher"], help="whose, if a file has both")
    parser.add_argument(
        "--data",
        default="cifar100",
        help="the data set for --weights (%(default)s), or as in a configuration: '{name: folder, root: photos}'",
    )
    parser.add_argument("--split", default="test", help="test, or val where the run held images out (%(default)s)")
    parser.add_argument("--batch-size", type=int, help="images per forward pass (default: what suits the device)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="float32 arithmetic, with TF32 units where a GPU has them or without (default: fp32 if the run had that)",
    )
    beside = parser.add_argument_group("beside accuracy, loss and calibration")
    beside.add_argument("--teacher", action="store_true", help="compare with the teacher of the run")
    beside.add_argument("--teacher-model", help="compare with this network; needs --teacher-weights")
    beside.add_argument("--teacher-weights", type=common.path, help="its checkpoint")
    common.add_checkpoint_root(beside)
    beside.add_argument("--per-class", action="store_true", help="top-1 of each class")
    beside.add_argument(
        "--predictions",
        type=common.path,
        metavar="OUT.npz",
        help="write logits, labels and names of classes; replaces it",
    )
    common.add_recorded_code(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    return parser.parse_intermixed_args(arguments)


@dataclass
class Subject:
    """What is evaluated."""

    name: str
    network: "nn.Module"  # its weights are still to be loaded
    weights: Path
    dataset: "Dataset"
    precision: Precision = "tf32"
    note: str | None = None  # what a reader of the figures must know
    teacher: "Teacher | None" = None


@dataclass
class Teacher:
    """What it is compared with."""

    name: str
    network: "nn.Module"  # with its weights


def find_subject(args: argparse.Namespace) -> Subject:
    """What the command line means."""
    if (args.run is None) == (args.weights is None):
        raise UserError("name one thing to evaluate: a run folder, a checkpoint in one, or --model NAME --weights FILE")
    if (args.teacher_model is None) != (args.teacher_weights is None):
        raise UserError("--teacher-model NAME and --teacher-weights FILE go together")
    if args.teacher and args.teacher_model is not None:
        raise UserError("--teacher is the teacher of the run, and --teacher-model another one; give one of them")
    if args.run is None:
        if args.teacher:
            raise UserError("--teacher goes with a run folder; give --teacher-model NAME --teacher-weights FILE")
        return _lone_checkpoint(args)
    if args.model is not None or args.role is not None or args.data != "cifar100":
        raise UserError(f"--model, --role and --data go with --weights; {args.run} says itself what it is")
    return _of_run(args)


def _lone_checkpoint(args: argparse.Namespace) -> Subject:
    from mdistill import config
    from mdistill.data import DATASETS
    from mdistill.engine.build import build_network
    from mdistill.user_code import import_user_module

    if args.model is None:
        raise UserError(f"--weights {args.weights} needs --model, the network that it belongs to")
    for module in args.imports:
        import_user_module(module, [Path.cwd()])
    section = config.inline_section(args.data, "--data")
    dataset = DATASETS.build(section.pop("name"), args.data_root, args.download, where="--data", **section)
    network = build_network("--model", args.model, {}, dataset.info(1), seed=0)
    return Subject(args.model, network, args.weights, dataset, teacher=_other_teacher(args, dataset))


def _other_teacher(args: argparse.Namespace, dataset: "Dataset") -> Teacher | None:
    """The one that --teacher-model and --teacher-weights name."""
    from mdistill.engine.build import build_network
    from mdistill.models.weights import load_weights

    if args.teacher_model is None:
        return None
    network = build_network("--teacher-model", args.teacher_model, {}, dataset.info(1), seed=0)
    load_weights(network, args.teacher_weights, name=args.teacher_model, role="teacher")
    return Teacher(args.teacher_model, network)


def _own_teacher(args: argparse.Namespace, settings: "Config", dataset: "Dataset", folder: Path) -> Teacher:
    """The one that the run in ``folder`` had.

    Raises:
        UserError: it had none; the weights are not there, or others than the run had.
    """
    from mdistill.reporting.outputs import teacher_of_run

    if settings.teacher is None:
        raise UserError(f"--teacher: the run in {folder} has none; give --teacher-model NAME --teacher-weights FILE")
    network = teacher_of_run(settings, folder, dataset.info(settings.data.batch_size), args.checkpoint_root)
    return Teacher("+".join(member.name for member in settings.teacher.members), network)


def _of_run(args: argparse.Namespace) -> Subject:
    from mdistill.engine.build import UNCALIBRATED, build_dataset, build_students

    recorded = (args.run if args.run.is_dir() else args.run.parent) / "config.yaml"
    if not args.run.exists():
        raise UserError(f"no run folder or checkpoint at {args.run}")
    if not recorded.is_file():
        raise UserError(f"{args.run}: no {recorded.name} in its folder; give --model NAME --weights {args.run}")
    settings = common.recorded_config(args, recorded.parent)
    dataset = build_dataset(settings, data_root=args.data_root, download=args.download)
    students = build_students(settings, dataset.info(settings.data.batch_size))
    headline = next(iter(students.values()))  # averages of its weights have its network
    return Subject(
        settings.student.name,
        students.get(args.run.stem, headline),
        args.run,
        dataset,
        "fp32" if settings.run.precision == "fp32" else "tf32",
        UNCALIBRATED if settings.distiller.arguments["ce_weight"] == 0 else None,
        _own_teacher(args, settings, dataset, recorded.parent) if args.teacher else _other_teacher(args, dataset),
    )


def run_eval(args: argparse.Namespace) -> None:
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size: should be at least 1, found {args.batch_size}")
    if args.predictions is not None and (args.predictions.suffix != ".npz" or args.predictions.is_dir()):
        raise UserError(f"--predictions: should be a file whose name ends in .npz, found {args.predictions}")
    from mdistill.engine.build import pick_device
    from mdistill.engine.evaluate import evaluate
    from mdistill.engine.fidelity import Observer
    from mdistill.models.memory_format import move
    from mdistill.models.weights import load_weights
    from mdistill.precision import set_numerics

    device = pick_device(args.device)
    subject = find_subject(args)
    if args.split not in subject.dataset.splits:
        raise UserError(f"--split: no split {args.split!r} here (there is: {', '.join(subject.dataset.splits)})")
    record = load_weights(subject.network, subject.weights, name=subject.name, role=args.role or "student")
    if record.note:
        print(f"note: {subject.weights} {record.note}", file=sys.stderr)
    precision = args.precision or subject.precision
    set_numerics(precision, deterministic=False)
    move(subject.network, device, precision)
    info = subject.dataset.info(1)
    teacher = None if subject.teacher is None else frozen(subject.teacher.network, device, precision)
    observer = Observer(info.num_classes, device, teacher=teacher, keep=args.predictions is not None)
    result = evaluate(
        subject.network,
        subject.dataset.to(device),
        args.split,
        batch_size=args.batch_size,
        precision=precision,
        observe=observer,
    )
    if args.predictions is not None:
        write_predictions(args.predictions, {**observer.arrays(), "names": info.class_names})
    if args.json:
        line = {"model": subject.name, "weights": str(subject.weights), "sha256": record.sha256, "split": args.split}
        print(json.dumps(line | as_dict(subject, result, observer, info.class_names, per_class=args.per_class)))
        return
    print("\n".join(lines_of(subject, args.split, result, observer, info.class_names, per_class=args.per_class)))


def frozen(network: "nn.Module", device: "torch.device", precision: Precision) -> "Callable[[Tensor], Tensor]":
    """A teacher's ``network`` as a function from images to logits, in eval mode."""
    from mdistill.models.memory_format import move, to_layout
    from mdistill.precision import computing

    move(network, device, precision)
    network.eval().requires_grad_(False)

    def logits(image: "Tensor") -> "Tensor":
        with computing(precision, image.device):
            found: Tensor = network(to_layout(network, image))
        return found

    return logits


def write_predictions(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write ``arrays`` by name as a NumPy archive, all or nothing.

    Raises:
        RunFailed: the disk is full or the folder is not writable.
    """
    import numpy

    converted: dict[str, Any] = {name: numpy.asarray(values) for name, values in arrays.items()}
    converted["names"] = converted["names"].astype(str)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        numpy.savez(file, **converted)


def as_dict(
    subject: Subject, result: "Evaluation", observer: "Observer", names: Sequence[str], *, per_class: bool
) -> dict[str, Any]:
    """What an evaluation found, for JSON; ``ece`` and shares are in percent, ``kl`` in nats."""
    from mdistill.engine.fidelity import calibration_error

    found: dict[str, Any] = {**result.as_dict(), "ece": 100.0 * calibration_error(observer.calibration)}
    found["calibration"] = [
        {"images": int(images), "confidence": 100.0 * confidence / images, "top1": 100.0 * right / images}
        if images
        else {"images": 0}
        for images, confidence, right in observer.calibration.T.tolist()
    ]
    against = observer.against_teacher()
    if subject.teacher is not None and against is not None:
        told = {"model": subject.teacher.name, "top1": against.top1}
        found["teacher"] = told | {"agreement": against.agreement, "kl": against.divergence}
    if per_class:
        found["per_class"] = [
            {"class": number, "name": name, "images": images, "top1": top1}
            for number, name, images, top1 in class_rows(observer, names)
        ]
    return found | ({"note": subject.note} if subject.note else {})


def class_rows(observer: "Observer", names: Sequence[str]) -> list[tuple[int, str, int, float | None]]:
    """Number, name, images and top-1 in percent (None where there is no image) of each class."""
    counts = observer.classes.T.tolist()
    return [
        (number, names[number] if names else str(number), int(images), 100.0 * right / images if images else None)
        for number, (images, right) in enumerate(counts)
    ]


def lines_of(
    subject: Subject, split: str, result: "Evaluation", observer: "Observer", names: Sequence[str], *, per_class: bool
) -> Iterator[str]:
    """What a person reads."""
    from mdistill.engine.fidelity import calibration_error

    yield (
        f"{subject.name}  {split} ({result.images} images)  top-1 {result.top1:.2f}  top-5 {result.top5:.2f}"
        f"  loss {result.loss:.4f}  ECE {100.0 * calibration_error(observer.calibration):.2f}"
        f"  {result.images_per_second:.0f} images/s"
    )
    against = observer.against_teacher()
    if subject.teacher is not None and against is not None:
        yield (
            f"teacher {subject.teacher.name}  top-1 {against.top1:.2f}  agreement {against.agreement:.2f}"
            f"  KL(teacher || student) {against.divergence:.4f}"
        )
    if subject.note:
        yield f"note: {subject.note}"
    if per_class:
        rows = [
            [printable(name), str(images), "" if top1 is None else f"{top1:.2f}"]
            for _, name, images, top1 in class_rows(observer, names)
        ]
        yield text_table(["class", "images", "top-1"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(run_eval, parse, arguments)
