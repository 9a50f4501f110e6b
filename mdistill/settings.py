"""Settings of a run in plain containers, as its ``config.yaml`` holds them: which of them change a result, and how two
runs differ. What reads many records needs no more of a configuration than this, and so not torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def leaves(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of ``tree`` that is no section, or an empty one, with its key."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value
