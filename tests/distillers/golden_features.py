"""Reference losses and gradients of methods that read features, float64: what each one's published code gives.

``tests/golden/features/<method>.json`` holds ``arrays``, how every input and parameter is drawn, and ``values``: the
losses, and of each gradient its norm, its sum, some entries and its product with a random array.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "golden" / "features"
TOLERANCE = 1e-9


def cases(method: str) -> list[Any]:
    """The cases of ``method``, as parameters of a test."""
    rows = json.loads((FOLDER / f"{method}.json").read_text())["values"]
    return [pytest.param({**row, "method": method}, id=row["key"]) for row in rows]


def arguments(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a case by name."""
    pairs = (word.split("=") for word in row["arguments"].split(","))
    return {name: float(value) for name, value in pairs}


def tensors(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs and parameters of a case by name, float64; the teacher's own alone want no gradient."""
    file = json.loads((FOLDER / f"{row['method']}.json").read_text())
    found = {}
    for name, recipe in file["arrays"].items():
        case, _, short = name.partition("/")
        if case == row["case"]:
            values = torch.from_numpy(drawn(file["seed"], name, recipe))
            short = short.removeprefix(f"{row['method']}/")
            found[short] = values.requires_grad_(
                not short.startswith(("teacher_stage", "teacher_p", "teacher_l", "teacher_c", "teacher_b"))
            )
    return found


def drawn(seed: int, name: str, recipe: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """An array from its recipe, through float32."""
    values = recipe.get("offset", 0.0) + recipe.get("factor", 1.0) * normal(seed, name, recipe["shape"])
    if "rows" in recipe:
        values = values * np.reshape(recipe["rows"], (-1,) + (1,) * (values.ndim - 1))
    if recipe.get("relu"):
        values = np.maximum(values, 0)
    narrow = values.astype(np.float32)
    assert hashlib.sha256(narrow.tobytes()).hexdigest()[:16] == recipe["sha256"], name
    return narrow.astype(np.float64)


def normal(seed: int, name: str, shape: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(0, 1, shape)


def stages(given: Mapping[str, Tensor], side: str) -> list[Tensor]:
    """The stages of ``student`` or ``teacher`` after the stem, in order."""
    return [given[name] for name in sorted(given) if name.startswith(f"{side}_stage")]


def fill(module: nn.Module, given: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Give ``module`` its parameters from ``given``; they are returned by the names that they have there."""
    module.double().train()
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            assert parameter.shape == given[prefix + name].shape
            parameter.copy_(given[prefix + name])
    return {prefix + name: parameter for name, parameter in own.items()}


def check(row: Mapping[str, Any], loss: Tensor, given: Mapping[str, Tensor]) -> None:
    """``loss`` and its gradients by ``given`` agree with the case to 1e-9; what is not listed there has none."""
    assert loss.item() == pytest.approx(row["loss"], rel=TOLERANCE)
    loss.backward()
    with_gradient = {name for name, value in given.items() if value.grad is not None}
    assert with_gradient == set(row["grads"])
    seed = json.loads((FOLDER / f"{row['method']}.json").read_text())["seed"]
    for name, expected in row["grads"].items():
        gradient = given[name].grad
        assert gradient is not None
        if expected.get("zero"):  # a bias in front of BatchNorm: what is computed is noise
            assert gradient.abs().max() < TOLERANCE
            continue
        probe = torch.from_numpy(normal(seed, f"{row['key']}/{name}/probe", list(gradient.shape)))
        flat, norm = gradient.flatten(), gradient.norm().item()
        near = {"rel": TOLERANCE, "abs": TOLERANCE * gradient.abs().max().item()}
        assert flat[expected["at"]].tolist() == pytest.approx(expected["entries"], **near), name
        assert norm == pytest.approx(expected["norm"], rel=TOLERANCE), name
        assert flat.sum().item() == pytest.approx(expected["sum"], abs=TOLERANCE * flat.abs().sum().item()), name
        assert (gradient * probe).sum().item() == pytest.approx(expected["probe"], abs=TOLERANCE * norm), name
