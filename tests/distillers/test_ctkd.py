"""CTKD: loss, curriculum and both temperature modules against loops and cases by hand; who climbs and who descends."""

from math import cos, exp, log, pi

import pytest
import torch

from mdistill.distillers.ctkd import GradientReversal, InstanceTemperature, ctkd_loss, curriculum
from mdistill.distillers.kd import kd_loss
from mdistill.errors import UserError
from mdistill.optim.solvers import SGD

from . import examples
from . import golden_more as golden

MODULES = {"global": {"module": "global", "hidden": None}, "instance": {"module": "instance", "hidden": 6}}
every_module = pytest.mark.parametrize("settings", MODULES.values(), ids=MODULES)
CURRICULUM = {"minimum": 0.0, "maximum": 1.0, "epochs": 10}


def warmed(settings, **changes):
    """A method whose temperature module has learned something, so that all of its weights matter; float64."""
    distiller = examples.build("ctkd", **settings, **changes).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in distiller.temperature.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return distiller


def temperatures(distiller, batch):
    """What the module predicts for each sample, mapped to a temperature: (), or (B,)."""
    with torch.no_grad():
        prediction = distiller.temperature(distiller.student(batch.image), distiller.teacher(batch.image))
    return distiller.temperature_init + distiller.temperature_range / (1 + (-prediction).exp())


# --- loss ---


