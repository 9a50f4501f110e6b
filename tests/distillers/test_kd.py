"""KD against the published code, cases worked by hand, and its properties; then its variants."""

import copy
from math import exp, log

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.functional import kl_divergence
from mdistill.distillers.kd import MovingTarget, balanced_divergence, interpolate, js_divergence, kd_loss
from mdistill.engine.metrics import EpochSums
from mdistill.engine.trainer import train_step
from mdistill.errors import UserError
from mdistill.optim.solvers import SGD

from ..host_reads import NoHostReads
from . import examples, golden

CASES = golden.cases("kd")
DIVERGENCES = ["forward", "reverse", "js", "balanced"]
INTERPOLATION = {"epochs": 5, "start": 0.4, "end": 1.0, "alpha": 0.1, "beta": 0.9}
VARIANTS = {
    "reverse": {"divergence": "reverse"},
    "js": {"divergence": "js"},
    "balanced": {"divergence": "balanced", "balance": 2.0},
    "interpolated": {"target": "interpolated", "interpolation": INTERPOLATION},
    "both": {"divergence": "balanced", "balance": 2.0, "target": "interpolated", "interpolation": INTERPOLATION},
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def test_reference_cases_are_all_there():
    assert len(CASES) == 6


@pytest.mark.parametrize("row", CASES)
def test_equals_the_published_code(row):
    golden.check(row, lambda student, teacher, target, **arguments: kd_loss(student, teacher, **arguments))


def test_by_hand():
    """T = 2, teacher logits (2 ln 3, 0), student logits (0, 0).

    Softened: teacher (3/4, 1/4), student (1/2, 1/2). KL = 3/4 ln 3/2 + 1/4 ln 1/2; times T^2 = 4.
    """
    loss = kd_loss(torch.zeros(1, 2), torch.tensor([[2 * log(3), 0.0]]), temperature=2.0)
    assert loss.item() == pytest.approx(4 * (0.75 * log(1.5) + 0.25 * log(0.5)), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_is_least_where_student_equals_teacher(temperature):
    teacher = examples.logits(0, 6, 9)
    student = (teacher + 5.0).requires_grad_()  # equal up to a shift
    loss = kd_loss(student, teacher, temperature=temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12
    assert kd_loss(teacher + examples.logits(1, 6, 9), teacher, temperature=temperature) > 0.1


def test_has_the_gradient_of_cross_entropy_with_soft_targets():
    """Hinton et al. write the cross-entropy; with the factor T^2 its gradient is the same."""
    teacher, student = examples.logits(0, 6, 9), examples.logits(1, 6, 9).requires_grad_()
    (found,) = torch.autograd.grad(kd_loss(student, teacher, temperature=3.0), student)
    paper = 9.0 * F.cross_entropy(student / 3.0, (teacher / 3.0).softmax(dim=1))
    torch.testing.assert_close(found, torch.autograd.grad(paper, student)[0], rtol=1e-12, atol=1e-14)


def test_weighs_its_term():
    batch = examples.batch()
    terms = [examples.build("kd", kd_weight=weight).eval()(batch, examples.epoch()).terms for weight in (1.0, 0.25)]
    assert list(terms[0]) == ["ce", "kd"]
    torch.testing.assert_close(0.25 * terms[0]["kd"], terms[1]["kd"])


def test_weight_0_leaves_the_term_out():
    assert list(examples.build("kd", kd_weight=0.0)(examples.batch(), examples.epoch()).terms) == ["ce"]
    with pytest.raises(UserError, match=r"^distiller: KD has nothing to train on: ce_weight, kd_weight all 0"):
        examples.build("kd", kd_weight=0.0, ce_weight=0.0)


def test_refuses_a_temperature_of_0():
    with pytest.raises(UserError, match=r"temperature: .*greater than 0, found 0"):
        examples.build("kd", temperature=0.0)


# --- other divergences ---


def test_the_method_is_what_is_computed_unless_told():
    """Bit for bit the formula of the method alone."""
    student, teacher = examples.logits(0, 6, 9).float(), examples.logits(1, 6, 9).float()
    expected = 16.0 * kl_divergence(F.log_softmax(teacher / 4.0, dim=1), F.log_softmax(student / 4.0, dim=1))
    assert kd_loss(student, teacher, temperature=4.0) == expected
    assert kd_loss(student, teacher, temperature=4.0, divergence="forward", balance=3.0) == expected
    batch, distiller = examples.batch(), examples.build("kd").eval()
    logits = distiller.student(batch.image), distiller.teacher(batch.image)
    assert distiller(batch, examples.epoch()).terms["kd"] == 0.9 * kd_loss(*logits, temperature=4.0)
    assert not [key for key in distiller.training_state() if not key.startswith("student.")]


def by_loop(student, teacher, divergence, temperature, balance):
    """The four divergences from their sums, row by row in Python floats."""

    def softmax(row):
        powers = [exp(z / temperature) for z in row]
        return [power / sum(powers) for power in powers]

    def kl(p, q):
        return sum(a * log(a / b) for a, b in zip(p, q, strict=True))

    total = 0.0
    for t, s in zip(map(softmax, teacher.tolist()), map(softmax, student.tolist()), strict=True):
        middle = [(a + b) / 2 for a, b in zip(t, s, strict=True)]
        entropy_t, entropy_s = (-sum(a * log(a) for a in p) for p in (t, s))
        weights = (balance, 1.0) if entropy_t > entropy_s else (1.0, balance)
        total += {
            "forward": kl(t, s),
            "reverse": kl(s, t),
            "js": kl(t, middle) / 2 + kl(s, middle) / 2,
            "balanced": weights[0] * kl(t, s) + weights[1] * kl(s, t),
        }[divergence]
    return temperature**2 * total / len(student)


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_a_loop(divergence, temperature):
    student, teacher = examples.logits(0, 12, 5), examples.logits(1, 12, 5)
    settings = {"divergence": divergence, "temperature": temperature, "balance": 2.5}
    found = kd_loss(student, teacher, **settings)
    assert found.item() == pytest.approx(by_loop(student, teacher, **settings), rel=1e-10)


def test_the_divergences_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2), T = 1. The student's entropy is the larger one.

    Reverse: 1/2 ln 2/3 + 1/2 ln 2 = 1/2 ln 4/3. Forward: 3/4 ln 3/2 + 1/4 ln 1/2.
    JS: the middle is (5/8, 3/8); 1/2 (3/4 ln 6/5 + 1/4 ln 2/3) + 1/2 (1/2 ln 4/5 + 1/2 ln 4/3).
    Balanced with 2: forward + 2 reverse; the two networks exchanged, 2 reverse + forward with each the other's.
    """
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    forward, reverse = 0.75 * log(3 / 2) + 0.25 * log(1 / 2), 0.5 * log(4 / 3)
    js = (0.75 * log(6 / 5) + 0.25 * log(2 / 3) + 0.5 * log(4 / 5) + 0.5 * log(4 / 3)) / 2

    def found(divergence, *logits):
        return kd_loss(*logits, temperature=1.0, divergence=divergence, balance=2.0).item()

    assert found("forward", student, teacher) == pytest.approx(forward, rel=1e-12)
    assert found("reverse", student, teacher) == pytest.approx(reverse, rel=1e-12)
    assert found("js", student, teacher) == pytest.approx(js, rel=1e-12)
    assert found("balanced", student, teacher) == pytest.approx(forward + 2 * reverse, rel=1e-12)
    assert found("balanced", teacher, student) == pytest.approx(2 * reverse + forward, rel=1e-12)


def test_js_is_symmetric_and_at_most_ln_2():
    p, q = (F.log_softmax(examples.logits(seed, 6, 9, scale=30.0), dim=1) for seed in (0, 1))
    torch.testing.assert_close(js_divergence(p, q), js_divergence(q, p), rtol=1e-12, atol=0)
    assert 0.3 < js_divergence(p, q) <= log(2)


def test_balanced_with_weight_1_is_the_sum_of_both_directions():
    p, q = (F.log_softmax(examples.logits(seed, 6, 9), dim=1) for seed in (0, 1))
    expected = kl_divergence(p, q) + kl_divergence(q, p)
    torch.testing.assert_close(balanced_divergence(p, q, balance=1.0), expected, rtol=1e-12, atol=0)


# --- the moving target ---


def test_the_target_goes_from_the_student_to_the_teacher():
    student, teacher = examples.logits(0, 3, 4).requires_grad_(), examples.logits(1, 3, 4)
    for coefficient, expected in ((0.0, student), (1.0, teacher), (0.25, 0.75 * student + 0.25 * teacher)):
        found = interpolate(student, teacher, torch.tensor(coefficient))
        assert not found.requires_grad
        torch.testing.assert_close(found, expected.detach(), rtol=1e-15, atol=0)


def test_the_gradient_is_that_of_a_constant_target():
    distiller = examples.build("kd", ce_weight=0.0, kd_weight=1.0, **VARIANTS["interpolated"]).eval()
    batch = examples.batch()
    distiller(batch, examples.epoch()).total.backward()
    found = distiller.student[-1].weight.grad.clone()
    distiller.zero_grad()
    logits = distiller.student(batch.image)
    target = 0.6 * logits.detach() + 0.4 * distiller.teacher(batch.image)
    kd_loss(logits, target, temperature=4.0).backward()
    torch.testing.assert_close(found, distiller.student[-1].weight.grad)


def moves(losses, epochs, settings):
    """The coefficient before each step, from the update rule in Python floats."""
    t, momentum, previous, found = settings["start"], 0.0, None, []
    for loss, epoch in zip(losses, epochs, strict=True):
        way = min((epoch - 1) / (settings["epochs"] - 1), 1.0)
        t = max(t, settings["start"] + (settings["end"] - settings["start"]) * way)
        found.append(t)
        if previous is not None:
            change = (previous - loss) / (previous + 1e-15)
            momentum = settings["beta"] * momentum + (1 - settings["beta"]) * change
            t = min(settings["end"], t + settings["alpha"] / (1 + exp(-momentum)) * (1 - t))
        previous = loss
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("end", [0.8, 1.0])
def test_the_coefficient_moves_as_a_loop_says(alpha, end):
    settings = {**INTERPOLATION, "alpha": alpha, "end": end}
    target = MovingTarget(settings).double()
    target.coefficient.fill_(settings["start"])  # which float32 had rounded
    losses = [3.0, 2.0, 2.5, 0.5, 0.01, 0.1, 7.0, 6.0, 1e-3, 2e-3, 1.0, 1.0]
    epochs = [1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 9]
    found = []
    for loss, epoch in zip(losses, epochs, strict=True):
        found.append(target.at(torch.tensor(epoch)).item())
        target.update(torch.tensor(loss, dtype=torch.float64), torch.tensor(epoch))
    assert found == pytest.approx(moves(losses, epochs, settings), rel=1e-12)
    assert found == sorted(found)
    assert found[-1] == pytest.approx(end, rel=1e-12)


def test_a_move_by_hand():
    """Loss 2, then 1, with momentum 1/2: delta = 1/2, m = 1/4; from t = 0.4 a step of 0.1 sigmoid(1/4) 0.6."""
    target = MovingTarget({**INTERPOLATION, "beta": 0.5})
    target.update(torch.tensor(2.0), torch.tensor(1))
    assert target.coefficient == pytest.approx(0.4)
    assert target.momentum == 0
    target.update(torch.tensor(1.0), torch.tensor(1))
    assert target.momentum.item() == pytest.approx(0.25)
    assert target.coefficient.item() == pytest.approx(0.4 + 0.06 / (1 + exp(-0.25)))


def test_a_falling_loss_moves_the_target_faster_than_a_rising_one():
    ends = []
    for losses in ([4.0, 2.0, 1.0, 0.5], [0.5, 1.0, 2.0, 4.0]):
        target = MovingTarget(INTERPOLATION)
        for loss in losses:
            target.update(torch.tensor(loss), torch.tensor(1))
        ends.append(target.coefficient)
    assert ends[0] > ends[1] > 0.4


@pytest.mark.parametrize("epochs", [1, 5])
def test_the_last_epoch_is_plain_kd(epochs):
    interpolation = {**INTERPOLATION, "epochs": epochs, "start": 1.0 if epochs == 1 else 0.0}
    distiller = examples.build("kd", target="interpolated", interpolation=interpolation).eval()
    batch = examples.batch()
    assert distiller(batch, examples.epoch(epochs)).total == examples.build("kd").eval()(batch, examples.epoch()).total


def test_a_target_that_starts_at_the_student_has_nothing_to_teach():
    interpolation = {**INTERPOLATION, "start": 0.0}
    distiller = examples.build("kd", ce_weight=0.0, target="interpolated", interpolation=interpolation).train()
    loss = distiller(examples.batch(), examples.epoch()).total
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert distiller.student[-1].weight.grad.abs().max() < 1e-6
    distiller.after_step()
    for number in range(3):
        assert examples.step(distiller, examples.batch(number)).isfinite()
    assert all(value.isfinite().all() for value in distiller.training_state().values())


# --- the variants as methods ---


@every_variant
def test_a_variant_never_waits_for_the_device(settings):
    distiller = examples.build("kd", **settings).train()
    solver = SGD(distiller.param_groups(), momentum=0.9, nesterov=False, weight_decay=5e-4)
    solver.set_lr(0.05)
    epoch, sums = examples.epoch(2), EpochSums(torch.device("cpu"))
    with NoHostReads():
        for number, size in enumerate((8, 8, 5)):
            train_step(distiller, solver, examples.batch(number, size), epoch, sums)
    assert sums.read(epoch=2).images == 21


@every_variant
def test_a_variant_goes_on_bit_for_bit(settings):
    unbroken, restored = examples.build("kd", **settings), examples.build("kd", **settings)
    for number in range(4):
        examples.step(unbroken, examples.batch(number), lr=0.1)
    restored.load_training_state(copy.deepcopy(unbroken.training_state()))
    for number in range(4, 8):
        losses = [examples.step(distiller, examples.batch(number), 3, lr=0.1) for distiller in (unbroken, restored)]
        assert losses[0] == losses[1]
    torch.testing.assert_close(restored.training_state(), unbroken.training_state(), rtol=0, atol=0)


def test_only_training_steps_move_the_target():
    distiller = examples.build("kd", **VARIANTS["interpolated"]).train()
    for number in range(3):
        examples.step(distiller, examples.batch(number))
    before = copy.deepcopy(distiller.target.state_dict())
    assert before["coefficient"] > 0.4
    distiller.eval()(examples.batch(3), examples.epoch())
    distiller.after_step()
    with torch.no_grad():
        distiller.train()(examples.batch(4), examples.epoch())
    distiller.after_step()
    torch.testing.assert_close(distiller.target.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@every_variant
def test_a_variant_trains_all_of_the_student_and_nothing_else(settings, scale):
    distiller = examples.build("kd", **settings).train()
    with torch.no_grad():
        for network in (distiller.student, distiller.teacher):
            network[-1].weight.mul_(scale)
    for number in range(2):
        assert examples.step(distiller, examples.batch(number)).isfinite()
    gradients = {key: value.grad for key, value in distiller.named_parameters() if value.grad is not None}
    assert set(gradients) == {f"student.{key}" for key, _ in distiller.student.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "forwards"}, r"divergence: .*'forward', 'reverse', 'js' or 'balanced', found 'forwards'"),
        ({"divergence": "balanced"}, r"^distiller.balance: divergence 'balanced' and balance go together; .* missing"),
        ({"balance": 2.0}, r"^distiller.balance: .*; balance is given, and divergence is 'forward'"),
        ({"divergence": "balanced", "balance": 0.5}, r"balance: .*greater than or equal to 1, found 0.5"),
        (
            {"target": "interpolated"},
            r"^distiller.interpolation: target 'interpolated' and .*; interpolation is missing",
        ),
        ({"interpolation": INTERPOLATION}, r"interpolation is given, and target is 'teacher'"),
        (
            {"target": "interpolated", "interpolation": {**INTERPOLATION, "start": 0.9, "end": 0.5}},
            r"^distiller.interpolation: start 0.9 is above end 0.5",
        ),
        (
            {"target": "interpolated", "interpolation": {**INTERPOLATION, "epochs": 0}},
            r"interpolation.epochs: .*, found 0",
        ),
        (
            {"target": "interpolated", "interpolation": {**INTERPOLATION, "ends": 1.0}},
            r"interpolation.ends: .*not permitted",
        ),
        ({"target": "interpolated", "interpolation": {"epochs": 5}}, r"interpolation.start: Field required"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        examples.build("kd", **settings)
