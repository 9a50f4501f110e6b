"""The maths of multi-level logit distillation: a case worked by hand, plain loops, the published total, properties."""

import json
from math import exp, log

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.kd import kd_loss
from mdistill.distillers.mlkd import batch_loss, class_loss, instance_loss, uncertain_fractions, weak_view_terms
from mdistill.errors import UserError

from . import examples, golden, two_views

LEVELS = {"instance": instance_loss, "batch": batch_loss, "class": class_loss}
every_level = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)


def by_hand():
    """A teacher of (3/4, 1/4), a uniform student, one sample."""
    return torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[log(3), 0.0]], dtype=torch.float64)


def test_the_levels_by_hand():
    """Instance: 3/4 ln 3/2 + 1/4 ln 1/2. Batch: 9/16 + 1/16 against 1/2, the square of 1/8.

    Class: ((9, 3), (3, 1)) / 16 against 4/16 everywhere: (25 + 1 + 1 + 9) / 256 over 2 classes.
    """
    expected = {"instance": 0.75 * log(3 / 2) + 0.25 * log(1 / 2), "batch": 1 / 64, "class": 36 / 512}
    for name, level in LEVELS.items():
        assert level(*by_hand(), temperatures=(1.0,)).item() == pytest.approx(expected[name], rel=1e-12)


def test_the_fractions_by_hand():
    """One sample is the median itself. Of the classes, 3/4 and 1/4, the median 1/2 leaves one."""
    samples, classes = uncertain_fractions(by_hand()[1])
    assert (samples, classes) == (1.0, 0.5)
    teacher = torch.tensor([[5.0, 3, 2], [2, 7, 1], [1, 1, 8], [6, 2, 2]]).log()  # over 10: 5, 7, 8, 6; 14, 13, 13
    samples, classes = uncertain_fractions(teacher.double())
    assert samples == 0.5
    assert classes.item() == pytest.approx(2 / 3)


def by_loop(student, teacher, temperatures):
    """The three levels from their sums, in Python floats."""
    rows, classes = range(len(student)), range(student.shape[1])
    losses = dict.fromkeys(LEVELS, 0.0)
    for temperature in temperatures:
        q, p = (
            [[exp(z / temperature) / sum(exp(x / temperature) for x in row) for z in row] for row in logits.tolist()]
            for logits in (student, teacher)
        )
        for i in rows:
            losses["instance"] += temperature**2 * sum(p[i][c] * log(p[i][c] / q[i][c]) for c in classes) / len(rows)
            for j in rows:
                gap = sum(p[i][c] * p[j][c] - q[i][c] * q[j][c] for c in classes)
                losses["batch"] += gap**2 / len(rows)
        for a in classes:
            for b in classes:
                gap = sum(p[i][a] * p[i][b] - q[i][a] * q[i][b] for i in rows)
                losses["class"] += gap**2 / len(classes)
    return losses


@pytest.mark.parametrize("temperatures", [(1.0,), (4.0, 3.0, 5.0)])
@pytest.mark.parametrize(("size", "classes"), [(6, 4), (1, 5), (5, 2)])
def test_the_levels_equal_a_loop(size, classes, temperatures):
    student, teacher = examples.logits(0, size, classes), examples.logits(1, size, classes)
    losses = {name: level(student, teacher, temperatures=temperatures).item() for name, level in LEVELS.items()}
    assert losses == pytest.approx(by_loop(student, teacher, temperatures), rel=1e-10)


@pytest.mark.parametrize(("size", "classes"), [(1, 2), (2, 3), (5, 4), (8, 10), (7, 7)])
def test_the_fractions_equal_those_of_the_median_of_numpy(size, classes):
    teacher = examples.logits(3, size, classes)
    probs = F.softmax(teacher, dim=1).numpy()
    expected = [(x <= np.percentile(x, 50)).mean() for x in (probs.max(axis=1), probs.sum(axis=0))]
    assert [fraction.item() for fraction in uncertain_fractions(teacher)] == pytest.approx(expected, rel=1e-12)


def test_ties_with_the_median_count_as_uncertain():
    samples, classes = uncertain_fractions(torch.zeros(4, 3))
    assert samples == 1
    assert classes == 1


