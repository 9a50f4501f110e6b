"""CAT-KD against published values, a plain loop and finite differences; class maps and the logits."""

from functools import partial
from math import sqrt

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mdistill.distillers import DISTILLERS
from mdistill.distillers.catkd import catkd_loss, class_maps
from mdistill.errors import UserError
from mdistill.models import MODELS

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("catkd"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    arguments = golden_features.arguments(row)
    maps = []
    for side in ("student", "teacher"):
        last = given.get(f"{side}_last_map", golden_features.stages(given, side)[-1])
        maps.append(class_maps(last, given[f"{side}_classifier.weight"]))
    loss = catkd_loss(*maps, resolution=int(arguments["resolution"]), normalize=bool(arguments["normalize"]))
    if "with_ce" in arguments:
        task = F.cross_entropy(maps[0].mean(dim=(2, 3)), torch.tensor(row["target"]))
        loss = task + arguments["weight"] * loss
    golden_features.check(row, loss, given)


def by_loop(sample, resolution, normalize):
    """Of the class maps of one sample, lists of 4 rows of 4."""
    found, step = [], 4 // resolution
    for rows in sample:
        cells = [
            sum(rows[y][x] for y in range(i, i + step) for x in range(j, j + step)) / step**2
            for i in range(0, 4, step)
            for j in range(0, 4, step)
        ]
        length = sqrt(sum(cell**2 for cell in cells)) if normalize else 1
        found += [cell / length for cell in cells]
    return found


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("resolution", [1, 2, 4])
def test_equals_a_loop(resolution, normalize):
    student, teacher = (examples.logits(seed, 6, 16).view(2, 3, 4, 4) for seed in range(2))
    pairs = [
        pair
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
        for pair in zip(by_loop(s, resolution, normalize), by_loop(t, resolution, normalize), strict=True)
    ]
    expected = sum((s - t) ** 2 for s, t in pairs) / len(pairs)
    loss = catkd_loss(student, teacher, resolution=resolution, normalize=normalize)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_equals_finite_differences(normalize):
    student, teacher = (examples.logits(seed, 4, 16).view(2, 2, 4, 4) for seed in range(2))
    loss = partial(catkd_loss, teacher_maps=teacher, resolution=2, normalize=normalize)
    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


def test_class_maps_of_nothing_have_no_gradient():
    student = torch.zeros(2, 3, 4, 4).requires_grad_()
    catkd_loss(student, torch.randn(2, 3, 4, 4), resolution=2, normalize=True).backward()
    assert student.grad.abs().max() == 0


def test_class_maps_average_to_the_logits_less_the_bias():
    network = MODELS.build("resnet8", 7).eval()
    with torch.no_grad():
        features = network.forward_features(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        maps = class_maps(features.last_map, network.classifier.weight)
        torch.testing.assert_close(maps.mean(dim=(2, 3)) + network.classifier.bias, features.logits)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_student_s_classifier_learns_from_the_class_maps(normalize):
    student, teacher = (MODELS.build("resnet8", examples.CLASSES) for _ in range(2))
    settings = {"ce_weight": 0.0, "catkd_weight": 2.0, "resolution": 4, "normalize": normalize}
    distiller = DISTILLERS.build("catkd", student, teacher, examples.data_info(image_size=32), **settings)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distiller(examples.batch(size=2, image=image), examples.epoch()).total.backward()
    assert student.classifier.weight.grad.abs().max() > 0
    assert student.classifier.bias.grad is None


def test_refuses_a_resolution_above_that_of_the_maps():
    with pytest.raises(UserError, match=r"^distiller.resolution: 2 is more than the student's last map of 1x1 has$"):
        examples.build("catkd", resolution=2)


def test_refuses_a_network_without_a_classifier(monkeypatch):
    monkeypatch.setattr(examples.TinyNetwork, "classifier", nn.Identity())
    with pytest.raises(UserError, match=r"^the student, a TinyNetwork, has no linear layer called classifier$"):
        examples.build("catkd")
