"""Run records as a run would write them, without running anything."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mdistill.config import Config, cell_identity

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_record(
    output: Path,
    config: Config,
    top1: Sequence[float],
    *,
    data: str = "d" * 64,
    teacher: str = "a" * 64,
    session: Mapping[str, Any] | None = None,
    top5: float = 95.0,
    first: int = 1,
    folder: Path | None = None,
) -> Path:
    """Write the record of a run of ``config`` whose test accuracies by epoch are ``top1``; its folder.

    Args:
        data: fingerprint of its data, and ``teacher`` of its teacher's weights.
        session: further entries of its session.
        first: epoch of the first of them.
        folder: where it lies below ``output``; None for where a run would write.
    """
    more = {"lr": 0.05, "train/loss": 1.5, "test/top5": top5, "test/loss": 1.0, "seconds/train": 1.0}
    lines = [{**line, **more, "seconds/eval": 0.1, "images_per_second": 100.0} for line in _epochs(top1, first=first)]
    fingerprints = {"data": data, **({"teacher": teacher} if config.teacher else {})}
    own = {
        "started": f"2026-01-01T00:00:0{config.seed % 10}+0000",
        "command": ["mdistill", "--output", str(output.resolve())],
        "commit": COMMIT,
        "device": "cpu",
        "cell": cell_identity(config, fingerprints),
        "data": {"fingerprint": data},
        **({"teacher": {"fingerprint": teacher, "files": []}} if config.teacher else {}),
        **(session or {}),
    }
    return _write(output / (folder or config.run_folder()), config.to_yaml(), lines, own)


def write_plain(
    root: Path,
    method: str,
    seed: int = 0,
    *,
    teacher: str = "",
    student: str = "small",
    top1: Sequence[float] = (10.0, 20.0, 30.0),
    epochs: int = 3,
    variant: str = "",
    cell: str | None = None,
    session: Mapping[str, Any] | None = None,
) -> Path:
    """A run of a method and networks that need not be, with one line for each of ``top1``; the folder."""
    pair = f"{teacher}_{student}" if teacher else student
    config = {
        "data": {"name": "tiny", "batch_size": 50},
        "teacher": {"name": teacher, "checkpoint": "x.pth", "expected_top1": None} if teacher else None,
        "student": {"name": student},
        "distiller": {"name": method},
        "solver": {"epochs": epochs},
        "seed": seed,
        "variant": variant,
    }
    lines = [{**line, "images_per_second": 1000.0 * line["epoch"]} for line in _epochs(top1)]
    own = {"commit": "abc", "device": "cpu", "cell": cell or f"{method}{teacher}{student}{variant}", **(session or {})}
    return _write(root / "tiny" / method / pair / variant / f"seed{seed}", yaml.safe_dump(config), lines, own)


def _epochs(top1: Sequence[float], first: int = 1) -> list[dict[str, Any]]:
    lines = []
    for number, value in enumerate(top1):
        best = max(top1[: number + 1])
        lines.append(
            {"epoch": first + number, "test/top1": value, "best/epoch": first + top1.index(best), "best/top1": best}
        )
    return lines


def _write(path: Path, config: str, lines: Sequence[Mapping[str, Any]], session: Mapping[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "env.json").write_text(json.dumps({"sessions": [session]}))
    return path
