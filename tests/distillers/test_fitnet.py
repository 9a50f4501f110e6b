"""FitNet against published values, a plain loop, and the shapes that its regressor joins."""

import pytest
import torch

from mdistill.distillers import DISTILLERS
from mdistill.distillers.fitnet import Regressor, fitnet_loss
from mdistill.errors import UserError
from mdistill.models import MODELS, feature_shapes

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("fitnet"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    student, teacher = given["student_stage2"], given["teacher_stage2"]
    regressor = Regressor(tuple(student.shape[1:]), tuple(teacher.shape[1:]))
    own = golden_features.fill(regressor, given, "regressor.")
    golden_features.check(row, fitnet_loss(regressor(student), teacher), {**given, **own})


def test_equals_a_loop():
    regressed, teacher = (examples.logits(seed, 3, 8).view(3, 2, 2, 2) for seed in range(2))
    pairs = list(zip(regressed.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    expected = sum((r - h) ** 2 for r, h in pairs) / len(pairs)
    assert fitnet_loss(regressed, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((3, 8, 8), (4, 8, 8)),
        ((3, 8, 8), (4, 4, 4)),
        ((3, 4, 4), (4, 8, 8)),
        ((3, 7, 5), (4, 4, 4)),
        ((3, 2, 2), (4, 1, 1)),
        ((3, 1, 1), (4, 2, 2)),
    ],
)
def test_the_regressor_leads_from_shape_to_shape(student, teacher):
    assert Regressor(student, teacher)(torch.zeros(2, *student)).shape == (2, *teacher)


def test_refuses_sizes_that_no_regressor_joins():
    with pytest.raises(UserError) as caught:
        Regressor((3, 4, 4), (4, 12, 12))
    assert str(caught.value) == (
        "distiller.hint: the student's map is 4x4 and the teacher's 12x12; the regressor needs one at least as large,"
        " or exactly half as large"
    )


def test_refuses_a_stage_that_a_network_has_not():
    with pytest.raises(UserError, match=r"^distiller.hint: 2 is no stage of the student, which has 0 to 1$"):
        examples.build("fitnet", hint=2)


@pytest.mark.parametrize(("student", "teacher"), [("resnet8x4", "resnet32x4"), ("mobilenet_v2", "wrn_40_2")])
def test_its_regressor_fits_networks_of_the_zoo(student, teacher):
    with torch.device("meta"):
        networks = [MODELS.build(name, 100) for name in (student, teacher)]
        data = examples.data_info(image_size=32)
        distiller = DISTILLERS.build("fitnet", *networks, data, ce_weight=1.0, fitnet_weight=100.0, hint=2)
    shapes = [feature_shapes(network, 32).stages[2] for network in networks]
    assert distiller.regressor(torch.zeros(2, *shapes[0], device="meta")).shape == (2, *shapes[1])


def test_reads_the_hint_alone():
    distiller = examples.build("fitnet").eval()
    signals = distiller(examples.batch(), examples.epoch()).signals
    student, teacher = signals.student_features.stages[1], signals.teacher_features.stages[1]
    expected = 100.0 * fitnet_loss(distiller.regressor(student), teacher)
    torch.testing.assert_close(distiller.distillation(signals)["fitnet"], expected)
    assert distiller.students() == {"student": distiller.student}
