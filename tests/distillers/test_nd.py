"""ND against the released code's values, cases worked by hand, a plain loop and finite differences.

Then its class means, and networks of unequal width.
"""

import copy
from math import sqrt

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.distillers import DISTILLERS, Signals
from mdistill.distillers.nd import Embedding, nd_loss, running_means
from mdistill.errors import UserError
from mdistill.models.base import Features

from . import examples
from .golden_more import Case, cases, check, close


def wide(given: dict[str, Tensor], embedded: Tensor) -> Tensor:
    return nd_loss(embedded, given["teacher_pooled_wide"], given["centres_wide"], given["target"])


@pytest.mark.parametrize("case", cases("nd", "nd_term", "nd_term_linear"))
def test_the_term_equals_the_released_code(case: Case):
    own = ("weight", "bias") if case.method == "nd_term_linear" else ()
    given = case.tensors("student_pooled", *own)
    if own:
        loss = wide(given, F.linear(given["student_pooled"], given["weight"], given["bias"]))
    else:
        loss = nd_loss(given["student_pooled"], given["teacher_pooled"], given["centres"], given["target"])
    check(case, loss, given)


@pytest.mark.parametrize("case", cases("nd_embedding"))
def test_the_embedding_equals_the_released_code(case: Case):
    given = case.tensors("student_pooled", "weight", "bias")
    embedding = Embedding(*reversed(given["weight"].shape)).double().train()
    weights = {"linear.weight": given["weight"], "linear.bias": given["bias"]}
    factors = case.results()["kept"] / (1 - case.arguments["dropout"])
    check(case, wide(given, torch.func.functional_call(embedding, weights, (given["student_pooled"], factors))), given)


@pytest.mark.parametrize("case", cases("nd", "nd_total"))
def test_the_method_equals_the_released_code(case: Case, monkeypatch: pytest.MonkeyPatch):
    """Of networks of equal width; with the class means of the case in the place of those that were seen."""
    given, settings = case.tensors("student", "student_pooled"), dict(case.arguments)
    epoch, warmup = settings.pop("epoch"), settings.pop("warmup_epochs")
    distiller = examples.build("nd", kd_warmup_epochs=warmup, **settings).train()
    monkeypatch.setattr(distiller, "_means", lambda signals: (given["centres"], None))
    student = Features(given["student"], (), (), torch.empty(0), given["student_pooled"])
    logits = given["student"], given["teacher"]
    index = torch.arange(len(given["target"]))
    pooled = {"student_features": student, "teacher_pooled": given["teacher_pooled"]}
    signals = Signals(*logits, *logits, given["target"], index, torch.tensor(epoch), **pooled)
    terms = {**distiller.task(signals), **distiller.distillation(signals)}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(case.numbers, rel=1e-9)
    check(case, torch.stack(list(terms.values())).sum(), given)


def inputs(size: int = 6, classes: int = 4, width: int = 5):
    """Student and teacher features, class means and targets; about half the students are the longer ones."""
    student, teacher = examples.logits(0, size, width), examples.logits(1, size, width)
    return student, teacher, examples.logits(2, classes, width), examples.targets(3, size, classes)


def test_by_hand():
    """Class mean (0, 5), direction (0, 1), teacher feature (6, 8) of length 10.

    Student (3, 4), length 5: 1 - 4 / 10 = 0.6. Student (30, 40), length 50: 1 - 40 / 50 = 0.2. Mean 0.4.
    """
    student, teacher = torch.tensor([[3.0, 4.0], [30.0, 40.0]]), torch.tensor([[6.0, 8.0], [6.0, 8.0]])
    means = torch.tensor([[7.0, 7.0], [0.0, 5.0]])
    assert nd_loss(student, teacher, means, torch.tensor([1, 1])).item() == pytest.approx(0.4, rel=1e-6)


def test_equals_a_loop_over_samples():
    student, teacher, means, target = inputs()
    expected = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        mean = means[y].tolist()
        length = sqrt(sum(value**2 for value in mean))
        projected = sum(a * b / length for a, b in zip(s, mean, strict=True))
        longer = max(sqrt(sum(value**2 for value in s)), sqrt(sum(value**2 for value in t)))
        expected += (1 - projected / longer) / 6
    assert nd_loss(student, teacher, means, target).item() == pytest.approx(expected, rel=1e-10)


def test_gradient_equals_finite_differences():
    student, teacher, means, target = inputs()
    longer = student.norm(dim=1) > teacher.norm(dim=1)
    assert longer.any()
    assert not longer.all()
    assert torch.autograd.gradcheck(lambda f: nd_loss(f, teacher, means, target), (student.requires_grad_(),))


