"""USKD against the released code's values, plain loops, cases worked by hand, and its properties."""

from functools import partial
from math import exp, log

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mdistill.distillers import DISTILLERS
from mdistill.distillers.uskd import (
    non_target_label_loss,
    paper_score,
    rank_labels,
    released_score,
    target_label_loss,
    weak_loss,
)
from mdistill.errors import UserError
from mdistill.models import MODELS

from . import examples
from .golden_more import Case, cases, check
from .test_losses import inputs

LOSSES = {
    "target": lambda s, w, y: target_label_loss(s, y),
    "non_target": partial(non_target_label_loss, variant="released"),
    "non_target-paper": partial(non_target_label_loss, variant="paper"),
    "weak": lambda s, w, y: weak_loss(s, y),
}


def paper_labels(logits, weak_logits, target):
    return rank_labels(paper_score(logits, weak_logits, target), target)


@pytest.mark.parametrize("case", cases("uskd"))
def test_equals_the_released_code(case: Case):
    given = case.tensors("student", "feature", "weight", "bias")
    weak_logits = F.linear(given["feature"], given["weight"], given["bias"])
    terms = {
        "alpha": target_label_loss(given["student"], given["target"]),
        "beta": non_target_label_loss(given["student"], weak_logits, given["target"], variant="released"),
        "mu": weak_loss(weak_logits, given["target"]),
    }
    check(case, torch.stack([case.arguments[name] * term for name, term in terms.items()]).sum(), given)


def softmax(row):
    powers = [exp(z - max(row)) for z in row]
    return [power / sum(powers) for power in powers]


def target_by_loop(logits, target):
    probs = [softmax(row)[y] for row, y in zip(logits.tolist(), target.tolist(), strict=True)]
    mean = sum(p**2 for p in probs) / len(probs)
    return sum(-(p**2 + 1 - mean) * log(p) for p in probs) / len(probs)


def non_target_by_loop(logits, weak_logits, target):
    """With lists of the other classes in place of masks."""
    total = 0.0
    for row, weak_row, y in zip(logits.tolist(), weak_logits.tolist(), target.tolist(), strict=True):
        s, w = softmax(row), softmax(weak_row)
        others = [c for c in range(len(row)) if c != y]
        ranked = sorted(others, key=lambda c: s[c] / (1 - s[y]) + w[c] / (1 - w[y]), reverse=True)
        weights = {c: 1 / (place + 1) for place, c in enumerate(ranked)}
        rest = sum(s[c] for c in others)
        total -= sum(weights[c] / sum(weights.values()) * log(s[c] / rest) for c in others)
    return total / len(logits)


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop(seed):
    logits, weak_logits = examples.logits(seed, 12, 7), examples.logits(seed + 10, 12, 7)
    target = examples.targets(seed, 12, 7)
    losses = (
        target_label_loss(logits, target),
        non_target_label_loss(logits, weak_logits, target, variant="paper"),
    )
    expected = target_by_loop(logits, target), non_target_by_loop(logits, weak_logits, target)
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-10)


def by_hand():
    """Two samples of true class 0, s = (1/2, 1/3, 1/6) and (1/4, 1/4, 1/2); w ranks their class 2 far ahead."""
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 2.0]], dtype=torch.float64).log()
    weak_logits = torch.tensor([[1.0, 1.0, 98.0]] * 2, dtype=torch.float64).log()
    return logits, weak_logits, torch.tensor([0, 0])


def test_target_term_by_hand():
    """s_y^2 = 1/4 and 1/16, their mean 5/32: P = 35/32 and 29/32 with -ln s_y = ln 2 and 2 ln 2."""
    logits, _, target = by_hand()
    assert target_label_loss(logits, target).item() == pytest.approx((35 + 2 * 29) / 32 * log(2) / 2, rel=1e-12)


def test_non_target_term_by_hand():
    """Ranks: class 2 before class 1 twice, labels (0, 1/3, 2/3); the others' softmax (2/3, 1/3) and (1/3, 2/3)."""
    logits, weak_logits, target = by_hand()
    labels = paper_labels(logits, weak_logits, target)
    torch.testing.assert_close(labels, torch.tensor([[0.0, 1 / 3, 2 / 3]] * 2, dtype=torch.float64))
    first, second = log(3 / 2) / 3 + 2 * log(3) / 3, log(3) / 3 + 2 * log(3 / 2) / 3
    loss = non_target_label_loss(logits, weak_logits, target, variant="paper")
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-12)


