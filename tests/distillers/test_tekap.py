"""TeKAP against the published code, and its draws."""

import pytest
import torch

from mdistill.distillers.kd import kd_loss
from mdistill.distillers.tekap import tekap_loss

from . import examples, golden_more

CASES = golden_more.cases("tekap")


def test_reference_cases_are_all_there():
    assert len(CASES) == 6


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case):
    given = case.tensors("student")
    golden_more.check(case, tekap_loss(*case.logits(given), given["noise"], **case.arguments), given)


def test_without_noise_or_without_weight_it_is_kd():
    student, teacher, noise = (
        examples.logits(0, 6, 5),
        examples.logits(1, 6, 5),
        examples.logits(2, 12, 5).view(2, 6, 5),
    )
    kd = kd_loss(student, teacher, temperature=4.0)
    settings = {"temperature": 4.0, "noise_weight": 0.0, "augmented_weight": 0.8}
    torch.testing.assert_close(tekap_loss(student, teacher, noise, **settings), 2.6 * kd)
    settings = {"temperature": 4.0, "noise_weight": 0.1, "augmented_weight": 0.0}
    torch.testing.assert_close(tekap_loss(student, teacher, noise, **settings), kd)


def draws(distiller, epoch=1, seed=0):
    """The noise of one batch, (N, B, C)."""
    output = distiller(examples.batch(seed), examples.epoch(epoch))
    return distiller._noise(output.signals)


def test_every_teacher_sample_and_epoch_has_draws_of_its_own():
    distiller = examples.build("tekap").eval()
    first = draws(distiller)
    assert first.shape == (3, examples.BATCH, examples.CLASSES)
    assert len(first.unique()) == first.numel()
    assert not (first == draws(distiller, epoch=2)).any()
    torch.testing.assert_close(draws(distiller), first, rtol=0, atol=0)
    distiller.seed = 1
    assert not (first == draws(distiller)).any()


def test_its_loss_is_that_of_its_draws():
    distiller, batch = examples.build("tekap").eval(), examples.batch()
    output = distiller(batch, examples.epoch())
    logits, noise = (output.signals.student_logits, output.signals.teacher_logits), distiller._noise(output.signals)
    expected = 0.9 * tekap_loss(*logits, noise, temperature=4.0, noise_weight=0.1, augmented_weight=0.8)
    torch.testing.assert_close(output.distillation["kd"], expected)