@pytest.mark.parametrize("inputs", ["8x100", "5x10"])
def test_they_make_up_the_published_total_of_two_views(inputs):
    """The instance term of the strong view reads the weak one at its temperatures 2 and 6, as published."""
    rows = json.loads((golden.FOLDER / "logit_losses.json").read_text())
    (row,) = [row for row in rows if row["inputs"] == inputs and row["case"].startswith("mlkd_total|")]
    assert row["case"] == "mlkd_total|temperature=4.0,ce_weight=1.0,kd_weight=1.0"
    with np.load(golden.FOLDER / "logit_losses.npz") as arrays:
        names = ("student", "teacher", "student_strong", "teacher_strong", "target")
        weak, teacher, strong, strong_teacher, target = (torch.from_numpy(arrays[f"{inputs}/{x}"]) for x in names)
        expected = torch.from_numpy(arrays[f"{inputs}/{row['case']}/grad"])
    weak.requires_grad_()
    terms = weak_view_terms(weak, teacher, weak, teacher, temperatures=(4.0, 3.0, 5.0, 2.0, 6.0))
    loss = torch.stack(
        [
            *terms.values(),
            instance_loss(strong, strong_teacher, temperatures=(4.0, 3.0, 5.0)),
            instance_loss(weak, teacher, temperatures=(2.0, 6.0)),
            F.cross_entropy(weak, target),
            F.cross_entropy(strong, target),
        ]
    ).sum()
    loss.backward()
    assert loss.item() == pytest.approx(row["loss"], rel=1e-9)
    assert (weak.grad - expected).abs().max() <= 1e-9 * expected.abs().max()


@every_level
def test_is_0_with_gradient_0_where_the_networks_agree(level):
    teacher = examples.logits(0, 6, 5)
    student = teacher.clone().requires_grad_()
    loss = level(student, teacher, temperatures=(4.0, 1.0))
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert student.grad.abs().max() < 1e-14


@every_level
def test_gradient_equals_finite_differences(level):
    student, teacher = examples.logits(0, 4, 3).requires_grad_(), examples.logits(1, 4, 3)
    assert torch.autograd.gradcheck(lambda z: level(z, teacher, temperatures=(4.0, 1.0)), student)


@every_level
def test_temperatures_add_up(level):
    logits = examples.logits(0, 6, 5), examples.logits(1, 6, 5)
    parts = [level(*logits, temperatures=(temperature,)) for temperature in (4.0, 3.0, 6.0)]
    torch.testing.assert_close(level(*logits, temperatures=(4.0, 3.0, 6.0)), torch.stack(parts).sum())
    assert level(*logits, temperatures=()) == 0


def test_the_instance_level_at_one_temperature_is_kd():
    logits = examples.logits(0, 6, 5), examples.logits(1, 6, 5)
    assert instance_loss(*logits, temperatures=(4.0,)) == kd_loss(*logits, temperature=4.0)


def test_the_batch_level_does_not_see_the_names_of_the_classes_nor_the_class_level_the_order_of_samples():
    student, teacher = examples.logits(0, 6, 5), examples.logits(1, 6, 5)
    renamed, reordered = student[:, [2, 0, 4, 1, 3]], student[[3, 0, 5, 1, 4, 2]]
    for level, blind, seen in ((batch_loss, renamed, reordered), (class_loss, reordered, renamed)):
        value = level(student, teacher, temperatures=(2.0,))
        torch.testing.assert_close(level(blind, teacher, temperatures=(2.0,)), value)
        assert abs(level(seen, teacher, temperatures=(2.0,)) - value) > 1e-3


def test_standardised_logits_reach_the_instance_level_alone():
    """The raw teacher here ties everywhere, so that its fractions are 1 and no other teacher's."""
    raw, ready = [[examples.logits(seed + n, 6, 5) for n in (0, 1)] for seed in (0, 10)]
    raw[1] = torch.zeros_like(raw[1])
    terms = weak_view_terms(*ready, *raw, temperatures=(4.0, 2.0))
    expected = {
        "instance": instance_loss(*ready, temperatures=(4.0, 2.0)),
        "class": class_loss(*raw, temperatures=(4.0, 2.0)),
        "batch": batch_loss(*raw, temperatures=(4.0, 2.0)),
    }
    torch.testing.assert_close(terms, expected)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_teacher_that_is_certain_gives_finite_terms(scale):
    teacher = scale * F.one_hot(torch.arange(6) % 4, 5).float()
    student = (scale * examples.logits(0, 6, 5)).float().requires_grad_()
    for name, term in weak_view_terms(student, teacher, student, teacher, temperatures=(4.0, 2.0)).items():
        (gradient,) = torch.autograd.grad(term, student, retain_graph=True)
        assert term.isfinite(), name
        assert gradient.isfinite().all(), name


