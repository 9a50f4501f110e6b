"""SimKD against published values and a plain loop; its network at inference."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mdistill.distillers import DISTILLERS
from mdistill.distillers.maps import of_one_size
from mdistill.distillers.simkd import Projector, prediction, simkd_loss
from mdistill.errors import UserError
from mdistill.models import MODELS

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("simkd"))
def test_equals_published_values(row):
    """Loss, gradients, and logits in training and, with the statistics of that one pass, in evaluation."""
    given = golden_features.tensors(row)
    student = golden_features.stages(given, "student")[-1]
    teacher = given.get("teacher_last_map", golden_features.stages(given, "teacher")[-1])
    projector = Projector(student.shape[1], teacher.shape[1], factor=2)
    own = golden_features.fill(projector, given)
    classifier = nn.Linear(teacher.shape[1], len(given["teacher_classifier.bias"])).double()
    golden_features.fill(classifier, given, "teacher_classifier.")
    pooled, target = of_one_size(student, teacher)
    projected = projector(pooled)
    logits = {"logits_train": prediction(projected, classifier)}
    logits["logits_eval_after"] = prediction(projector.eval()(pooled), classifier)
    for name, found in logits.items():
        expected = torch.tensor(row[name], dtype=torch.float64)  # of the first classes
        torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=1e-9, atol=1e-9)
    golden_features.check(row, simkd_loss(projected, target), {**given, **own})


def test_equals_a_loop():
    projected, teacher = (examples.logits(seed, 3, 8).view(3, 2, 2, 2) for seed in range(2))
    pairs = list(zip(projected.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    expected = sum((p - t) ** 2 for p, t in pairs) / len(pairs)
    assert simkd_loss(projected, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_logits_are_the_teacher_s_classifier_on_the_averaged_map():
    classifier, projected = nn.Linear(3, 4).double(), examples.logits(0, 6, 4).view(2, 3, 2, 2)
    torch.testing.assert_close(prediction(projected, classifier), classifier(projected.mean(dim=(2, 3))))


def build(student="resnet8", teacher="resnet8x4", **changes):
    networks = [MODELS.build(name, examples.CLASSES) for name in (student, teacher)]
    settings = {**examples.SETTINGS["simkd"], **changes}
    return DISTILLERS.build("simkd", *networks, examples.data_info(image_size=32), **settings)


def image(size=4):
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_what_is_evaluated_is_what_predicts_in_a_step():
    distiller = build()
    examples.step(distiller, examples.batch(size=4, image=image()), lr=0.1)
    distiller.eval()
    output = distiller(examples.batch(size=4, image=image()), examples.epoch())
    (name, network), *others = distiller.students().items()
    assert (name, others) == ("student", [])
    torch.testing.assert_close(network(image()), output.logits)
    restored = build().eval().students()["student"]
    restored.load_state_dict(copy.deepcopy(network.state_dict()))
    torch.testing.assert_close(restored(image()), output.logits)


def test_a_student_that_gives_the_teacher_s_map_predicts_as_the_teacher():
    distiller = build("resnet8x4", "resnet8x4").eval()
    with torch.no_grad():
        teacher = distiller.teacher.forward_features(image())
        logits = prediction(teacher.last_map, distiller.teacher.classifier)
    torch.testing.assert_close(logits, teacher.logits)
    torch.testing.assert_close(simkd_loss(teacher.last_map, teacher.last_map), torch.tensor(0.0))


def test_a_larger_map_is_pooled_and_cross_entropy_trains_the_prediction():
    """ShuffleNetV2's last stage is 4x4, the teacher's last map 8x8."""
    distiller = build("shufflenet_v2", ce_weight=1.0).train()
    output = distiller(examples.batch(size=4, image=image()), examples.epoch())
    assert output.signals.student_features.last_map.shape == (4, 256, 4, 4)
    torch.testing.assert_close(output.task["ce"], F.cross_entropy(output.logits, output.target))
    target = F.avg_pool2d(output.signals.teacher_features.last_map, 2)
    torch.testing.assert_close(
        output.distillation["simkd"], simkd_loss(output.signals.student_features.last_map, target)
    )
    output.total.backward()
    assert distiller.projector.conv1.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


@pytest.mark.parametrize(("factor", "count"), [(2, 214_016), (4, 70_400)])
def test_parameters_of_the_projector(factor, count):
    """Of resnet32x4 to resnet8x4; 214,016 is published for factor 2."""
    assert sum(parameter.numel() for parameter in Projector(256, 256, factor=factor).parameters()) == count


def test_refuses_a_factor_above_the_teacher_s_width():
    with pytest.raises(UserError, match=r"^distiller.factor: 6 is more than the 5 channels of the teacher's last map$"):
        examples.build("simkd", factor=6)
