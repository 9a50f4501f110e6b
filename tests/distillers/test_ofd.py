"""OFD against published values, a plain loop and numerical integration; its margins, and the mode of the teacher."""

import copy
from math import erf, exp, inf, sqrt

import pytest
import torch
from torch import nn

from mdistill.distillers import DISTILLERS
from mdistill.distillers.ofd import Connector, channel_margins, ofd_loss, partial_l2_loss
from mdistill.errors import UserError
from mdistill.models import MODELS, feature_shapes

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("ofd"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    student, teacher = (
        [given[name] for name in sorted(given) if name.startswith(f"{side}_preact")] for side in ("student", "teacher")
    )
    student = student[-len(teacher) :]  # of one more stage, in one of the cases
    connected, margins = [], []
    for number, (preact, target) in enumerate(zip(student, teacher, strict=True), start=1):
        connector = Connector(preact.shape[1], target.shape[1])
        given |= golden_features.fill(connector, given, f"connector{number}.")
        connected.append(connector(preact))
        margins.append(channel_margins(given[f"teacher_bn{number}.weight"], given[f"teacher_bn{number}.bias"]))
        expected = row["margins"][number - 1]  # of the first channels
        assert margins[-1][: len(expected)].tolist() == pytest.approx(expected, rel=1e-9)
    golden_features.check(row, ofd_loss(connected, teacher, margins), given)


def arguments():
    student, teacher = (examples.logits(seed, 6, 4).view(2, 3, 2, 2) for seed in range(2))
    return student, teacher, torch.tensor([-0.5, -2.0, 0.0], dtype=torch.float64)


def test_equals_a_loop():
    student, teacher, margin = arguments()
    expected = 0.0
    for b in range(2):
        for c in range(3):
            for x, p in zip(student[b, c].flatten().tolist(), teacher[b, c].flatten().tolist(), strict=True):
                t = max(p, margin[c].item())
                expected += (x - t) ** 2 if x > t or t > 0 else 0.0
    assert partial_l2_loss(student, teacher, margin).item() == pytest.approx(expected / 2, rel=1e-12)


def test_later_stages_weigh_more_and_larger_maps_of_the_teacher_are_pooled():
    (first, teacher, margin), third = arguments(), examples.logits(3, 6, 1).view(2, 3, 1, 1)
    stages = [(first, teacher, margin), (-first, teacher, margin), (third, teacher, margin)]
    pooled = teacher.mean(dim=(2, 3), keepdim=True)
    terms = [partial_l2_loss(*each) for each in [*stages[:2], (third, pooled, margin)]]
    torch.testing.assert_close(ofd_loss(*zip(*stages, strict=True)), terms[0] / 4 + terms[1] / 2 + terms[2])


def test_gradient_equals_finite_differences():
    student, teacher, margin = arguments()
    assert torch.autograd.gradcheck(lambda x: partial_l2_loss(x, teacher, margin), (student.requires_grad_(),))


def test_below_a_silent_teacher_nothing_counts():
    student = torch.tensor([-3.0, -1.0, 0.5]).view(1, 3, 1, 1).requires_grad_()
    loss = partial_l2_loss(student, torch.full((1, 3, 1, 1), -9.0), torch.full((3,), -2.0))
    loss.backward()
    assert loss == 1.0 + 2.5**2
    assert student.grad.flatten().tolist() == [0.0, 2.0, 5.0]


@pytest.mark.parametrize("mean", [-2.0, -0.1, 0.0, 0.7, 1.5])
@pytest.mark.parametrize("weight", [0.5, -0.8])
def test_a_margin_is_the_mean_below_0(mean, weight):
    """By the midpoint rule, or three deviations where next to nothing is below 0."""
    sigma, steps = abs(weight), 20_000
    low = mean - 12 * sigma
    points = [low * (1 - (i + 0.5) / steps) for i in range(steps)]  # from ``low`` to 0
    density = [exp(-(((z - mean) / sigma) ** 2) / 2) for z in points]
    expected = sum(z * d for z, d in zip(points, density, strict=True)) / sum(density)
    if (1 + erf(-mean / sigma / sqrt(2))) / 2 <= 0.001:
        expected = -3 * sigma
    (margin,) = channel_margins(*(torch.tensor([x], dtype=torch.float64) for x in (weight, mean))).tolist()
    assert margin == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_margin_of_a_channel_without_spread_is_the_limit(dtype):
    bias = torch.tensor([-1.5, 0.0, 2.0, -1e4, 1e4], dtype=dtype)
    for weight in (0.0, -0.0, 1e-40, torch.finfo(dtype).tiny):
        margins = channel_margins(torch.full_like(bias, weight), bias)
        torch.testing.assert_close(margins, bias.clamp(max=0.0))


def test_margins_are_finite_and_not_above_0():
    weight, bias = (torch.cat([sign * 10.0 ** torch.arange(-8, 5) for sign in (-1, 1)]) for _ in range(2))
    margins = channel_margins(weight[:, None], bias)
    assert margins.isfinite().all()
    assert margins.max() <= 0
    assert margins.min() > -inf


def build(teacher, student, **changes):
    with torch.device("meta"):
        networks = [MODELS.build(name, 100) for name in (student, teacher)]
        settings = {**examples.SETTINGS["ofd"], **changes}
        return DISTILLERS.build("ofd", *networks, examples.data_info(image_size=32), **settings)


@pytest.mark.parametrize(("student", "count"), [("resnet8x4", 86_912), ("shufflenet_v2", 156_800)])
def test_parameters_of_the_connectors_are_as_many_as_published(student, count):
    distiller = build("resnet32x4", student)
    assert sum(parameter.numel() for parameter in distiller.connectors.parameters()) == count
    assert distiller.students() == {"student": distiller.student}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "student"),
    [("wrn_40_2", "mobilenet_v2"), ("vgg13", "resnet8x4"), ("mobilenet_v2", "shufflenet_v1")],
)
def test_maps_of_the_zoo_pair_from_the_last_stage_back(teacher, student):
    distiller = build(teacher, student)
    own, theirs = (feature_shapes(network, 32).preacts[1:] for network in (distiller.student, distiller.teacher))
    count = min(len(own), len(theirs))
    widths = [tuple(connector.conv.weight.shape[:2]) for connector in distiller.connectors]
    assert widths == [(t[0], s[0]) for s, t in zip(own[-count:], theirs[-count:], strict=True)]


