"""LumiNet against a case worked by hand, a plain loop, and its invariances."""

from math import exp, log, sqrt

import pytest
import torch

from mdistill.distillers.luminet import luminet_loss, perception
from mdistill.errors import UserError

from . import examples
from . import golden_more as golden


def test_by_hand():
    """Two samples: the perception of a class is -1 for the smaller logit and 1 for the larger.

    Teacher (0, 2000), (2000, 0): h = (-1, 1), (1, -1). Student (0, 0), (2000, 2000): h = (-1, -1), (1, 1), uniform.
    With tau = 2 / ln 3 the teacher's rows are (1/4, 3/4) and reversed: tau^2 (3/4 ln 3/2 + 1/4 ln 1/2).
    """
    student, teacher = torch.tensor([[0.0, 0.0], [2e3, 2e3]]), torch.tensor([[0.0, 2e3], [2e3, 0.0]])
    temperature = 2 / log(3)
    loss = luminet_loss(student.double(), teacher.double(), temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * (0.75 * log(1.5) + 0.25 * log(0.5)), rel=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_equals_a_loop_over_samples_and_classes(temperature):
    def probabilities(rows):
        columns = list(zip(*rows, strict=True))
        means = [sum(column) / len(column) for column in columns]
        variances = [sum((z - m) ** 2 for z in c) / len(c) for c, m in zip(columns, means, strict=True)]
        for row in rows:
            powers = [
                exp((z - m) / sqrt(v + 1e-5) / temperature) for z, m, v in zip(row, means, variances, strict=True)
            ]
            yield [power / sum(powers) for power in powers]

    student, teacher = examples.logits(0, 5, 6), examples.logits(1, 5, 6)
    expected = 0.0
    for q, p in zip(probabilities(student.tolist()), probabilities(teacher.tolist()), strict=True):
        expected += temperature**2 * sum(a * log(a / b) for a, b in zip(p, q, strict=True)) / 5
    assert luminet_loss(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("case", golden.cases("luminet"))
def test_equals_the_released_code(case):
    """At the weight (alpha / tau)^2; loss and gradient."""
    given, (alpha, temperature) = case.tensors("student"), (case.arguments[name] for name in ("alpha", "temperature"))
    golden.check(case, (alpha / temperature) ** 2 * luminet_loss(*case.logits(given), temperature=temperature), given)


def test_perception_has_mean_0_and_variance_1_in_every_class():
    perceived = perception(100 * examples.logits(0, 12, 5))
    torch.testing.assert_close(perceived.mean(dim=0), torch.zeros(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(perceived.var(dim=0, unbiased=False), torch.ones(5).double(), rtol=1e-8, atol=0)


def test_a_class_may_be_scaled_and_shifted():
    student, teacher = 100 * examples.logits(0, 8, 5), 100 * examples.logits(1, 8, 5)
    scale, shift = examples.logits(2, 1, 5).abs() + 0.5, 100 * examples.logits(3, 1, 5)
    moved = luminet_loss(scale * student + shift, teacher, temperature=2.0)
    torch.testing.assert_close(moved, luminet_loss(student, teacher, temperature=2.0), rtol=1e-7, atol=0)


def test_is_0_where_student_equals_teacher():
    teacher = examples.logits(0, 6, 9)
    student = (teacher + examples.logits(1, 1, 9)).requires_grad_()  # equal up to a shift of each class
    loss = luminet_loss(student, teacher, temperature=4.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12
    assert luminet_loss(examples.logits(1, 6, 9), teacher, temperature=4.0) > 0.1


def test_a_batch_of_1_gives_0_and_no_gradient():
    student, teacher = examples.logits(0, 1, 5).requires_grad_(), examples.logits(1, 1, 5)
    loss = luminet_loss(student, teacher, temperature=4.0)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_a_class_that_is_constant_over_the_batch_perceives_0():
    logits = examples.logits(0, 6, 4)
    logits[:, 2] = 3.0
    logits.requires_grad_()
    perceived = perception(logits)
    perceived.square().sum().backward()
    assert perceived[:, 2].abs().max() == 0
    assert logits.grad.isfinite().all()


def test_weighs_its_term():
    batch, last = examples.batch(), examples.epoch(20)
    terms = [examples.build("luminet", luminet_weight=weight).eval()(batch, last).terms for weight in (1.0, 0.25)]
    assert list(terms[0]) == ["ce", "luminet"]
    torch.testing.assert_close(0.25 * terms[0]["luminet"], terms[1]["luminet"])


def test_weight_0_leaves_the_term_out():
    assert list(examples.build("luminet", luminet_weight=0.0)(examples.batch(), examples.epoch()).terms) == ["ce"]
    with pytest.raises(
        UserError, match=r"^distiller: LumiNet has nothing to train on: ce_weight, luminet_weight all 0"
    ):
        examples.build("luminet", luminet_weight=0.0, ce_weight=0.0)
