"""From a configuration to the objects of a run, each checked before anything is written."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistill.config import Config, MemberConfig, TeacherConfig
from mdistill.data import DATASETS, Batch, DataInfo, Dataset
from mdistill.data.sampling import derive_seed
from mdistill.distillers import DISTILLERS, Distiller
from mdistill.engine.cuda_graph import choose_engine
from mdistill.engine.evaluate import evaluate
from mdistill.engine.teacher import KEPT, FrozenTeacher
from mdistill.engine.teacher_cache import NoRoom, TeacherTable
from mdistill.errors import UserError
from mdistill.models import MODELS
from mdistill.models.ensemble import Ensemble
from mdistill.models.teachers import locate, verify_top1
from mdistill.models.weights import fingerprint, load_weights
from mdistill.optim.solvers import SOLVERS, Solver
from mdistill.precision import Precision, require_precision, set_numerics

UNCALIBRATED = "trained without cross-entropy: the scale of its logits is free and its test loss not comparable"


@dataclass
class Trial:
    """One seed of a configuration: its own student, method state and optimiser."""

    config: Config
    distiller: Distiller
    solver: Solver


@dataclass
class Experiment:
    """Everything that ``fit`` needs, on its device: trials that differ in their seed alone, and what they share."""

    trials: list[Trial]
    dataset: Dataset
    device: torch.device
    fingerprints: dict[str, str]  # SHA-256 of the data and of the teacher's weights, which a resumed run must share
    facts: dict[str, Any] = field(default_factory=dict)  # for env.json
    teacher: FrozenTeacher | None = None  # where the engine asks the teacher itself
    table: TeacherTable | None = None  # its answers, kept between runs
    teacher_note: str = ""  # which of these it is, and why


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``; CUDA if there is one, else the CPU, when None.

    Raises:
        UserError: not a device, or one that this machine lacks.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        raise UserError(f"--device: unknown device {name!r} (allowed: cpu, cuda, cuda:N)")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            raise UserError(f"--device: {name} asked for, but this machine has {count} usable CUDA devices; use cpu")
    return device


def build_dataset(config: Config, *, data_root: Path, download: bool) -> Dataset:
    """The configured data set, with its hold-out."""
    dataset = DATASETS.build(config.data.name, data_root, download, where="data", **config.data.arguments)
    return dataset.hold_out(config.data.holdout)


def build_network(section: str, name: str, arguments: Mapping[str, Any], info: DataInfo, *, seed: int) -> nn.Module:
    """A network with initial weights fixed by (seed, section), in channels-last layout, checked on two blank images.

    Raises:
        UserError: its output is not (B, num_classes).
    """
    with _seeded(seed, section):
        network = MODELS.build(name, info.num_classes, where=section, **arguments)
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with torch.no_grad():
        output = network.eval()(torch.zeros(2, 3, info.image_size, info.image_size, device=device))
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (2, info.num_classes):
        raise UserError(
            f"{section}.name: {name!r} turns 2 images into an output of shape {shape};"
            f" the data set has {info.num_classes} classes, so it should be (2, {info.num_classes})"
        )
    return network.train().to(memory_format=torch.channels_last)


def build_teacher(config: Config, info: DataInfo) -> nn.Module | None:
    """The teacher's network, or several as one, with initial weights; None when the configuration has none."""
    if config.teacher is None:
        return None
    members = [
        build_network(section, member.name, member.arguments, info, seed=config.seed)
        for section, member in _members_of(config.teacher)
    ]
    return members[0] if len(members) == 1 else Ensemble(members, config.teacher.average)


