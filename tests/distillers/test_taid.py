"""TAID: its moving target against a loop and cases worked by hand, and what the student learns from it."""

from math import exp

import pytest
import torch

from mdistill.distillers.kd import kd_loss
from mdistill.distillers.taid import MovingTarget, interpolate, taid_loss
from mdistill.errors import UserError

from . import examples

SETTINGS = {"epochs": 5, "start": 0.4, "end": 1.0, "alpha": 0.1, "beta": 0.9}


def test_the_target_goes_from_the_student_to_the_teacher():
    student, teacher = examples.logits(0, 3, 4).requires_grad_(), examples.logits(1, 3, 4)
    for coefficient, expected in ((0.0, student), (1.0, teacher), (0.25, 0.75 * student + 0.25 * teacher)):
        target = interpolate(student, teacher, torch.tensor(coefficient))
        assert not target.requires_grad
        torch.testing.assert_close(target, expected.detach(), rtol=1e-15, atol=0)


def test_the_loss_is_kd_from_the_target_held_still():
    """Value and gradient."""
    student, teacher = examples.logits(0, 6, 5).requires_grad_(), examples.logits(1, 6, 5)
    target = 0.6 * student.detach() + 0.4 * teacher
    losses = (
        taid_loss(student, teacher, torch.tensor(0.4, dtype=torch.float64), temperature=3.0),
        kd_loss(student, target, temperature=3.0),
    )
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in losses))


def moves(losses, epochs, settings):
    """The coefficient before each step, from the update rule in Python floats."""
    t, momentum, previous, coefficients = settings["start"], 0.0, None, []
    for loss, epoch in zip(losses, epochs, strict=True):
        way = min((epoch - 1) / (settings["epochs"] - 1), 1.0)
        t = max(t, settings["start"] + (settings["end"] - settings["start"]) * way)
        coefficients.append(t)
        if previous is not None:
            change = (previous - loss) / (previous + 1e-15)
            momentum = settings["beta"] * momentum + (1 - settings["beta"]) * change
            t = min(settings["end"], t + settings["alpha"] / (1 + exp(-momentum)) * (1 - t))
        previous = loss
    return coefficients


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("end", [0.8, 1.0])
def test_the_coefficient_moves_as_in_a_loop(alpha, end):
    settings = {**SETTINGS, "alpha": alpha, "end": end}
    target = MovingTarget(**settings).double()
    target.coefficient.fill_(settings["start"])  # which float32 had rounded
    losses = [3.0, 2.0, 2.5, 0.5, 0.01, 0.1, 7.0, 6.0, 1e-3, 2e-3, 1.0, 1.0]
    epochs = [1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 9]
    coefficients = []
    for loss, epoch in zip(losses, epochs, strict=True):
        coefficients.append(target.at(torch.tensor(epoch)).item())
        target.update(torch.tensor(loss, dtype=torch.float64), torch.tensor(epoch))
    assert coefficients == pytest.approx(moves(losses, epochs, settings), rel=1e-12)
    assert coefficients == sorted(coefficients)
    assert coefficients[-1] == pytest.approx(end, rel=1e-12)


def test_a_move_by_hand():
    """Loss 2, then 1, with momentum 1/2: delta = 1/2, m = 1/4; from t = 0.4 a step of 0.1 sigmoid(1/4) 0.6."""
    target = MovingTarget(**{**SETTINGS, "beta": 0.5})
    target.update(torch.tensor(2.0), torch.tensor(1))
    assert target.coefficient == pytest.approx(0.4)
    assert target.momentum == 0
    target.update(torch.tensor(1.0), torch.tensor(1))
    assert target.momentum.item() == pytest.approx(0.25)
    assert target.coefficient.item() == pytest.approx(0.4 + 0.06 / (1 + exp(-0.25)))


def test_a_falling_loss_moves_the_target_faster_than_a_rising_one():
    ends = []
    for losses in ([4.0, 2.0, 1.0, 0.5], [0.5, 1.0, 2.0, 4.0]):
        target = MovingTarget(**SETTINGS)
        for loss in losses:
            target.update(torch.tensor(loss), torch.tensor(1))
        ends.append(target.coefficient)
    assert ends[0] > ends[1] > 0.4


def test_a_step_moves_the_target_by_its_unweighted_loss():
    distiller, expected = examples.build("taid", kd_weight=0.5), MovingTarget(**SETTINGS)
    for number in range(3):
        output = distiller.train()(examples.batch(number), examples.epoch(number + 1))
        expected.update(2.0 * output.terms["kd"].detach(), examples.epoch(number + 1))
        with torch.no_grad():
            distiller.after_step(output.signals)
    torch.testing.assert_close(distiller.target.state_dict(), expected.state_dict())
    assert distiller.target.coefficient > 0.4


@pytest.mark.parametrize("epochs", [1, 5])
def test_the_last_epoch_is_plain_kd(epochs):
    distiller = examples.build("taid", epochs=epochs, start=1.0 if epochs == 1 else 0.0).eval()
    batch = examples.batch()
    assert distiller(batch, examples.epoch(epochs)).total == examples.build("kd").eval()(batch, examples.epoch()).total


def test_a_target_that_starts_at_the_student_has_nothing_to_teach():
    distiller = examples.build("taid", ce_weight=0.0, start=0.0).train()
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
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        examples.build("taid", **settings)
