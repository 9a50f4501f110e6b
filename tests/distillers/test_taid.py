"""TAID: its moving target against a loop and cases worked by hand, and what the student learns from it."""

from math import exp

import pytest
import torch

from mdistill.distillers.kd import kd_loss
from mdistill.distillers.taid import MovingTarget, interpolate, taid_loss
from mdistill.errors import UserError

from . import examples
from . import golden_more as golden

SETTINGS = {"steps": 25, "start": 0.4, "end": 1.0, "alpha": 0.1, "beta": 0.9}  # 5 epochs of 40 images, 8 a step


def test_the_target_goes_from_the_student_to_the_teacher():
    student, teacher = examples.logits(0, 3, 4).requires_grad_(), examples.logits(1, 3, 4)
    for coefficient, expected in ((0.0, student), (1.0, teacher), (0.25, 0.75 * student + 0.25 * teacher)):
        target = interpolate(student, teacher, torch.tensor(coefficient))
        assert not target.requires_grad
        torch.testing.assert_close(target, expected.detach(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_the_loss_is_kd_from_the_target_held_still(variant):
    """The released one besides T^2 times the target's entropy, which has no gradient."""
    student, teacher = examples.logits(0, 6, 5).requires_grad_(), examples.logits(1, 6, 5)
    target = 0.6 * student.detach() + 0.4 * teacher
    probs = (target / 3).softmax(dim=1)
    entropy = -(probs * probs.log()).sum(dim=1).mean()
    losses = (
        taid_loss(student, teacher, torch.tensor(0.4, dtype=torch.float64), temperature=3.0, variant=variant),
        kd_loss(student, target, temperature=3.0) + (9 * entropy if variant == "released" else 0),
    )
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in losses))


@pytest.mark.parametrize("case", golden.cases("taid", "taid"))
def test_the_loss_equals_the_released_code(case):
    given, coefficient = case.tensors("student"), torch.tensor(case.arguments["coefficient"], dtype=torch.float64)
    student, teacher = case.logits(given)
    golden.close(interpolate(student, teacher, coefficient).softmax(dim=1), case.results()["target"])
    golden.check(case, taid_loss(student, teacher, coefficient, temperature=1.0, variant="released"), given)


def path(losses, settings):
    """Coefficient and momentum after each step, in float64."""
    target = MovingTarget(**settings).double()
    target.coefficient.fill_(settings["start"])  # which float32 had rounded
    coefficients, momenta = [], []
    for loss in losses:
        target.update(torch.as_tensor(loss, dtype=torch.float64))
        coefficients.append(target.coefficient.item())
        momenta.append(target.momentum.item())
    return coefficients, momenta


@pytest.mark.parametrize("case", golden.cases("taid", "taid_path"))
def test_the_path_equals_the_released_code(case):
    found = path(case.tensors()["losses"], case.arguments)
    for name, values in zip(("coefficient", "momentum"), found, strict=True):
        golden.close(torch.tensor(values, dtype=torch.float64), case.results()[name], name)


def moves(losses, settings):
    """The coefficient after each step, from the update rule in Python floats."""
    t, momentum, previous, coefficients = settings["start"], 0.0, None, []
    for step, loss in enumerate(losses):
        if previous is not None:
            change = (previous - loss) / (previous + 1e-15)
            momentum = settings["beta"] * momentum + (1 - settings["beta"]) * change
            line = settings["start"] + (settings["end"] - settings["start"]) * min(step / settings["steps"], 1.0)
            t = min(settings["end"], max(line, t + settings["alpha"] / (1 + exp(-momentum)) * (1 - t)))
        coefficients.append(t)
        previous = loss
    return coefficients


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("end", [0.8, 1.0])
def test_the_coefficient_moves_as_in_a_loop(alpha, end):
    """Longer than the run was to be."""
    settings = {**SETTINGS, "steps": 10, "alpha": alpha, "end": end}
    losses = [3.0, 2.0, 2.5, 0.5, 0.01, 0.1, 7.0, 6.0, 1e-3, 2e-3, 1.0, 1.0]
    coefficients, _ = path(losses, settings)
    assert coefficients == pytest.approx(moves(losses, settings), rel=1e-12)
    assert coefficients == sorted(coefficients)
    assert coefficients[-1] == pytest.approx(end, rel=1e-12)


def test_a_move_by_hand():
    """Loss 2, then 1, with momentum 1/2: delta = 1/2, m = 1/4; from t = 0.4 a step of 0.1 sigmoid(1/4) 0.6.

    That is ahead of the line, 0.4 + 0.6 / 25 = 0.424.
    """
    target = MovingTarget(**{**SETTINGS, "beta": 0.5})
    target.update(torch.tensor(2.0))
    assert target.coefficient == pytest.approx(0.4)
    assert target.momentum == 0
    target.update(torch.tensor(1.0))
    assert target.momentum.item() == pytest.approx(0.25)
    assert target.coefficient.item() == pytest.approx(0.4 + 0.06 / (1 + exp(-0.25)))


def test_a_falling_loss_moves_the_target_faster_than_a_rising_one():
    ends = []
    for losses in ([4.0, 2.0, 1.0, 0.5], [0.5, 1.0, 2.0, 4.0]):
        target = MovingTarget(**SETTINGS)
        for loss in losses:
            target.update(torch.tensor(loss))
        ends.append(target.coefficient)
    assert ends[0] > ends[1] > 0.4


def test_a_step_moves_the_target_by_its_unweighted_loss():
    distiller, expected = examples.build("taid", kd_weight=0.5), MovingTarget(**SETTINGS)
    for number in range(3):
        output = distiller.train()(examples.batch(number), examples.epoch(number + 1))
        expected.update(2.0 * output.terms["kd"].detach())
        with torch.no_grad():
            distiller.after_step(output.signals)
    torch.testing.assert_close(distiller.target.state_dict(), expected.state_dict())
    assert distiller.target.coefficient > 0.4


def test_a_target_that_has_arrived_is_plain_kd():
    distiller, batch = examples.build("taid", start=1.0, variant="paper").eval(), examples.batch()
    assert distiller(batch, examples.epoch()).total == examples.build("kd").eval()(batch, examples.epoch()).total


def test_a_target_that_starts_at_the_student_has_nothing_to_teach():
    distiller = examples.build("taid", ce_weight=0.0, start=0.0, variant="paper").train()
    assert abs(examples.step(distiller, examples.batch())) < 1e-6
    assert distiller.student[-1].weight.grad.abs().max() < 1e-6
    for number in range(3):
        assert examples.step(distiller, examples.batch(number)).isfinite()
    assert all(value.isfinite().all() for value in distiller.state_dict().values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.9, "end": 0.5}, r"^distiller.start: 0.9 is above end 0.5"),
        ({"epochs": 0}, r"epochs: .*greater than 0, found 0"),
        ({"end": 1.5}, r"end: .*less than or equal to 1, found 1.5"),
        ({"kd_weight": 0.0}, r"kd_weight: .*greater than 0, found 0"),
        ({"variant": "published"}, r"variant: should be 'released' or 'paper', found 'published'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        examples.build("taid", **settings)
