"""DHKD against plain loops, cases worked by hand, and its properties."""

from math import cosh, exp, log

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.dhkd import Align, binary_kl_norm_loss, main_gradient
from mdistill.distillers.functional import standardize
from mdistill.errors import UserError

from . import examples


def by_loop(logits, teacher, temperature):
    """KL between two binary distributions, (1/2, 1/2) and (q, 1 - q), class by class."""
    total = 0.0
    for row, teacher_row in zip(logits.tolist(), teacher.tolist(), strict=True):
        for z, t in zip(row, teacher_row, strict=True):
            q = 1 / (1 + exp(-(z - t) / temperature))
            total += 0.5 * log(0.5 / q) + 0.5 * log(0.5 / (1 - q))
    return temperature**2 * total / len(logits)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_loss_equals_a_loop(temperature):
    logits, teacher = examples.logits(0, 7, 5, 1.0), examples.logits(1, 7, 5, 1.0)
    loss = binary_kl_norm_loss(logits, teacher, temperature=temperature)
    assert loss.item() == pytest.approx(by_loop(logits, teacher, temperature), rel=1e-10)


def test_loss_by_hand():
    """tau = 2, gaps of 2 ln 3 and 0: q = 3/4 gives 1/2 ln 2/3 + 1/2 ln 2 = 1/2 ln 4/3, q = 1/2 gives 0. Times 4."""
    teacher = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    logits = teacher + torch.tensor([[2 * log(3), 0.0]])
    assert binary_kl_norm_loss(logits, teacher, temperature=2.0).item() == pytest.approx(2 * log(4 / 3), rel=1e-6)


def test_loss_is_a_log_cosh_and_0_only_where_logits_are_equal():
    teacher = examples.logits(0, 1, 3)
    assert abs(binary_kl_norm_loss(teacher, teacher, temperature=2.0)) < 1e-15
    shifted = binary_kl_norm_loss(teacher + 3.0, teacher, temperature=2.0)  # which no probability would show
    assert shifted.item() == pytest.approx(3 * 4 * log(cosh(3 / 4)), rel=1e-10)


def test_gradient_is_bounded_by_half_a_temperature():
    logits = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float64, requires_grad=True)
    binary_kl_norm_loss(logits, torch.zeros(1, 3).double(), temperature=2.0).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0, 0.0]]).double())


