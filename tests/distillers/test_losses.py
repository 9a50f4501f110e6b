"""What every loss must stand: extreme and degenerate logits, shifts, and a second derivation by finite differences."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mdistill.distillers.bd_kd import bd_kd_loss
from mdistill.distillers.ckd import ckd_loss
from mdistill.distillers.ctkd import ctkd_loss
from mdistill.distillers.dhkd import binary_kl_norm_loss
from mdistill.distillers.dist import dist_loss
from mdistill.distillers.dkd import dkd_loss, nckd_loss, tckd_loss
from mdistill.distillers.functional import soft_target_loss, standardize
from mdistill.distillers.gdkd import gdkd_loss
from mdistill.distillers.kd import kd_loss
from mdistill.distillers.la import la_loss
from mdistill.distillers.label_revision import label_revision_loss
from mdistill.distillers.luminet import luminet_loss
from mdistill.distillers.mcld import category_loss, instance_loss, normalize, sample_loss
from mdistill.distillers.mlkd import weak_view_terms
from mdistill.distillers.nkd import nkd_loss
from mdistill.distillers.normkd import normkd_dkd_loss, normkd_loss
from mdistill.distillers.rld import masked_correlation_loss, rld_loss, sample_confidence_loss
from mdistill.distillers.sinkd import sinkhorn_loss
from mdistill.distillers.sld import swapped_student_loss, swapped_teacher_loss
from mdistill.distillers.tekap import tekap_loss
from mdistill.distillers.ttm import ttm_loss
from mdistill.distillers.wttm import wttm_loss

from . import examples

pytestmark = pytest.mark.slow

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def instance(student: Tensor, teacher: Tensor, target: Tensor, filled: int) -> Tensor:
    """The instance-wise term against a queue of 6 slots that holds a copy of every second sample."""
    queue = normalize(examples.logits(3, 6, student.shape[1]).to(student.dtype))
    index = torch.arange(len(student))
    return instance_loss(student, teacher, index, queue, 2 * torch.arange(6), torch.tensor(filled), temperature=0.2)


def mlkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Three levels at two temperatures, instances standardised."""
    inputs = standardize(student), standardize(teacher), student, teacher
    return torch.stack(list(weak_view_terms(*inputs, temperatures=(4.0, 0.5)).values())).sum()


def tekap(student: Tensor, teacher: Tensor) -> Tensor:
    """The same noise for every sample, whatever its place."""
    noise = examples.logits(6, 3, teacher.shape[1], 1.0).to(teacher.dtype)[:, None].expand(-1, *teacher.shape)
    return tekap_loss(student, teacher, noise, temperature=4.0, noise_weight=0.1, augmented_weight=0.8)


def gdkd(student: Tensor, teacher: Tensor, divergence: Literal["forward", "both"] = "forward") -> Tensor:
    """A class on top."""
    return gdkd_loss(student, teacher, k=1, w0=1.0, w1=2.0, w2=8.0, temperature=4.0, divergence=divergence)


ON_PROBABILITIES: dict[str, Loss] = {
    "kd": lambda s, t, y: kd_loss(s, t, temperature=4.0),
    "bd-kd": lambda s, t, y: bd_kd_loss(s, t, temperature=4.0, balance=2.0),
    "tckd": lambda s, t, y: tckd_loss(s, t, y, temperature=4.0),
    "nckd": lambda s, t, y: nckd_loss(s, t, y, temperature=4.0),
    "dkd": lambda s, t, y: dkd_loss(s, t, y, alpha=1.0, beta=8.0, temperature=0.5),
    "scd": lambda s, t, y: sample_confidence_loss(s, t, y, temperature=4.0),
    "mcd": lambda s, t, y: masked_correlation_loss(s, t, y, temperature=4.0),
    "mcd-g": lambda s, t, y: masked_correlation_loss(s, t, y, temperature=4.0, mask="g"),
    "rld": lambda s, t, y: rld_loss(s, t, y, alpha=1.0, beta=8.0, temperature=0.5),
    "ttm": lambda s, t, y: ttm_loss(s, t, power=0.2),
    "wttm": lambda s, t, y: wttm_loss(s, t, power=0.2),
    "dist": lambda s, t, y: dist_loss(s, t, beta=2.0, gamma=2.0, temperature=4.0),
    "dist-cold": lambda s, t, y: dist_loss(s, t, beta=1.0, gamma=1.0, temperature=0.5),
    "sinkhorn": lambda s, t, y: sinkhorn_loss(s, t, temperature=2.0, regularization=0.1, iterations=20),
    "sinkhorn-sharp": lambda s, t, y: sinkhorn_loss(s, t, temperature=2.0, regularization=0.01, iterations=20),
    "soft-targets": lambda s, t, y: soft_target_loss(s, t, temperature=2.0),
    "la": lambda s, t, y: la_loss(s, t, y, temperature=4.0),
    "la-cold": lambda s, t, y: la_loss(s, t, y, temperature=0.5),
    "nkd": lambda s, t, y: nkd_loss(s, t, y, gamma=1.5, temperature=1.0),
    "nkd-soft": lambda s, t, y: nkd_loss(s, t, y, gamma=3.5, temperature=3.0),
    "mlkd": lambda s, t, y: mlkd(s, t),
    "ctkd": lambda s, t, y: ctkd_loss(s, t, torch.tensor(2.5, dtype=s.dtype)),
    "gdkd": lambda s, t, y: gdkd(s, t),
    "gdkd-both": lambda s, t, y: gdkd(s, t, "both"),
    "sld-teacher": lambda s, t, y: swapped_teacher_loss(s, t, y, temperatures=(1.0, 4.0)),
    "sld-student": lambda s, t, y: swapped_student_loss(s, y, temperatures=(1.0, 4.0)),
    "tekap": lambda s, t, y: tekap(s, t),
    "normkd": lambda s, t, y: normkd_loss(s, t, temperature_norm=2.0),
    "normkd-dkd": lambda s, t, y: normkd_dkd_loss(s, t, y, alpha=4.0, beta=5.0, temperature_norm=2.0),
}
LOSSES: dict[str, Loss] = {
    **ON_PROBABILITIES,
    "kd-standardized": lambda s, t, y: kd_loss(standardize(s), standardize(t), temperature=2.0),
    "rld-standardized": lambda s, t, y: rld_loss(
        standardize(s), standardize(t), y, alpha=1.0, beta=8.0, temperature=2.0
    ),
    "binary-kl-norm": lambda s, t, y: binary_kl_norm_loss(s, t, temperature=2.0),
    "instance": lambda s, t, y: instance(s, t, y, 4),
    "instance-empty": lambda s, t, y: instance(s, t, y, 0),
    "sample": lambda s, t, y: sample_loss(s, t, temperature=0.2),
    "sample-cold": lambda s, t, y: sample_loss(s, t, temperature=0.001),
    "category": lambda s, t, y: category_loss(s, t, y, temperature=0.2),
    "luminet": lambda s, t, y: luminet_loss(s, t, temperature=4.0),
    "luminet-cold": lambda s, t, y: luminet_loss(s, t, temperature=0.5),
    "ckd": lambda s, t, y: ckd_loss(s, t, temperature=1.0),
    "label-revision": lambda s, t, y: label_revision_loss(s, t, y, lambda1=4.0, lambda2=1.0, eta=0.8),
}