def test_weak_term_by_hand():
    """Labels 0.9 + 0.1/2 and 0.1/2 against (1/4, 3/4)."""
    loss = weak_loss(torch.tensor([[1.0, 3.0]], dtype=torch.float64).log(), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.95 * log(4) + 0.05 * log(4 / 3), rel=1e-12)


def test_both_networks_decide_the_ranks():
    """Normalised over the others: the network (0.6, 0.4), the weak head (0.3, 0.7). However sure each is of y."""
    target = torch.tensor([0])
    logits = torch.tensor([[0.0, log(0.6), log(0.4)]])
    weak_logits = torch.tensor([[0.0, log(0.3), log(0.7)]])
    for sure in (0.0, 30.0):
        logits[0, 0], weak_logits[0, 0] = sure, -sure
        assert paper_labels(logits, weak_logits, target)[0, 2] > 0.6
        assert paper_labels(logits, -weak_logits, target)[0, 1] > 0.6


@pytest.mark.parametrize("case", inputs())
def test_labels_are_a_distribution_over_the_other_classes(case):
    logits, weak_logits, target = inputs()[case]
    labels = paper_labels(logits, weak_logits, target)
    size, classes = labels.shape
    assert labels.gather(1, target[:, None]).abs().max() == 0
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(size).double())
    zipf = [1 / rank for rank in range(1, classes)]
    expected = torch.tensor([0.0, *sorted(weight / sum(zipf) for weight in zipf)]).double()
    torch.testing.assert_close(labels.sort(dim=1).values, expected.expand(size, -1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", inputs())
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_are_finite(loss, case, dtype):
    logits, weak_logits, target = inputs()[case]
    logits = logits.to(dtype).requires_grad_()
    value = LOSSES[loss](logits, weak_logits.to(dtype), target)
    value.backward()
    assert value.shape == ()
    assert value.dtype == dtype
    assert value.isfinite()
    assert value >= 0
    assert logits.grad.isfinite().all()


def test_released_labels_by_hand():
    """s = (1/2, 1/4, 1/4), y = 0, w = (1/4, 1/4, 1/2): the target's score is 1/3 - ln 2 / (1 + ln 2) = -0.08.

    Class 1 has 1/3 - 2 ln 2 / (1 + ln 2) = -0.49, class 2 has 2/3 - 0.82 = -0.15: ranks 1, 3, 2, labels 1/3 and 1/2.
    """
    logits = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64).log()
    weak_logits, target = torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64).log(), torch.tensor([0])
    score = released_score(logits, weak_logits, target)
    expected = [1 / 3 - log(2) / (1 + log(2)), 1 / 3 - 2 * log(2) / (1 + log(2)), 2 / 3 - 2 * log(2) / (1 + log(2))]
    assert score[0].tolist() == pytest.approx(expected, abs=3e-6)
    assert rank_labels(score, target)[0].tolist() == pytest.approx([0, 0.4, 0.6])


