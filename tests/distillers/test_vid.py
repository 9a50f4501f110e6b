"""VID against published values, a plain loop and finite differences; its variances."""

from math import log

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers import DISTILLERS
from mdistill.distillers.maps import of_one_size
from mdistill.distillers.vid import Predictor, vid_loss
from mdistill.errors import UserError
from mdistill.models import MODELS

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("vid"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    sides = (golden_features.stages(given, side) for side in ("student", "teacher"))
    terms = []
    for number, (student, teacher) in enumerate(zip(*sides, strict=True), start=1):
        predictor = Predictor(student.shape[1], teacher.shape[1], 5.0)
        given |= golden_features.fill(predictor, given, f"stage{number}.")
        inputs, target = of_one_size(student, teacher)
        terms.append(vid_loss(predictor(inputs), target, predictor.log_scale))
    golden_features.check(row, torch.stack(terms).sum(), given)


def arguments():
    means, target = (examples.logits(seed, 2, 12).view(2, 3, 2, 2) for seed in range(2))
    return means, target, examples.logits(2, 1, 3).flatten()


def test_equals_a_loop():
    means, target, log_scale = arguments()
    variances = [value + 1e-5 for value in F.softplus(log_scale).tolist()]
    expected = 0.0
    for sample, wanted in zip(means.flatten(2).tolist(), target.flatten(2).tolist(), strict=True):
        for mean, value, variance in zip(sample, wanted, variances, strict=True):
            expected += sum((m - v) ** 2 / variance + log(variance) for m, v in zip(mean, value, strict=True)) / 2
    assert vid_loss(means, target, log_scale).item() == pytest.approx(expected / 24, rel=1e-12)


def test_gradient_equals_finite_differences():
    means, target, log_scale = arguments()
    inputs = means.requires_grad_(), log_scale.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, rho: vid_loss(m, target, rho), inputs)


@pytest.mark.parametrize("variance", [0.01, 5.0, 200.0])
def test_variances_start_from_the_setting_and_are_trained(variance):
    distiller = examples.build("vid", initial_variance=variance)
    (predictor,) = distiller.predictors
    torch.testing.assert_close(F.softplus(predictor.log_scale) + 1e-5, torch.full((5,), variance))
    before = predictor.log_scale.detach().clone()
    examples.step(distiller, examples.batch(), lr=0.1)
    assert not predictor.log_scale.equal(before)


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_value_and_gradient_are_finite_for_variances_far_out(value):
    means, target, log_scale = (argument.float() for argument in arguments())
    log_scale = torch.full_like(log_scale, value).requires_grad_()
    loss = vid_loss(means, target, log_scale)
    loss.backward()
    assert loss.isfinite()
    assert log_scale.grad.isfinite().all()


def test_networks_of_unequal_depth_pair_from_the_front():
    """MobileNetV2 has 4 stages after the stem, WRN 3."""
    with torch.device("meta"):
        student, teacher = MODELS.build("mobilenet_v2", 100), MODELS.build("wrn_40_2", 100)
        settings = {"ce_weight": 1.0, "vid_weight": 1.0, "initial_variance": 5.0}
        distiller = DISTILLERS.build("vid", student, teacher, examples.data_info(image_size=32), **settings)
    assert [len(predictor.log_scale) for predictor in distiller.predictors] == [32, 64, 128]
    assert distiller.students() == {"student": student}


def test_a_variance_below_the_least_is_refused():
    with pytest.raises(
        UserError, match=r"^distiller.initial_variance: 1e-05 should be above 1e-05, the least variance$"
    ):
        examples.build("vid", initial_variance=1e-5)
