"""From a checked configuration to the objects of a run; every problem is reported before anything is written."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistill import distributed
from mdistill.config import Config, MemberConfig, SolverConfig
from mdistill.data import DATASETS, Batch, DataInfo, Dataset, StreamedDataset
from mdistill.data.sampling import derive_seed
from mdistill.distillers import DISTILLERS, Distiller, Needs, StepOutput
from mdistill.engine.class_distances import ClassDistances
from mdistill.engine.cuda_graph import choose_engine
from mdistill.engine.evaluate import evaluate
from mdistill.engine.logit_cache import LogitCache
from mdistill.engine.logit_formats import LogitFormat, format_of
from mdistill.engine.starting_weights import (
    LoadedTeacher,
    fingerprint_of,
    load_student,
    load_teacher,
    members_of,
    networks_of,
    note_on_images,
    teacher_files,
    weight_files,
)
from mdistill.engine.teacher import FrozenTeacher, count_entries, open_cache
from mdistill.errors import UserError, printable, shown
from mdistill.file_schemas import EXPORT_NAME, TAKEN
from mdistill.models import MODELS, feature_shapes
from mdistill.models.base import why_no_features
from mdistill.models.ensemble import Ensemble
from mdistill.models.memory_format import move
from mdistill.models.preprocessing import Preprocessing, bare, preprocessed
from mdistill.models.pretrained import published_weights
from mdistill.models.teachers import verify_top1
from mdistill.models.torch_files import FileRecord
from mdistill.optim import SOLVERS, Solver
from mdistill.optim.averaging import AveragedNetwork
from mdistill.optim.solvers import without_decay_of_norms
from mdistill.precision import Precision, require_precision, set_numerics
from mdistill.user_code import traceback_of

UNCALIBRATED = "trained without cross-entropy: the scale of its logits is free and its test loss not comparable"


LARGE_STATE = 2**30
"""Bytes that a method keeps beside the networks, from which on a run says so."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a run's epochs with a loss and a solver of its own."""

    name: str | None  # as the method has it; None for the last one
    settings: SolverConfig
    solver: Solver
    terms: tuple[str, ...]  # of its loss, by name
    before: int  # epochs before it

    @property
    def last_epoch(self) -> int:
        """Counted from 1 over all phases."""
        return self.before + self.settings.epochs

    def enter(self, distiller: Distiller) -> None:
        """Set ``distiller`` to it."""
        distiller.enter_phase(self.name, epochs_before=self.before)


@dataclass
class Trial:
    """One seed of a configuration: its own student, method state, optimisers and averages of weights."""

    config: Config
    distiller: Distiller
    phases: list[Phase]  # in order; most methods have the last one alone
    averages: dict[str, AveragedNetwork]  # of the headline student's weights in the last phase, by name

    def phase(self, epoch: int) -> Phase:
        """That of ``epoch``, counted from 1 over all of them."""
        return next((phase for phase in self.phases if epoch <= phase.last_epoch), self.phases[-1])

    @property
    def students(self) -> dict[str, nn.Module]:
        """The networks to evaluate and export; the first is the headline."""
        return {**self.distiller.students(), **{name: average.network for name, average in self.averages.items()}}


@dataclass
class Experiment:
    """Everything that ``fit`` needs, on its device: trials that differ in their seed alone, and what they share."""

    trials: list[Trial]
    dataset: Dataset
    device: torch.device
    fingerprints: dict[str, str]  # SHA-256 of the data and of the teacher's weights, which a resumed run must share
    metadata: dict[str, Any] = field(default_factory=dict)  # for env.json
    teacher: FrozenTeacher | None = None  # where its outputs are computed ahead of the steps
    logit_format: LogitFormat | None = None  # what they are stored as; there with ``teacher``
    cache: LogitCache | None = None  # of its outputs, shared between runs
    teacher_note: str = ""  # which of these it is, and why
    class_distances: ClassDistances | None = None  # where the method asks for them


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
    """The configured data set, with its hold-out; without ``run.evaluate_test`` its test split is not evaluated."""
    dataset = DATASETS.get(config.data.name)(data_root, download, **config.data.arguments)
    dataset = dataset.hold_out(config.data.holdout)
    if not config.run.evaluate_test:
        dataset.splits = tuple(split for split in dataset.splits if split != "test")
    return dataset


