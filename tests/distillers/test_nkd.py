"""NKD against the published code, a loop, a case worked by hand, and its properties."""

from math import exp, log

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.dkd import nckd_loss
from mdistill.distillers.nkd import nkd_loss, non_target_loss, target_loss
from mdistill.errors import UserError

from . import examples, golden

CASES = golden.cases("nkd")


def test_reference_cases_are_all_there():
    assert len(CASES) == 2


@pytest.mark.parametrize("row", CASES)
def test_equals_the_published_code(row):
    golden.check(row, nkd_loss)


def by_hand():
    """Teacher (1/2, 2/5, 1/10) with true class 0; the student gives (1/2, 1/4, 1/4)."""
    student, teacher = (torch.tensor([row]).double().log() for row in ([2.0, 1.0, 1.0], [5.0, 4.0, 1.0]))
    return student, teacher, torch.tensor([0])


def test_the_target_term_by_hand():
    """-1/2 ln 1/2."""
    assert target_loss(*by_hand()).item() == pytest.approx(0.5 * log(2), rel=1e-12)


def test_the_non_target_term_by_hand():
    """The student is uniform over two classes whatever the temperature: lambda^2 ln 2 for any teacher.

    The other way round, at lambda = 2 the student's (4, 1) becomes (2, 1) / 3, the teacher's weights are 1/2 each:
    4 (1/2 ln 3/2 + 1/2 ln 3) = 2 ln 9/2.
    """
    student, teacher, target = by_hand()
    for temperature in (1.0, 2.0):
        loss = non_target_loss(student, teacher, target, temperature=temperature)
        assert loss.item() == pytest.approx(temperature**2 * log(2), rel=1e-12)
    loss = non_target_loss(teacher, student, target, temperature=2.0)
    assert loss.item() == pytest.approx(2 * log(9 / 2), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_a_loop(temperature):
    student, teacher, target = examples.logits(0, 12, 5), examples.logits(1, 12, 5), examples.targets(2, 12, 5)
    total = 0.0

    def softmax(row, t=1.0):
        return [exp(z / t) / sum(exp(x / t) for x in row) for z in row]

    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        total -= softmax(t)[y] * log(softmax(s)[y])
        p, q = (softmax(row[:y] + row[y + 1 :], temperature) for row in (t, s))
        total -= 3.5 * temperature**2 * sum(a * log(b) for a, b in zip(p, q, strict=True))
    loss = nkd_loss(student, teacher, target, gamma=3.5, temperature=temperature)
    assert loss.item() == pytest.approx(total / 12, rel=1e-10)


def test_the_non_target_term_has_the_gradient_of_dkd_s():
    """They differ by the teacher's entropy, which is the term's least value."""
    teacher, target = examples.logits(1, 8, 6), examples.targets(2, 8, 6)
    student = examples.logits(0, 8, 6).requires_grad_()
    ours = non_target_loss(student, teacher, target, temperature=3.0)
    theirs = nckd_loss(student, teacher, target, temperature=3.0)
    torch.testing.assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student))
    least = non_target_loss(teacher, teacher, target, temperature=3.0)
    torch.testing.assert_close(ours - theirs, least)
    assert least < ours


def test_non_target_logits_alone_decide_the_non_target_term():
    student, teacher, target = examples.logits(0, 8, 6), examples.logits(1, 8, 6), examples.targets(2, 8, 6)
    moved = student.scatter_add(1, target[:, None], examples.logits(3, 8, 1))
    before, after = (non_target_loss(z, teacher, target, temperature=2.0) for z in (student, moved))
    torch.testing.assert_close(before, after, rtol=1e-14, atol=0)


def test_the_target_term_trusts_the_teacher_s_confidence():
    """A teacher certain of the true class leaves cross-entropy, one certain of another nothing."""
    student, target = examples.logits(0, 8, 6), examples.targets(2, 8, 6)
    certain = 1e4 * F.one_hot(target, 6).double()
    torch.testing.assert_close(target_loss(student, certain, target), F.cross_entropy(student, target))
    assert target_loss(student, certain, (target + 1) % 6) == 0


def test_two_classes_leave_no_non_target_distribution_to_learn():
    student = examples.logits(0, 4, 2).requires_grad_()
    loss = non_target_loss(student, examples.logits(1, 4, 2), torch.tensor([0, 1, 1, 0]), temperature=2.0)
    loss.backward()
    assert loss == 0
    assert student.grad.abs().max() == 0


def test_terms_are_weighed_and_the_second_can_be_switched_off():
    batch, distiller = examples.batch(), examples.build("nkd", ce_weight=0.5, gamma=2.0, temperature=3.0).eval()
    logits = distiller.student(batch.image), distiller.teacher(batch.image), batch.target
    expected = {
        "target": target_loss(*logits),
        "non_target": 2.0 * non_target_loss(*logits, temperature=3.0),
        "ce": 0.5 * F.cross_entropy(logits[0], batch.target),
    }
    torch.testing.assert_close(distiller(batch, examples.epoch()).terms, expected)
    assert list(examples.build("nkd", gamma=0.0)(batch, examples.epoch()).distillation) == ["target"]


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"temperature: .*greater than 0, found 0"):
        examples.build("nkd", temperature=0.0)
    with pytest.raises(UserError, match=r"gamma: .*greater than or equal to 0, found -1"):
        examples.build("nkd", gamma=-1.0)