def build_distiller(config: Config, info: DataInfo, teacher: nn.Module | None) -> Distiller:
    """Student (initial weights) and method around ``teacher``, on torch's default device."""
    needs = DISTILLERS.get(config.distiller.name).needs  # type: ignore[attr-defined]
    if needs.views > 1 and not info.strong_views:
        raise UserError(
            f"distiller.name: {config.distiller.name!r} needs a second, strongly augmented view of each image and the"
            f" data set {config.data.name!r} gives one view"
        )
    if config.data.mixing is not None and needs.labels == "hard":
        raise UserError(
            f"data.mixing: {config.data.mixing.name!r} gives an image shares of two classes and the method"
            f" {config.distiller.name!r} needs one class an image; remove data.mixing or take another method"
        )
    if config.data.mixing is not None and needs.views > 1:
        raise UserError(
            f"data.mixing: images are mixed in one view and the method {config.distiller.name!r} needs two;"
            " remove data.mixing or take another method"
        )
    if needs.teacher == "features" and isinstance(teacher, Ensemble):
        raise UserError(
            f"teacher.ensemble: the method {config.distiller.name!r} reads the teacher's features, and several networks"
            " share none; remove teacher.ensemble or take another method"
        )
    student = build_network("student", config.student.name, config.student.arguments, info, seed=config.seed)
    for section, network, features in (
        ("student", student, needs.student_features),
        ("teacher", teacher, needs.teacher == "features"),
    ):
        if features and network is not None and not hasattr(network, "forward_features"):
            name = getattr(config, section).name
            raise UserError(
                f"{section}.name: {config.distiller.name!r} reads features and {name!r} has no forward_features"
            )
    with _seeded(config.seed, "distiller"):
        return DISTILLERS.build(
            config.distiller.name, student, teacher, info, where="distiller", **config.distiller.arguments
        )


def build(
    configs: Sequence[Config],
    device: torch.device,
    *,
    data_root: Path,
    checkpoint_root: Path,
    output_root: Path,
    cache_root: Path | None = None,
    download: bool = False,
    check_teacher: bool = True,
) -> Experiment:
    """Data, networks with the teacher's weights, methods and solvers.

    Args:
        configs: one for each trial; they differ in ``seed`` alone.
        cache_root: folder of the tables of teacher logits; None keeps none.
        check_teacher: compare the teacher's accuracy with ``teacher.expected_top1``; what was measured once is
            remembered under ``output_root``.

    Raises:
        UserError: anything in the configuration, the data, the teacher's file or its table that does not fit.
    """
    config, run = configs[0], configs[0].run
    teacher_precision = run.teacher_precision or run.precision
    require_precision(run.precision, device, "run.precision")
    require_precision(teacher_precision, device, "run.teacher_precision")
    choose_engine(run.engine, device)
    set_numerics(run.precision, deterministic=run.deterministic)
    sources = [  # before the data: the quickest check first
        locate(member.checkpoint, checkpoint_root, model=member.name, dataset=config.data.name, section=section)
        for section, member in (_members_of(config.teacher) if config.teacher is not None else ())
    ]
    dataset = build_dataset(config, data_root=data_root, download=download)
    info = dataset.info(config.data.batch_size)
    teacher = build_teacher(config, info)
    distillers = [build_distiller(each, info, teacher) for each in configs]
    fingerprints = {"data": dataset.fingerprint()}
    facts: dict[str, Any] = {"data": {"fingerprint": fingerprints["data"], "notes": list(dataset.notes)}}
    prints = []
    if config.teacher is not None and teacher is not None:
        for network, member, source in zip(_members(teacher), config.teacher.members, sources, strict=True):
            load_weights(network, source, name=member.name, role="teacher")
            prints.append(fingerprint(network.state_dict()))
        fingerprints["teacher"] = prints[0] if len(prints) == 1 else _joined(prints, config.teacher.average)
        facts["teacher"] = {"path": " + ".join(map(str, sources)), "fingerprint": fingerprints["teacher"]}
    if not distillers[0].fits_labels:
        facts["loss"] = UNCALIBRATED
    dataset = dataset.to(device)
    trials = []
    for each, distiller in zip(configs, distillers, strict=True):
        distiller = distiller.to(device)
        distiller.student_precision, distiller.teacher_precision = run.precision, teacher_precision
        solver = SOLVERS.build(each.solver.name, distiller.param_groups(), where="solver", **each.solver.arguments)
        if run.engine == "compile" and solver.backward_passes > 1:
            raise UserError(
                "run.engine: what is compiled allows one backward pass a step and the solver"
                f" {each.solver.name!r} takes {solver.backward_passes}; use auto, eager or graph"
            )
        _try_solver(solver, distiller, info)
        trials.append(Trial(each, distiller, solver))
    experiment = Experiment(trials, dataset, device, fingerprints, facts)
    if config.teacher is not None and teacher is not None:
        if check_teacher:
            batch_size = config.data.eval_batch_size
            measured = [
                verify_top1(
                    member.expected_top1,
                    partial(_top1, network, dataset, batch_size, teacher_precision),
                    key=f"{weights}:{fingerprints['data']}",
                    memory=output_root / "teachers.json",
                    teacher=str(source),
                    where=config.data.name,
                    section=section,
                )
                for (section, member), network, source, weights in zip(
                    _members_of(config.teacher), _members(teacher), sources, prints, strict=True
                )
            ]
            facts["teacher"]["top1"] = measured[0] if len(measured) == 1 else measured
        _ask_teacher(experiment, teacher, cache_root)
    return experiment