def test_is_0_along_the_class_mean_and_no_shorter_than_the_teacher():
    _, teacher, means, target = inputs()
    along = means[target] / means[target].norm(dim=1, keepdim=True)
    lengths = teacher.norm(dim=1, keepdim=True)
    torch.testing.assert_close(nd_loss(lengths * along, teacher, means, target), torch.tensor(0.0).double())
    torch.testing.assert_close(nd_loss(7 * lengths * along, teacher, means, target), torch.tensor(0.0).double())
    torch.testing.assert_close(nd_loss(0.25 * lengths * along, teacher, means, target), torch.tensor(0.75).double())


def test_a_short_student_is_lengthened_and_a_long_one_only_turned():
    student, teacher, means, target = inputs()
    for scale in (1e-2, 1e2):
        features = (scale * student).requires_grad_()
        (gradient,) = torch.autograd.grad(nd_loss(features, teacher, means, target), features)
        if scale < 1:
            toward = -(gradient * means[target]).sum(dim=1)
            torch.testing.assert_close(toward, means[target].norm(dim=1) / teacher.norm(dim=1) / 6)
        else:
            assert (gradient * features).sum(dim=1).abs().max() < 1e-12


def test_only_the_direction_of_a_class_mean_counts():
    student, teacher, means, target = inputs()
    torch.testing.assert_close(
        nd_loss(student, teacher, 100 * means, target), nd_loss(student, teacher, means, target), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "scales",
    [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0), (1e4, 1, 1), (1, 1e4, 1e4), (1e-20, 1e-20, 1e-20)],
    ids=str,
)
def test_value_and_gradient_are_finite(scales, dtype):
    student, teacher, means, target = inputs()
    student, teacher, means = (
        (scale * value).to(dtype) for scale, value in zip(scales, (student, teacher, means), strict=True)
    )
    for size in (6, 1):
        features = student[:size].clone().requires_grad_()
        loss = nd_loss(features, teacher[:size], means, target[:size])
        loss.backward()
        assert loss.dtype == dtype
        assert 0 <= loss <= 2
        assert features.grad.isfinite().all()


def test_running_means_are_the_means_of_all_that_came():
    """Batches of several sizes; class 3 comes once, class 4 never."""
    means, counts = torch.zeros(5, 3).double(), torch.zeros(5).double()
    seen = []
    for number, size in enumerate((6, 1, 4, 6)):
        features, target = examples.logits(number, size, 3), examples.targets(number, size, 3)
        if number == 2:
            target[0] = 3
        seen += list(zip(target.tolist(), features, strict=True))
        means, counts = running_means(means, counts, features, target)
    for label in range(5):
        own = [feature for y, feature in seen if y == label]
        assert counts[label] == len(own)
        expected = torch.stack(own).mean(dim=0) if own else torch.zeros(3).double()
        torch.testing.assert_close(means[label], expected, rtol=1e-12, atol=1e-14)


def test_class_means_of_a_run_are_those_of_the_teacher_s_features():
    distiller = examples.build("nd")
    batches = [examples.batch(number, size) for number, size in enumerate((8, 8, 3))]
    for batch in batches:
        examples.step(distiller, batch, lr=0.1)
    pooled = torch.cat([distiller.teacher.forward_features(batch.image).pooled for batch in batches])
    target = torch.cat([batch.target for batch in batches])
    assert distiller.class_counts.tolist() == torch.bincount(target, minlength=examples.CLASSES).tolist()
    for label in target.unique().tolist():
        torch.testing.assert_close(distiller.class_means[label], pooled[target == label].mean(dim=0))


def test_the_first_batch_has_class_means_already():
    """Its own features make them."""
    distiller, batch = examples.build("nd", kd_weight=0.0, nd_weight=2.0).eval(), examples.batch()
    student, teacher = (
        network.forward_features(batch.image).pooled for network in (distiller.student, distiller.teacher)
    )
    means = torch.zeros(examples.CLASSES, 5)
    for label in batch.target.unique():
        means[label] = teacher[batch.target == label].mean(dim=0)
    terms = distiller(batch, examples.epoch()).distillation
    assert list(terms) == ["nd"]
    torch.testing.assert_close(terms["nd"], 2.0 * nd_loss(student, teacher, means, batch.target))
    assert distiller.class_counts.sum() == 0  # evaluation counts nothing


