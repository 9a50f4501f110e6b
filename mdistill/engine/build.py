"""From a configuration to the objects of a run, each checked before anything is written."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistill.config import Config, RunConfig
from mdistill.data import DATASETS, DataInfo, Dataset
from mdistill.data.sampling import derive_seed
from mdistill.distillers import DISTILLERS, Distiller
from mdistill.engine.evaluate import evaluate
from mdistill.engine.solver import SOLVERS, Solver
from mdistill.errors import UserError
from mdistill.models import MODELS
from mdistill.models.teachers import locate, verify_top1
from mdistill.models.weights import fingerprint, load_weights

UNCALIBRATED = "trained without cross-entropy: the scale of its logits is free and its test loss not comparable"


@dataclass
class Experiment:
    """Everything that ``fit`` needs, on its device."""

    distiller: Distiller
    solver: Solver
    dataset: Dataset
    device: torch.device
    fingerprints: dict[str, str]  # SHA-256 of the data and of the teacher's weights, which a resumed run must share
    facts: dict[str, Any] = field(default_factory=dict)  # for env.json


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


def set_numerics(run: RunConfig) -> None:
    """Apply a configuration's ``run:`` section to torch's backends."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # as torch's default: losses are float32 throughout
    torch.backends.cudnn.conv.fp32_precision = "tf32" if run.precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not run.deterministic
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(run.deterministic)


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


def build_distiller(config: Config, info: DataInfo) -> Distiller:
    """Student, teacher (initial weights) and method, on torch's default device."""
    needs = DISTILLERS.get(config.distiller.name).needs  # type: ignore[attr-defined]
    if needs.views > 1:
        raise UserError(f"distiller.name: {config.distiller.name!r} needs two views of each image, the data gives one")
    if needs.labels == "soft":
        raise UserError(f"distiller.name: {config.distiller.name!r} needs soft labels, the data gives classes")
    student = build_network("student", config.student.name, config.student.arguments, info, seed=config.seed)
    teacher = None
    if config.teacher is not None:
        teacher = build_network("teacher", config.teacher.name, config.teacher.arguments, info, seed=config.seed)
    for section, network in (("student", student), ("teacher", teacher)):
        if needs.teacher == "features" and network is not None and not hasattr(network, "forward_features"):
            name = getattr(config, section).name
            raise UserError(
                f"{section}.name: {config.distiller.name!r} reads features and {name!r} has no forward_features"
            )
    with _seeded(config.seed, "distiller"):
        return DISTILLERS.build(
            config.distiller.name, student, teacher, info, where="distiller", **config.distiller.arguments
        )


def build(
    config: Config,
    device: torch.device,
    *,
    data_root: Path,
    checkpoint_root: Path,
    output_root: Path,
    download: bool = False,
    check_teacher: bool = True,
) -> Experiment:
    """Data, networks with the teacher's weights, method and solver.

    Args:
        check_teacher: compare the teacher's accuracy with ``teacher.expected_top1``; what was measured once is
            remembered under ``output_root``.

    Raises:
        UserError: anything in the configuration, the data or the teacher's file that does not fit.
    """
    set_numerics(config.run)
    source = None
    if config.teacher is not None:  # before the data: the quickest check first
        source = locate(config.teacher.checkpoint, checkpoint_root, model=config.teacher.name, dataset=config.data.name)
    dataset = build_dataset(config, data_root=data_root, download=download)
    distiller = build_distiller(config, dataset.info(config.data.batch_size))
    fingerprints = {"data": dataset.fingerprint()}
    facts: dict[str, Any] = {"data": {"fingerprint": fingerprints["data"], "notes": list(dataset.notes)}}
    if config.teacher is not None and source is not None and distiller.teacher is not None:
        load_weights(distiller.teacher, source, name=config.teacher.name, role="teacher")
        fingerprints["teacher"] = fingerprint(distiller.teacher.state_dict())
        facts["teacher"] = {"path": str(source), "fingerprint": fingerprints["teacher"]}
    if not distiller.fits_labels:
        facts["loss"] = UNCALIBRATED
    dataset = dataset.to(device)
    distiller = distiller.to(device)
    if check_teacher and config.teacher is not None and distiller.teacher is not None:
        network = distiller.teacher
        facts["teacher"]["top1"] = verify_top1(
            config.teacher.expected_top1,
            lambda: evaluate(network, dataset, "test", batch_size=config.data.eval_batch_size).top1,
            key=f"{fingerprints['teacher']}:{fingerprints['data']}",
            memory=output_root / "teachers.json",
            teacher=str(source),
            where=config.data.name,
        )
    solver = SOLVERS.build(config.solver.name, distiller.param_groups(), where="solver", **config.solver.arguments)
    return Experiment(distiller, solver, dataset, device, fingerprints, facts)


@contextmanager
def _seeded(seed: int, stream: str) -> Iterator[None]:
    """Draw from a generator of (seed, stream); torch's global one is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, stream))
        yield