def test_margins_are_of_the_weights_that_the_teacher_has_now():
    distiller = examples.build("ofd")
    norm = distiller.teacher[2]
    with torch.no_grad():
        norm.weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        norm.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    (margin,) = distiller.margins()
    torch.testing.assert_close(margin, channel_margins(norm.weight, norm.bias))
    assert "margin" not in " ".join(distiller.state_dict())


@pytest.mark.parametrize("of_the_batch", [True, False])
def test_the_teacher_normalises_as_the_setting_says_and_keeps_its_statistics(of_the_batch):
    distiller = examples.build("ofd", teacher_batch_statistics=of_the_batch)
    norm, batch = distiller.teacher[2], examples.batch()
    before = copy.deepcopy(distiller.teacher.state_dict())
    for mode in (True, False):
        distiller.train(mode)
        assert norm.training == of_the_batch
        preact = distiller(batch, examples.epoch()).signals.teacher_features.preacts[1]
        assert (preact.mean(dim=0).abs().max() < 1e-5) == of_the_batch
    torch.testing.assert_close(dict(distiller.teacher.state_dict()), dict(before), rtol=0, atol=0)
    assert type(distiller).needs.teacher_batch_statistics


def test_refuses_teachers_without_a_batchnorm_for_each_stage(monkeypatch):
    need = "OFD takes its margins from the BatchNorm before each of the teacher's stages' last ReLU"
    with pytest.raises(UserError) as caught:
        build("shufflenet_v2", "resnet8x4")
    assert str(caught.value) == (
        f"{need}: ShuffleNetV2 has no BatchNorm over all the channels before its stages' last ReLU"
    )
    monkeypatch.setattr(examples.TinyNetwork, "bn_before_relu", lambda self: [nn.BatchNorm2d(5, affine=False)])
    with pytest.raises(UserError) as caught:
        examples.build("ofd")
    assert str(caught.value) == (
        f"{need}: TinyNetwork.bn_before_relu should name layers with weights of [5] channels, found [None]"
    )
    monkeypatch.delattr(examples.TinyNetwork, "bn_before_relu")
    with pytest.raises(UserError) as caught:
        examples.build("ofd")
    assert str(caught.value) == f"{need}, and TinyNetwork has no bn_before_relu that names them"
