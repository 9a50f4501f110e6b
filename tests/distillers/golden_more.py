"""Reference values of further logit methods, float64: what each method's published code gives.

``tests/golden/more/<family>.json`` lists the cases of a paper, ``<family>.npz`` holds their own inputs and results, and
``logits.npz`` the logits that all of them share: of random images (8 of 100 classes, 5 of 10) and of odd ones (6 of 12,
where rows tie, are constant, or the teacher is certain). A case reads ``method|argument=value,...``; ``+lskd`` means
that both logits were standardised first.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdistill.distillers.functional import standardize

FOLDER = Path(__file__).parent.parent / "golden" / "more"
SHARED = ("student", "teacher", "target", "student_strong", "teacher_strong")
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Case:
    """One case; inputs are named as in the files, without what they begin with."""

    family: str
    inputs: str  # 8x100, 5x10, 6x12 or trajectory
    name: str
    method: str
    standardized: bool  # ``logits`` says how
    arguments: dict[str, Any]
    loss: float | None  # None: the published code gives none, or NaN
    numbers: dict[str, float] = field(default_factory=dict)  # terms and scalars beside the loss

    def tensors(self, *trained: str) -> dict[str, Tensor]:
        """The shared logits and the family's own inputs by name; those in ``trained`` want a gradient."""
        found: dict[str, Tensor] = {}
        if self.inputs != "trajectory":
            with np.load(FOLDER / "logits.npz") as arrays:
                found |= {name: torch.from_numpy(arrays[f"{self.inputs}/{name}"]) for name in SHARED}
        with np.load(FOLDER / f"{self.family}.npz") as arrays:
            for key in arrays.files:
                inputs, head, *rest = key.split("/")
                if inputs == self.inputs and "|" not in head:
                    found["/".join(rest)] = torch.from_numpy(arrays[key])
        return {name: value.requires_grad_() if name in trained else value for name, value in found.items()}

    def results(self) -> dict[str, Tensor]:
        """The case's arrays by name: ``grad`` (of the student's logits), ``grad_NAME``, further outputs."""
        start = f"{self.inputs}/{self.name}/"
        with np.load(FOLDER / f"{self.family}.npz") as arrays:
            return {
                key.removeprefix(start): torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith(start)
            }

    def logits(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's, standardised where the case says so."""
        student, teacher = given["student"], given["teacher"]
        return (standardize(student), standardize(teacher)) if self.standardized else (student, teacher)


def cases(family: str, *methods: str) -> list[Any]:
    """The cases of ``methods`` (by the word before ``|``, without ``+lskd``) as parameters of a test; all if none."""
    found = []
    for row in json.loads((FOLDER / f"{family}.json").read_text()):
        head, _, text = row["case"].partition("|")
        method = head.removesuffix("+lskd")
        if methods and method not in methods:
            continue
        arguments = dict(_argument(word) for word in text.split(",") if word)
        case = Case(
            family, row["inputs"], row["case"], method, head != method, arguments, row["loss"], row.get("numbers", {})
        )
        found.append(pytest.param(case, id=f"{row['inputs']}-{row['case']}"))
    assert found, (family, methods)
    return found


def check(case: Case, loss: Tensor, given: Mapping[str, Tensor], *, tolerance: float = TOLERANCE) -> None:
    """``loss``, and after its backward the gradient of every input that wants one, agree with the case.

    Args:
        given: what ``Case.tensors`` returned.
        tolerance: of each gradient's largest entry, and of the loss.
    """
    assert loss.item() == pytest.approx(case.loss, rel=tolerance)
    loss.backward()
    results = case.results()
    for name, value in given.items():
        if value.requires_grad:
            expected = results["grad" if name == "student" else f"grad_{name}"]
            assert value.grad is not None, name
            close(value.grad, expected, name, tolerance=tolerance)


def close(found: Tensor, expected: Tensor, name: str = "", *, tolerance: float = TOLERANCE) -> None:
    """Equal to ``tolerance`` of the largest entry."""
    assert found.shape == expected.shape, name
    assert (found - expected).abs().max() <= tolerance * expected.abs().max(), name


def _argument(word: str) -> tuple[str, Any]:
    name, _, text = word.partition("=")
    if text in ("True", "False"):
        return name, text == "True"
    try:
        number = float(text)
    except ValueError:
        return name, text
    return name, int(number) if number.is_integer() and "." not in text and "e" not in text else number
