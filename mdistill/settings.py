"""Settings of a run in plain containers, as its ``config.yaml`` holds them: which of them change a result, and how two
runs differ. What reads many records needs no more of a configuration than this, and so not torch."""

from collections.abc import Collection, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from mdistill.errors import shown

NO_RESULT = {
    "imports",
    "seed",
    "variant",
    "data.eval_batch_size",
    "data.root",
    "student.checkpoint",
    *(
        f"{member}.{key}"
        for member in ("teacher", "teacher.ensemble")
        for key in ("checkpoint", "expected_top1", "classes", "preprocessing")  # these two are in its fingerprint
    ),
    "run.engine",
    "run.evaluate_every",
    "run.evaluate_test",
    "run.checkpoint_minutes",
}
"""Settings that change no result: paths, names, how a run is run."""

RETIRED = {
    "*.ema_decay": (None, "write solver.ema_decay"),
    "*.average_from": (None, "write solver.average_from"),
    "kd.divergence": ("forward", "the balanced divergence is distiller.name: bd_kd, the others are gone"),
    "kd.balance": (None, "it is a setting of distiller.name: bd_kd"),
    "kd.target": ("teacher", "the moving target is distiller.name: taid"),
    "dhkd.align": (False, "its alignment, over all weights, is solver.name: aligned_sgd"),
    "kd.interpolation": (None, "its keys are settings of distiller.name: taid"),
}
"""Settings of methods (``*``: of all) in the run folders of earlier versions: the value that had no effect, and what to
write now. A setting that a method does take is its own."""

RENAMED = {"mlkd.reading": "variant"}
"""Settings of methods that have a new name."""

_START = "distiller."  # of a method's settings


def results_only(tree: Any, place: str = "") -> Any:
    """``tree``, a configuration in plain containers, without what changes no result: paths, names, how it is run."""
    if isinstance(tree, Mapping):
        return {
            key: results_only(value, f"{place}{key}.")
            for key, value in tree.items()
            if f"{place}{key}" not in NO_RESULT and not isinstance(value, Path)
        }
    if isinstance(tree, (list, tuple)):
        return [results_only(value, place) for value in tree]
    return tree


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two resolved configurations differ, with both values (None where absent)."""
    old_leaves, new_leaves = dict(leaves(old)), dict(leaves(new))
    keys = [*old_leaves, *(key for key in new_leaves if key not in old_leaves)]
    return {
        ".".join(key): (old_leaves.get(key), new_leaves.get(key))
        for key in keys
        if old_leaves.get(key) != new_leaves.get(key)
    }


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved configuration changes results, by dotted key.

    A teacher's precision that is the student's is null, as where none is set.
    """
    settings = {".".join(key): value for key, value in leaves(results_only(config))}
    if "run.teacher_precision" in settings and settings["run.teacher_precision"] == settings.get("run.precision"):
        settings["run.teacher_precision"] = None
    return settings


def changes(
    recorded: Mapping[str, Any], wanted: Mapping[str, Any], chosen: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """The settings that change results in which a run is another one than is wanted, with both values.

    One that the record's version did not know, at its default, changes nothing, nor does one of it that did nothing.

    Args:
        recorded: ``flat_settings`` of the run.
        wanted: those of what is wanted, every default written out.
        chosen: those of ``wanted`` that are not at their default.
    """
    found = _in_present_words(recorded, str(wanted.get("distiller.name")), wanted)
    changed = {
        key: (value, wanted.get(key))
        for key, value in found.items()
        if wanted.get(key) != value and (key in wanted or value not in ({}, []))
    }
    lacking = (key for key in wanted if key in chosen and key not in found and wanted[key] is not None)
    return changed | {key: (None, wanted[key]) for key in lacking}


def retire(given: dict[str, Any], method: str, allowed: Container[str]) -> list[str]:
    """Take settings of earlier versions out of ``given``, a method's; a line for each that did something.

    Args:
        allowed: names of the settings that the method has.
    """
    problems = []
    for setting in (*RETIRED, *RENAMED):
        owner, key = setting.split(".")
        if owner not in {"*", method} or key not in given or key in allowed:
            continue
        value, setting = given.pop(key), f"{owner}.{key}"
        if setting in RENAMED:
            given.setdefault(RENAMED[setting], value)
        elif value != RETIRED[setting][0]:
            problems.append(
                f"distiller.{key}: {shown(value)} is no setting of {method!r} any more; {RETIRED[setting][1]}"
            )
    return problems


def _in_present_words(recorded: Mapping[str, Any], method: str, allowed: Container[str]) -> Mapping[str, Any]:
    """``recorded`` without what ``retire`` takes out; as it is where one of those did something, which then is told."""
    if all(key in allowed for key in recorded if key.startswith(_START)):
        return recorded
    given = {key.removeprefix(_START): value for key, value in recorded.items() if key.startswith(_START)}
    if retire(given, method, [key for key in given if f"{_START}{key}" in allowed]):
        return recorded
    others = {key: value for key, value in recorded.items() if not key.startswith(_START)}
    return others | {f"{_START}{key}": value for key, value in given.items()}


def checkpoints(config: Mapping[str, Any]) -> dict[str, str]:
    """The weights that a resolved configuration begins from, the teacher's and the student's; by key, "" for none."""
    teacher = config.get("teacher") or {}
    found = {f"teacher.ensemble.{n}.checkpoint": each for n, each in enumerate(teacher.get("ensemble") or ())}
    found = {**({"teacher.checkpoint": teacher} if teacher else {}), **found, "student.checkpoint": config["student"]}
    return {key: str(member.get("checkpoint") or "") for key, member in found.items()}


def leaves(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of ``tree`` that is no section, or an empty one, with its key."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value
