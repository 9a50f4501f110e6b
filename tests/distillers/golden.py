"""Reference losses and gradients, float64: what each method's published implementation gives.

``tests/golden/logit_losses.json`` lists the cases, ``logit_losses.npz`` holds their inputs and gradients. A case reads
``method|argument=value,...``; ``+lskd`` means that both logits were standardised first.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdistill.distillers.functional import standardize

FOLDER = Path(__file__).parent.parent / "golden"


def cases(method: str) -> list[Any]:
    """The cases of ``method``, as parameters of a test."""
    rows = json.loads((FOLDER / "logit_losses.json").read_text())
    return [
        pytest.param(row, id=f"{row['inputs']}-{row['case']}")
        for row in rows
        if row["case"].split("|")[0].removesuffix("+lskd") == method
    ]


def check(row: dict[str, Any], loss: Callable[..., Tensor]) -> None:
    """Loss and gradient of ``loss(student, teacher, target, **arguments)`` agree with the case to 1e-9."""
    with np.load(FOLDER / "logit_losses.npz") as arrays:
        student, teacher, target = (
            torch.from_numpy(arrays[f"{row['inputs']}/{name}"]) for name in ("student", "teacher", "target")
        )
        expected = torch.from_numpy(arrays[f"{row['inputs']}/{row['case']}/grad"])
    method, numbers = row["case"].split("|")
    arguments = {name: float(value) for name, value in (word.split("=") for word in numbers.split(","))}
    student.requires_grad_()
    inputs = (standardize(student), standardize(teacher)) if method.endswith("+lskd") else (student, teacher)
    value = loss(*inputs, target, **arguments)
    value.backward()
    assert value.item() == pytest.approx(row["loss"], rel=1e-9)
    assert student.grad is not None
    assert (student.grad - expected).abs().max() <= 1e-9 * expected.abs().max()
