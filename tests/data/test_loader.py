"""The batches of an epoch: which images, from which step on, read how far ahead, and in which process."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdistill import distributed
from mdistill.data import DATASETS, Batch, Dataset, loader
from mdistill.data.loader import BatchLoader, Reader, shard
from mdistill.data.mixing import Mixing
from mdistill.data.sampling import epoch_plan, strong_views
from mdistill.errors import UserError

from ..host_reads import NoHostReads
from ..same import assert_same
from ..streamed import StreamedBlobs

CPU = torch.device("cpu")
SAMPLES, BATCH_SIZE, STEPS = 38, 16, 3  # the last batch is smaller
SEED = 3

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two views": {"strong": True},
    "mixup": {"mixing": Mixing("mixup", alpha=1.0)},
    "cutmix": {"mixing": Mixing("cutmix", alpha=1.0, probability=0.5)},
    "cutmix_pick": {"mixing": Mixing("cutmix_pick", alpha=1.0, candidates=2)},
    "cutmix_pick beside": {
        "mixing": Mixing("cutmix_pick", 1.0, candidates=2, mode="beside", share="batch", partner="batch")
    },
    "streamed": {},
    "streamed, two views": {"strong": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def dataset_of(kind: str) -> Dataset:
    if kind.startswith("streamed"):
        return StreamedBlobs(SAMPLES)
    return DATASETS.build("tiny", None, False, images=SAMPLES).to(CPU)


def loader_of(kind: str, *, batch_size: int = BATCH_SIZE, **arguments: Any) -> BatchLoader:
    arguments = {**KINDS[kind], **arguments}
    return BatchLoader(dataset_of(kind), seed=SEED, batch_size=batch_size, device=CPU, **arguments)


def batches(source: BatchLoader, epoch: int, first: int = 0, last: int | None = None) -> list[Batch]:
    """The batches of the steps from ``first`` on, at most up to ``last``."""
    source.begin(epoch, first)
    return [source.batch(source.fetch(step)) for step in range(first, source.steps if last is None else last)]


def values(parts: list[Batch]) -> list[dict[str, Any]]:
    return [{**vars(part), "mixed": part.mixed and vars(part.mixed)} for part in parts]


def joined(parts: list[Batch], name: str) -> Tensor:
    return torch.cat([getattr(part, name) for part in parts])


# --- what an epoch shows ---


@pytest.mark.parametrize("kind", ["plain", "streamed"])
def test_an_epoch_shows_every_sample_once_in_its_order_and_view(kind: str) -> None:
    source = loader_of(kind)
    parts = batches(source, epoch=2)
    source.close()
    plan = epoch_plan(SEED, 2, SAMPLES, dataset_of(kind).num_views)
    assert [len(part.index) for part in parts] == [16, 16, 6]
    assert joined(parts, "index").tolist() == plan.index.tolist()
    assert joined(parts, "view").tolist() == plan.view.tolist()
    assert sorted(plan.index) == list(range(SAMPLES))


def test_an_image_in_memory_is_that_of_its_index_and_view() -> None:
    data = dataset_of("plain")
    for part in batches(loader_of("plain"), epoch=1):
        assert_same(vars(part), vars(data.train_batch(part.index, part.view)))


def test_a_streamed_image_is_that_of_its_index_and_view() -> None:
    data, source = StreamedBlobs(SAMPLES), loader_of("streamed")
    for part in batches(source, epoch=1):
        pixels = torch.from_numpy(data.read(part.index.numpy(), part.view.numpy()))
        assert_same(vars(part), vars(data.finish_batch(pixels, part.index, part.view)))
    source.close()


def test_strong_views_are_those_of_the_epoch() -> None:
    parts = batches(loader_of("two views"), epoch=4)
    assert joined(parts, "strong_view").tolist() == strong_views(SEED, 4, SAMPLES).tolist()
    data = dataset_of("two views")
    assert torch.equal(parts[0].strong_image, data.strong_image(parts[0].index, parts[0].strong_view))


def test_a_streamed_strong_view_is_that_of_its_index_and_word() -> None:
    data, source = StreamedBlobs(SAMPLES), loader_of("streamed, two views")
    strong = torch.from_numpy(strong_views(SEED, 2, SAMPLES))
    for part, words in zip(batches(source, epoch=2), strong.split(BATCH_SIZE), strict=True):
        assert torch.equal(part.strong_view, words)
        pixels = torch.from_numpy(data.read(part.index.numpy(), words.numpy()))
        assert torch.equal(part.strong_image, data.finish_strong(pixels, part.index, words))
        again = torch.from_numpy(data.read(part.index.numpy(), part.view.numpy()))
        assert torch.equal(part.image, data.finish_batch(again, part.index, part.view).image)
    source.close()


def test_as_many_mixed_images_as_there_are_candidates_come_with_the_number_to_keep() -> None:
    parts = batches(loader_of("cutmix_pick"), epoch=1)
    assert [(len(part.image), part.keep) for part in parts] == [(32, 16), (32, 16), (12, 6)]
    first, second = parts[0].index.chunk(2)
    assert torch.equal(first, second)
    assert not torch.equal(*parts[0].partner.chunk(2))


@kinds
def test_epochs_differ(kind: str) -> None:
    source = loader_of(kind)
    one, other = batches(source, epoch=1), batches(source, epoch=2)
    source.close()
    assert not torch.equal(joined(one, "index"), joined(other, "index"))


def test_a_batch_may_be_larger_than_the_data_set() -> None:
    source = loader_of("plain", batch_size=1000)
    assert (source.steps, source.batch_size) == (1, SAMPLES)
    assert len(batches(source, epoch=1)[0].index) == SAMPLES


# --- from any step on ---


@kinds
@pytest.mark.slow
def test_begun_at_any_step_the_batches_are_the_same(kind: str) -> None:
    source = loader_of(kind)
    whole = values(batches(source, epoch=2))
    source.close()
    for first in range(STEPS):
        other = loader_of(kind)
        assert_same(values(batches(other, epoch=2, first=first)), whole[first:])
        other.close()


@kinds
@pytest.mark.slow
def test_an_epoch_left_early_does_not_show_in_the_next(kind: str) -> None:
    source, other = loader_of(kind), loader_of(kind)
    batches(source, epoch=1, last=1)
    assert_same(values(batches(source, epoch=2)), values(batches(other, epoch=2)))
    source.close()
    other.close()


@kinds
@pytest.mark.slow
def test_an_epoch_prepared_ahead_is_the_same_and_leaves_the_one_at_hand_alone(kind: str) -> None:
    source, other = loader_of(kind), loader_of(kind)
    expected = values(batches(other, epoch=1)), values(batches(other, epoch=2))
    parts = batches(source, epoch=1, last=1)
    source.prepare(2)
    parts += [source.batch(source.fetch(step)) for step in range(1, STEPS)]
    assert_same(values(parts), expected[0])
    assert_same(values(batches(source, epoch=2)), expected[1])
    source.close()
    other.close()


def test_what_was_prepared_for_another_step_is_not_used() -> None:
    source = loader_of("plain")
    expected = values(batches(source, epoch=2, first=1))
    source.prepare(2, step=0)
    assert_same(values(batches(source, epoch=2, first=1)), expected)
    source.prepare(1, step=1)
    assert_same(values(batches(source, epoch=2, first=1)), expected)


@kinds
def test_a_batch_reads_nothing_on_the_host(kind: str) -> None:
    source = loader_of(kind)
    expected = values(batches(source, epoch=1))
    source.begin(1, 0)
    for step in range(STEPS):
        size = source.fetch(step)
        with NoHostReads():
            part = source.batch(size)
        assert_same(values([part]), expected[step : step + 1])
    source.close()


# --- the teacher's logits ---


class CountedLogits:
    """A source of teacher logits: row n of epoch e is full of 100 e + n; notes what it is asked."""

    def __init__(self, pairs: Tensor, batch_size: int) -> None:
        assert batch_size == BATCH_SIZE
        self.pairs, self.calls = pairs, []
        self.logits = torch.full((pairs.shape[1], 2), -1.0)

    def look_up(self, index: Any, view: Any, *, first: int = 0) -> Any:
        self.calls.append(("look_up", len(index), first))
        return index.copy()

    def begin(self, found: Any) -> None:
        assert self.pairs[0, :-1].tolist() == found.tolist()
        self.logits.fill_(-1.0)
        self.calls.append(("begin",))

    def require(self, count: int) -> None:
        self.logits[:count] = torch.arange(count, dtype=torch.float32)[:, None]
        self.calls.append(("require", count))

    def at(self, positions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        assert torch.equal(target, self.pairs[0].index_select(0, positions) % 10)
        return self.logits.index_select(0, positions), -positions[:, None]

    def flush(self) -> None:
        self.calls.append(("flush",))

    def close(self, *, wait: bool = True) -> None:
        self.calls.append(("close",))


def test_teacher_logits_are_required_before_a_batch_reads_them() -> None:
    sources: list[CountedLogits] = []
    source = loader_of("plain", teacher_logits=lambda *given: sources.append(CountedLogits(*given)) or sources[0])
    parts = batches(source, epoch=1, first=1)
    source.finish()
    source.close()
    assert sources[0].calls == [
        ("look_up", SAMPLES, 16), ("begin",), ("require", 32), ("require", 38), ("flush",), ("close",)
    ]  # fmt: skip
    assert joined(parts, "teacher_logits")[:, 0].tolist() == list(range(16, 38))
    assert joined(parts, "teacher_pooled")[:, 0].tolist() == [-number for number in range(16, 38)]


def test_plain_images_bring_their_logits_where_mixed_ones_lie_beside_them() -> None:
    part = batches(loader_of("cutmix_pick beside", teacher_logits=CountedLogits), epoch=1)[1]
    assert part.teacher_logits is not None
    assert part.teacher_logits[:, 0].tolist() == list(range(16, 32))
    assert part.mixed is not None
    assert (part.mixed.teacher_logits, part.mixed.keep, len(part.mixed.image)) == (None, 16, 32)


def test_without_a_source_a_batch_brings_no_teacher_logits() -> None:
    source = loader_of("plain")
    assert batches(source, epoch=1)[0].teacher_logits is None
    source.finish()


# --- images that are read ahead ---


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_the_batches_are_the_same_however_far_ahead_images_are_read(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = loader_of("streamed", batch_size=5)
    expected = [values(batches(source, epoch=epoch)) for epoch in (1, 2)]
    source.close()
    monkeypatch.setattr(loader, "READ_AHEAD", ahead)
    other = loader_of("streamed", batch_size=5)
    batches(other, epoch=1, last=3)
    assert_same([values(batches(other, epoch=epoch)) for epoch in (1, 2)], expected)
    other.close()


def test_at_most_so_many_batches_are_read_ahead() -> None:
    data = StreamedBlobs(SAMPLES)
    source = BatchLoader(data, seed=SEED, batch_size=4, device=CPU)
    source.begin(1, 2)
    source.fetch(2)
    source.close()  # waits for what was submitted
    plan = epoch_plan(SEED, 1, SAMPLES, None)
    assert len(data.log) <= 1 + loader.READ_AHEAD
    assert np.concatenate(data.log).tolist() == plan.index[8 : 8 + 4 * len(data.log)].tolist()


def test_an_error_while_images_are_read_surfaces_in_fetch() -> None:
    data = StreamedBlobs(SAMPLES)
    read, lost = data.read, int(epoch_plan(SEED, 1, SAMPLES, None).index[20])

    def failing(index: Any, view: Any) -> Any:
        if lost in index:
            raise UserError(f"image {lost} cannot be read")
        return read(index, view)

    data.read = failing
    source = BatchLoader(data, seed=SEED, batch_size=BATCH_SIZE, device=CPU)
    source.begin(1, 0)
    source.batch(source.fetch(0))
    with pytest.raises(UserError, match=f"image {lost} cannot be read"):
        source.fetch(1)
    source.begin(1, 2)  # those after it can still be read
    assert len(source.batch(source.fetch(2)).index) == 6
    source.close()


def test_close_ends_the_thread_that_reads() -> None:
    def reading() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("mdistill-read")}

    before = reading()
    source = loader_of("streamed")
    batches(source, epoch=1, last=1)
    assert len(reading() - before) == 1
    source.close()
    assert reading() == before


def test_a_reader_s_pixels_stay_where_they_are() -> None:
    data = StreamedBlobs(SAMPLES)
    reader = Reader(data, BATCH_SIZE, CPU)
    place = reader.pixels.data_ptr()
    plan = epoch_plan(SEED, 1, SAMPLES, None)
    reader.begin(plan, 0)
    for first, size in ((0, 16), (16, 16), (32, 6)):
        reader.fetch()
        expected = data.read(plan.index[first : first + size], plan.view[first : first + size])
        assert torch.equal(reader.pixels[:size], torch.from_numpy(expected))
    assert reader.pixels.data_ptr() == place
    reader.close()


# --- several processes ---


@pytest.mark.parametrize(("samples", "batch_size"), [(38, 16), (64, 16), (33, 16), (7, 4), (3, 4), (41, 6)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_every_batch_without_overlap(samples: int, batch_size: int, world_size: int) -> None:
    parts = [shard(samples, batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
    for start in range(0, samples, batch_size):
        whole = range(start, min(start + batch_size, samples))
        shares = [[position for position in part.tolist() if position in whole] for part in parts]
        assert [position for share in shares for position in share] == list(whole)  # in rank order
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Have this process think that it is one of several."""

    def set_rank(rank: int, world_size: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)

    return set_rank


def assert_together(whole: Batch, parts: Sequence[Batch | None], *, candidates: int) -> None:
    """The images of ``parts``, candidate by candidate, are those of ``whole``."""
    for name, value in vars(whole).items():
        if isinstance(value, Tensor):
            chunks = [getattr(part, name).chunk(candidates) for part in parts]
            assert_same(torch.cat([torch.cat(each) for each in zip(*chunks, strict=True)]), value, name)


@kinds
def test_the_batches_of_all_processes_are_those_of_one(kind: str, as_rank: Callable[[int, int], None]) -> None:
    source = loader_of(kind)
    whole = batches(source, epoch=1)
    source.close()
    parts = []
    for rank in range(2):
        as_rank(rank, 2)
        source = loader_of(kind)
        assert (source.steps, source.batch_size, source.own_batch_size) == (STEPS, BATCH_SIZE, BATCH_SIZE // 2)
        parts.append(batches(source, epoch=1))
        source.close()
    for one, pair in zip(whole, zip(*parts, strict=True), strict=True):
        assert_together(one, pair, candidates=2 if kind == "cutmix_pick" else 1)
        if one.mixed is not None:
            assert_together(one.mixed, [part.mixed for part in pair], candidates=2)
