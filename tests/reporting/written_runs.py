"""Run folders of the tests, written without training anything."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def write(
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
    session: dict[str, Any] | None = None,
) -> Path:
    """A run with one line for each of ``top1``; the folder."""
    folder = root / "tiny" / method / (f"{teacher}_{student}" if teacher else student) / variant / f"seed{seed}"
    folder.mkdir(parents=True)
    config = {
        "data": {"name": "tiny", "batch_size": 50},
        "teacher": {"name": teacher, "checkpoint": "x.pth", "expected_top1": None} if teacher else None,
        "student": {"name": student},
        "distiller": {"name": method},
        "solver": {"epochs": epochs},
        "seed": seed,
        "variant": variant,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"epoch": epoch, "test/top1": value, "images_per_second": 1000.0 * epoch}
        for epoch, value in enumerate(top1, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    noted: dict[str, Any] = {"commit": "abc", "device": "cpu", **(session or {})}
    noted["cell"] = cell or f"{method}{teacher}{student}{variant}"
    (folder / "env.json").write_text(json.dumps({"sessions": [noted]}))
    return folder
