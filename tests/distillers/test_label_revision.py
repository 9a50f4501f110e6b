"""Label revision against the published code, a loop, a case worked by hand, and its properties."""

from math import exp, log

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers import DISTILLERS
from mdistill.distillers.label_revision import (
    label_revision_loss,
    revise,
    revised_loss,
    right_ce_loss,
    right_logit_loss,
)
from mdistill.errors import UserError

from . import examples, golden

CASES = golden.cases("lr_total")


def test_reference_cases_are_all_there():
    assert len(CASES) == 2


@pytest.mark.parametrize("row", CASES)
def test_equals_the_published_code(row):
    golden.check(row, label_revision_loss)


def test_the_terms_by_hand():
    """Two samples of two classes, a uniform student (logits 0).

    The teacher is right on the first, logits (1, 0): cross-entropy ln 2, logits off by 1 and 0, mean square 1/2.
    It is wrong on the second, (3/4, 1/4) with true class 1: beta = (1/2) / (3/4 - 1/4 + 1) = 1/3, revised
    (1/4, 1/12 + 2/3) = (1/4, 3/4), off by 1/4 each, mean square 1/16.
    """
    student, target = torch.zeros(2, 2).double(), torch.tensor([0, 1])
    teacher = torch.tensor([[1.0, 0.0], [log(3), 0.0]], dtype=torch.float64)
    assert revise(teacher[1:], target[1:], eta=0.5).tolist()[0] == pytest.approx([1 / 4, 3 / 4], rel=1e-12)
    assert right_ce_loss(student, teacher, target).item() == pytest.approx(log(2), rel=1e-12)
    assert right_logit_loss(student, teacher, target).item() == pytest.approx(1 / 2, rel=1e-12)
    assert revised_loss(student, teacher, target, eta=0.5).item() == pytest.approx(1 / 16, rel=1e-12)
    total = label_revision_loss(student, teacher, target, lambda1=4.0, lambda2=3.0, eta=0.5)
    assert total.item() == pytest.approx(log(2) + 4 / 2 + 3 / 16, rel=1e-12)


def by_loop(student, teacher, target, lambda1, lambda2, eta):
    """Lists of right and wrong samples, in Python floats."""

    def softmax(row):
        powers = [exp(z) for z in row]
        return [power / sum(powers) for power in powers]

    ce, logit, revised = [], [], []
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        p, q = softmax(t), softmax(s)
        if t[y] == max(t):
            ce.append(-log(q[y]))
            logit += [(a - b) ** 2 for a, b in zip(s, t, strict=True)]
        else:
            beta = eta / (max(p) - p[y] + 1)
            labels = [beta * a + (1 - beta) * (c == y) for c, a in enumerate(p)]
            revised += [(a - b) ** 2 for a, b in zip(q, labels, strict=True)]
    ce, logit, revised = (sum(values) / len(values) if values else 0.0 for values in (ce, logit, revised))
    return ce + lambda1 * logit + lambda2 * revised


@pytest.mark.parametrize("teacher_is", ["sometimes right", "always right", "always wrong"])
def test_equals_a_loop(teacher_is):
    student, teacher = examples.logits(0, 16, 4), examples.logits(1, 16, 4)
    target = {
        "sometimes right": examples.targets(2, 16, 4),
        "always right": teacher.argmax(dim=1),
        "always wrong": teacher.argmin(dim=1),
    }[teacher_is]
    numbers = {"lambda1": 4.0, "lambda2": 2.0, "eta": 0.7}
    loss = label_revision_loss(student, teacher, target, **numbers)
    assert loss.item() == pytest.approx(by_loop(student, teacher, target, **numbers), rel=1e-10)


@pytest.mark.parametrize("eta", [0.1, 0.8, 0.99])
def test_revised_labels_are_distributions_that_the_true_class_leads(eta):
    for scale in (1.0, 100.0):
        teacher, target = examples.logits(0, 50, 6, scale), examples.targets(1, 50, 6)
        labels = revise(teacher, target, eta=eta)
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(50).double())
        assert (labels >= 0).all()
        assert torch.equal(labels.argmax(dim=1), target)


def test_the_other_classes_keep_their_proportions():
    teacher, target = examples.logits(0, 1, 5), torch.tensor([2])
    ratio = (revise(teacher, target, eta=0.8) / F.softmax(teacher, dim=1))[0, [0, 1, 3, 4]]
    torch.testing.assert_close(ratio, ratio[:1].expand(4))


def test_a_row_of_one_kind_never_touches_the_terms_of_the_other():
    student, teacher = examples.logits(0, 2, 5).requires_grad_(), examples.logits(1, 2, 5)
    target = torch.stack([teacher[0].argmax(), teacher[1].argmin()])
    for loss, row in (
        (right_ce_loss(student, teacher, target), 0),
        (right_logit_loss(student, teacher, target), 0),
        (revised_loss(student, teacher, target, eta=0.8), 1),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient[row].abs().max() > 0
        assert gradient[1 - row].abs().max() == 0


def test_terms_without_samples_are_0_with_gradient_0():
    student, teacher = examples.logits(0, 6, 5).requires_grad_(), examples.logits(1, 6, 5)
    losses = [
        right_ce_loss(student, teacher, teacher.argmin(dim=1)),
        right_logit_loss(student, teacher, teacher.argmin(dim=1)),
        revised_loss(student, teacher, teacher.argmax(dim=1), eta=0.8),
    ]
    for loss in losses:
        assert loss == 0
        assert torch.autograd.grad(loss, student)[0].abs().max() == 0


def test_cross_entropy_is_weighed_and_reads_the_raw_logits():
    settings = {"ce_weight": 0.5, "lambda1": 3.0, "lambda2": 2.0, "eta": 0.6, "standardize_logits": True}
    batch, distiller = examples.batch(), examples.build("label_revision", **settings).eval()
    raw = distiller.student(batch.image), distiller.teacher(batch.image)
    target = torch.where(torch.arange(8) < 4, raw[1].argmax(dim=1), raw[1].argmin(dim=1))
    batch = examples.batch(target=target)
    output = distiller(batch, examples.epoch())
    ready = [(z - z.mean(1, True)) / (1e-7 + z.std(1, keepdim=True)) for z in raw]
    torch.testing.assert_close(output.task, {"ce": 0.5 * F.cross_entropy(raw[0][:4], target[:4])})
    expected = {
        "logit": 3.0 * right_logit_loss(*ready, target),
        "revised": 2.0 * revised_loss(*ready, target, eta=0.6),
    }
    torch.testing.assert_close(output.distillation, expected)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({}, ["ce", "logit", "revised"]),
        ({"ce_weight": 0.0}, ["logit", "revised"]),
        ({"lambda1": 0.0}, ["ce", "revised"]),
        ({"lambda2": 0.0}, ["ce", "logit"]),
    ],
)
def test_terms_can_be_switched_off(settings, terms):
    assert list(examples.build("label_revision", **settings)(examples.batch(), examples.epoch()).terms) == terms


def test_has_the_short_name_of_the_comparisons_too():
    assert DISTILLERS.canonical("lr") == "label_revision"


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"eta: .*less than 1, found 1"):
        examples.build("label_revision", eta=1.0)
    with pytest.raises(UserError, match=r"^distiller: LabelRevision has nothing to train on: ce_weight, lambda1, lam"):
        examples.build("label_revision", ce_weight=0.0, lambda1=0.0, lambda2=0.0)
