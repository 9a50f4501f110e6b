"""Where a teacher's weights come from, and whether they are what the configuration says."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mdistill import distributed
from mdistill.errors import UserError
from mdistill.file_schemas import Teachers, read_json
from mdistill.files import write_text

TOLERANCE = 1.0  # points of top-1 between a teacher as measured and as expected


def locate(checkpoint: str, root: Path, *, model: str, dataset: str, section: str = "teacher") -> Path:
    """The file or run folder that ``checkpoint`` of ``section`` means: under ``root``, else as it stands.

    Raises:
        UserError: nothing is there; says both ways to get a teacher.
    """
    candidates = [root / checkpoint, Path(checkpoint)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
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
