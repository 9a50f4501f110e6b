"""LA against the published code, a loop, a case worked by hand, and its properties."""

from math import exp, log

import pytest
import torch

from mdistill.distillers.kd import kd_loss
from mdistill.distillers.la import la_loss, swap
from mdistill.errors import UserError

from . import examples, golden

CASES = golden.cases("la")


def test_reference_cases_are_all_there():
    assert len(CASES) == 2


@pytest.mark.parametrize("row", CASES)
def test_equals_the_published_code(row):
    golden.check(row, la_loss)


def by_hand():
    """A teacher that is wrong, (1/2, 1/4, 1/4) with true class 1, and a uniform student."""
    return torch.zeros(1, 3).double(), torch.tensor([[2.0, 1.0, 1.0]]).double().log(), torch.tensor([1])


def test_a_wrong_teacher_by_hand():
    """Swapped, the teacher gives (1/4, 1/2, 1/4): KL to thirds = 1/2 ln 3/2 + 2 (1/4 ln 3/4)."""
    loss = la_loss(*by_hand(), temperature=1.0)
    assert loss.item() == pytest.approx(0.5 * log(3 / 2) + 0.5 * log(3 / 4), rel=1e-12)


def test_two_entries_change_places_and_no_other():
    logits = torch.tensor([[4.0, 1.0, 2.0], [4.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    given = logits.clone()
    expected = [[1.0, 4.0, 2.0], [4.0, 1.0, 2.0], [0.0, 1.0, 1.0]]  # wrong; right; a tie, of which the first counts
    assert swap(logits, torch.tensor([1, 0, 2])).tolist() == expected
    assert torch.equal(logits, given)


@pytest.mark.parametrize("seed", range(3))
def test_the_swapped_teacher_is_always_right_and_swapping_twice_changes_nothing(seed):
    logits, target = examples.logits(seed, 20, 6), examples.targets(seed, 20, 6)
    swapped = swap(logits, target)
    assert torch.equal(swapped.argmax(dim=1), target)
    assert torch.equal(swapped.sort(dim=1).values, logits.sort(dim=1).values)
    assert torch.equal(swap(swapped, logits.argmax(dim=1)), logits)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_a_loop(temperature):
    """Softened probabilities, swapped as lists."""
    student, teacher, target = examples.logits(0, 12, 5), examples.logits(1, 12, 5), examples.targets(2, 12, 5)
    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        p, q = ([exp(z / temperature) / sum(exp(x / temperature) for x in row) for z in row] for row in (t, s))
        top = p.index(max(p))
        p[top], p[y] = p[y], p[top]
        total += sum(a * log(a / b) for a, b in zip(p, q, strict=True))
    loss = la_loss(student, teacher, target, temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * total / 12, rel=1e-10)


def test_is_kd_where_the_teacher_is_right_and_not_elsewhere():
    student, teacher = examples.logits(0, 8, 5), examples.logits(1, 8, 5)
    kd = kd_loss(student, teacher, temperature=4.0)
    assert la_loss(student, teacher, teacher.argmax(dim=1), temperature=4.0) == kd
    assert abs(la_loss(student, teacher, teacher.argmin(dim=1), temperature=4.0) - kd) > 0.1


def test_is_0_where_the_student_is_the_swapped_teacher():
    teacher, target = examples.logits(1, 8, 5), examples.targets(2, 8, 5)
    student = swap(teacher, target).requires_grad_()
    loss = la_loss(student, teacher, target, temperature=4.0)
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert student.grad.abs().max() < 1e-14


def test_standardising_before_or_after_the_swap_is_the_same():
    batch, distiller = examples.batch(), examples.build("la", standardize_logits=True).eval()
    logits = (network(batch.image) for network in (distiller.student, distiller.teacher))
    student, teacher = ((z - z.mean(1, True)) / (1e-7 + z.std(1, keepdim=True)) for z in logits)
    expected = la_loss(student, teacher, batch.target, temperature=4.0)
    torch.testing.assert_close(distiller(batch, examples.epoch()).terms["kd"], expected)


def test_terms_are_weighed_and_can_be_switched_off():
    batch = examples.batch()
    assert list(examples.build("la")(batch, examples.epoch()).terms) == ["kd"]
    assert list(examples.build("la", ce_weight=0.5, kd_weight=0.0)(batch, examples.epoch()).terms) == ["ce"]
    one, two = (examples.build("la", kd_weight=w).eval()(batch, examples.epoch()).total for w in (1.0, 2.0))
    torch.testing.assert_close(two, 2 * one)
    with pytest.raises(UserError, match=r"^distiller: LA has nothing to train on: ce_weight, kd_weight all 0"):
        examples.build("la", kd_weight=0.0)
