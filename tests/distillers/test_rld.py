"""RLD against the published code, cases worked by hand, DKD where the teacher is right, and its properties."""

from math import log

import pytest
import torch

from mdistill.distillers.dkd import dkd_loss
from mdistill.distillers.rld import masked_correlation_loss, rld_loss, sample_confidence_loss
from mdistill.errors import UserError

from . import examples, golden

CASES = golden.cases("rld")


def test_reference_cases_are_all_there():
    assert len(CASES) == 10


@pytest.mark.parametrize("row", CASES)
def test_equals_the_published_code(row):
    golden.check(row, rld_loss)


def by_hand():
    """The teacher ranks class 0 above the true class 1: (4, 2, 1.5, 0.5) / 8. The student is uniform."""
    return torch.zeros(1, 4), torch.tensor([[4.0, 2.0, 1.5, 0.5]]).log(), torch.tensor([1])


def test_sample_confidence_by_hand():
    """Teacher: its top class (1/2, 1/2). Student: the true class (1/4, 3/4). KL = 1/2 ln 2 + 1/2 ln 2/3."""
    loss = sample_confidence_loss(*by_hand(), temperature=1.0)
    assert loss.item() == pytest.approx(0.5 * log(2) + 0.5 * log(2 / 3), rel=1e-5)


def test_masked_correlation_by_hand():
    """ge masks 0 and 1: teacher (3/4, 1/4), student (1/2, 1/2). KL = 3/4 ln 3/2 + 1/4 ln 1/2.

    g masks 0 alone: teacher (1/2, 3/8, 1/8), student thirds. KL = 1/2 ln 3/2 + 3/8 ln 9/8 + 1/8 ln 3/8.
    """
    ge = masked_correlation_loss(*by_hand(), temperature=1.0)
    g = masked_correlation_loss(*by_hand(), temperature=1.0, mask="g")
    assert ge.item() == pytest.approx(0.75 * log(3 / 2) + 0.25 * log(1 / 2), rel=1e-5)
    assert g.item() == pytest.approx(0.5 * log(3 / 2) + 0.375 * log(9 / 8) + 0.125 * log(3 / 8), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (0.0, 1.0), (1.0, 0.0), (3.0, 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_dkd_where_the_teacher_is_right(seed, alpha, beta, temperature):
    student, teacher = examples.logits(seed, 12, 10).requires_grad_(), examples.logits(seed + 100, 12, 10)
    target = teacher.argmax(dim=1)
    numbers = {"alpha": alpha, "beta": beta, "temperature": temperature}
    rld, dkd = rld_loss(student, teacher, target, **numbers), dkd_loss(student, teacher, target, **numbers)
    torch.testing.assert_close(rld, dkd, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (rld, dkd)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)


def test_differs_from_dkd_where_the_teacher_is_wrong():
    student, teacher = examples.logits(0, 12, 10), examples.logits(1, 12, 10)
    target = teacher.argsort(dim=1)[:, -3]
    numbers = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}
    rld, dkd = rld_loss(student, teacher, target, **numbers), dkd_loss(student, teacher, target, **numbers)
    assert abs(rld - dkd) > 0.1


@pytest.mark.parametrize("mask", ["ge", "g"])
def test_equals_a_loop_over_the_unmasked_classes(mask):
    """Eqs. (7) to (9) with lists in place of masks, ties included."""
    student, target = examples.logits(0, 16, 6), examples.targets(2, 16, 6)
    teacher = examples.logits(1, 16, 6).round()
    expected = 0.0
    for row in range(16):
        of_target = teacher[row, target[row]]
        unmasked = [
            c for c in range(6) if teacher[row, c] < of_target or (mask == "g" and teacher[row, c] == of_target)
        ]
        if unmasked:
            p, q = ((logits[row, unmasked] / 3.0).softmax(dim=0) for logits in (teacher, student))
            expected += 9.0 * (p * (p / q).log()).sum().item() / 16
    loss = masked_correlation_loss(student, teacher, target, temperature=3.0, mask=mask)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_ties_with_the_true_class_are_masked():
    """All logits equal: ge keeps nothing, g everything."""
    student, teacher, target = examples.logits(0, 3, 5), torch.ones(3, 5, dtype=torch.float64), torch.tensor([0, 1, 2])
    assert masked_correlation_loss(student, teacher, target, temperature=1.0).item() == 0
    assert masked_correlation_loss(student, teacher, target, temperature=1.0, mask="g") > 0


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_row_with_every_class_masked_adds_nothing():
    student, teacher = examples.logits(0, 2, 5).requires_grad_(), examples.logits(1, 2, 5)
    target = torch.stack([teacher[0].argmin(), teacher[1].argmax()])
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN on the way either
        loss = masked_correlation_loss(student, teacher, target, temperature=2.0)
        loss.backward()
    assert student.grad[0].abs().max() == 0
    assert student.grad[1].abs().max() > 0
    alone = masked_correlation_loss(student[1:], teacher[1:], target[1:], temperature=2.0)
    torch.testing.assert_close(loss, alone / 2)  # and still counts in the mean


def test_both_terms_have_one_temperature_by_default():
    student, teacher, target = examples.logits(0, 4, 5), examples.logits(1, 4, 5), examples.targets(2, 4, 5)
    numbers = {"alpha": 1.0, "beta": 2.0, "temperature": 4.0}
    shared = rld_loss(student, teacher, target, **numbers)
    torch.testing.assert_close(shared, rld_loss(student, teacher, target, **numbers, sc_temperature=4.0))
    own = rld_loss(student, teacher, target, **numbers, sc_temperature=1.0)
    difference = [sample_confidence_loss(student, teacher, target, temperature=t) for t in (1.0, 4.0)]
    torch.testing.assert_close(own - shared, difference[0] - difference[1])
    batch = examples.batch()
    for settings, temperature in (({}, 4.0), ({"sc_temperature": 1.0}, 1.0)):
        distiller = examples.build("rld", warmup_epochs=0, **settings).eval()
        logits = distiller.student(batch.image), distiller.teacher(batch.image)
        expected = sample_confidence_loss(*logits, batch.target, temperature=temperature)
        torch.testing.assert_close(distiller(batch, examples.epoch()).terms["scd"], expected)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({}, ["scd", "mcd"]),
        ({"alpha": 0.0}, ["mcd"]),
        ({"beta": 0.0}, ["scd"]),
        ({"alpha": 0.0, "beta": 0.0}, []),
    ],
)
def test_terms_can_be_switched_off(settings, terms):
    output = examples.build("rld", **settings)(examples.batch(), examples.epoch())
    assert list(output.distillation) == terms
    assert list(output.task) == ["ce"]


def test_mask_strategy_reaches_the_loss():
    batch = examples.batch()
    ge, g = (examples.build("rld", mask=mask).eval()(batch, examples.epoch()).terms["mcd"] for mask in ("ge", "g"))
    assert ge != g
    with pytest.raises(UserError, match=r"mask: .*'ge' or 'g', found 'le'"):
        examples.build("rld", mask="le")


def test_refuses_to_train_on_nothing():
    with pytest.raises(UserError, match=r"^distiller: RLD has nothing to train on: ce_weight, alpha, beta all 0"):
        examples.build("rld", ce_weight=0.0, alpha=0.0, beta=0.0)
