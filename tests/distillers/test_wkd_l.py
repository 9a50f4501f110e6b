import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.wkd_l import cosine_decay, transport_costs, wasserstein_loss, wkd_l_loss

from . import examples
from .golden_more import cases, check

SINKHORN = {"temperature": 4.0, "sharpen": 1.0, "regularization": 0.05, "iterations": 10}


@pytest.mark.parametrize("case", cases("wkd", "wkd_l_total"))
def test_loss_is_the_published_code_s(case):
    given, settings = case.tensors("student"), dict(case.arguments)
    decay = cosine_decay(
        torch.tensor(settings.pop("epoch"), dtype=torch.float64),
        decay_epoch=settings.pop("decay_epoch"),
        epochs=settings.pop("epochs"),
    )
    ce = settings.pop("ce_weight") * F.cross_entropy(given["student"], given["target"])
    settings["wkd_weight"] *= decay
    kd = wkd_l_loss(given["student"], given["teacher"], given["target"], given["distance"], **settings)
    assert ce.item() == pytest.approx(case.numbers["loss_ce"], rel=1e-9)
    assert kd.item() == pytest.approx(case.numbers["loss_kd"], rel=1e-9)
    check(case, ce + kd, given)


def test_loss_is_a_plain_loop_s_over_the_classes_without_the_true_one():
    student, teacher = (examples.logits(seed, 3, 5) for seed in range(2))
    target, distances = torch.tensor([4, 0, 2]), examples.class_distances(5).double()
    expected = []
    for row, true in enumerate(target.tolist()):
        others = [each for each in range(5) if each != true]
        a, b = (F.softmax(logits[row, others] / 4, dim=0) for logits in (student, teacher))
        costs = 1 - torch.exp(-distances[others][:, others]) + 1e-8
        kernel = torch.exp(-costs / 0.05)
        u = torch.full((4,), 1 / 4, dtype=torch.float64)
        for _ in range(10):
            v = b / (kernel.T @ u + 1e-8)
            u = a / (kernel @ v + 1e-8)
        expected.append((u[:, None] * kernel * v * costs).sum())
    found = wasserstein_loss(student, teacher, target, distances, **SINKHORN)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_costs_follow_the_distances():
    distances = torch.tensor([[0.0, 0.5], [0.5, -1e-3]])
    torch.testing.assert_close(transport_costs(distances, sharpen=0.0), distances.clamp(min=0) + 1e-8)
    torch.testing.assert_close(transport_costs(distances, sharpen=2.0)[0, 1], torch.tensor(0.632121))


@pytest.mark.parametrize("sharpen", [0.0, 1.0])
def test_logits_of_1e4_give_finite_gradients_where_classes_are_far_apart(sharpen):
    student = (1e4 * examples.logits(0, 6, 9, scale=1.0)).float().requires_grad_()
    teacher = (1e4 * examples.logits(1, 6, 9, scale=1.0)).float()
    distances = (1 - torch.eye(9)) * (1.0 if sharpen else 0.5)
    loss = wasserstein_loss(student, teacher, examples.targets(2, 6, 9), distances, **{**SINKHORN, "sharpen": sharpen})
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_two_classes_have_nothing_to_move():
    student, teacher = (examples.logits(seed, 4, 2) for seed in range(2))
    loss = wasserstein_loss(
        student, teacher, torch.tensor([0, 1, 0, 1]), examples.class_distances(2).double(), **SINKHORN
    )
    assert 0 <= loss.item() < 1e-6


def test_the_weight_falls_after_its_epoch():
    weights = [cosine_decay(torch.tensor(epoch), decay_epoch=2, epochs=6).item() for epoch in (1, 2, 4, 6, 9)]
    assert weights == pytest.approx([1, 1, 0.5, 0, 0], abs=1e-6)
    assert cosine_decay(torch.tensor(6), decay_epoch=6, epochs=6) == 1


def test_weight_and_distances_enter_the_term():
    distiller = examples.build("wkd_l", ce_weight=0.0).eval()
    terms = [distiller(examples.batch(), examples.epoch(number)).terms["wasserstein"].item() for number in (1, 6, 10)]
    assert terms[0] > 0
    assert terms[1:] == pytest.approx([terms[0] / 2, 0.0])
    distiller.class_distances.zero_()
    assert distiller(examples.batch(), examples.epoch(1)).terms["wasserstein"].item() < 1e-3 * terms[0]