def total(settings, views, target):
    """The method's terms over given logits: for each view the student's and the teacher's."""
    (student, teacher), (strong_student, strong_teacher) = views
    given = {"student": student, "teacher": teacher, "target": target}
    given |= {"student_strong": strong_student, "teacher_strong": strong_teacher}
    return two_views.terms("mlkd", settings, given)


@pytest.mark.parametrize("inputs", ["8x100", "5x10"])
@pytest.mark.slow
def test_the_method_equals_the_published_total_of_two_views(inputs):
    """Value and gradient of the weak view's logits, to 1e-9."""
    rows = json.loads((golden.FOLDER / "logit_losses.json").read_text())
    (row,) = [row for row in rows if row["inputs"] == inputs and row["case"].startswith("mlkd_total|")]
    with np.load(golden.FOLDER / "logit_losses.npz") as arrays:
        names = ("student", "teacher", "student_strong", "teacher_strong", "target")
        weak, teacher, strong, strong_teacher, target = (torch.from_numpy(arrays[f"{inputs}/{x}"]) for x in names)
        expected = torch.from_numpy(arrays[f"{inputs}/{row['case']}/grad"])
    weak.requires_grad_()
    terms = total({"ce_weight": 1.0, "kd_weight": 1.0}, ((weak, teacher), (strong, strong_teacher)), target)
    assert list(terms) == ["ce", "ce_strong", "instance", "class", "batch", "strong"]
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    assert loss.item() == pytest.approx(row["loss"], rel=1e-9)
    assert (weak.grad - expected).abs().max() <= 1e-9 * expected.abs().max()


def four_views():
    return (
        (examples.logits(0, 6, 5), examples.logits(1, 6, 5)),
        (examples.logits(2, 6, 5), examples.logits(3, 6, 5)),
    )


def test_the_variant_of_the_paper_treats_both_views_alike():
    """Every level of each view, by the loops above; no factors, no exchange of views."""
    views, target = four_views(), examples.targets(4, 6, 5)
    settings = {"variant": "paper", "kd_weight": 2.0, "temperature": 4.0, "extra_temperatures": [3.0]}
    terms = total(settings, views, target)
    for ending, (student, teacher) in zip(("", "_strong"), views, strict=True):
        loop = by_loop(student, teacher, (4.0, 3.0))
        assert {name: terms[f"{name}{ending}"].item() for name in LEVELS} == pytest.approx(
            {name: 2 * value for name, value in loop.items()}, rel=1e-10
        )
    assert len(terms) == 8
    swapped = total(settings, views[::-1], target)
    torch.testing.assert_close(sum(terms.values()), sum(swapped.values()))


@pytest.mark.parametrize("variant", ["published", "paper"])
def test_the_method_standardises_the_instance_level_alone(variant):
    views, target = four_views(), examples.targets(4, 6, 5)
    scaled = tuple((3 * student + 1, 0.5 * teacher - 2) for student, teacher in views)
    settings = {"variant": variant, "standardize_logits": True}
    before, after = total(settings, views, target), total(settings, scaled, target)
    for name, term in before.items():
        same = name.startswith("instance") or name == "strong"
        assert torch.allclose(term, after[name], rtol=1e-5) == same, name


def test_cross_entropy_is_the_sum_of_both_views():
    views, target = four_views(), examples.targets(4, 6, 5)
    terms = total({"ce_weight": 0.5, "kd_weight": 0.0}, views, target)
    torch.testing.assert_close(terms["ce"], 0.5 * F.cross_entropy(views[0][0], target))
    torch.testing.assert_close(terms["ce_strong"], 0.5 * F.cross_entropy(views[1][0], target))
    assert len(terms) == 2


def test_a_loss_without_terms_is_refused():
    with pytest.raises(UserError, match=r"^distiller: MLKD has nothing to train on: ce_weight, kd_weight all 0"):
        examples.build("mlkd", ce_weight=0.0, kd_weight=0.0)
    with pytest.raises(UserError, match=r"variant: .*'published' or 'paper', found 'both'"):
        examples.build("mlkd", variant="both")
