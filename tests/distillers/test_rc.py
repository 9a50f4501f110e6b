"""RC against the published code, a loop, a case worked by hand, finite differences, and its properties."""

from math import exp, log

import pytest
import torch

from mdistill.distillers.kd import kd_loss
from mdistill.distillers.rc import correct, rc_loss
from mdistill.errors import UserError

from . import examples, golden

CASES = golden.cases("rc_term")


def test_reference_cases_are_all_there():
    assert len(CASES) == 2


@pytest.mark.parametrize("row", CASES)
def test_equals_the_published_code(row):
    golden.check(row, lambda student, teacher, target, **settings: rc_loss(student, target, **settings))


def test_the_correction_by_hand():
    """Logits (ln 2, 0), true class 1: its own 0 plus the maximum ln 2 makes both equal.

    KL of (1/2, 1/2) to (2/3, 1/3) = 1/2 ln 3/4 + 1/2 ln 3/2 = 1/2 ln 9/8.
    """
    student, target = torch.tensor([[log(2), 0.0]], dtype=torch.float64), torch.tensor([1])
    assert correct(student, target).tolist() == [[log(2), log(2)]]
    assert rc_loss(student, target, temperature=1.0).item() == pytest.approx(0.5 * log(9 / 8), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_a_loop(temperature):
    student, target = examples.logits(0, 12, 5), examples.targets(2, 12, 5)
    total = 0.0
    for z, y in zip(student.tolist(), target.tolist(), strict=True):
        corrected = [x + max(z) if c == y else x for c, x in enumerate(z)]
        p, q = ([exp(x / temperature) / sum(exp(w / temperature) for w in row) for x in row] for row in (corrected, z))
        total += sum(a * log(a / b) for a, b in zip(p, q, strict=True))
    loss = rc_loss(student, target, temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * total / 12, rel=1e-10)


def test_the_gradient_is_that_of_finite_differences_with_the_corrected_logits_held_still():
    student, target = examples.logits(0, 3, 4), examples.targets(2, 3, 4)
    corrected = correct(student, target)
    assert not corrected.requires_grad
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, corrected, temperature=2.0), student.clone().requires_grad_())
    gradients = []
    for loss in (lambda z: rc_loss(z, target, temperature=2.0), lambda z: kd_loss(z, corrected, temperature=2.0)):
        z = student.clone().requires_grad_()
        loss(z).backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)


def test_the_correction_leads_and_leaves_the_other_classes_alone():
    student, target = examples.logits(0, 20, 6).abs(), examples.targets(1, 20, 6)
    corrected = correct(student, target)
    assert torch.equal(corrected.argmax(dim=1), target)
    changed = corrected != student
    assert torch.equal(changed, torch.arange(6) == target[:, None])


def test_the_step_raises_the_true_class_whose_maximum_is_positive():
    student, target = examples.logits(0, 20, 6).requires_grad_(), examples.targets(1, 20, 6)
    assert (student.amax(dim=1) > 0).all()
    rc_loss(student, target, temperature=4.0).backward()
    assert (student.grad.gather(1, target[:, None]) < 0).all()


def test_a_row_whose_maximum_is_0_has_nothing_to_correct():
    student = (-examples.logits(0, 5, 4).abs()).requires_grad_()
    with torch.no_grad():
        student[:, 2] = 0.0
    loss = rc_loss(student, torch.arange(5) % 4, temperature=4.0)
    loss.backward()
    assert loss == 0
    assert student.grad.abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
@pytest.mark.parametrize(("size", "classes"), [(6, 5), (1, 5), (4, 2)])
def test_is_finite_for_extreme_logits(size, classes, scale, dtype):
    student = (scale * examples.logits(0, size, classes).sign()).to(dtype).requires_grad_()
    loss = rc_loss(student, examples.targets(1, size, classes), temperature=4.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("standardize_logits", [False, True])
def test_terms_are_weighed(standardize_logits):
    settings = {"ce_weight": 0.5, "kd_weight": 0.9, "rc_weight": 0.3, "standardize_logits": standardize_logits}
    batch, distiller = examples.batch(), examples.build("rc", **settings).eval()
    student, teacher = distiller.student(batch.image), distiller.teacher(batch.image)
    ce = torch.nn.functional.cross_entropy(student, batch.target)
    if standardize_logits:
        student, teacher = ((z - z.mean(1, True)) / (1e-7 + z.std(1, keepdim=True)) for z in (student, teacher))
    expected = {
        "ce": 0.5 * ce,
        "kd": 0.9 * kd_loss(student, teacher, temperature=4.0),
        "rc": 0.3 * rc_loss(student, batch.target, temperature=4.0),
    }
    torch.testing.assert_close(distiller(batch, examples.epoch()).terms, expected)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [({}, ["kd", "rc"]), ({"kd_weight": 0.0}, ["rc"]), ({"rc_weight": 0.0}, ["kd"])],
)
def test_terms_can_be_switched_off(settings, terms):
    assert list(examples.build("rc", **settings)(examples.batch(), examples.epoch()).distillation) == terms


def test_refuses_to_train_on_nothing():
    with pytest.raises(UserError, match=r"^distiller: RC has nothing to train on: ce_weight, kd_weight, rc_weight all"):
        examples.build("rc", ce_weight=0.0, kd_weight=0.0, rc_weight=0.0)
