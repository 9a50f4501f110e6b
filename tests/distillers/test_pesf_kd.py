"""PESF-KD against plain loops, a case worked by hand, and its properties."""

from math import exp, log

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.kd import kd_loss
from mdistill.distillers.pesf_kd import Adapter
from mdistill.errors import UserError
from mdistill.optim.solvers import SGD

from . import examples


def adapter_by_loop(adapter, logits):
    """W2 relu(W1 z + b1) + b2 + z with Python floats."""
    down, up = adapter.down, adapter.up
    rows = []
    for z in logits.tolist():
        hidden = [
            max(0.0, b + sum(w * x for w, x in zip(row, z, strict=True)))
            for row, b in zip(down.weight.tolist(), down.bias.tolist(), strict=True)
        ]
        rows.append(
            [
                x + b + sum(w * h for w, h in zip(row, hidden, strict=True))
                for x, row, b in zip(z, up.weight.tolist(), up.bias.tolist(), strict=True)
            ]
        )
    return rows


def test_the_adapter_equals_a_loop():
    adapter, logits = Adapter(6, 3).double(), examples.logits(0, 5, 6)
    expected = torch.tensor(adapter_by_loop(adapter, logits), dtype=torch.float64)
    torch.testing.assert_close(adapter(logits), expected, rtol=1e-10, atol=1e-12)


def test_the_adapter_by_hand():
    """Logits (2, -1), one hidden unit 2 + (-1) + 1 = 2, which adds (2, -2) + (0, 1/2): (4, -2.5)."""
    adapter = Adapter(2, 1)
    with torch.no_grad():
        for parameter, values in (
            (adapter.down.weight, [[1.0, 1.0]]),
            (adapter.down.bias, [1.0]),
            (adapter.up.weight, [[1.0], [-1.0]]),
            (adapter.up.bias, [0.0, 0.5]),
        ):
            parameter.copy_(torch.tensor(values))
        assert adapter(torch.tensor([[2.0, -1.0]])).tolist() == [[4.0, -2.5]]


def test_terms_equal_a_loop():
    settings = {"ce_weight": 0.5, "kd_weight": 2.0, "adapter_ce_weight": 0.25, "temperature": 3.0}
    distiller = examples.build("pesf_kd", **settings).double().eval()
    batch = examples.batch(dtype=torch.float64)
    student = distiller.student(batch.image).tolist()
    teacher = adapter_by_loop(distiller.adapter, distiller.teacher(batch.image))

    def softmax(row, temperature=1.0):
        powers = [exp(z / temperature) for z in row]
        return [power / sum(powers) for power in powers]

    ce = kd = adapter_ce = 0.0
    for s, t, y in zip(student, teacher, batch.target.tolist(), strict=True):
        ce -= log(softmax(s)[y]) / 8
        adapter_ce -= log(softmax(t)[y]) / 8
        kd += 9 * sum(p * log(p / q) for p, q in zip(softmax(t, 3.0), softmax(s, 3.0), strict=True)) / 8
    terms = distiller(batch, examples.epoch()).terms
    values = {name: term.item() for name, term in terms.items()}
    assert values == pytest.approx({"ce": 0.5 * ce, "kd": 2.0 * kd, "adapter_ce": 0.25 * adapter_ce}, rel=1e-10)


def test_the_kd_term_has_the_gradient_of_finite_differences_on_both_sides():
    student, teacher = examples.logits(0, 3, 4).requires_grad_(), examples.logits(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: kd_loss(s, t, temperature=2.0), (student, teacher))


def test_an_adapter_that_adds_nothing_leaves_plain_kd():
    distiller, batch = examples.build("pesf_kd", temperature=4.0, kd_weight=0.9).eval(), examples.batch()
    with torch.no_grad():
        for parameter in distiller.adapter.up.parameters():
            parameter.zero_()
    terms = distiller(batch, examples.epoch()).terms
    assert terms["kd"] == examples.build("kd").eval()(batch, examples.epoch()).terms["kd"]
    torch.testing.assert_close(terms["adapter_ce"], F.cross_entropy(distiller.teacher(batch.image), batch.target))


@pytest.mark.parametrize(
    ("settings", "student", "adapter"),
    [
        ({"adapter_ce_weight": 0.0, "ce_weight": 0.0}, True, True),
        ({"kd_weight": 0.0, "ce_weight": 1.0}, True, True),
        ({"kd_weight": 0.0, "adapter_ce_weight": 0.0}, True, False),
    ],
)
def test_who_learns_from_what(settings, student, adapter):
    """The KD term trains both, from both sides; the teacher never learns."""
    distiller = examples.build("pesf_kd", **settings).train()
    distiller(examples.batch(), examples.epoch()).total.backward()
    assert any(value.grad is not None for value in distiller.student.parameters()) == student
    assert any(value.grad is not None for value in distiller.adapter.parameters()) == adapter
    assert all(value.grad is None for value in distiller.teacher.parameters())


def test_training_the_adapter_brings_the_teacher_to_the_student():
    """With the student held still the KD term falls: the sharpness gap closes from the teacher's side."""
    distiller = examples.build("pesf_kd", ce_weight=0.0, adapter_ce_weight=0.0).eval()
    batch, losses = examples.batch(), []
    for _ in range(20):
        distiller.zero_grad()
        loss = distiller(batch, examples.epoch()).total
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in distiller.adapter.parameters():
                parameter -= 0.1 * parameter.grad
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_the_adapter_has_a_rate_of_its_own():
    distiller = examples.build("pesf_kd", adapter_lr_scale=0.25)
    solver = SGD(distiller.param_groups(), momentum=0.0, nesterov=False, weight_decay=0.0)
    solver.set_lr(0.4)
    before = {key: value.detach().clone() for key, value in distiller.named_parameters()}
    solver.step(distiller.train()(examples.batch(), examples.epoch()))
    for key, value in distiller.named_parameters():
        if not key.startswith("teacher."):
            rate = 0.1 if key.startswith("adapter.") else 0.4
            torch.testing.assert_close(value.detach(), before[key] - rate * value.grad)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_stays_finite_for_a_certain_teacher(scale):
    """Its logits, and so what the adapter sees, of 1e4 and one sign a class."""
    distiller, batch = examples.build("pesf_kd").train(), examples.batch()
    with torch.no_grad():
        distiller.teacher.classifier.weight.zero_()
        distiller.teacher.classifier.bias.copy_(scale * torch.tensor([1.0, -1, 1, -1, 1, -1, 1]))
    distiller(batch, examples.epoch()).total.backward()
    for value in (*distiller.student.parameters(), *distiller.adapter.parameters()):
        assert value.grad.isfinite().all()


def test_the_adapter_is_saved_and_not_exported():
    distiller = examples.build("pesf_kd")
    assert sum(key.startswith("adapter.") for key in distiller.state_dict()) == 4
    assert distiller.students() == {"student": distiller.student}


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"adapter_lr_scale: .*greater than 0, found 0"):
        examples.build("pesf_kd", adapter_lr_scale=0.0)
    with pytest.raises(UserError, match=r"^distiller: PESFKD has nothing to train on: ce_weight, kd_weight all 0"):
        examples.build("pesf_kd", ce_weight=0.0, kd_weight=0.0)
