"""MCLD against plain loops over lists, a case worked by hand, finite differences, and its queue."""

from collections import deque
from math import e, exp, log, sqrt

import pytest
import torch
from torch import Tensor

from mdistill.distillers.mcld import MCLD, Queue, category_loss, instance_loss, mcld_loss, normalize, sample_loss
from mdistill.errors import UserError

from . import examples

TAU = 0.2
Row = list[float]


class Loops:
    """The method written with lists and numbers alone: the reference of these tests."""

    def __init__(self, size: int, mean: str = "positives", denominator: str = "others") -> None:
        self.queue: deque[tuple[int, Row]] = deque(maxlen=size)
        self.mean, self.denominator = mean, denominator

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor, index: Tensor) -> dict[str, float]:
        queries, keys = ([self.unit(row) for row in rows.tolist()] for rows in (student, teacher))
        return {
            "instance": self.instance(queries, keys, index.tolist()),
            "sample": self.sample(queries, keys),
            "category": self.category(queries, keys, target.tolist()),
        }

    def push(self, teacher: Tensor, index: Tensor) -> None:
        self.queue.extend((i, self.unit(row)) for i, row in zip(index.tolist(), teacher.tolist(), strict=True))

    def instance(self, queries: list[Row], keys: list[Row], index: list[int]) -> float:
        losses = []
        for query, key, i in zip(queries, keys, index, strict=True):
            negatives = [self.similarity(query, other) for j, other in self.queue if j != i]
            losses.append(-self.log_share(self.similarity(query, key), negatives))
        return sum(losses) / len(losses)

    def sample(self, queries: list[Row], keys: list[Row]) -> float:
        losses = []
        for i, query in enumerate(queries):
            negatives = [self.similarity(query, key) for j, key in enumerate(keys) if j != i]
            losses.append(-self.log_share(self.similarity(query, keys[i]), negatives))
        return sum(losses) / len(losses)

    def category(self, queries: list[Row], keys: list[Row], target: list[int]) -> float:
        losses = []
        for i, query in enumerate(queries):
            others = [j for j in range(len(keys)) if j != i]
            against = [a for a in others if self.denominator == "others" or target[a] != target[i]]
            logs = [
                self.log_share(
                    self.similarity(query, keys[j]), [self.similarity(query, keys[a]) for a in against if a != j]
                )
                for j in others
                if target[j] == target[i]
            ]
            if logs:
                losses.append(-sum(logs) / len(logs))
        divisor = len(target) if self.mean == "batch" else len(losses)
        return sum(losses) / divisor if losses else 0.0

    @staticmethod
    def unit(row: Row) -> Row:
        length = sqrt(sum(value**2 for value in row) + 1e-6)
        return [value / length for value in row]

    @staticmethod
    def similarity(query: Row, key: Row) -> float:
        return sum(a * b for a, b in zip(query, key, strict=True)) / TAU

    @staticmethod
    def log_share(positive: float, negatives: list[float]) -> float:
        return positive - log(exp(positive) + sum(exp(negative) for negative in negatives))


def epochs(sizes: list[int], count: int) -> list[Tensor]:
    """Sample indices of ``count`` shuffled epochs, cut into batches of these sizes."""
    generator = torch.Generator().manual_seed(0)
    return [part for _ in range(count) for part in torch.randperm(sum(sizes), generator=generator).split(sizes)]


@pytest.mark.parametrize(
    ("queue_size", "num_samples"),
    [
        pytest.param(8, 27, id="one-batch"),
        pytest.param(19, 27, id="wraps-inside-a-batch"),
        pytest.param(None, 27, id="one-epoch"),
        pytest.param(64, 27, id="older-copies"),
    ],
)
@pytest.mark.slow
def test_equals_plain_loops_over_many_steps(queue_size, num_samples):
    """Batches of 8, 8, 8 and 3: unfilled positions, wrap-around, partial batches, own older copies in the queue."""
    data = examples.data_info(num_samples=num_samples)
    distiller = examples.build("mcld", data=data, queue_size=queue_size).double().train()
    loops = Loops(queue_size or num_samples)
    own_copies = 0
    for number, index in enumerate(epochs([8, 8, 8, 3], 4)):
        batch = examples.batch(number, len(index), dtype=torch.float64, index=index)
        teacher = distiller.teacher(batch.image)
        output = distiller(batch, examples.epoch())
        expected = loops(output.logits.detach(), teacher, batch.target, index)
        assert list(output.terms) == list(expected)
        for name, term in output.terms.items():
            assert term.item() == pytest.approx(expected[name], rel=1e-10, abs=1e-12), (number, name)
        own_copies += sum(i in index.tolist() for i, _ in loops.queue)
        loops.push(teacher, index)
        output.total.backward()
        with torch.no_grad():
            for parameter in distiller.student.parameters():
                parameter -= 0.01 * parameter.grad
            distiller.after_step(output.signals)
    assert own_copies > 0 or queue_size == 8
    assert distiller.queue.filled == len(loops.queue)
    assert sorted(distiller.queue.index.tolist())[-len(loops.queue) :] == sorted(i for i, _ in loops.queue)


