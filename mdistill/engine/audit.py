"""A run's first steps as recorded and as replayed: how far they are apart, and what else differs.

Letters: N steps, T terms of the loss.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mdistill.config.schema import RunConfig
from mdistill.errors import printable
from mdistill.precision import Precision

Verdict = Literal["bit-equal", "close", "different"]

CLOSE: dict[Precision, tuple[float, float]] = {"fp32": (1e-5, 1e-2), "tf32": (5e-3, 5e-2), "bf16": (5e-3, 5e-2)}
"""How far loss terms may be apart, as a share of the loss of their step, to be called close: in the first step, where
weights and images are the same and rounding alone can differ, and in any of them, as rounding grows."""

CLOSE_EPOCH = 2e-2
"""The same for the means of a whole epoch, and for what is evaluated after one whose terms are all the same."""

POINTS = 1.0
"""How far its accuracies may then be apart to be called close. After rounding has moved the weights they say nothing:
one thread against two moved top-1 by 3.9 points within an epoch of a ResNet-8 on the embedded data."""

FIELDS = (
    *("code", "commit", "versions", "device", "kernels", "threads", "processes", "engine", "memory_format", "cell"),
    *("seed", "data.fingerprint", "teacher.fingerprint", "student.sha256"),
)
"""What ``env.json`` says of a session that can change its result; of a section all of it."""

IDENTITY = {
    "seed": "another seed",
    "data.fingerprint": "other data",
    "teacher.fingerprint": "another teacher",
    "student.sha256": "other weights to begin with",
}
"""Those without which it is another run, and what the run then had. Where all of them agree and ``cell`` does not, it
had other settings."""


@dataclass(frozen=True)
class Comparison:
    """Two records of the same steps."""

    verdict: Verdict
    first: tuple[int, str] | None  # where they first differ: step, counted from 1, and term; None: no term does
    first_step: float  # largest difference of a term in the first step, as a share of the loss
    largest: float  # in any step
    same_weights: bool  # after the last step


def closeness(run: RunConfig, on_cuda: bool) -> tuple[float, float]:
    """The row of ``CLOSE`` for a run, by the coarser precision of its two networks; TF32 units are a GPU's."""
    used = {run.precision, run.teacher_precision or run.precision}
    if "bf16" in used:
        return CLOSE["bf16"]
    return CLOSE["tf32" if "tf32" in used and on_cuda else "fp32"]


def misfit(recorded: Mapping[str, Sequence[float]], replayed: Mapping[str, Sequence[float]]) -> str | None:
    """Why the terms of two records cannot be compared; None if they can."""
    told = []
    for terms in (recorded, replayed):
        lengths = {len(values) for values in terms.values()}
        told.append(f"{', '.join(sorted(terms))} of {' or '.join(map(str, sorted(lengths)))} steps")
    if told[0] == told[1] and len({len(values) for values in recorded.values()}) == 1:
        return None
    return f"the loss had the terms {printable(told[0])} and has {printable(told[1])}"


def compare(
    recorded: Mapping[str, Sequence[float]],
    replayed: Mapping[str, Sequence[float]],
    *,
    same_weights: bool,
    close: tuple[float, float],
) -> Comparison:
    """The terms of the loss in the same N steps, twice; they have no ``misfit``.

    Args:
        recorded: (T,) by name, (N,) each.
        replayed: the same.
        same_weights: whether what is trained is the same after these steps.
        close: as in ``CLOSE``.
    """
    gaps = []  # of each step
    first = None
    for step in range(len(next(iter(recorded.values())))):
        scale = sum(abs(values[step]) for values in recorded.values())
        apart = {name: abs(values[step] - replayed[name][step]) for name, values in recorded.items()}
        gaps.append(_share(max(apart.values()), scale))
        if first is None:
            first = next(((step + 1, name) for name, gap in apart.items() if gap != 0), None)
    if first is None and same_weights:
        verdict: Verdict = "bit-equal"
    else:
        verdict = "close" if gaps[0] <= close[0] and max(gaps) <= close[1] else "different"
    return Comparison(verdict, first, gaps[0], max(gaps), same_weights)


def compare_epochs(
    recorded: Mapping[str, Any], replayed: Mapping[str, Any]
) -> tuple[Verdict, dict[str, tuple[float | None, float | None]]]:
    """Two lines of metrics of the same epoch: a verdict by their loss terms, and all that differs, with both values."""
    keys = [key for key in {**recorded, **replayed} if key.endswith(("/top1", "/top5", "/loss")) or _is_term(key)]
    pairs = {key: (recorded.get(key), replayed.get(key)) for key in keys if not key.startswith("best/")}
    apart = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if not apart:
        return "bit-equal", apart
    scale = sum(abs(value) for key, value in recorded.items() if _is_term(key))
    gaps = [_share(_gap(*pair), scale) for key, pair in apart.items() if _is_term(key)]
    if not gaps:
        limits = {key: POINTS if "/top" in key else CLOSE_EPOCH * abs(pair[0] or 0.0) for key, pair in apart.items()}
        close = all(_gap(*pair) <= limits[key] for key, pair in apart.items())
        return "close" if close else "different", apart
    return "close" if max(gaps) <= CLOSE_EPOCH else "different", apart


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The one that says least for a run."""
    order: list[Verdict] = ["bit-equal", "close", "different"]
    return max(verdicts, key=order.index)


def differing_fields(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of two sessions that differ, with both values; what the older one did not record is left out."""
    before, after = dict(_fields(recorded)), dict(_fields(now))
    return {key: (value, after.get(key)) for key, value in before.items() if value != after.get(key)}


def unrecorded_fields(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Fields that only a later version records."""
    return [key for key, value in _fields(now) if value is not None and key not in dict(_fields(recorded))]


def ran_on_cuda(session: Mapping[str, Any]) -> bool:
    """Whether a session trained on a GPU."""
    versions = session.get("versions")
    return isinstance(versions, Mapping) and versions.get("cuda") is not None


def _fields(session: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for field in FIELDS:
        if field == "threads" and ran_on_cuda(session):  # which compute nothing of its steps
            continue
        section, _, key = field.partition(".")
        value = session.get(section)
        if field == "student.sha256":
            files = value.get("files") if isinstance(value, Mapping) else None
            value = files[0].get("sha256") if isinstance(files, list) and files and isinstance(files[0], dict) else None
            if value is not None:
                yield field, value
        elif key:
            if isinstance(value, Mapping) and key in value:
                yield field, value[key]
        elif isinstance(value, Mapping):
            yield from ((f"{section}.{name}", each) for name, each in value.items())
        elif section in session:
            yield field, value


def _is_term(key: str) -> bool:
    return key.startswith("train/loss_")


def _gap(one: float | None, other: float | None) -> float:
    return math.inf if one is None or other is None else abs(one - other)


def _share(gap: float, scale: float) -> float:
    return 0.0 if gap == 0 else gap / scale if scale > 0 else math.inf