def test_main_gradient_is_that_of_the_head():
    pooled, target = examples.logits(0, 6, 4).requires_grad_(), examples.targets(1, 6, 5)
    head = torch.nn.Linear(4, 5).double()
    (expected,) = torch.autograd.grad(F.cross_entropy(head(pooled), target), pooled)
    gradient = main_gradient(head(pooled), target, head.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_main_gradient_by_hand():
    """p = (1/2, 1/2), true class 0, W = rows (1, 2) and (5, 0): 1/2 (5 - 1, 0 - 2), for a batch of 1."""
    weight = torch.tensor([[1.0, 2.0], [5.0, 0.0]])
    assert main_gradient(torch.zeros(1, 2), torch.tensor([0]), weight).tolist() == [[2.0, -1.0]]


def aligned(gradient, reference):
    features = torch.zeros_like(gradient, requires_grad=True)
    (Align.apply(features, reference) * gradient).sum().backward()
    return features.grad


def test_alignment_by_hand():
    """g = (-1, 2) against r = (3, 0): g loses its -1. Along r = (-3, 0) it stays as it is."""
    gradient = torch.tensor([[-1.0, 2.0]])
    assert aligned(gradient, torch.tensor([[3.0, 0.0]])).tolist() == [[0.0, 2.0]]
    assert aligned(gradient, torch.tensor([[-3.0, 0.0]])).tolist() == [[-1.0, 2.0]]


@pytest.mark.parametrize("seed", range(4))
def test_alignment_equals_a_loop_and_leaves_nothing_against_the_reference(seed):
    g, r = examples.logits(seed, 3, 4), examples.logits(seed + 10, 3, 4)
    g = g if (g * r).sum() < 0 else -g
    changed = aligned(g, r)
    dot = sum(a * b for a, b in zip(g.flatten().tolist(), r.flatten().tolist(), strict=True))
    square = sum(b * b for b in r.flatten().tolist())
    expected = [a - dot / square * b for a, b in zip(g.flatten().tolist(), r.flatten().tolist(), strict=True)]
    torch.testing.assert_close(changed.flatten(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)
    assert abs((changed * r).sum()) < 1e-12
    assert (aligned(-g, r) == -g).all()
    torch.testing.assert_close(aligned(7.0 * g, 1e-3 * r), 7.0 * changed, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e8])
def test_alignment_with_a_reference_of_any_size_is_finite(scale):
    gradient = examples.logits(0, 3, 4).float()
    assert aligned(gradient, scale * examples.logits(1, 3, 4).float()).isfinite().all()
    assert (aligned(gradient, torch.zeros(3, 4)) == gradient).all()


def test_the_term_is_that_of_the_auxiliary_head():
    batch = examples.batch()
    for align in (False, True):
        distiller = examples.build("dhkd", kd_weight=0.5, temperature=3.0, align=align).eval()
        logits = distiller.head(distiller.student.forward_features(batch.image).pooled)
        expected = 0.5 * binary_kl_norm_loss(logits, distiller.teacher(batch.image), temperature=3.0)
        terms = distiller(batch, examples.epoch()).terms
        assert list(terms) == ["ce", "kd"]
        torch.testing.assert_close(terms["kd"], expected)


def test_standardised_logits_meet_standardised_ones():
    distiller, batch = examples.build("dhkd", standardize_logits=True, align=False).eval(), examples.batch()
    logits = distiller.head(distiller.student.forward_features(batch.image).pooled), distiller.teacher(batch.image)
    expected = binary_kl_norm_loss(*map(standardize, logits), temperature=2.0)
    torch.testing.assert_close(distiller(batch, examples.epoch()).terms["kd"], expected)


def gradients(distiller, batch, term=None):
    """Of the total, or of one term, by parameter."""
    distiller.zero_grad()
    output = distiller(batch, examples.epoch())
    (output.terms[term] if term else output.total).backward()
    return {key: value.grad.clone() for key, value in distiller.named_parameters() if value.grad is not None}


def test_each_head_learns_from_its_own_loss():
    distiller, batch = examples.build("dhkd").eval(), examples.batch()
    main, auxiliary = gradients(distiller, batch, "ce"), gradients(distiller, batch, "kd")
    assert not [key for key in main if key.startswith("head.")]
    assert not [key for key in auxiliary if key.startswith("student.4.")]
    assert "student.1.weight" in main.keys() & auxiliary.keys()


@pytest.mark.parametrize("conflict", [True, False])
def test_alignment_changes_the_backbone_s_gradient_alone_and_only_in_conflict(conflict):
    """The teacher's logits are drawn toward, or away from, what lowers cross-entropy."""
    batch = examples.batch()
    plain, surgery = (examples.build("dhkd", align=align).double().eval() for align in (False, True))
    batch = examples.batch(dtype=torch.float64)
    pooled = plain.student.forward_features(batch.image).pooled.detach().requires_grad_()
    reference = main_gradient(plain.student.classifier(pooled), batch.target, plain.student.classifier.weight)
    step = reference @ plain.head.weight.detach().T  # what the auxiliary logits do when features follow the reference
    teacher_logits = (plain.head(pooled) + (1.0 if conflict else -1.0) * step).detach()
    batch = examples.batch(dtype=torch.float64, teacher_logits=teacher_logits)
    aligned_gradients, without = gradients(surgery, batch, "kd"), gradients(plain, batch, "kd")
    assert aligned_gradients.keys() == without.keys()
    for key in ("head.weight", "head.bias"):
        torch.testing.assert_close(aligned_gradients[key], without[key], rtol=1e-12, atol=1e-14)
    (raw,) = torch.autograd.grad(binary_kl_norm_loss(plain.head(pooled), teacher_logits, temperature=2.0), pooled)
    assert ((raw * reference).sum() < 0) == conflict
    rest = raw - (raw * reference).sum().clamp(max=0) / reference.square().sum() * reference
    features = plain.student.forward_features(batch.image).pooled
    weights = [plain.student[1].weight, plain.student[2].weight]
    expected = torch.autograd.grad(features, weights, rest.detach())
    torch.testing.assert_close(aligned_gradients["student.1.weight"], expected[0], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(aligned_gradients["student.2.weight"], expected[1], rtol=1e-9, atol=1e-14)
    changed = (aligned_gradients["student.1.weight"] - without["student.1.weight"]).abs().max()
    assert (changed > 1e-6) == conflict


def test_the_head_is_saved_and_not_exported():
    distiller = examples.build("dhkd")
    assert distiller.head.weight.shape == (examples.CLASSES, 5)
    assert {"head.weight", "head.bias"} <= set(distiller.state_dict())
    assert distiller.students() == {"student": distiller.student}


def test_weight_0_leaves_the_term_out():
    assert list(examples.build("dhkd", kd_weight=0.0)(examples.batch(), examples.epoch()).terms) == ["ce"]


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"^distiller.align: true needs ce_weight above 0"):
        examples.build("dhkd", ce_weight=0.0)
    with pytest.raises(UserError, match=r"^distiller: DHKD has nothing to train on: ce_weight, kd_weight all 0"):
        examples.build("dhkd", ce_weight=0.0, kd_weight=0.0, align=False)
    assert list(examples.build("dhkd", ce_weight=0.0, align=False)(examples.batch(), examples.epoch()).terms) == ["kd"]
