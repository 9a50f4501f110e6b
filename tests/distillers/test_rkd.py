"""RKD against published values, plain loops and finite differences; equal images."""

from math import sqrt

import pytest
import torch

from mdistill.distillers.rkd import rkd_angle_loss, rkd_distance_loss
from mdistill.errors import UserError

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("rkd"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    pair = given["student_pooled"], given["teacher_pooled"]
    weights = golden_features.arguments(row)
    loss = weights["distance"] * rkd_distance_loss(*pair) + weights["angle"] * rkd_angle_loss(*pair)
    golden_features.check(row, loss, given)


def huber(x, y):
    gap = abs(x - y)
    return gap**2 / 2 if gap < 1 else gap - 0.5


def minus(v, w):
    return [a - b for a, b in zip(v, w, strict=True)]


def length(v):
    return sqrt(sum(a**2 for a in v))


def distances_by_loop(rows):
    table = [[length(minus(v, w)) for w in rows] for v in rows]
    mean = sum(map(sum, table)) / (len(rows) * (len(rows) - 1))
    return [d / mean for row in table for d in row]


def angles_by_loop(rows):
    found = []
    for i, v in enumerate(rows):
        for j, w in enumerate(rows):
            for k, u in enumerate(rows):
                a, b = minus(w, v), minus(u, v)
                found.append(
                    0.0 if i in (j, k) else sum(x * y for x, y in zip(a, b, strict=True)) / length(a) / length(b)
                )
    return found


@pytest.mark.parametrize(
    ("loss", "by_loop"), [(rkd_distance_loss, distances_by_loop), (rkd_angle_loss, angles_by_loop)]
)
def test_equals_a_loop(loss, by_loop):
    student, teacher = examples.logits(0, 5, 3), examples.logits(1, 5, 4)
    pairs = list(zip(by_loop(student.tolist()), by_loop(teacher.tolist()), strict=True))
    assert loss(student, teacher).item() == pytest.approx(sum(huber(*pair) for pair in pairs) / len(pairs), rel=1e-12)


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_gradient_equals_finite_differences(loss):
    student, teacher = examples.logits(0, 4, 3).requires_grad_(), examples.logits(1, 4, 3)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student,))


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_a_shift_a_scale_and_a_rotation_do_not_count(loss):
    teacher = examples.logits(1, 5, 3)
    rotation = torch.linalg.qr(examples.logits(2, 3, 3)).Q
    torch.testing.assert_close(
        loss(0.3 * teacher @ rotation + 5, teacher), torch.tensor(0.0).double(), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
@pytest.mark.parametrize("case", ["two equal", "all equal", "one image", "zero", "1e4"])
def test_value_and_gradient_are_finite_and_moderate(loss, case, dtype):
    student, teacher = examples.logits(0, 4, 3).to(dtype), examples.logits(1, 4, 3).to(dtype)
    if case == "two equal":
        student[1] = student[0]
    elif case == "all equal":
        student[:] = student[0]
    elif case == "one image":
        student, teacher = student[:1], teacher[:1]
    else:
        student *= float(case.replace("zero", "0"))
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.abs().max() < 10


@pytest.mark.parametrize(
    ("settings", "terms"),
    [({}, ["distance", "angle"]), ({"angle_weight": 0.0}, ["distance"]), ({"distance_weight": 0.0}, ["angle"])],
)
def test_terms_can_be_switched_off(settings, terms):
    assert list(examples.build("rkd", **settings)(examples.batch(), examples.epoch()).distillation) == terms


def test_refuses_to_train_on_nothing():
    with pytest.raises(
        UserError, match=r"^distiller: RKD has nothing to train on: ce_weight, distance_weight, angle_w"
    ):
        examples.build("rkd", ce_weight=0.0, distance_weight=0.0, angle_weight=0.0)
