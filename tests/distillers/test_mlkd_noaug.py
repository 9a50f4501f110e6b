"""MLKD of one view against the published code, and how its method weighs the levels."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mdistill.distillers.functional import standardize
from mdistill.distillers.mlkd import weak_view_terms
from mdistill.errors import UserError

from . import examples, golden

CASES = golden.cases("mlkd_noaug_total")
EXTRA = (3.0, 5.0, 2.0, 6.0)


def total(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    ready: bool,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
) -> Tensor:
    """Everything that the method adds up, cross-entropy included."""
    logits = (standardize(student), standardize(teacher)) if ready else (student, teacher)
    terms = weak_view_terms(*logits, student, teacher, temperatures=(temperature, *EXTRA))
    return ce_weight * F.cross_entropy(student, target) + kd_weight * torch.stack(list(terms.values())).sum()


def test_reference_cases_are_all_there():
    assert len(CASES) == 4


@pytest.mark.parametrize("row", CASES)
def test_equals_the_published_code(row):
    """Not by the helper of the other methods: here standardised logits are for one of the levels alone."""
    inputs, case = row["inputs"], row["case"]
    method, numbers = case.split("|")
    arguments = {name: float(value) for name, value in (word.split("=") for word in numbers.split(","))}
    with np.load(golden.FOLDER / "logit_losses.npz") as arrays:
        student, teacher, target = (torch.from_numpy(arrays[f"{inputs}/{x}"]) for x in ("student", "teacher", "target"))
        expected = torch.from_numpy(arrays[f"{inputs}/{case}/grad"])
    student.requires_grad_()
    loss = total(student, teacher, target, method.endswith("+lskd"), **arguments)
    loss.backward()
    assert loss.item() == pytest.approx(row["loss"], rel=1e-9)
    assert (student.grad - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("standardize_logits", [False, True])
def test_the_method_adds_up_to_that_total(standardize_logits):
    settings = {"ce_weight": 0.3, "kd_weight": 2.0, "temperature": 4.0, "extra_temperatures": list(EXTRA)}
    distiller = examples.build("mlkd_noaug", **settings, standardize_logits=standardize_logits).double().eval()
    batch = examples.batch(dtype=torch.float64)
    logits = distiller.student(batch.image), distiller.teacher(batch.image)
    expected = total(*logits, batch.target, standardize_logits, 4.0, 0.3, 2.0)
    torch.testing.assert_close(distiller(batch, examples.epoch()).total, expected)


def test_terms_are_weighed_level_by_level():
    batch = examples.batch()
    one, two = (examples.build("mlkd_noaug", kd_weight=w).eval()(batch, examples.epoch()) for w in (1.0, 2.0))
    assert list(one.distillation) == ["instance", "class", "batch"]
    torch.testing.assert_close(two.distillation, {name: 2 * term for name, term in one.distillation.items()})
    assert list(examples.build("mlkd_noaug", kd_weight=0.0)(batch, examples.epoch()).terms) == ["ce"]


def test_the_temperatures_are_the_first_and_the_others():
    batch = examples.batch()
    given = [
        examples.build("mlkd_noaug", temperature=first, extra_temperatures=others).eval()(batch, examples.epoch())
        for first, others in ((2.0, [3.0, 5.0]), (5.0, [2.0, 3.0]), (2.0, []))
    ]
    torch.testing.assert_close(given[0].total, given[1].total)
    assert given[2].total < given[0].total


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"extra_temperatures.*greater than 0, found 0"):
        examples.build("mlkd_noaug", extra_temperatures=[3.0, 0.0])
    with pytest.raises(UserError, match=r"^distiller: MLKDNoAug has nothing to train on: ce_weight, kd_weight all 0"):
        examples.build("mlkd_noaug", ce_weight=0.0, kd_weight=0.0)