def _members_of(teacher: TeacherConfig) -> list[tuple[str, MemberConfig]]:
    """A teacher's networks, each with where it stands in the configuration."""
    further = [(f"teacher.ensemble.{number}", member) for number, member in enumerate(teacher.ensemble)]
    return [("teacher", teacher), *further]


def _members(teacher: nn.Module) -> list[nn.Module]:
    return list(teacher.members) if isinstance(teacher, Ensemble) else [teacher]


def _joined(fingerprints: Sequence[str], average: str) -> str:
    """One fingerprint of several networks and what is averaged over them."""
    return hashlib.sha256(" ".join([average, *fingerprints]).encode()).hexdigest()


def _top1(network: nn.Module, dataset: Dataset, batch_size: int | None, precision: Precision) -> float:
    return evaluate(network, dataset, "test", batch_size=batch_size, precision=precision).top1


@torch.no_grad()
def _try_solver(solver: Solver, distiller: Distiller, info: DataInfo) -> None:
    """Show a solver that asks something of a loss which terms the method has, on two blank images in eval mode."""
    if type(solver).check is Solver.check:
        return
    drawn = {name: generator.get_state() for name, generator in distiller.generators.items()}
    device = next(distiller.student.parameters()).device
    image = torch.zeros(2, 3, info.image_size, info.image_size, device=device)
    number = torch.arange(2, device=device)
    strong = image if distiller.needs.views > 1 else None
    distiller.eval()
    solver.check(distiller(Batch(image, number, number, number, strong_image=strong), torch.ones((), device=device)))
    distiller.train()
    for name, generator in distiller.generators.items():
        generator.set_state(drawn[name])


def _ask_teacher(it: Experiment, teacher: nn.Module, cache_root: Path | None) -> None:
    """Let the engine ask the teacher ahead of the steps, through a table, where the method leaves room for that."""
    config, needs = it.trials[0].config, it.trials[0].distiller.needs
    if needs.teacher != "logits":
        it.teacher_note = "runs in every step: this method reads more of it than its logits"
        return
    if config.data.mixing is not None:
        it.teacher_note = "runs in every step: images are mixed"
        return
    it.teacher = FrozenTeacher(teacher, it.device, config.run.teacher_precision or config.run.precision)
    if it.dataset.num_views is None:
        it.teacher_note = "runs on every image: the views of this data set cannot be enumerated"
        return
    if cache_root is None:
        it.teacher_note = "runs on every image: no cache was asked for"
        return
    try:
        it.table = open_table(it, cache_root)
    except NoRoom as error:
        it.teacher_note = f"runs on every image, without a cache: {error}"
        return
    it.facts["teacher"]["table"] = str(it.table.path)
    it.teacher_note = (
        f"logits come from {it.table.path} ({config.run.teacher_logits}, {100 * it.table.filled / it.table.rows:.1f} %"
        f" of {it.table.rows:,} rows there), an epoch's at a time in {it.device.type} memory; missing ones are computed"
        f"{'; those of the strong views in every step' if needs.views > 1 else ''}"
    )


def open_table(it: Experiment, cache_root: Path) -> TeacherTable:
    """The table of ``it.teacher``'s logits under ``cache_root``, made if it is not there.

    Raises:
        UserError: what is there is another table or damaged, or the folder cannot be written.
        NoRoom: the disk has no space for it.
    """
    assert it.teacher is not None
    assert it.dataset.num_views is not None
    identity = {"weights": it.fingerprints["teacher"], "data": it.fingerprints["data"], **it.teacher.identity()}
    return TeacherTable.open(
        cache_root,
        identity,
        rows=it.dataset.num_samples * it.dataset.num_views,
        classes=it.dataset.num_classes,
        dtype=KEPT[it.trials[0].config.run.teacher_logits],
    )


@contextmanager
def _seeded(seed: int, stream: str) -> Iterator[None]:
    """Draw from a generator of (seed, stream); torch's global one is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, stream))
        yield