def build_network(section: str, name: str, arguments: Mapping[str, Any], info: DataInfo, *, seed: int) -> nn.Module:
    """A network with initial weights fixed by (seed, section), checked on two blank images.

    Raises:
        UserError: its output is not (B, num_classes), or it does not take images of this size.
    """
    with _seeded(seed, section):
        try:
            network = MODELS.build(name, info.num_classes, where=section, **arguments)
        except (RuntimeError, OverflowError) as error:  # of torch, which cannot make a tensor of any size
            if traceback_of(error):
                raise
            reason = printable(" ".join(str(error).split()), 200)
            raise UserError(
                f"{section}.name: {name!r} cannot be built with {shown(dict(arguments))}: {reason}"
            ) from None
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    size = info.image_size
    try:
        with torch.no_grad():
            output = network.eval()(torch.zeros(2, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        if "/" not in name:  # of the user's own, whose frames are shown
            raise
        reason = printable(" ".join(str(error).split()), 200)
        advice = "; set its img_size, if it has one" if name.startswith("timm/") else ""
        raise UserError(
            f"{section}.name: {name!r} does not take images of {size}x{size} pixels: {reason}{advice}"
        ) from error
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (2, info.num_classes):
        raise UserError(
            f"{section}.name: {name!r} turns 2 images into an output of shape {shape};"
            f" the data set has {info.num_classes} classes, so it should be (2, {info.num_classes})"
        )
    return network.train()


def build_teacher(config: Config, info: DataInfo) -> nn.Module | None:
    """The teacher's network, or several as one, with initial weights; None when the configuration has none."""
    if config.teacher is None:
        return None
    members = []
    for section, member in members_of(config.teacher):
        given, wanted = _preprocessing(section, member, info)
        images = replace(info, image_size=wanted.image_size)
        network = build_network(section, member.name, member.arguments, images, seed=config.seed)
        members.append(preprocessed(network, given, wanted))
    return members[0] if len(members) == 1 else Ensemble(members, config.teacher.average)


def trained_teacher(config: Config, info: DataInfo, checkpoint_root: Path) -> tuple[nn.Module, str]:
    """The teacher of a configuration that has one, with its weights, and the fingerprint of these.

    Raises:
        UserError: its weights are not there, or do not fit.
    """
    assert config.teacher is not None
    sources = teacher_files(config, checkpoint_root)
    teacher = build_teacher(config, info)
    assert teacher is not None
    loaded = load_teacher(config, networks_of(teacher), sources, info.class_names, checkpoint_root)
    return teacher, fingerprint_of(loaded, config.teacher.average)


def _preprocessing(section: str, member: MemberConfig, info: DataInfo) -> tuple[Preprocessing, Preprocessing]:
    """How the data set's images come, and how a teacher's network expects them.

    Raises:
        UserError: it expects another normalisation, and the data set does not say its own.
    """
    published, own = published_weights(member.name, member.checkpoint, section), member.preprocessing
    mean, std = own.mean or (published and published.mean), own.std or (published and published.std)
    size = own.image_size or (published and published.image_size) or info.image_size
    if not (info.mean and info.std) and (mean or std):
        raise UserError(
            f"{section}.preprocessing: {member.name!r} expects images normalised by mean {shown(mean)} and std"
            f" {shown(std)}, and the data set does not say its own mean and std (attributes of these names)"
        )
    given = Preprocessing(info.mean or (0.0, 0.0, 0.0), info.std or (1.0, 1.0, 1.0), info.image_size)
    return given, Preprocessing(mean or given.mean, std or given.std, size)


def build_distiller(
    config: Config, info: DataInfo, teacher: nn.Module | None, *, start: Callable[[nn.Module], object] | None = None
) -> Distiller:
    """Student (initial weights) and method around ``teacher``, on torch's default device.

    Args:
        start: loads the weights that the student begins with.

    Raises:
        UserError: the method needs what the data set, the mixing or a network does not give.
    """
    method = config.distiller.name
    needs: Needs = DISTILLERS.get(method).needs  # type: ignore[attr-defined]
    compares_maps = distances_by(config, needs) == "last_map"
    if (needs.teacher_features or compares_maps) and isinstance(teacher, Ensemble):
        raise UserError(
            f"teacher.ensemble: the method {method!r} reads the teacher's features, and several networks"
            " share none; remove teacher.ensemble or take another method"
        )
    student = build_network("student", config.student.name, config.student.arguments, info, seed=config.seed)
    for section, network, features in (
        ("student", student, needs.student_features),
        ("teacher", teacher, needs.teacher_features or compares_maps),
    ):
        if features and network is not None and (why := why_no_features(network)):
            name = getattr(config, section).name
            has = f"has {why}" if why.startswith("no ") else f"gives none: {why}"
            raise UserError(f"{section}.name: {method!r} reads features and {name!r} {has}")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError(f"student.name: {config.student.name!r} has no trainable parameters")
    if start is not None:
        start(student)
    with _seeded(config.seed, "distiller"):
        distiller = DISTILLERS.get(method)(student, teacher, info, **config.distiller.arguments)
    _check_views_and_labels(config, info, distiller.needs)
    distiller.seed = config.seed
    distiller.enter_phase(None)
    _check_students(distiller.students(), method)
    return distiller


def _check_views_and_labels(config: Config, info: DataInfo, needs: Needs) -> None:
    """Refuse data or mixing that do not give what a method needs with its settings."""
    method, mixing = config.distiller.name, config.data.mixing
    if needs.views > 1 and not info.strong_views:
        raise UserError(
            f"distiller.name: {method!r} needs a second, strongly augmented view of each image and the"
            f" data set {config.data.name!r} gives one view"
        )
    if mixing is not None and mixing.mode == "beside" and needs.labels != "none":
        remedy = "set it to replace" if needs.labels == "soft" else "remove data.mixing"
        raise UserError(
            f"data.mixing.mode: 'beside' computes a method's own terms on mixed images, which have no label there, and"
            f" the method {method!r} reads labels; {remedy} or take another method"
        )
    if mixing is not None and needs.labels == "hard":
        raise UserError(
            f"data.mixing: {mixing.name!r} makes soft labels and the method {method!r} needs one class per image;"
            " remove data.mixing or take another method"
        )
    if mixing is not None and needs.views > 1:
        raise UserError(
            f"data.mixing: images are mixed in one view and the method {method!r} needs two;"
            " remove data.mixing or take another method"
        )


def distances_by(config: Config, needs: Needs) -> Any:
    """What of the teacher the method compares classes by; None where it does not."""
    return None if needs.class_distances is None else config.distiller.arguments[needs.class_distances]


def _check_students(students: Any, method: str) -> None:
    """Refuse networks to export that have no usable names."""
    names = list(students) if isinstance(students, dict) else []
    folded = [str(name).casefold() for name in names]  # as some file systems see them
    wrong = [
        name
        for name in names
        if not isinstance(name, str) or not EXPORT_NAME.fullmatch(name) or name.casefold() in TAKEN
    ]
    wrong += [name for name in names if folded.count(str(name).casefold()) > 1]
    if not names or wrong or not all(isinstance(network, nn.Module) for network in students.values()):
        found = f"{shown(wrong[0])} is no such name" if wrong else f"found {shown(students)}"
        raise UserError(
            f"distiller.name: students() of {method!r} should return networks by name (letters, digits, _ - and .; not"
            f" {', '.join(TAKEN)}); {found}"
        )


def _checked_groups(groups: Any, method: str) -> list[dict[str, Any]]:
    """``groups`` of parameters, if an optimiser takes them."""
    try:
        checked = [{"lr_scale": 1.0, **group, "params": [*group["params"]]} for group in groups]
    except (TypeError, KeyError):
        checked = []
    parameters = [parameter for group in checked for parameter in group["params"]]
    if (
        not parameters
        or not all(group["params"] and type(group["lr_scale"]) in (int, float) for group in checked)
        or not all(isinstance(parameter, nn.Parameter) for parameter in parameters)
        or len(set(map(id, parameters))) < len(parameters)
    ):
        raise UserError(
            f"distiller.name: param_groups() of {method!r} should return a list of groups, each a dictionary whose"
            f" 'params' are some parameters that no other group has and whose 'lr_scale' is a number; found"
            f" {shown(groups)}"
        )
    return checked


def build_students(config: Config, info: DataInfo) -> dict[str, nn.Module]:
    """What a run of ``config`` evaluates and exports, by name, with initial weights: what its files load into."""
    students = build_distiller(config, info, build_teacher(config, info)).students()
    headline = next(iter(students.values()))
    return students | {name: copy.deepcopy(headline) for name in averages_of(config, headline)}


def count_parameters(distiller: Distiller) -> dict[str, int]:
    """Of the student, of the teacher, and ``extra``: what the method has beside them, in any of its phases."""
    networks = {"student": distiller.student, "teacher": distiller.teacher}
    own = {name: _sizes(network) for name, network in networks.items() if network is not None}
    shared = {key for sizes in own.values() for key in sizes}
    extra = sum(size for key, size in _sizes(distiller).items() if key not in shared)
    return {**{name: sum(sizes.values()) for name, sizes in own.items()}, "extra": extra}


def _sizes(network: nn.Module) -> dict[int, int]:
    return {id(parameter): parameter.numel() for parameter in network.parameters()}


def large_state(distillers: Sequence[Distiller], device: torch.device) -> str | None:
    """A line on what the methods of all trials keep on ``device`` beside their networks, where that is much.

    Raises:
        UserError: it is more than the device has free.
    """
    state = {
        name: value
        for name, value in distillers[0].state_dict().items()
        if not name.startswith(("student.", "teacher."))
    }
    size = sum(value.nbytes for value in state.values())
    if size < LARGE_STATE:
        return None
    name, largest = max(state.items(), key=lambda item: item[1].nbytes)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    trials = f" for each of {len(distillers)} trials" if len(distillers) > 1 else ""
    kept = (
        f"{type(distillers[0]).__name__} keeps {size / 1e9:.1f} GB beside the networks{trials}, most of it {name}"
        f" {tuple(largest.shape)} in {str(largest.dtype).removeprefix('torch.')}"
    )
    if free is not None and size * len(distillers) > free:
        raise UserError(
            f"distiller: {kept}; {device} has {free / 1e9:.1f} GB free. Choose settings that keep less, another method"
            " or a larger device"
        )
    return f"distiller: {kept}; a checkpoint holds it too"


def averages_of(config: Config, network: nn.Module) -> dict[str, AveragedNetwork]:
    """The averages of the weights of ``network`` that ``config`` asks for, of its last phase."""
    solver, averages = config.solver, {}
    if solver.ema_decay is not None:
        averages["ema"] = AveragedNetwork(network, decay=solver.ema_decay)
    if solver.average_from is not None:
        first_epoch = config.epochs - solver.epochs + solver.average_from
        averages["average"] = AveragedNetwork(network, first_epoch=first_epoch, statistics=solver.average_statistics)
    return averages


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
        cache_root: folder of the logit caches and class distances; None keeps none.
        check_teacher: compare the teacher's accuracy with ``teacher.expected_top1``, where the test split is evaluated;
            what was measured once is remembered under ``output_root``.

    Raises:
        UserError: anything in the configuration, the data, the teacher's file or its cache that does not fit.
    """
    roots = {"data_root": data_root, "checkpoint_root": checkpoint_root}
    if distributed.world_size() > 1:
        with distributed.together():
            if distributed.is_first_on_machine():  # fetches what the others then find
                weight_files(configs[0], checkpoint_root)
                if download:
                    build_dataset(configs[0], data_root=data_root, download=True)
    with distributed.together():
        experiment, teacher, loaded = _assemble(configs, device, **roots, download=download)
    config, metadata = configs[0], experiment.metadata
    if config.teacher is not None and teacher is not None:
        if check_teacher and config.run.evaluate_test:
            precision = config.run.teacher_precision or config.run.precision
            measured = [
                verify_top1(
                    member.expected_top1,
                    partial(_top1, network, experiment.dataset, config.data.eval_batch_size, precision),
                    key=f"{weights.fingerprint}:{experiment.fingerprints['data']}",
                    memory=output_root / "teachers.json",
                    teacher=str(weights.path),
                    where=config.data.name,
                    section=section,
                )
                for (section, member), network, weights in zip(
                    members_of(config.teacher), networks_of(teacher), loaded, strict=True
                )
            ]
            metadata["teacher"]["top1"] = measured[0] if len(measured) == 1 else measured
        with distributed.together():
            _place_teacher(experiment, teacher, cache_root)
            if (by := distances_by(config, experiment.trials[0].distiller.needs)) is not None:
                frozen = experiment.teacher or _frozen(experiment, teacher)
                experiment.class_distances = ClassDistances(
                    frozen, experiment.dataset, by, fingerprints=experiment.fingerprints, root=cache_root
                )
    return experiment


def _assemble(
    configs: Sequence[Config], device: torch.device, *, data_root: Path, checkpoint_root: Path, download: bool
) -> tuple[Experiment, nn.Module | None, list[LoadedTeacher]]:
    """What ``build`` gives before the teacher is tried, the teacher, and what its weights are."""
    config, run = configs[0], configs[0].run
    teacher_precision = run.teacher_precision or run.precision
    require_precision(run.precision, device, "run.precision")
    require_precision(teacher_precision, device, "run.teacher_precision")
    choose_engine(run.engine, device)
    set_numerics(run.precision, deterministic=run.deterministic)
    sources, begin = weight_files(config, checkpoint_root)  # before the data: the quickest check first
    dataset = build_dataset(config, data_root=data_root, download=download)
    info = dataset.info(config.data.batch_size)
    teacher = build_teacher(config, info)
    fingerprints = {"data": dataset.fingerprint()}
    metadata: dict[str, Any] = {
        "data": {"fingerprint": fingerprints["data"], "classes": info.num_classes},
        "notes": [f"data: {note}" for note in dataset.notes],
    }
    records: list[FileRecord] = []
    start = None if begin is None else partial(load_student, config=config, file=begin, records=records)
    distillers = [build_distiller(each, info, teacher, start=start) for each in configs]
    if teacher is not None:
        _check_teacher_logits(config, distillers[0].needs, dataset)
    if records:
        fingerprints["student"] = records[0].sha256
        metadata["student"] = {"files": [{"path": str(begin), **vars(records[0])}]}
        metadata["notes"] += [f"student: {begin} {records[0].note}"] if records[0].note else []
        metadata["notes"] += note_on_images(config, info)
    metadata["notes"] += _notes_on_features(distillers[0])
    metadata["parameters"] = count_parameters(distillers[0])
    loaded: list[LoadedTeacher] = []
    if config.teacher is not None and teacher is not None:
        loaded = load_teacher(config, networks_of(teacher), sources, info.class_names, checkpoint_root)
        metadata["notes"] += [f"teacher: {each.path} {each.record.note}" for each in loaded if each.record.note]
        fingerprints["teacher"] = fingerprint_of(loaded, config.teacher.average)
        metadata["teacher"] = {"files": [each.metadata for each in loaded], "fingerprint": fingerprints["teacher"]}
    if not distillers[0].fits_labels:
        metadata["loss"] = UNCALIBRATED
    if config.data.mixing is not None and isinstance(dataset, StreamedDataset):
        raise UserError(f"data.mixing: the images of {config.data.name!r} are streamed and cannot be mixed; remove it")
    ranks = distributed.world_size()
    if ranks > 1 and len(configs) > 1:
        raise UserError(f"--seeds: {len(configs)} trials at once need one process, found {ranks}; give one --seed")
    _check_shares(config.data.batch_size, dataset.num_samples, ranks)
    _check_single_image(config, distillers[0], info, ranks)
    note = large_state(distillers, device)
    metadata["notes"] += [note] if note else []
    dataset = dataset.to(device)
    if teacher is not None:
        move(teacher, device, teacher_precision)
    trials = []
    for each, distiller in zip(configs, distillers, strict=True):
        layout, reason = move(distiller.student, device, run.precision)
        metadata["memory_format"] = f"{layout} ({reason})"
        distiller = distiller.to(device)
        averages = averages_of(each, next(iter(distiller.students().values())))
        distiller.student_precision, distiller.teacher_precision = run.precision, teacher_precision
        trials.append(Trial(each, distiller, _build_phases(each, distiller, info), averages))
    experiment = Experiment(trials, dataset, device, fingerprints, metadata)
    return experiment, teacher, loaded


def _build_phases(config: Config, distiller: Distiller, info: DataInfo) -> list[Phase]:
    """The phases of a run, a solver for each; one step of each is tried. ``distiller`` is in the last one then."""
    phases: list[Phase] = []
    for name, settings in (*config.phases.items(), (None, config.solver)):
        before = phases[-1].last_epoch if phases else 0
        distiller.enter_phase(name, epochs_before=before)
        groups = _checked_groups(distiller.param_groups(), config.distiller.name)
        groups = groups if settings.decay_norms else without_decay_of_norms(groups)
        solver = SOLVERS.get(settings.name)(groups, **settings.arguments)
        if name is not None and solver.backward_passes > 1:
            raise UserError(
                f"phases.{name}.name: {settings.name!r} takes the task's gradient apart from the distillation's, and a"
                f" first phase has one loss; set phases.{name}.name=sgd"
            )
        if config.run.engine == "compile" and solver.backward_passes > 1:
            raise UserError(
                "run.engine: what is compiled allows one backward pass a step and the solver"
                f" {settings.name!r} takes {solver.backward_passes}; use auto, eager or graph"
            )
        try:
            terms = _try_step(solver, distiller, info, config)
        except UserError as error:
            raise error if name is None else UserError(f"phases.{name}: {error}") from error.__cause__
        phases.append(Phase(name, settings, solver, terms, before))
    return phases


def _last_batch(batch_size: int, samples: int) -> int:
    """Images of the last step of an epoch."""
    return samples % batch_size or min(batch_size, samples)


def _check_shares(batch_size: int, samples: int, ranks: int) -> None:
    """Refuse batches that several processes cannot share."""
    if batch_size % ranks:
        raise UserError(
            f"data.batch_size: {batch_size} images cannot be shared evenly by {ranks} processes; take a multiple of"
            f" {ranks}, such as {max(1, round(batch_size / ranks)) * ranks}"
        )
    last = _last_batch(batch_size, samples)
    if last < ranks:
        raise UserError(
            f"data.batch_size: with {batch_size} the last of an epoch's batches has {last} of the {samples} images,"
            f" fewer than the {ranks} processes; take another batch size"
        )


def _check_single_image(config: Config, distiller: Distiller, info: DataInfo, ranks: int) -> None:
    """Refuse an epoch that ends in a single image of a process, where a phase cannot be trained on one.

    BatchNorm has nothing to normalise by where its map is one pixel. ``distiller`` is in the last phase then.
    """
    batch_size = config.data.batch_size
    if _last_batch(batch_size, info.num_samples) // ranks != 1:
        return
    try:
        for phase in (*distiller.phases, None):
            distiller.enter_phase(phase)
            _blank_step(distiller, info, config, images=1)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        alone = "" if ranks == 1 else f" for one of {ranks} processes"
        raise UserError(
            f"data.batch_size: with {batch_size} the last of an epoch's batches has a single one of the"
            f" {info.num_samples} images{alone}, which BatchNorm cannot normalise at this image size; take another"
            " batch size"
        ) from None


def _notes_on_features(distiller: Distiller) -> list[str]:
    """What must be known of the features that the method reads."""
    if "preacts" not in distiller.needs.features or not distiller.needs.student_features:
        return []
    read = {"student": distiller.student, "teacher": distiller.teacher and bare(distiller.teacher)}
    if distiller.needs.teacher != "features":
        del read["teacher"]
    notes = {section: getattr(network, "note", None) for section, network in read.items()}
    return [f"{section}: {note}" for section, note in notes.items() if note]


def _top1(network: nn.Module, dataset: Dataset, batch_size: int | None, precision: Precision) -> float:
    return evaluate(network, dataset, "test", batch_size=batch_size, precision=precision).top1


def _try_step(solver: Solver, distiller: Distiller, info: DataInfo, config: Config) -> tuple[str, ...]:
    """The names of the loss terms of a training step on two blank images, after which all is as it was.

    Raises:
        UserError: a network or the method returns what it should not, or the solver cannot take such steps; or mixed
            images have no term.
    """
    output = _blank_step(distiller, info, config, images=2)
    if config.data.mixing is not None and config.data.mixing.mode == "beside" and not output.distillation:
        raise UserError(
            "data.mixing.mode: 'beside' computes a method's own terms on mixed images, and the method"
            f" {config.distiller.name!r} has none; set it to replace or take another method"
        )
    if not output.total.requires_grad:
        raise UserError(f"{type(distiller).__name__}: no term of the loss depends on a weight that is trained")
    solver.check(output)
    return tuple(output.terms)


def _blank_step(distiller: Distiller, info: DataInfo, config: Config, *, images: int) -> StepOutput:
    """The forward pass of a training step on blank images, after which all buffers are as they were."""
    device = next(distiller.student.parameters()).device
    image = torch.zeros(images, 3, info.image_size, info.image_size, device=device)
    number = torch.arange(images, device=device)
    batch = Batch(image, number, number, number, strong_image=image if distiller.needs.views > 1 else None)
    if config.data.mixing is not None and config.data.mixing.mode == "beside":
        batch = replace(batch, mixed=batch)
    before = {name: value.clone() for name, value in distiller.named_buffers() if not name.startswith("teacher.")}
    with torch.random.fork_rng(devices=[]):
        output: StepOutput = distiller.train()(batch, torch.ones((), device=device))
    with torch.no_grad():
        for name, value in distiller.named_buffers():
            if name in before and value.shape == before[name].shape:
                value.copy_(before[name])
    return output


def _place_teacher(experiment: Experiment, teacher: nn.Module, cache_root: Path | None) -> None:
    """Compute the teacher's outputs ahead of the steps, through a cache, where the method leaves room for that."""
    config, needs, dataset = experiment.trials[0].config, experiment.trials[0].distiller.needs, experiment.dataset
    run, streamed = config.run, isinstance(dataset, StreamedDataset)
    needs_at_last = experiment.trials[0].distiller.needs_at_last
    in_every_step = _why_in_every_step(config, needs, dataset)
    if in_every_step is not None:
        steps = "every step" if needs_at_last is None else "every step of the first phases"
        experiment.teacher_note = f"runs in {steps}: {in_every_step}"
        return
    pooled = feature_shapes(teacher, dataset.image_size).pooled[0] if needs.teacher == "pooled" else 0
    experiment.teacher = _frozen(experiment, teacher, pooled=pooled > 0)
    experiment.logit_format = form = format_of(run, dataset.num_classes, pooled=pooled)
    again = "; images are read a second time for that" if streamed else ""
    if dataset.num_views is None:
        experiment.teacher_note = "runs on every image: the views of this data set cannot be enumerated"
        return
    if cache_root is None:
        experiment.teacher_note = f"runs on every image: no cache was asked for{again}"
        return
    experiment.cache = cache = open_cache(
        experiment.teacher, dataset, cache_root, fingerprints=experiment.fingerprints, form=form
    )
    experiment.metadata["teacher"]["cache"] = str(cache.path)
    others = "strong views" if needs.views > 1 else "mixed images" if config.data.mixing is not None else None
    apart = f"; those of the {others} in every step" if others else ""
    experiment.teacher_note = (
        f"logits{' and pooled features' if pooled else ''} come from the cache {cache.path} ({run.teacher_logits},"
        f" {100 * cache.filled / cache.entries:.1f} % of {cache.entries:,} entries); missing ones are"
        f" computed{again}{apart}"
    )


def _frozen(experiment: Experiment, teacher: nn.Module, *, pooled: bool = False) -> FrozenTeacher:
    run = experiment.trials[0].config.run
    return FrozenTeacher(teacher, experiment.device, run.teacher_precision or run.precision, pooled=pooled)


def _why_in_every_step(config: Config, needs: Needs, dataset: Dataset) -> str | None:
    """Why the teacher has to run as part of the step; None: it has not."""
    if needs.teacher_batch_statistics:
        return "its BatchNorm uses batch statistics"
    if needs.teacher == "features":
        return "this method reads more of it than its logits and pooled features"
    if config.data.mixing is not None and config.data.mixing.mode == "replace":
        return "images are mixed"
    if isinstance(dataset, StreamedDataset) and dataset.num_views is None:
        advice = "; data.views sets a number of them" if "views" in config.data.arguments else ""
        return f"images are streamed, in views that cannot be enumerated{advice}"
    return None


def _check_teacher_logits(config: Config, needs: Needs, dataset: Dataset) -> None:
    """Refuse logits that cannot be stored as they are to be, or that the method, as it is set, could not read.

    Raises:
        UserError: names the setting and what to do.
    """
    in_every_step = _why_in_every_step(config, needs, dataset)
    if config.run.teacher_logits == "sparse":
        _check_sparse(config, needs, in_every_step)
    if in_every_step is None:
        format_of(config.run, dataset.num_classes)
        if dataset.num_views is not None:
            count_entries(dataset)


def _check_sparse(config: Config, needs: Needs, in_every_step: str | None) -> None:
    method, arguments = config.distiller.name, config.distiller.arguments
    settings = {key: arguments.get(key) for key in needs.sparse_logits or ()}
    wrong = [f"distiller.{key} 1, found {shown(value)}" for key, value in settings.items() if value not in (None, 1)]
    if arguments.get("standardize_logits"):
        wrong.append("distiller.standardize_logits false, found true")
    reason = None
    if needs.sparse_logits is None:
        reason = "it reads more of the teacher than its largest probabilities"
    elif needs.teacher == "pooled":
        reason = "it reads the teacher's pooled features too"
    elif wrong:
        reason = f"that takes {' and '.join(wrong)}"
    elif in_every_step is not None:
        reason = f"its teacher runs in every step, since {in_every_step}"
    if reason is not None:
        raise UserError(
            f"run.teacher_logits: the method {method!r} cannot read 'sparse' logits here: {reason};"
            " take run.teacher_logits=float16"
        )


@contextmanager
def _seeded(seed: int, stream: str) -> Iterator[None]:
    """Draw from a generator of (seed, stream); torch's global one is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, stream))
        yield
