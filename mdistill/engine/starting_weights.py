"""The weights that a run begins with: their files, what is loaded from these, and what tells them apart."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mdistill.config import Config, MemberConfig, TeacherConfig, without_defaults
from mdistill.data import DataInfo
from mdistill.models.ensemble import Ensemble
from mdistill.models.preprocessing import Preprocessed, bare
from mdistill.models.pretrained import published_weights
from mdistill.models.teachers import locate, outputs_of
from mdistill.models.torch_files import FileRecord
from mdistill.models.weights import Convert, fingerprint, load_weights


def weight_files(config: Config, root: Path) -> tuple[list[Path], Path | None]:
    """Of the teacher's networks, and of what the student begins with; published ones are fetched."""
    dataset, student = config.data.name, config.student
    teachers = teacher_files(config, root)
    if student.checkpoint is None:
        return teachers, None
    return teachers, locate(student.checkpoint, root, model=student.name, dataset=dataset, section="student")


def teacher_files(config: Config, root: Path) -> list[Path]:
    """Of the teacher's networks; published ones are fetched."""
    return [
        locate(member.checkpoint, root, model=member.name, dataset=config.data.name, section=section)
        for section, member in (members_of(config.teacher) if config.teacher is not None else [])
    ]


def members_of(teacher: TeacherConfig) -> list[tuple[str, MemberConfig]]:
    """A teacher's networks, each with where it stands in the configuration."""
    further = [(f"teacher.ensemble.{number}", member) for number, member in enumerate(teacher.ensemble)]
    return [("teacher", teacher), *further]


def networks_of(teacher: nn.Module) -> list[nn.Module]:
    """The networks themselves, in the same order."""
    return list(teacher.members) if isinstance(teacher, Ensemble) else [teacher]


def load_student(student: nn.Module, *, config: Config, file: Path, records: list[FileRecord]) -> None:
    """Load the weights that ``student`` begins with, and note the file in ``records``."""
    name, checkpoint = config.student.name, config.student.checkpoint
    convert = _conversion(name, checkpoint or "", config.student.arguments, "student")
    records.append(load_weights(student, file, name=name, convert=convert, new_classifier=True))


def note_on_images(config: Config, info: DataInfo) -> list[str]:
    """Whether the weights that the student begins with were published for other images than the data set's."""
    published = published_weights(config.student.name, config.student.checkpoint or "", "student")
    if published is None or (published.mean, published.std) == (info.mean, info.std):
        return []
    return [
        f"student: {published.name} were trained with mean {published.mean} and std {published.std}, the data set has"
        f" {info.mean} and {info.std}"
    ]


@dataclass(frozen=True)
class LoadedTeacher:
    """One of a teacher's networks, as it was loaded."""

    path: Path
    record: FileRecord
    fingerprint: str  # of all that fixes its logits: weights, preprocessing and arguments that are not at their default
    metadata: dict[str, Any]  # for env.json


def load_teacher(
    config: Config, networks: Sequence[nn.Module], sources: Sequence[Path], class_names: Sequence[str], root: Path
) -> list[LoadedTeacher]:
    """Load the weights of a teacher's ``networks`` from ``sources``.

    Args:
        class_names: of the data set, for ``teacher.classes``.
        root: folder of weights, and of files that name a network's outputs.

    Raises:
        UserError: as ``load_weights`` and ``outputs_of``.
    """
    assert config.teacher is not None
    loaded = []
    for network, (section, member), source in zip(networks, members_of(config.teacher), sources, strict=True):
        outputs = outputs_of(member.classes, class_names, root, section=section) if member.classes else None
        convert = _conversion(member.name, member.checkpoint, member.arguments, section)
        record = load_weights(bare(network), source, name=member.name, role="teacher", convert=convert, outputs=outputs)
        identity = fingerprint(bare(network).state_dict())
        metadata = {"path": str(source), **vars(record)}
        if isinstance(network, Preprocessed):
            metadata["preprocessing"] = asdict(network.wanted)
            identity = _joined([identity], repr(network.wanted))
        if arguments := _chosen_arguments(config, section):  # which may change what the same weights compute
            identity = _joined([identity], f"{member.name} {json.dumps(arguments, sort_keys=True)}")
        loaded.append(LoadedTeacher(source, record, identity, metadata))
    return loaded


def fingerprint_of(loaded: Sequence[LoadedTeacher], average: str) -> str:
    """Of a whole teacher, whose networks are averaged as ``average`` says where there are several."""
    prints = [each.fingerprint for each in loaded]
    return prints[0] if len(prints) == 1 else _joined(prints, average)


def _conversion(name: str, checkpoint: str, arguments: Mapping[str, Any], section: str) -> Convert | None:
    """How the file of published weights becomes a state dict of its network; None where it is one."""
    published = published_weights(name, checkpoint, section)
    if published is None or published.convert is None:
        return None
    return partial(published.convert, arguments=arguments)


def _chosen_arguments(config: Config, section: str) -> dict[str, Any]:
    """The arguments of a teacher's network that are not at their default."""
    teacher = without_defaults(config)["teacher"]
    given = teacher if section == "teacher" else teacher["ensemble"][int(section.rpartition(".")[2])]
    return {key: value for key, value in given.items() if key not in TeacherConfig.model_fields}


def _joined(fingerprints: Sequence[str], beside: str) -> str:
    """One fingerprint of several, and of what is said beside them."""
    return hashlib.sha256(" ".join([beside, *fingerprints]).encode()).hexdigest()
