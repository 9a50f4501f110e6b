"""CRD against published values and a plain loop; its draws, memories and constants."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdistill.distillers import crd
from mdistill.distillers.crd import contrast_lists, crd_loss, log_mean_exp, renewed, similarities
from mdistill.distillers.maps import unit
from mdistill.errors import UserError

from ..host_reads import NoHostReads
from . import examples, golden_features

TAU = 0.07
LABELS = torch.arange(examples.SAMPLES) % examples.CLASSES  # of the examples' data


def rows_after(row: dict[str, Any], given: dict[str, Tensor], side: str) -> None:
    """The renewed rows of a case agree with its summary."""
    expected = row[f"{side}_rows_after"]
    index = torch.tensor(row["index"])
    new = renewed(given[f"{side}_memory"][index], given[side], momentum=0.5)
    assert new.flatten()[expected["at"]].tolist() == pytest.approx(expected["entries"], rel=1e-9)
    assert new.norm().item() == pytest.approx(expected["norm"], rel=1e-9)
    probe = torch.from_numpy(golden_features.normal(1, f"{row['key']}/{side}_memory_rows_after/probe", [*new.shape]))
    assert (new * probe).sum().item() == pytest.approx(expected["probe"], rel=1e-9)


@pytest.mark.parametrize("case", golden_features.cases("crd"))
def test_equals_published_values(case):
    """Loss, gradients, constants and the memories' rows after the step; lists with a row twice are among them."""
    given = golden_features.tensors(case)
    settings, second = golden_features.arguments(case), "step=2" in case["key"]
    anchors, lists, memories = {}, torch.tensor(case["lists"]), {}
    for side in ("student", "teacher"):
        memories[side] = given.pop(f"{side}_memory").detach()
        width, pooled = memories[side].shape[1], given[f"{side}_pooled"]
        layer = nn.Linear(pooled.shape[1], width)
        given |= golden_features.fill(layer, given, f"{side}_embed.")
        anchors[side] = unit(layer(pooled.flip(0) if second else pooled), dim=1)
    if second:  # the first step's embeddings are in the memories
        rows = [other.values[0] for other in golden_features.cases("crd")]
        first = torch.tensor(next(row["index"] for row in rows if row["case"] == case["case"]))
        for side in ("student", "teacher"):
            new = renewed(memories[side][first], anchors[side].detach().flip(0), momentum=0.5)
            memories[side] = memories[side].index_copy(0, first, new)
    losses, samples = [], int(settings["n"])
    for side, other, constant in zip(anchors, ("teacher", "student"), case["constants"], strict=True):
        scores = similarities(anchors[side], memories[other], lists) / TAU
        if not second:
            assert (log_mean_exp(scores.flatten()).exp() * samples).item() == pytest.approx(constant, rel=1e-9)
        log_constant = torch.tensor(constant, dtype=torch.float64).log()
        losses.append(crd_loss(scores[:, 0], scores[:, 1:], log_constant, samples=samples))
    if "student_rows_after" in case:
        for side in ("student", "teacher"):
            rows_after(case, {f"{side}_memory": memories[side], side: anchors[side].detach()}, side)
    golden_features.check(case, losses[0] + losses[1], given)


def test_equals_a_loop():
    scores = examples.logits(0, 4, 6)
    constant, samples, count = 2.5, 20, 5
    total = 0.0
    for row in scores.tolist():
        probs = [math.exp(score) / constant for score in row]
        total -= math.log(probs[0] / (probs[0] + count / samples + 1e-7))
        total -= sum(math.log(count / samples / (x + count / samples + 1e-7)) for x in probs[1:])
    found = crd_loss(scores[:, 0], scores[:, 1:], torch.tensor(constant).double().log(), samples=samples)
    assert found.item() == pytest.approx(total / 4, rel=1e-7)


def test_similarities_in_parts_are_the_products_of_the_listed_rows(monkeypatch):
    anchors, memory = examples.logits(0, 5, 3).requires_grad_(), examples.logits(1, 12, 3)
    lists = torch.randint(12, (5, 4), generator=torch.Generator().manual_seed(2))
    lists[0] = 3  # one row again and again
    expected = (memory[lists] @ anchors[:, :, None])[:, :, 0]
    (gradient,) = torch.autograd.grad(expected.square().sum(), anchors)
    for at_once in (1, 30, 1000):
        monkeypatch.setattr(crd, "PRODUCTS", at_once)
        found = similarities(anchors, memory, lists)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), anchors)[0], gradient)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3, 1e4])
def test_is_finite_for_any_scores(scale):
    scores = examples.logits(0, 4, 6, scale=scale).float().requires_grad_()
    crd_loss(scores[:, 0], scores[:, 1:], log_mean_exp(scores.flatten()).detach(), samples=20).backward()
    assert scores.grad.isfinite().all()


# --- which negatives ---


def drawn(index: Tensor, *, epoch: int = 1, seed: int = 0, labels: Tensor = LABELS, **settings: Any) -> Tensor:
    return contrast_lists(seed, torch.tensor(epoch), index, labels, **{"negatives": 12, **settings})


