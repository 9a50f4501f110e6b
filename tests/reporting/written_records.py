"""Run records as a run would write them, without running anything."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    path = output / (folder or config.run_folder())
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config.to_yaml())
    lines = []
    for number, value in enumerate(top1):
        epoch, best = first + number, max(top1[: number + 1])
        lines.append(
            {"epoch": epoch, "lr": 0.05, "train/loss": 1.5, "test/top1": value, "test/top5": top5, "test/loss": 1.0}
            | {"seconds/train": 1.0, "seconds/eval": 0.1, "images_per_second": 100.0}
            | {"best/epoch": first + top1.index(best), "best/top1": best}
        )
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
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
    (path / "env.json").write_text(json.dumps({"sessions": [own]}))
    return path
