"""ReviewKD against published values, a plain loop and finite differences; its levels."""

import pytest
import torch
from torch import nn

from mdistill.distillers import DISTILLERS
from mdistill.distillers.reviewkd import Fusion, Output, ReviewKD, hcl_loss, reviewkd_loss
from mdistill.errors import UserError
from mdistill.models import MODELS

from . import examples, golden_features


@pytest.mark.slow
@pytest.mark.parametrize("row", golden_features.cases("reviewkd"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    levels = [*golden_features.stages(given, "student"), given["student_pooled"][:, :, None, None]]
    preacts = [given[name] for name in sorted(given) if name.startswith("teacher_preact")]
    targets = [*preacts, given["teacher_pooled"][:, :, None, None]]
    names = [*(f"level{number}." for number in range(1, len(levels))), "pooled."]
    distiller = examples.build("reviewkd")
    distiller.fusions, distiller.outputs = nn.ModuleList(), nn.ModuleList()
    width = min(512, given["student_pooled"].shape[1])
    for name, level, target in zip(names, levels, targets, strict=True):
        fusion = Fusion(level.shape[1], width, tuple(target.shape[2:]), deepest=name == "pooled.")
        output = Output(width, target.shape[1])
        given |= golden_features.fill(fusion, given, name) | golden_features.fill(output, given, name)
        distiller.fusions.append(fusion)
        distiller.outputs.append(output)
    golden_features.check(row, reviewkd_loss(ReviewKD.review(distiller, levels), targets), given)


def mean_square(first, second):
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / len(first)


def pooled_by_loop(maps, size):
    """Of lists of samples of channels of rows."""
    found = []
    for channel in (channel for sample in maps for channel in sample):
        step = len(channel) // size
        for i in range(0, len(channel), step):
            for j in range(0, len(channel), step):
                cells = [channel[y][x] for y in range(i, i + step) for x in range(j, j + step)]
                found.append(sum(cells) / len(cells))
    return found


@pytest.mark.parametrize(
    ("size", "weights"),
    [(1, {1: 1.0}), (2, {2: 1.0, 1: 0.5}), (4, {4: 1.0, 2: 0.5, 1: 0.25}), (8, {8: 1.0, 4: 0.5, 2: 0.25, 1: 0.125})],
)
def test_equals_a_loop(size, weights):
    student, teacher = (examples.logits(seed, 6, size * size).view(2, 3, size, size) for seed in range(2))
    expected = sum(
        weight * mean_square(pooled_by_loop(student.tolist(), to), pooled_by_loop(teacher.tolist(), to))
        for to, weight in weights.items()
    )
    assert hcl_loss(student, teacher).item() == pytest.approx(expected / sum(weights.values()), rel=1e-12)


def test_gradient_equals_finite_differences():
    student, teacher = (examples.logits(seed, 4, 16).view(2, 2, 4, 4) for seed in range(2))
    assert torch.autograd.gradcheck(lambda s: hcl_loss(s, teacher), (student.requires_grad_(),))


def build(student, teacher, image_size=32, **changes):
    with torch.device("meta"):
        networks = [MODELS.build(name, 100) for name in (student, teacher)]
        settings = {"ce_weight": 1.0, "reviewkd_weight": 5.0, "max_width": 512, "student_preacts": False, **changes}
        return DISTILLERS.build("reviewkd", *networks, examples.data_info(image_size=image_size), **settings)


@pytest.mark.parametrize(("student", "count"), [("resnet8x4", 1_808_774), ("shufflenet_v2", 4_195_718)])
def test_parameters_of_the_fusion_are_as_many_as_published(student, count):
    distiller = build(student, "resnet32x4")
    own = [*distiller.fusions.parameters(), *distiller.outputs.parameters()]
    assert sum(parameter.numel() for parameter in own) == count
    assert distiller.students() == {"student": distiller.student}


def test_the_width_is_bounded():
    assert build("shufflenet_v2", "resnet32x4", max_width=64).fusions[0].reduce.out_channels == 64
    assert build("resnet8x4", "resnet32x4").fusions[0].reduce.out_channels == 256


def test_levels_have_the_teacher_s_shapes():
    distiller = build("mobilenet_v2", "vgg13")
    with torch.device("meta"):
        image = torch.zeros(2, 3, 32, 32)
        student, teacher = (network.forward_features(image) for network in (distiller.student, distiller.teacher))
        outputs = distiller.review([*student.stages[1:], student.pooled[:, :, None, None]])
    shapes = [*(preact.shape for preact in teacher.preacts[1:]), (2, 512, 1, 1)]
    assert [output.shape for output in outputs] == shapes


@pytest.mark.parametrize("preacts", [True, False])
def test_the_student_s_levels_are_its_stages_before_or_after_their_last_relu(preacts):
    distiller = examples.build("reviewkd", student_preacts=preacts).eval()
    output = distiller(examples.batch(), examples.epoch(20))
    student, teacher = output.signals.student_features, output.signals.teacher_features
    outputs = distiller.review([(student.preacts if preacts else student.stages)[1], student.pooled[:, :, None, None]])
    targets = [teacher.preacts[1], teacher.pooled[:, :, None, None]]
    torch.testing.assert_close(output.distillation["reviewkd"], 5.0 * reviewkd_loss(outputs, targets))


def test_networks_of_unequal_depth_are_refused():
    with pytest.raises(UserError) as caught:
        build("mobilenet_v2", "wrn_40_2")
    assert str(caught.value) == (
        "ReviewKD needs as many stages after the stem in both networks; the student has 4 and the teacher 3"
    )
