"""BD-KD against a plain loop, a case worked by hand, and its properties."""

from math import exp, log

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.bd_kd import bd_kd_loss
from mdistill.distillers.functional import kl_divergence
from mdistill.errors import UserError

from . import examples


def by_loop(student, teacher, temperature, balance):
    """Row by row in Python floats."""

    def softmax(row):
        powers = [exp(z / temperature) for z in row]
        return [power / sum(powers) for power in powers]

    def kl(p, q):
        return sum(a * log(a / b) for a, b in zip(p, q, strict=True))

    total = 0.0
    for t, s in zip(map(softmax, teacher.tolist()), map(softmax, student.tolist()), strict=True):
        entropy_t, entropy_s = (-sum(a * log(a) for a in p) for p in (t, s))
        weights = (balance, 1.0) if entropy_t > entropy_s else (1.0, balance)
        total += weights[0] * kl(t, s) + weights[1] * kl(s, t)
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_a_loop(temperature):
    student, teacher = examples.logits(0, 12, 5), examples.logits(1, 12, 5)
    loss = bd_kd_loss(student, teacher, temperature=temperature, balance=2.5)
    assert loss.item() == pytest.approx(by_loop(student, teacher, temperature, 2.5), rel=1e-10)


def test_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2), T = 1. The student's entropy is the larger one: forward + 2 reverse.

    Forward: 3/4 ln 3/2 + 1/4 ln 1/2. Reverse: 1/2 ln 2/3 + 1/2 ln 2 = 1/2 ln 4/3. The two networks exchanged, the
    student is the more certain one: 2 of what is forward then, the same sum.
    """
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    expected = 0.75 * log(3 / 2) + 0.25 * log(1 / 2) + 2 * 0.5 * log(4 / 3)
    for logits in ((student, teacher), (teacher, student)):
        assert bd_kd_loss(*logits, temperature=1.0, balance=2.0).item() == pytest.approx(expected, rel=1e-12)


def test_with_balance_1_is_the_sum_of_both_directions():
    student, teacher = examples.logits(0, 6, 9), examples.logits(1, 6, 9)
    p, q = (F.log_softmax(logits / 3.0, dim=1) for logits in (teacher, student))
    expected = 9.0 * (kl_divergence(p, q) + kl_divergence(q, p))
    torch.testing.assert_close(bd_kd_loss(student, teacher, temperature=3.0, balance=1.0), expected)


def test_terms_are_weighed_and_can_be_switched_off():
    batch = examples.batch()
    distiller = examples.build("bd_kd", kd_weight=0.25, temperature=3.0, balance=1.5).eval()
    logits = distiller.student(batch.image), distiller.teacher(batch.image)
    terms = distiller(batch, examples.epoch()).terms
    assert list(terms) == ["ce", "kd"]
    torch.testing.assert_close(terms["kd"], 0.25 * bd_kd_loss(*logits, temperature=3.0, balance=1.5))
    assert list(examples.build("bd_kd", kd_weight=0.0)(batch, examples.epoch()).terms) == ["ce"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": 0.5}, r"balance: .*greater than or equal to 1, found 0.5"),
        ({"temperature": 0.0}, r"temperature: .*greater than 0, found 0"),
        ({"ce_weight": 0.0, "kd_weight": 0.0}, r"^distiller: BDKD has nothing to train on: ce_weight, kd_weight all 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        examples.build("bd_kd", **settings)
