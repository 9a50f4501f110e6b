"""NormKD, with KD and with DKD, against the published code, and what it does where that is not finite."""

from pathlib import Path

import pytest
import torch

from mdistill.distillers.dkd import dkd_loss
from mdistill.distillers.kd import kd_loss
from mdistill.distillers.normkd import normalize, normkd_dkd_loss, normkd_loss
from mdistill.reporting.methods import describe

from . import examples, golden_more

CASES = golden_more.cases("normkd", "normkd", "normkd_dkd")
FINITE = [case for case in CASES if case.values[0].loss is not None]
NOT_FINITE = [case for case in CASES if case.values[0].loss is None]


def loss_of(case, given):
    logits = case.logits(given)
    if case.method == "normkd":
        return normkd_loss(*logits, **case.arguments)
    return normkd_dkd_loss(*logits, given["target"], **case.arguments)


def test_reference_cases_are_all_there():
    assert (len(FINITE), len(NOT_FINITE)) == (8, 4)


@pytest.mark.parametrize("case", FINITE)
def test_equals_the_published_code(case):
    given = case.tensors("student")
    golden_more.check(case, loss_of(case, given), given)


@pytest.mark.parametrize("case", NOT_FINITE)
def test_is_finite_where_the_published_code_is_not(case):
    given = case.tensors("student")
    loss = loss_of(case, given)
    loss.backward()
    assert loss.isfinite()
    assert given["student"].grad.isfinite().all()


def test_rows_of_equal_logits():
    """The student's is uniform whatever its value; the teacher's counts for next to nothing."""
    teacher = examples.logits(0, 4, 5)
    losses = [normkd_loss(torch.full((4, 5), value).double(), teacher, temperature_norm=2.0) for value in (0.0, 0.1, 7)]
    assert losses[0] > 0.1
    torch.testing.assert_close(losses, [losses[0]] * 3)
    assert normkd_loss(examples.logits(1, 4, 5), torch.full((4, 5), 0.1).double(), temperature_norm=2.0) < 1e-5


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_the_gradient_of_a_row_of_equal_logits_is_small(value):
    """Rounding must not pass for a deviation."""
    student, teacher = torch.full((4, 100), value, requires_grad=True), examples.logits(0, 4, 100).float()
    normkd_loss(student, teacher, temperature_norm=2.0).backward()
    assert student.grad.abs().max() < 1e4


def test_each_sample_has_its_temperatures():
    """KD and DKD at one temperature, sample by sample: of the teacher's logits and the student's over its own."""
    student, teacher, target = examples.logits(0, 5, 6), examples.logits(1, 5, 6), examples.targets(2, 5, 6)
    kd, dkd = torch.zeros(2).double()
    for row in range(5):
        part = slice(row, row + 1)
        hot = 2.0 * teacher[row].std()
        ready = student[part] * (teacher[row].std() / student[row].std())  # at the teacher's temperature
        kd = kd + kd_loss(ready, teacher[part], temperature=hot) / 5
        dkd = dkd + dkd_loss(ready, teacher[part], target[part], alpha=4.0, beta=5.0, temperature=hot) / 5
    torch.testing.assert_close(normkd_loss(student, teacher, temperature_norm=2.0), kd)
    found = normkd_dkd_loss(student, teacher, target, alpha=4.0, beta=5.0, temperature_norm=2.0)
    torch.testing.assert_close(found, dkd)


def test_the_scale_of_the_student_does_not_matter():
    student, teacher = examples.logits(0, 5, 6), examples.logits(1, 5, 6)
    losses = [normkd_loss(scale * student, teacher, temperature_norm=2.0) for scale in (1.0, 3.0)]
    torch.testing.assert_close(*losses)
    scaled, scales = normalize(3.0 * student, temperature_norm=1.0)
    torch.testing.assert_close(scaled.std(dim=1), torch.ones(5).double())
    torch.testing.assert_close(scales, 3.0 * student.std(dim=1, keepdim=True))


def test_the_terms_of_the_variant_with_dkd_add_up_to_its_loss():
    distiller, batch = (
        examples.build("normkd_dkd", warmup_epochs=0).double().eval(),
        examples.batch(dtype=torch.float64),
    )
    terms = distiller(batch, examples.epoch()).distillation
    assert list(terms) == ["tckd", "nckd"]
    logits = distiller.student(batch.image), distiller.teacher(batch.image)
    settings = {"alpha": 4.0, "beta": 5.0, "temperature_norm": 2.0}
    torch.testing.assert_close(sum(terms.values()), normkd_dkd_loss(*logits, batch.target, **settings))
    assert list(examples.build("normkd_dkd", beta=0.0)(examples.batch(), examples.epoch()).distillation) == ["tckd"]


def test_each_variant_lists_what_it_uses_itself():
    configs = Path(__file__).parents[2] / "configs" / "cifar100"
    plain, with_dkd = ({place for place, _ in describe(name, configs).differences} for name in ("normkd", "normkd_dkd"))
    assert plain == {"normalize", "normkd_loss"}
    assert {"normalize", "normkd_dkd_loss"} <= with_dkd
