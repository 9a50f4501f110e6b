"""AB against published values and a plain loop; its connectors, and what its two phases train."""

import pytest
import torch
from torch import nn

from mdistill.distillers import DISTILLERS
from mdistill.distillers.ab import ab_loss
from mdistill.distillers.fitnet import Regressor
from mdistill.errors import UserError
from mdistill.models import MODELS

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("ab"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    connected, targets = [], []
    for number in (1, 2, 3):
        student, teacher = given[f"student_preact{number}"], given[f"teacher_preact{number}"]
        shapes = [tuple(preact.shape[1:]) for preact in (student, teacher)]
        connector = nn.Identity() if shapes[0] == shapes[1] else Regressor(*shapes, relu=False)
        given |= golden_features.fill(connector, given, f"connector{number}.")
        connected.append(connector(student))
        targets.append(teacher)
    for number in range(3):  # a stage alone has the factor of the last one
        alone = ab_loss([connected[number]], [targets[number]], margin=1.0).item() / 2 ** (2 - number)
        assert alone == pytest.approx(row["scalars"][f"stage{number + 1}"], rel=1e-9)
    golden_features.check(row, ab_loss(connected, targets, margin=1.0), given)


def arguments():
    return [examples.logits(seed, 2, 12, scale=1.0).view(2, 3, 2, 2) for seed in range(4)]


def test_equals_a_loop():
    *students, first, second = arguments()
    expected = 0.0
    for factor, student, teacher in zip((0.5, 1.0), students, (first, second), strict=True):
        for x, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
            gap = 0.7 - x if t > 0 else 0.7 + x
            expected += 0.003 * factor * max(gap, 0.0) ** 2 / 2
    assert ab_loss(students, [first, second], margin=0.7).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_equals_finite_differences():
    student, _, teacher, _ = arguments()
    assert torch.autograd.gradcheck(lambda x: ab_loss([x], [teacher], margin=1.0), student.requires_grad_())


def build(student: str, teacher: str):
    with torch.device("meta"):
        networks = MODELS.build(student, 100), MODELS.build(teacher, 100)
        data = examples.data_info(image_size=32)
        return DISTILLERS.build("ab", *networks, data, ce_weight=1.0, margin=1.0)


def parameters(modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.slow
def test_connectors_are_the_identity_between_equal_shapes_and_have_the_published_number_of_weights_elsewhere():
    assert parameters(build("resnet8x4", "resnet32x4").connectors) == 0
    assert parameters(build("shufflenet_v2", "resnet32x4").connectors) == 2_495_808


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "behind"),
    [
        ("resnet8x4", ["fc"]),
        ("vgg8", ["classifier"]),
        ("shufflenet_v2", ["conv2", "bn2", "linear"]),
        ("mobilenet_v2", ["conv2", "classifier"]),
        ("wrn_16_2", ["bn1", "fc"]),
    ],
)
def test_the_first_phase_trains_the_student_up_to_its_last_stage(student, behind):
    distiller = build(student, "resnet32x4" if student != "vgg8" else "vgg13")
    distiller.enter_phase("boundaries")
    frozen = {name.split(".")[0] for name, value in distiller.student.named_parameters() if not value.requires_grad}
    trained = {name.split(".")[0] for name, value in distiller.student.named_parameters() if value.requires_grad}
    assert frozen == set(behind)
    assert not frozen & trained
    distiller.train()
    assert all(module.training == (next(module.parameters()).requires_grad) for module in norms(distiller.student))
    distiller.enter_phase(None)
    assert all(value.requires_grad for value in distiller.student.parameters())
    assert all(module.training for module in distiller.student.modules())
    assert not any(value.requires_grad for value in distiller.connectors.parameters())


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def test_the_last_phase_does_not_run_the_teacher():
    distiller = examples.build("ab")
    distiller.teacher.forward_features = distiller.teacher.forward = None
    assert set(distiller(examples.batch(), examples.epoch()).terms) == {"ce"}


def test_without_cross_entropy_there_is_nothing_to_train_on():
    with pytest.raises(UserError, match=r"^distiller: AB has nothing to train on: ce_weight all 0"):
        examples.build("ab", ce_weight=0.0)
