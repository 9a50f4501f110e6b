"""Where a teacher's weights come from, which classes they are for, and whether they are what the configuration says."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mdistill import distributed
from mdistill.errors import UserError, printable, suggestion
from mdistill.file_schemas import Teachers, read_json
from mdistill.files import read_text, write_text
from mdistill.models.imagenet.classes import WNIDS
from mdistill.models.pretrained import published_weights
from mdistill.models.weights import Outputs

TOLERANCE = 1.0  # points of top-1 between a teacher as measured and as expected


def locate(checkpoint: str, root: Path, *, model: str, dataset: str, section: str = "teacher") -> Path:
    """The file or run folder that ``checkpoint`` of ``section`` means: under ``root``, else as it stands.

    Published weights of a library's network, where ``checkpoint`` names some, are downloaded if they are missing.

    Raises:
        UserError: nothing is there; says both ways to get a teacher.
    """
    published = published_weights(model, checkpoint, section)
    if published is not None:
        return published.path(root, section)
    candidates = [root / checkpoint, Path(checkpoint)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if "/" in model:
        raise UserError(
            f"{section}.checkpoint: no {model} weights at {candidates[0]} (checkpoint root {root}); give a file, a run"
            f" folder, or published weights by name"
            f" ({'pretrained' if model.startswith('timm/') else 'such as IMAGENET1K_V1'})"
        )
    shipped = [path for path in sorted(Path("configs").glob(f"*/vanilla/{model}.yaml")) if _is_for(dataset, path)]
    recipe = f"`python tools/train.py --cfg {shipped[0]}`" if shipped else "a configuration without a teacher"
    released = (
        f"; or unpack cifar_teachers.tar from the releases of megvii-research/mdistiller into {root}, whose files load"
        " as they are"
    )
    nothing = f"{section}.checkpoint: no {model} weights at {candidates[0]} (checkpoint root {root})"
    if re.fullmatch(r"seed\d+", candidates[0].name) and "vanilla" not in candidates[0].parts:
        raise UserError(f"{nothing}. It is a run folder: do that run first, or give the --checkpoint-root it is under")
    raise UserError(
        f"{nothing}. Train them with {recipe}, then {_setting(section, 'checkpoint')}"
        f"runs/{dataset}/vanilla/{model}/seed0"
        f"{released if dataset == 'cifar100' else ', or give the --checkpoint-root that they are under'}"
    )


def outputs_of(classes: str, class_names: Sequence[str], root: Path, *, section: str) -> Outputs:
    """Which of a network's outputs are the classes of a data set.

    Args:
        classes: ``imagenet`` for the 1,000 WordNet ids in their order, or a text file with the name of each output on a
            line of its own, under ``root`` or as it stands.
        class_names: those of the data set.

    Raises:
        UserError: a class of the data set is not among the outputs, or either list has no or equal names.
    """
    names: Sequence[str] = WNIDS
    if classes != "imagenet":
        file = next((path for path in (root / classes, Path(classes)) if path.is_file()), None)
        if file is None:
            raise UserError(
                f"{section}.classes: no file {root / classes}; give imagenet, or a file with the name of each output"
                f" on a line of its own{suggestion(classes, ['imagenet'])}"
            )
        names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise UserError(f"{section}.classes: {file} names {printable(twice)!r} twice")
    if not class_names:
        raise UserError(f"{section}.classes: the data set does not say the names of its classes; remove it")
    rows = {name: row for row, name in enumerate(names)}
    unknown = [name for name in class_names if name not in rows]
    if unknown:
        raise UserError(
            f"{section}.classes: {len(unknown)} of the data set's {len(class_names)} classes are not among the"
            f" {len(names):,} of {classes}, first {printable(unknown[0])!r}{suggestion(unknown[0], names)}"
        )
    return Outputs(tuple(rows[name] for name in class_names), len(names), section)


def _setting(section: str, key: str) -> str:
    """How to set ``key`` of ``section``: by a word, or in the file where it is an entry of a list."""
    return f"add {section}.{key}=" if section.isidentifier() else f"in the file, set {key} of {section} to "


def _is_for(dataset: str, config: Path) -> bool:
    recipe = config.parent.parent / "_recipe.yaml"
    return recipe.exists() and f"name: {dataset}\n" in recipe.read_text(encoding="utf-8")


def verify_top1(
    expected: float | None,
    measure: Callable[[], float],
    *,
    key: str,
    memory: Path,
    teacher: str,
    where: str,
    section: str = "teacher",
) -> float | None:
    """Measure the teacher's top-1 once per ``key`` (weights and data), remember it in ``memory``, and compare.

    Args:
        expected: percent, or None to skip everything.
        measure: evaluates the teacher on the test split, in percent.
        memory: a JSON file of measured values.
        teacher, where, section: for the message: the weights, what they were tested on, and where the configuration has
            the expected value.

    Returns:
        the measured top-1 in percent, or None when nothing is expected.

    Raises:
        UserError: measured and expected differ by more than ``TOLERANCE`` points.
    """
    if expected is None:
        return None
    known = {}
    if memory.exists():
        with suppress(UserError):  # what was measured is measured again
            known = read_json(Teachers, memory).root
    known = distributed.of_rank_0(known)  # processes that train together measure together
    if key not in known:
        known[key] = measure()
        if distributed.rank() == 0:
            write_text(memory, json.dumps(known, indent=2) + "\n")
    top1 = known[key]
    if not abs(top1 - expected) <= TOLERANCE:
        raise UserError(
            f"{section}.expected_top1: {teacher} reaches {top1:.2f} on the test split of {where}, the configuration"
            f" expects {expected:.2f} (within {TOLERANCE:g}): wrong weights or data? For a teacher of your own"
            f" {_setting(section, 'expected_top1')}{top1:.2f} (or null to skip this check)"
        )
    return top1