def certain(target: Tensor, classes: int, margin: float) -> Tensor:
    """Logits of networks that are sure of ``target``."""
    return margin * torch.nn.functional.one_hot(target, classes).double()


def inputs() -> dict[str, Any]:
    """(student, teacher, target) of every case, float64."""
    student, teacher, target = examples.logits(0, 6, 5), examples.logits(1, 6, 5), examples.targets(2, 6, 5)
    zeros = torch.zeros_like(student)
    signs = 1e4 * student.sign()
    return {
        "plain": (student, teacher, target),
        "student of 1e4": (signs, teacher, target),
        "teacher of 1e4": (student, 1e4 * teacher.sign(), target),
        "both of 1e4": (signs, 1e4 * teacher.sign(), target),
        "spread over 1e4": (1e4 * student, 1e4 * teacher, target),
        "zero student": (zeros, teacher, target),
        "zero teacher": (student, zeros, target),
        "zero both": (zeros, zeros, target),
        "equal": (teacher, teacher, target),
        "teacher certain and right": (student, certain(target, 5, 1e4), target),
        "teacher certain and wrong": (student, certain((target + 1) % 5, 5, 1e4), target),
        "student certain and right": (certain(target, 5, 1e4), teacher, target),
        "student certain and wrong": (certain((target + 1) % 5, 5, 1e4), teacher, target),
        "both certain, of different classes": (certain((target + 1) % 5, 5, 1e4), certain(target, 5, 1e4), target),
        "every class masked": (student, -certain(target, 5, 3.0), target),
        "no positive pair": (student[:5], teacher[:5], torch.arange(5)),
        "one class in the batch": (student, teacher, torch.zeros_like(target)),
        "batch of 1": (student[:1], teacher[:1], target[:1]),
        "2 classes": (student[:, :2], teacher[:, :2], target % 2),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_are_finite(loss, dtype):
    for case, (student, teacher, target) in inputs().items():
        student = student.to(dtype, copy=True).requires_grad_()
        value = LOSSES[loss](student, teacher.to(dtype), target)
        value.backward()
        assert value.dtype == dtype, case
        assert value.shape == (), case
        assert value.isfinite(), case
        assert student.grad.isfinite().all(), case
        assert value >= -1e-5, case  # a divergence or a cross-entropy


@pytest.mark.parametrize("loss", ON_PROBABILITIES)
def test_a_shift_of_all_logits_changes_nothing(loss):
    student, teacher, target = inputs()["plain"]
    shifts = examples.logits(4, 6, 1, 10.0), examples.logits(5, 6, 1, 10.0)
    moved = ON_PROBABILITIES[loss](student + shifts[0], teacher + shifts[1], target)
    torch.testing.assert_close(moved, ON_PROBABILITIES[loss](student, teacher, target), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["kd", "bd-kd", "tckd", "nckd", "dkd", "mcd", "mcd-g"])
def test_is_0_where_student_equals_teacher(loss):
    _, teacher, target = inputs()["plain"]
    student = teacher.clone().requires_grad_()
    value = ON_PROBABILITIES[loss](student, teacher, target)
    value.backward()
    assert abs(value.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.slow
def test_gradient_equals_finite_differences(loss):
    cases = inputs()
    for case in ("plain", "every class masked", "2 classes", "batch of 1"):
        student, teacher, target = cases[case]
        function = partial(LOSSES[loss], t=teacher, y=target)
        assert torch.autograd.gradcheck(
            function, (student.clone().requires_grad_(),), eps=1e-6, atol=1e-4, rtol=1e-3, fast_mode=True
        ), case


@pytest.mark.parametrize(
    "loss", [name for name in LOSSES if name != "instance"]
)  # whose samples are numbered by their place here
def test_the_order_of_the_batch_does_not_matter(loss):
    student, teacher, target = inputs()["plain"]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = LOSSES[loss](student[order], teacher[order], target[order])
    torch.testing.assert_close(shuffled, LOSSES[loss](student, teacher, target), rtol=1e-12, atol=1e-14)
