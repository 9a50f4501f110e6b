"""FSP against published values and a plain loop; which pairs it takes."""

import pytest
import torch

from mdistill.distillers import DISTILLERS
from mdistill.distillers.fsp import fsp_loss
from mdistill.errors import UserError
from mdistill.models import MODELS

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("fsp"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    student, teacher = (golden_features.stages(given, side) for side in ("student", "teacher"))
    for number in range(3):
        pair = slice(number, number + 2)
        assert fsp_loss(student[pair], teacher[pair]).item() == pytest.approx(row["scalars"][f"pair{number}"], rel=1e-9)
    golden_features.check(row, fsp_loss(student, teacher), given)


def stages(seed):
    return [examples.logits(seed, 2, 12).view(2, 3, 2, 2), examples.logits(seed + 1, 2, 4).view(2, 4, 1, 1)]


def test_equals_a_loop():
    student, teacher = stages(0), stages(2)
    expected = 0.0
    for sample in range(2):
        flows = []
        for first, second in (student, teacher):
            pooled = [sum(sum(row) for row in channel) / 4 for channel in first[sample].tolist()]
            flows.append([a * b for a in second[sample].flatten().tolist() for b in pooled])
        expected += sum((s - t) ** 2 for s, t in zip(*flows, strict=True))
    assert fsp_loss(student, teacher).item() == pytest.approx(expected / 24, rel=1e-12)


def test_gradient_equals_finite_differences():
    student, teacher = [stage.requires_grad_() for stage in stages(0)], stages(2)
    assert torch.autograd.gradcheck(lambda *own: fsp_loss(own, teacher), student)


def build(student: str, teacher: str):
    with torch.device("meta"):
        networks = MODELS.build(student, 100), MODELS.build(teacher, 100)
        return DISTILLERS.build("fsp", *networks, examples.data_info(image_size=32), ce_weight=1.0)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            "wrn_40_1",
            "wrn_40_2",
            "distiller.name: FSP needs the same channels in both networks; stage 1 has 16 in the student and 32 in the"
            " teacher, stage 2 has 32 in the student and 64 in the teacher, stage 3 has 64 in the student and 128 in"
            " the teacher (stage 0 is the stem); take another pair or another method",
        ),
        (
            "mobilenet_v2",
            "wrn_40_2",
            "distiller.name: FSP pairs the stages of both networks; the student has 5 with the stem, the teacher 4;"
            " take networks of one family, with as many stages, or another method",
        ),
    ],
)
def test_networks_whose_channels_differ_are_refused(student, teacher, message):
    with pytest.raises(UserError) as caught:
        build(student, teacher)
    assert str(caught.value) == message


def test_the_first_phase_trains_the_student_up_to_its_last_stage():
    distiller = build("wrn_16_2", "wrn_40_2")
    distiller.enter_phase("flows")
    frozen = {name.split(".")[0] for name, value in distiller.student.named_parameters() if not value.requires_grad}
    assert frozen == {"bn1", "fc"}