def by_hand() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three samples, two classes, tau = 1; logits are so long that the 1e-6 under the root disappears.

    q = (1, 0), (0, 1), (0, 1); k = (1, 0), (1, 0), (0, 1). Samples 0 and 1 share a class.
    Queue: (1, 0) of sample 7, (0, 1) of sample 0, (-1, 0) of sample 9; its fourth position is unfilled.
    """
    student = torch.tensor([[1e4, 0.0], [0.0, 1e4], [0.0, 1e4]], dtype=torch.float64)
    teacher = torch.tensor([[1e4, 0.0], [1e4, 0.0], [0.0, 1e4]], dtype=torch.float64)
    queue = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    return (
        student,
        teacher,
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 1, 2]),
        queue,
        torch.tensor([7, 0, 9, -1]),
        torch.tensor(3),
    )


def test_instance_by_hand():
    """Positives 1, 0, 1. Negatives: sample 0 sees 1 and -1 (not its own copy), samples 1 and 2 see 0, 1 and 0."""
    student, teacher, _, *rest = by_hand()
    expected = (log(e + e + 1 / e) - 1) + (log(1 + 1 + e + 1) - 0) + (log(e + 1 + e + 1) - 1)
    assert instance_loss(student, teacher, *rest, temperature=1.0).item() == pytest.approx(expected / 3, rel=1e-12)


def test_sample_by_hand():
    """S = [[1, 1, 0], [0, 0, 1], [0, 0, 1]], labels 0, 1, 2."""
    student, teacher, *_ = by_hand()
    expected = (log(2 * e + 1) - 1) + (log(2 + e) - 0) + (log(2 + e) - 1)
    assert sample_loss(student, teacher, temperature=1.0).item() == pytest.approx(expected / 3, rel=1e-12)


def test_category_by_hand():
    """Off the diagonal, sample 0 has 1 (its class) against 0, sample 1 has 0 (its class) against 1, sample 2 no one."""
    student, teacher, target, *_ = by_hand()
    expected = (log(e + 1) - 1) + (log(1 + e) - 0)
    assert category_loss(student, teacher, target, temperature=1.0).item() == pytest.approx(expected / 2, rel=1e-12)


def test_loss_is_the_sum_of_the_three():
    student, teacher, target, *rest = by_hand()
    total = mcld_loss(student, teacher, target, *rest, temperature=TAU)
    parts = (
        instance_loss(student, teacher, *rest, temperature=TAU),
        sample_loss(student, teacher, temperature=TAU),
        category_loss(student, teacher, target, temperature=TAU),
    )
    torch.testing.assert_close(total, sum(parts))


@pytest.mark.parametrize("denominator", ["others", "negatives"])
@pytest.mark.parametrize("mean", ["positives", "batch"])
class TestCategoryChoices:
    @pytest.mark.parametrize(
        "target", [[0, 0, 1, 0, 2, 1], [0] * 6, [*range(6)], [4, 4, 5, 6, 0, 1]], ids=["mixed", "one", "none", "few"]
    )
    def test_equals_plain_loops(self, mean, denominator, target):
        student, teacher = examples.logits(0, 6, 3, 1.0).requires_grad_(), examples.logits(1, 6, 3, 1.0)
        queries, keys = ([Loops.unit(row) for row in rows.tolist()] for rows in (student, teacher))
        expected = Loops(1, mean, denominator).category(queries, keys, target)

        def loss(z: Tensor) -> Tensor:
            given = {"temperature": TAU, "mean": mean, "denominator": denominator}
            return category_loss(z, teacher, torch.tensor(target), **given)

        assert loss(student).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert torch.autograd.gradcheck(loss, (student,))

    def test_is_what_the_method_trains_with(self, mean, denominator):
        chosen = {"category_mean": mean, "category_denominator": denominator}
        distiller = examples.build("mcld", instance=False, sample=False, **chosen).train()
        batch = examples.batch()
        output = distiller(batch, examples.epoch())
        expected = category_loss(
            output.logits, distiller.teacher(batch.image), batch.target, temperature=TAU, mean=mean,
            denominator=denominator,
        )  # fmt: skip
        torch.testing.assert_close(output.terms["category"], expected)

    def test_is_finite_for_large_logits(self, mean, denominator):
        student = examples.logits(0, 6, 3, 1e4).float().requires_grad_()
        target = torch.tensor([0, 0, 0, 0, 0, 1])
        given = {"temperature": 1e-3, "mean": mean, "denominator": denominator}
        loss = category_loss(student, examples.logits(1, 6, 3, 1e4).float(), target, **given)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("filled", [0, 3, 5])
def test_gradient_equals_finite_differences(filled):
    student, teacher = examples.logits(0, 4, 3, 1.0).requires_grad_(), examples.logits(1, 4, 3, 1.0)
    target, index = torch.tensor([0, 0, 1, 0]), torch.arange(4)
    queue, queue_index = normalize(examples.logits(2, 5, 3)), torch.tensor([9, 1, 8, 3, 3])
    for loss in (
        lambda z: instance_loss(z, teacher, index, queue, queue_index, torch.tensor(filled), temperature=TAU),
        lambda z: sample_loss(z, teacher, temperature=TAU),
        lambda z: category_loss(z, teacher, target, temperature=TAU),
    ):
        assert torch.autograd.gradcheck(loss, (student,))


def test_zero_logits_have_a_gradient():
    student = torch.zeros(4, 3, requires_grad=True)
    sample_loss(student, torch.eye(4, 3), temperature=TAU).backward()
    assert student.grad.abs().max() > 1


def test_excluded_positions_do_not_matter_at_all():
    """Own copies and unfilled positions may hold anything: loss and gradient are bit for bit those without them."""
    student, teacher, index = examples.logits(0, 2, 3).requires_grad_(), examples.logits(1, 2, 3), torch.tensor([4, 4])
    queue, queue_index = normalize(examples.logits(2, 5, 3)), torch.tensor([4, 1, 2, 7, -1])
    results = []
    for anything in (0.0, 1e3):
        queue[0], queue[3:] = anything, anything
        loss = instance_loss(student, teacher, index, queue, queue_index, torch.tensor(3), temperature=TAU)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    without = instance_loss(student, teacher, index, queue[1:3], queue_index[1:3], torch.tensor(2), temperature=TAU)
    results.append((without.detach(), *torch.autograd.grad(without, student)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=1e-14, atol=1e-16)


def test_no_positive_pair_gives_a_category_term_of_0():
    student = examples.logits(0, 4, 3).requires_grad_()
    loss = category_loss(student, examples.logits(1, 4, 3), torch.arange(4), temperature=TAU)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_the_scale_of_the_logits_is_free():
    student, teacher, target = (
        examples.logits(0, 4, 3, 100.0),
        examples.logits(1, 4, 3, 100.0),
        torch.tensor([0, 0, 1, 1]),
    )
    for loss in (
        lambda s, t: sample_loss(s, t, temperature=TAU),
        lambda s, t: category_loss(s, t, target, temperature=TAU),
    ):
        torch.testing.assert_close(loss(student, teacher), loss(7 * student, 3 * teacher), rtol=1e-8, atol=0)


class TestQueue:
    def test_starts_empty(self):
        state = Queue(5, 3).state_dict()
        assert {name: (tuple(value.shape), value.dtype) for name, value in state.items()} == {
            "keys": ((5, 3), torch.float32),
            "index": ((5,), torch.int64),
            "pointer": ((), torch.int64),
            "filled": ((), torch.int64),
        }
        assert state["index"].tolist() == [-1] * 5
        assert state["keys"].abs().max() == 0

    def test_may_start_full_of_random_directions(self):
        torch.manual_seed(0)
        queue = Queue(500, 3, "random")
        assert queue.filled == 500
        assert set(queue.index.tolist()) == {-1}
        torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(500), rtol=0, atol=1e-3)
        assert queue.keys.mean(dim=0).abs().max() < 0.1
        queue.push(torch.ones(4, 3), torch.arange(4))
        assert queue.filled == 500
        assert queue.index[:5].tolist() == [0, 1, 2, 3, -1]

    def test_is_first_in_first_out(self):
        queue = Queue(5, 1)
        for start, size in ((0, 3), (3, 3), (6, 1)):
            index = torch.arange(start, start + size)
            queue.push(index[:, None].float(), index)
        assert queue.index.tolist() == [5, 6, 2, 3, 4]
        assert queue.keys[:, 0].tolist() == [5, 6, 2, 3, 4]
        assert queue.pointer.item() == 2
        assert queue.filled.item() == 5

    def test_counts_what_it_holds(self):
        queue = Queue(5, 1)
        queue.push(torch.ones(3, 1), torch.arange(3))
        assert (queue.pointer.item(), queue.filled.item()) == (3, 3)
        assert queue.index.tolist() == [0, 1, 2, -1, -1]

    def test_writes_in_place(self):
        queue = Queue(5, 1)
        before = [buffer.data_ptr() for buffer in queue.buffers()]
        queue.push(torch.ones(4, 1), torch.arange(4))
        queue.push(torch.ones(4, 1), torch.arange(4))
        assert [buffer.data_ptr() for buffer in queue.buffers()] == before


class TestState:
    def test_the_batch_joins_after_the_step_only(self):
        distiller = examples.build("mcld").train()
        batch = examples.batch()
        output = distiller(batch, examples.epoch())
        output.total.backward()
        assert distiller.queue.filled == 0
        with torch.no_grad():
            distiller.after_step(output.signals)
        assert distiller.queue.filled == examples.BATCH
        torch.testing.assert_close(distiller.queue.keys[: examples.BATCH], normalize(distiller.teacher(batch.image)))
        assert torch.equal(distiller.queue.index[: examples.BATCH], batch.index)

    def test_the_queue_is_part_of_it(self):
        first, second = examples.build("mcld"), examples.build("mcld")
        for number in range(6):
            examples.step(first, examples.batch(number), lr=0.1)
        second.load_state_dict(first.state_dict())
        losses = [examples.step(distiller, examples.batch(7)) for distiller in (first, second)]
        assert losses[0] == losses[1]

    def test_standardised_logits_are_what_the_queue_holds(self):
        distiller = examples.build("mcld", standardize_logits=True)
        examples.step(distiller, examples.batch())
        held = distiller.queue.keys[: examples.BATCH]
        torch.testing.assert_close(held.mean(dim=1), torch.zeros(examples.BATCH), rtol=0, atol=1e-6)
        torch.testing.assert_close(held.norm(dim=1), torch.ones(examples.BATCH))

    def test_float32_by_default(self):
        distiller = examples.build("mcld")
        distiller.student.bfloat16()
        distiller.teacher.bfloat16()
        loss = examples.step(distiller, examples.batch(dtype=torch.bfloat16))
        assert loss.dtype == distiller.queue.keys.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({}, ["instance", "sample", "category"]),
        ({"instance": False}, ["sample", "category"]),
        ({"sample": False}, ["instance", "category"]),
        ({"category": False}, ["instance", "sample"]),
        ({"instance": False, "sample": False, "category": False, "ce_weight": 1.0}, ["ce"]),
        ({"ce_weight": 1.0}, ["ce", "instance", "sample", "category"]),
    ],
)
def test_terms_can_be_switched_off(settings, terms):
    distiller = examples.build("mcld", **settings)
    assert list(distiller(examples.batch(), examples.epoch()).terms) == terms
    assert any(key.startswith("queue.") for key in distiller.state_dict()) == ("instance" in terms)
    examples.step(distiller, examples.batch())


def test_refuses_to_train_on_nothing():
    with pytest.raises(UserError, match=r"^distiller: MCLD has nothing to train on: ce_weight, instance, sample, cat"):
        examples.build("mcld", instance=False, sample=False, category=False)


def test_refuses_a_queue_smaller_than_a_batch():
    message = "^distiller.queue_size: 7 is smaller than the batch size 8; give at least 8$"
    with pytest.raises(UserError, match=message):
        examples.build("mcld", queue_size=7)
    with pytest.raises(UserError, match=r"queue_size: 6 \(null: the number of training samples\) is smaller"):
        examples.build("mcld", data=examples.data_info(num_samples=6))
    assert isinstance(examples.build("mcld", queue_size=8), MCLD)


def test_queue_size_null_is_the_number_of_training_samples():
    assert examples.build("mcld").queue.keys.shape == (examples.SAMPLES, examples.CLASSES)


def test_random_keys_are_negatives_from_the_first_step_until_batches_replace_them():
    distiller = examples.build("mcld", queue_size=12, queue_start="random").double().train()
    loops = Loops(12)
    loops.queue.extend((-1, row) for row in distiller.queue.keys.tolist())
    for number, index in enumerate(torch.arange(24).split(8)):
        batch = examples.batch(number, 8, dtype=torch.float64, index=index)
        teacher = distiller.teacher(batch.image)
        output = distiller(batch, examples.epoch())
        expected = loops(output.logits.detach(), teacher, batch.target, index)["instance"]
        assert output.terms["instance"].item() == pytest.approx(expected, rel=1e-6)
        assert expected > 0
        loops.push(teacher, index)
        with torch.no_grad():
            distiller.after_step(output.signals)


def test_an_unfilled_queue_gives_an_instance_term_of_0():
    """With no negatives the positive is certain: cross-entropy over one class."""
    distiller = examples.build("mcld").train()
    terms = distiller(examples.batch(), examples.epoch()).terms
    assert terms["instance"].item() == 0
