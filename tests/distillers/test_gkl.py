import pytest
import torch

from mdistill.distillers.gkl import gkl_loss, smoothed_difference_loss
from mdistill.distillers.ikl import difference_per_sample

from . import examples
from .golden_more import cases, check
from .test_ikl import weights


@pytest.mark.parametrize("case", cases("dkl", "gkl"))
def test_loss_is_the_published_code_s(case):
    given = case.tensors("student")
    check(case, gkl_loss(given["student"], given["teacher"], weights(case, given), **case.arguments), given)


def test_gamma_of_0_is_half_the_variance_over_the_classes():
    student, teacher, q = (examples.logits(seed, 4, 6) for seed in range(3))
    found = smoothed_difference_loss(student, teacher, q.softmax(dim=1), gamma=0.0)
    torch.testing.assert_close(found, (teacher - student).var(dim=1, correction=0).mean() / 2)


def test_gamma_of_1_is_the_difference_of_normalised_weights():
    student, teacher, q = (examples.logits(seed, 4, 6) for seed in range(3))
    q = q.softmax(dim=1)
    found = smoothed_difference_loss(student, teacher, q, gamma=1.0)
    torch.testing.assert_close(found, difference_per_sample(student, teacher, q).mean())