def test_the_loss_by_hand():
    """Logits (2 ln 3, 0) at tau = 2 are (3/4, 1/4), against a uniform student: 4 KL; (ln 3, 0) at tau = 1: 1 KL.

    With a temperature a sample the teacher's probabilities are 1e-7 larger.
    """
    student = torch.zeros(2, 2, dtype=torch.float64)
    teacher = torch.tensor([[2 * log(3), 0.0], [log(3), 0.0]], dtype=torch.float64)
    divergence = sum(p * log(2 * p) for p in (0.75 + 1e-7, 0.25 + 1e-7))
    loss = ctkd_loss(student, teacher, torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert loss.item() == pytest.approx((4 + 1) / 2 * divergence, rel=1e-12)


def test_the_loss_equals_a_loop():
    student, teacher = examples.logits(0, 12, 5), examples.logits(1, 12, 5)
    tau = torch.linspace(1, 21, 12, dtype=torch.float64)
    total = 0.0
    for s, t, temperature in zip(student.tolist(), teacher.tolist(), tau.tolist(), strict=True):
        q, p = ([exp(z / temperature) / sum(exp(x / temperature) for x in row) for z in row] for row in (s, t))
        p = [value + 1e-7 for value in p]
        total += temperature**2 * sum(a * log(a / b) for a, b in zip(p, q, strict=True)) / 12
    assert ctkd_loss(student, teacher, tau).item() == pytest.approx(total, rel=1e-10)


def test_the_loss_at_one_temperature_is_kd():
    logits = examples.logits(0, 12, 5), examples.logits(1, 12, 5)
    expected = kd_loss(*logits, temperature=3.5)
    tau = torch.tensor(3.5, dtype=torch.float64)
    torch.testing.assert_close(ctkd_loss(*logits, tau), expected)
    torch.testing.assert_close(ctkd_loss(*logits, tau.expand(12)), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_the_loss_has_the_gradient_of_finite_differences_for_student_and_temperature(shape):
    student, teacher = examples.logits(0, 3, 4).requires_grad_(), examples.logits(1, 3, 4)
    tau = torch.tensor([2.5, 1.0, 9.0], dtype=torch.float64)[: max(len(shape) * 3, 1)].reshape(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: ctkd_loss(s, teacher, t), (student, tau))


def distil(case, given, prediction):
    """The loss of the case's epoch, the temperature from ``prediction`` through the reversal."""
    arguments = case.arguments
    bounds = {"minimum": arguments["lambda_min"], "maximum": arguments["lambda_max"]}
    strength = curriculum(
        torch.tensor(arguments["epoch"], dtype=torch.float64), **bounds, epochs=arguments["lambda_epochs"]
    )
    reversed_prediction = GradientReversal.apply(prediction, strength)
    tau = arguments["temperature_init"] + arguments["temperature_range"] * reversed_prediction.sigmoid()
    return ctkd_loss(*case.logits(given), tau), strength, tau


@pytest.mark.parametrize("case", golden.cases("ctkd", "ctkd"))
def test_the_global_temperature_equals_the_released_code(case):
    """Loss, student's gradient, and what reaches the parameter of the temperature, reversed."""
    given = case.tensors("student")
    prediction = torch.tensor(case.arguments["prediction"], dtype=torch.float64, requires_grad=True)
    loss, strength, tau = distil(case, given, prediction)
    assert strength.item() == pytest.approx(case.numbers["strength"], rel=1e-9)
    assert tau.item() == pytest.approx(case.numbers["temperature"], rel=1e-9)
    golden.check(case, loss, given)
    golden.close(prediction.grad, case.results()["grad_prediction"].reshape(()), tolerance=1e-8)


@pytest.mark.parametrize("case", golden.cases("ctkd", "ctkd_instance"))
def test_a_temperature_a_sample_equals_the_released_code(case):
    given = case.tensors("student", "temperatures")
    golden.check(case, ctkd_loss(*case.logits(given), given["temperatures"]), given)


@pytest.mark.parametrize("case", golden.cases("ctkd", "ctkd_decay"))
def test_the_curriculum_equals_the_released_code(case):
    epochs = torch.arange(1, 13, dtype=torch.float64)
    bounds = {"minimum": case.arguments["lambda_min"], "maximum": case.arguments["lambda_max"]}
    golden.close(curriculum(epochs, **bounds, epochs=case.arguments["lambda_epochs"]), case.results()["strength"])


# --- curriculum ---


def test_the_curriculum_by_hand():
    """Two epochs long: half-way in the first, 1 from the second on; then from 0.2 to 0.6 in three."""
    strengths = [curriculum(torch.tensor(n), minimum=0.0, maximum=1.0, epochs=2).item() for n in (1, 2, 3, 240)]
    assert strengths == pytest.approx([0.5, 1.0, 1.0, 1.0], abs=1e-6)
    strengths = [curriculum(torch.tensor(n), minimum=0.2, maximum=0.6, epochs=3).item() for n in (1, 2, 3)]
    assert strengths == pytest.approx([0.3, 0.5, 0.6], abs=1e-6)


def test_the_curriculum_is_the_published_code_s_with_the_other_sign():
    """It multiplies the gradient by a value that falls from 0 to -1: 0.5 (cos(pi e / 10) + 1) (0 - -1) - 1."""
    for epoch in range(1, 15):
        published = 0.5 * (cos(pi * min(epoch, 10) / 10) + 1) - 1
        assert -curriculum(torch.tensor(epoch), **CURRICULUM).item() == pytest.approx(published, abs=1e-6)


def test_the_curriculum_goes_from_easy_to_hard():
    strengths = [curriculum(torch.tensor(epoch), **CURRICULUM).item() for epoch in range(1, 21)]
    assert 0 < strengths[0] < 0.03
    assert strengths[:10] == sorted(set(strengths[:10]))
    assert strengths[9:] == pytest.approx([1.0] * 11)


# --- who climbs and who descends ---


def test_the_reversal_is_the_identity_forward_and_minus_the_strength_backward():
    x = examples.logits(0, 3, 4).requires_grad_()
    y = GradientReversal.apply(x, torch.tensor(0.25))
    assert torch.equal(y, x)
    (y * torch.arange(4.0)).sum().backward()
    assert torch.equal(x.grad, -0.25 * torch.arange(4.0).double().expand(3, 4))


@every_module
@pytest.mark.parametrize("number", [1, 4, 10, 200])
def test_the_module_s_gradient_is_minus_lambda_times_that_of_the_loss(settings, number):
    """By finite differences on one weight of each parameter."""
    distiller, batch, epoch = warmed(settings, ce_weight=0.0), examples.batch(dtype=torch.float64), examples.epoch
    distiller(batch, epoch(number)).total.backward()
    strength = 0.5 * (1 - cos(pi * min(number, 10) / 10))
    for name, parameter in distiller.temperature.named_parameters():
        values, place = parameter.data.view(-1), parameter.grad.abs().argmax()
        losses = []
        for step in (1e-5, -2e-5):
            values[place] += step
            with torch.no_grad():
                losses.append(distiller(batch, epoch(number)).total.item())
        values[place] += 1e-5
        slope = (losses[0] - losses[1]) / 2e-5
        assert abs(slope) > 1e-6, name
        assert parameter.grad.view(-1)[place].item() == pytest.approx(-strength * slope, rel=1e-4), name


@every_module
def test_a_descending_solver_makes_the_student_s_task_harder_by_the_temperature(settings):
    """With the student held still the loss rises, step after step, and faster late than early in the curriculum."""
    rises = []
    for number in (1, 10):
        distiller, batch = warmed(settings, ce_weight=0.0), examples.batch(dtype=torch.float64)
        losses = []
        for _ in range(6):
            distiller.zero_grad()
            loss = distiller(batch, examples.epoch(number)).total
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for parameter in distiller.temperature.parameters():
                    parameter -= 0.05 * parameter.grad
        assert losses == sorted(set(losses))
        rises.append(losses[-1] - losses[0])
    assert rises[1] > 5 * rises[0] > 0


@every_module
def test_the_student_descends_the_same_loss_whatever_lambda_is(settings):
    """Its gradient is that of KD at temperatures that are given."""
    batch, gradients = examples.batch(dtype=torch.float64), []
    for changes in ({}, {"lambda_max": 0.0}):
        distiller = warmed(settings, ce_weight=0.0, **changes)
        distiller(batch, examples.epoch(10)).total.backward()
        gradients.append(distiller.student[-1].weight.grad)
    distiller = warmed(settings)
    logits = distiller.student(batch.image), distiller.teacher(batch.image)
    (0.9 * ctkd_loss(*logits, temperatures(distiller, batch))).backward()
    gradients.append(distiller.student[-1].weight.grad)
    assert torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


@every_module
def test_a_lambda_of_0_leaves_the_temperature_alone(settings):
    distiller = warmed(settings, lambda_max=0.0)
    distiller(examples.batch(dtype=torch.float64), examples.epoch(10)).total.backward()
    assert all((parameter.grad == 0).all() for parameter in distiller.temperature.parameters())


@every_module
def test_the_teacher_gets_no_gradient_and_the_module_is_saved_and_not_exported(settings):
    distiller = examples.build("ctkd", **settings).train()
    distiller(examples.batch(), examples.epoch()).total.backward()
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert all(parameter.grad is not None for parameter in distiller.temperature.parameters())
    assert any(key.startswith("temperature.") for key in distiller.state_dict())
    assert distiller.students() == {"student": distiller.student}


# --- the modules ---


def test_the_global_temperature_begins_where_the_published_one_does():
    """1 + 20 sigmoid(1), for every sample, whatever its image."""
    distiller = examples.build("ctkd", **MODULES["global"]).eval()
    for seed in range(3):
        assert temperatures(distiller, examples.batch(seed)).item() == pytest.approx(1 + 20 / (1 + exp(-1)), rel=1e-6)
    batch = examples.batch()
    logits = distiller.student(batch.image), distiller.teacher(batch.image)
    expected = 0.9 * kd_loss(*logits, temperature=1 + 20 / (1 + exp(-1)))
    torch.testing.assert_close(distiller(batch, examples.epoch()).terms["kd"], expected)


def test_the_instance_wise_temperature_begins_in_the_middle_for_all_and_then_tells_samples_apart():
    batch = examples.batch()
    assert temperatures(examples.build("ctkd").eval(), batch).tolist() == [11.0] * 8
    later = temperatures(warmed(MODULES["instance"]), examples.batch(dtype=torch.float64))
    assert len(set(later.tolist())) == 8


def test_the_instance_wise_module_equals_a_loop():
    """Probabilities in the teacher's order, two layers, the hidden one normalised, in Python floats."""
    distiller = warmed(MODULES["instance"])
    module, student, teacher = distiller.temperature, examples.logits(0, 5, 7), examples.logits(1, 5, 7)
    expected = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        order = sorted(range(7), key=lambda c, t=t: -t[c])
        x = [exp(row[c]) / sum(map(exp, row)) for row in (t, s) for c in order]
        hidden = [
            b + sum(w * v for w, v in zip(row, x, strict=True))
            for row, b in zip(module.first.weight.tolist(), module.first.bias.tolist(), strict=True)
        ]
        mean = sum(hidden) / 6
        scale = (sum((h - mean) ** 2 for h in hidden) / 6 + 1e-5) ** 0.5
        gains, offsets = module.norm.weight.tolist(), module.norm.bias.tolist()
        hidden = [max(0.0, g * (h - mean) / scale + b) for h, g, b in zip(hidden, gains, offsets, strict=True)]
        weights = module.last.weight.tolist()[0]
        expected.append(module.last.bias.item() + sum(w * h for w, h in zip(weights, hidden, strict=True)))
    assert module(student, teacher).tolist() == pytest.approx(expected, rel=1e-10)


def test_the_instance_wise_module_reads_both_networks_and_not_which_class_is_which():
    module = warmed(MODULES["instance"]).temperature
    student, teacher = examples.logits(0, 5, 7), examples.logits(1, 5, 7)
    before, order = module(student, teacher), [3, 6, 0, 2, 5, 1, 4]
    torch.testing.assert_close(module(student[:, order], teacher[:, order]), before)
    torch.testing.assert_close(module(student + 5, teacher - 3), before)
    assert ((module(student.flip(1), teacher) - before).abs() > 1e-4).all()
    assert ((module(student, 0.5 * teacher) - before).abs() > 1e-4).all()


def test_the_instance_wise_module_keeps_samples_apart_and_sends_no_gradient_back():
    module = warmed(MODULES["instance"]).temperature
    student, teacher = examples.logits(0, 5, 7).requires_grad_(), examples.logits(1, 5, 7)
    together = module(student, teacher)
    alone = torch.cat([module(student[n : n + 1], teacher[n : n + 1]) for n in range(5)])
    torch.testing.assert_close(together, alone)
    together.sum().backward()
    assert student.grad is None


@every_module
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_temperatures_stay_in_their_range_while_both_train(settings, scale):
    distiller = examples.build("ctkd", **settings).train()
    with torch.no_grad():
        for network in (distiller.student, distiller.teacher):
            network[-1].weight.mul_(scale)
    for number in range(1, 30):
        assert examples.step(distiller, examples.batch(number), number, lr=1.0 / scale**2).isfinite()
    for parameter in distiller.parameters():
        assert parameter.isfinite().all()
    actual = temperatures(distiller, examples.batch())
    assert ((actual >= 1) & (actual <= 21)).all()


@pytest.mark.parametrize("classes", [2, 5])
def test_a_certain_teacher_and_a_constant_student_give_finite_gradients(classes):
    module = InstanceTemperature(classes, 4)
    with torch.no_grad():
        module.last.weight.fill_(0.5)
    student = torch.zeros(1, classes, requires_grad=True)
    teacher = 1e4 * torch.nn.functional.one_hot(torch.tensor([1]), classes).float()
    ctkd_loss(student, teacher, 1 + 20 * module(student, teacher).sigmoid()).backward()
    assert all(value.grad.isfinite().all() for value in (student, *module.parameters()))


def test_the_global_temperature_never_waits_for_the_device():
    examples.steps_without_host_reads(examples.build("ctkd", **MODULES["global"]), (8, 8, 5))


def test_the_solver_trains_the_temperature_with_the_student():
    """One group, one rate: w <- w - rate (gradient + decay w)."""
    distiller = examples.build("ctkd", **MODULES["global"]).train()
    solver = SGD(distiller.param_groups(), momentum=0.0, nesterov=False, weight_decay=0.01)
    solver.set_lr(0.1)
    solver.step(distiller(examples.batch(), examples.epoch(10)))
    gradient = distiller.temperature.value.grad
    assert distiller.temperature.value.item() == pytest.approx((1 - 0.1 * (gradient + 0.01)).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": "both"}, r"module: .*'global' or 'instance', found 'both'"),
        ({"hidden": None}, r"^distiller.hidden: found None with module 'instance'; 'instance' needs a number"),
        ({"module": "global"}, r"^distiller.hidden: found 6 with module 'global'; .* 'global' needs null"),
        ({"lambda_min": 2.0}, r"^distiller.lambda_min: 2.0 is above lambda_max 1.0"),
        ({"temperature_init": 0.0}, r"temperature_init: .*greater than 0, found 0"),
        ({"kd_weight": 0.0}, r"kd_weight: .*greater than 0, found 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        examples.build("ctkd", **settings)
