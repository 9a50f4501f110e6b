"""GDKD against the published code, DKD itself, and how it decouples."""

import pytest
import torch

from mdistill.distillers.dkd import dkd_loss
from mdistill.distillers.gdkd import gdkd_loss, group_loss, top_classes, within_loss
from mdistill.distillers.kd import kd_loss
from mdistill.errors import UserError

from . import examples, golden_more

CASES = golden_more.cases("gdkd")


def test_reference_cases_are_all_there():
    assert len(CASES) == 10


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case):
    given = case.tensors("student")
    golden_more.check(case, gdkd_loss(*case.logits(given), **case.arguments), given)


def test_a_right_teacher_and_one_class_make_it_dkd():
    student, teacher = examples.logits(0, 6, 9), examples.logits(1, 6, 9)
    found = gdkd_loss(student, teacher, k=1, w0=1.0, w1=3.0, w2=8.0, temperature=4.0)
    expected = dkd_loss(student, teacher, teacher.argmax(dim=1), alpha=1.0, beta=8.0, temperature=4.0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_three_terms_weighted_by_the_groups(temperature):
    """Row by row, with P the teacher's probability of the top classes: KD = group + P top + (1 - P) others."""
    for row in range(5):
        student, teacher = examples.logits(0, 5, 9)[row : row + 1], examples.logits(1, 5, 9)[row : row + 1]
        top = top_classes(teacher, 3)
        share = (teacher / temperature).softmax(dim=1)[top].sum()
        within = [within_loss(student, teacher, keep, temperature=temperature) for keep in (top, ~top)]
        parts = group_loss(student, teacher, top, temperature=temperature) + share * within[0] + (1 - share) * within[1]
        torch.testing.assert_close(parts, kd_loss(student, teacher, temperature=temperature))


def test_ties_leave_k_classes_on_top():
    assert top_classes(torch.zeros(3, 7), 4).sum(dim=1).tolist() == [4, 4, 4]
    assert top_classes(torch.tensor([[3.0, 1, 2, 5]]), 2).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "both"])
def test_gradients_are_finite_where_a_network_is_certain(divergence):
    student, teacher = (1e4 * examples.logits(seed, 6, 7).float() for seed in (0, 1))
    student.requires_grad_()
    loss = gdkd_loss(student, teacher, k=3, w0=1.0, w1=2.0, w2=8.0, temperature=4.0, divergence=divergence)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_logs_its_terms_apart():
    batch = examples.batch()
    assert list(examples.build("gdkd")(batch, examples.epoch()).distillation) == ["group", "top", "others"]
    assert list(examples.build("gdkd", w1=0.0)(batch, examples.epoch()).distillation) == ["group", "others"]


def test_every_class_on_top_is_refused():
    assert examples.build("gdkd", k=6).k == 6
    with pytest.raises(UserError, match=r"^distiller.k: 7 leaves no other of 7 classes; give less"):
        examples.build("gdkd", k=7)