def wide_teacher(width: int = 9) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = (
            nn.Flatten(),
            nn.Linear(12, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, examples.CLASSES),
        )
        return examples.TinyNetwork(*layers)


def build_unequal(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        settings = {**examples.SETTINGS["nd"], **changes}
        return DISTILLERS.build("nd", examples.network(0), wide_teacher(), examples.data_info(), **settings)


def test_networks_of_equal_width_need_no_embedding():
    assert not list(examples.build("nd").embedding.parameters())


EMBEDDINGS = {
    "linear": {"weight": (9, 5), "bias": (9,)},
    "released": {"norm.weight": (5,), "norm.bias": (5,), "linear.weight": (9, 5), "linear.bias": (9,)},
}


@pytest.mark.slow
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_networks_of_unequal_width_are_joined_by_a_trained_embedding(embedding):
    distiller = build_unequal(embedding=embedding)
    assert distiller.class_means.shape == (examples.CLASSES, 9)
    shapes = {key: tuple(value.shape) for key, value in distiller.embedding.named_parameters()}
    assert shapes == EMBEDDINGS[embedding]
    trained = {id(parameter) for group in distiller.param_groups() for parameter in group["params"]}
    assert {
        id(value) for module in (distiller.student, distiller.embedding) for value in module.parameters()
    } == trained
    before = copy.deepcopy(distiller.state_dict())
    losses = [examples.step(distiller, examples.batch(), number=20, lr=0.05) for _ in range(20)]
    assert losses[-1] < losses[0]
    after = distiller.state_dict()
    assert [key for key in shapes if after[f"embedding.{key}"].equal(before[f"embedding.{key}"])] == []
    assert all(after[key].equal(before[key]) for key in before if key.startswith("teacher."))


def test_half_of_what_the_embedding_reads_is_dropped_anew_in_each_epoch():
    """In training alone; what is kept is doubled."""
    distiller, seen = build_unequal(), []
    distiller.embedding.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    batch = examples.batch(size=40, index=torch.arange(40))
    for number in (1, 1, 2):
        distiller.train()(batch, examples.epoch(number))
    first, again, other = seen
    close(again, first)
    assert not other.equal(first)
    assert 0.35 < (first == 0).double().mean() < 0.65
    distiller.eval()(batch, examples.epoch())
    assert (seen[-1] == 0).double().mean() < 0.05


@pytest.mark.parametrize(("epoch", "factor"), [(1, 0.0), (2, 0.25), (4, 0.75), (5, 1.0), (240, 1.0)])
def test_the_warm_up_is_of_kd_alone_and_begins_at_0(epoch, factor):
    batch = examples.batch()
    warmed, whole = (examples.build("nd", kd_warmup_epochs=each).eval() for each in (4, 0))
    found, expected = (each(batch, examples.epoch(epoch)).terms for each in (warmed, whole))
    torch.testing.assert_close(found, {**expected, "kd": factor * expected["kd"]})


def test_the_embedding_waits_for_no_device():
    examples.steps_without_host_reads(build_unequal(), (8, 5))


def test_a_single_row_is_normalised_by_the_stored_statistics():
    embedding = Embedding(3, 2).train()
    row = torch.ones(1, 3)
    assert embedding(row).equal(embedding.eval()(row))


def test_inference_needs_no_embedding():
    distiller = build_unequal()
    assert distiller.students() == {"student": distiller.student}
    assert not [key for key in distiller.student.state_dict() if "embedding" in key]


def test_a_joined_method_is_restored_whole():
    distiller, other = build_unequal(), build_unequal()
    for number in range(3):
        examples.step(distiller, examples.batch(number), lr=0.05)
    other.load_state_dict(copy.deepcopy(distiller.state_dict()))
    losses = [examples.step(each, examples.batch(5)) for each in (distiller, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("settings", "terms"),
    [({}, ["kd", "nd"]), ({"kd_weight": 0.0}, ["nd"]), ({"nd_weight": 0.0}, ["kd"])],
)
def test_terms_can_be_switched_off(settings, terms):
    for distiller in (examples.build("nd", **settings), build_unequal(**settings)):
        assert list(distiller(examples.batch(), examples.epoch()).distillation) == terms
        assert bool(list(distiller.embedding.parameters())) == ("nd" in terms and distiller.class_means.shape[1] == 9)


def test_refuses_to_train_on_nothing():
    with pytest.raises(
        UserError, match=r"^distiller: ND has nothing to train on: ce_weight, kd_weight, nd_weight all 0"
    ):
        examples.build("nd", ce_weight=0.0, kd_weight=0.0, nd_weight=0.0)