@pytest.mark.parametrize("negatives", [1, 12, 34])
def test_negatives_are_different_samples_of_other_classes(negatives):
    """34 are all there are of them beside the classes of six."""
    index = torch.arange(examples.SAMPLES)
    lists = drawn(index, negatives=negatives)
    assert lists.shape == (examples.SAMPLES, negatives + 1)
    assert torch.equal(lists[:, 0], index)
    assert (LABELS[lists[:, 1:]] != LABELS[:, None]).all()
    assert all(len(set(row)) == negatives for row in lists[:, 1:].tolist())


def test_lists_depend_on_seed_epoch_and_sample_alone(monkeypatch):
    index = torch.arange(examples.SAMPLES)
    lists = drawn(index).sort(dim=1).values
    order = torch.randperm(examples.SAMPLES, generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(crd.DRAWS, "cpu", 3 * examples.SAMPLES)
    assert torch.equal(drawn(order).sort(dim=1).values, lists[order])
    for other in (drawn(index, epoch=2), drawn(index, seed=1)):
        assert (other.sort(dim=1).values != lists).any(dim=1).all()


@pytest.mark.slow
def test_every_sample_and_every_pair_of_samples_is_equally_likely():
    """Uneven classes; pairs, since draws without replacement are not independent."""
    labels, visits, count = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2]), 4000, 3
    lists = torch.stack([drawn(torch.tensor([3]), epoch=e, labels=labels, negatives=count)[0] for e in range(visits)])
    chosen = torch.zeros(visits, 10).scatter_(1, lists[:, 1:], 1.0)
    together = (chosen.T @ chosen / visits).double()
    assert (together[[3, 4]] == 0).all()
    others = together[labels != 1][:, labels != 1]
    single, pair = count / 8, count * (count - 1) / (8 * 7)
    bound = 4.5 * math.sqrt(single / visits)
    assert (others.diagonal() - single).abs().max() < bound
    assert (others - pair).fill_diagonal_(0.0).abs().max() < bound


def test_samples_of_a_batch_draw_independently():
    index = torch.arange(400)
    chosen = drawn(index, labels=(index >= 200).long(), negatives=50)[:, 1:]  # each of the 200 of the other class
    low = torch.zeros(400, 400).scatter_(1, chosen, 1.0)[200:, :200]
    overlap = (low @ low.T)[~torch.eye(200, dtype=torch.bool)]
    assert overlap.mean().item() == pytest.approx(50 * 50 / 200, rel=0.02)
    assert overlap.std().item() == pytest.approx(math.sqrt(50 * 0.25 * 0.75 * 150 / 199), rel=0.05)


def test_a_relaxed_positive_is_any_sample_of_the_class():
    lists = torch.stack([drawn(torch.tensor([9]), epoch=e, relaxed=True)[0] for e in range(600)])
    counts = lists[:, 0].bincount(minlength=examples.SAMPLES)
    assert counts[LABELS != 2].sum() == 0
    assert counts[LABELS == 2].min() > 60  # of 600, six samples in the class
    assert torch.equal(lists[:, 1:].sort(dim=1).values[5], drawn(torch.tensor([9]), epoch=5)[0, 1:].sort().values)


def test_draws_read_nothing_on_the_host():
    with NoHostReads():
        drawn(torch.arange(8), relaxed=True)


# --- memories and constants ---


def test_the_memories_of_the_batch_alone_are_written_and_the_constants_stay():
    distiller = examples.build("crd")
    before = {side: getattr(distiller, f"{side}_memory").clone() for side in ("student", "teacher")}
    assert not distiller.fixed
    batch = examples.batch(0)
    examples.step(distiller, batch, lr=0.1)
    others = torch.ones(examples.SAMPLES, dtype=torch.bool)
    others[batch.index] = False
    for side, rows in before.items():
        after = getattr(distiller, f"{side}_memory")
        assert torch.equal(after[others], rows[others])
        assert (after[batch.index] != rows[batch.index]).any(dim=1).all()
        torch.testing.assert_close(after[batch.index].norm(dim=1), torch.ones(examples.BATCH))
    assert distiller.fixed
    constants = distiller.log_constants.clone()
    examples.step(distiller, examples.batch(1), lr=0.1)
    assert torch.equal(distiller.log_constants, constants)


def test_memories_begin_in_the_published_range():
    distiller = examples.build("crd", width=48)
    for memory in (distiller.student_memory, distiller.teacher_memory):
        assert memory.abs().max() <= 0.25
        assert memory.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.05)


def test_embeddings_are_trained_and_left_out_at_inference():
    distiller = examples.build("crd")
    assert distiller.students() == {"student": distiller.student}
    trained = {id(parameter) for group in distiller.param_groups() for parameter in group["params"]}
    for module in (distiller.student_embed, distiller.teacher_embed):
        assert {id(parameter) for parameter in module.parameters()} < trained


def test_relaxed_positives_are_a_setting():
    losses = {examples.step(examples.build("crd", mode=mode), examples.batch()).item() for mode in ("exact", "relax")}
    assert len(losses) == 2


@pytest.mark.parametrize(
    ("labels", "negatives", "message"),
    [
        (None, 12, r"^distiller.name: 'crd' draws samples of other classes, and this data set does not say the class"),
        (LABELS, 35, r"^distiller.negatives: 35 samples of other classes are more than the 34 that this data set has"),
    ],
)
def test_refuses_data_without_enough_samples_of_other_classes(labels, negatives, message):
    with pytest.raises(UserError, match=message):
        examples.build("crd", data=examples.data_info(labels=labels), negatives=negatives)