@pytest.mark.parametrize("case", inputs())
def test_released_labels_leave_out_the_rank_of_the_target(case):
    logits, weak_logits, target = inputs()[case]
    score = released_score(logits, weak_logits, target)
    labels, classes = rank_labels(score, target), score.shape[1]
    assert labels.gather(1, target[:, None]).abs().max() == 0
    for row, y, own in zip(labels, target.tolist(), score, strict=True):
        ahead = [own[c] > own[y] or (own[c] == own[y] and c < y) for c in range(classes)]
        weights = [1 / rank for rank in range(1, classes + 1) if rank != 1 + sum(map(bool, ahead))]
        expected = torch.tensor([0.0, *sorted(weight / sum(weights) for weight in weights)]).double()
        torch.testing.assert_close(row.sort().values, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_soft_labels_have_no_gradient(variant):
    """Finite differences with the labels held where they are."""
    logits, weak_logits = examples.logits(0, 5, 4).requires_grad_(), examples.logits(1, 5, 4).requires_grad_()
    target = examples.targets(2, 5, 4)
    square = logits.detach().softmax(dim=1).gather(1, target[:, None]).squeeze(1) ** 2
    score = released_score if variant == "released" else paper_score
    labels = rank_labels(score(logits.detach(), weak_logits.detach(), target), target)
    others = 1 - F.one_hot(target, 4)

    def with_fixed_labels(z):
        one = -((square + 1 - square.mean()) * z.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)).mean()
        rest = z - (z.exp() * others).sum(dim=1, keepdim=True).log()
        return one - (labels * rest).sum(dim=1).mean()

    assert torch.autograd.gradcheck(with_fixed_labels, (logits,))
    (expected,) = torch.autograd.grad(with_fixed_labels(logits), logits)
    loss = target_label_loss(logits, target) + non_target_label_loss(logits, weak_logits, target, variant=variant)
    (gradient, none) = torch.autograd.grad(loss, (logits, weak_logits), allow_unused=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert none is None


def test_equal_certainty_gives_plain_cross_entropy():
    """P_y differs from 1 only where samples of a batch differ."""
    row = examples.logits(0, 1, 5).expand(4, -1)
    target = torch.full((4,), 3)
    torch.testing.assert_close(target_label_loss(row, target), F.cross_entropy(row, target))


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_terms_are_those_of_the_networks(variant):
    weights = {"alpha": 0.5, "beta": 0.25, "mu": 2.0, "ce_weight": 3.0}
    distiller, batch = examples.build("uskd", variant=variant, **weights).eval(), examples.batch()
    features = distiller.student.forward_features(batch.image)
    weak_logits = distiller.head(features.stages[0].flatten(1))
    terms = distiller(batch, examples.epoch()).terms
    assert list(terms) == ["ce", "target", "non_target", "weak"]
    expected = {
        "ce": 3.0 * F.cross_entropy(features.logits, batch.target),
        "target": 0.5 * target_label_loss(features.logits, batch.target),
        "non_target": 0.25 * non_target_label_loss(features.logits, weak_logits, batch.target, variant=variant),
        "weak": 2.0 * weak_loss(weak_logits, batch.target),
    }
    torch.testing.assert_close(terms, expected)


def test_the_weak_term_trains_its_head_and_the_stages_below():
    distiller = examples.build("uskd", ce_weight=0.0, alpha=0.0, beta=0.0).train()
    distiller(examples.batch(), examples.epoch()).total.backward()
    assert distiller.head.weight.grad.abs().max() > 0
    assert distiller.student[1].weight.grad.abs().max() > 0
    assert distiller.student.classifier.weight.grad is None


@pytest.mark.parametrize(("stage", "width"), [(0, 16), (1, 16), (-2, 32), (-1, 64)])
def test_the_head_fits_the_stage_and_building_it_changes_nothing(stage, width):
    student = MODELS.build("resnet8", 7).train()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    data = examples.data_info(image_size=32)
    settings = {**examples.SETTINGS["uskd"], "stage": stage}
    distiller = DISTILLERS.build("uskd", student, None, data, **settings)
    assert distiller.head.weight.shape == (7, width)
    assert all(module.training for module in student.modules())
    torch.testing.assert_close(dict(student.state_dict()), before, rtol=0, atol=0)
    batch = examples.batch(image=torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    distiller(batch, examples.epoch()).total.backward()
    assert distiller.head.weight.grad.isfinite().all()


def test_the_head_is_saved_and_not_exported():
    distiller = examples.build("uskd")
    assert {"head.weight", "head.bias"} <= set(distiller.state_dict())
    assert distiller.students() == {"student": distiller.student}
    assert not [key for key, _ in distiller.student.named_parameters() if "head" in key]
    assert isinstance(distiller.head, nn.Linear)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({"alpha": 0.0}, ["non_target", "weak"]),
        ({"beta": 0.0}, ["target", "weak"]),
        ({"mu": 0.0}, ["target", "non_target"]),
    ],
)
def test_terms_can_be_switched_off(settings, terms):
    assert list(examples.build("uskd", **settings)(examples.batch(), examples.epoch()).distillation) == terms


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"^distiller.stage: 2 is none of the student's 2 stages, -2 to 1"):
        examples.build("uskd", stage=2)
    with pytest.raises(UserError, match=r"^distiller: USKD has nothing to train on: ce_weight, alpha, beta, mu all 0"):
        examples.build("uskd", ce_weight=0.0, alpha=0.0, beta=0.0, mu=0.0)
