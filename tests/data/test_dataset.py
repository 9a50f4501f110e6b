"""Data sets in memory: batches, splits, hold-out, fingerprint, and what is refused."""

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch

from mdistill.data import InMemoryDataset, augment
from mdistill.errors import UserError

from ..host_reads import NoHostReads

SETTINGS: dict[str, Any] = {"num_classes": 5, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "padding": 2}


def normalised(images: np.ndarray) -> torch.Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) float32, written out."""
    value = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (value - torch.tensor(SETTINGS["mean"]).view(3, 1, 1)) / torch.tensor(SETTINGS["std"]).view(3, 1, 1)


def test_what_it_tells_of_itself(small: InMemoryDataset):
    assert (small.num_classes, small.num_samples, small.image_size, small.num_views) == (5, 57, 8, 50)
    assert small.splits == ("test",)
    assert small.notes == ["made up"]
    info = small.info(16)
    assert astuple(info)[:6] == (5, 57, 8, 50, 16, True)
    assert info.labels is not None
    assert info.labels.tolist() == np.repeat(np.arange(5), [30, 12, 9, 4, 2]).tolist()
    assert info.class_names == ()
    assert small.info(64).batch_size == 57  # no batch is larger than the data
    assert small.size("test") == 23


def test_train_batch_is_the_view_of_the_sample(small: InMemoryDataset, small_arrays):
    images, labels = small_arrays["train"]
    index, view = torch.tensor([3, 56, 3, 0]), torch.tensor([0, 49, augment.identity(2, True), 7])
    batch = small.train_batch(index, view)
    assert batch.image.shape == (4, 3, 8, 8)
    assert batch.image.dtype == torch.float32
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert batch.index is index
    assert batch.view is view
    assert batch.target.dtype == torch.int64
    assert batch.target.tolist() == labels[index.numpy()].tolist()
    assert torch.equal(batch.image[2], normalised(images[3:4])[0])
    padded = np.pad(images[[3, 56]], ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected = np.stack([padded[0, 0:8, 0:8], padded[1, 4:12, 4:12][:, ::-1]])
    assert torch.equal(batch.image[:2], normalised(expected))


def test_an_image_does_not_depend_on_its_batch(small: InMemoryDataset):
    index, view = torch.arange(57), torch.arange(57) % 50
    together = small.train_batch(index, view).image
    for number in range(57):
        alone = small.train_batch(index[number : number + 1], view[number : number + 1]).image
        assert torch.equal(together[number], alone[0])


def test_train_batch_reads_nothing_back(small: InMemoryDataset):
    index, view = torch.arange(4), torch.arange(4)
    with NoHostReads():
        small.train_batch(index, view)


def test_without_padding_and_mirroring_there_is_one_view(small_arrays):
    data = InMemoryDataset(**small_arrays, **{**SETTINGS, "padding": 0}, flip=False)
    assert data.num_views == 1
    batch = data.train_batch(torch.arange(57), torch.zeros(57, dtype=torch.int64))
    assert torch.equal(batch.image, normalised(small_arrays["train"][0]))


def test_evaluation_sees_the_whole_split_in_order(small: InMemoryDataset, small_arrays):
    images, labels = small_arrays["test"]
    batches = list(small.eval_batches("test", 10))
    assert [len(target) for _, target in batches] == [10, 10, 3]
    assert torch.equal(torch.cat([image for image, _ in batches]), normalised(images))
    assert torch.cat([target for _, target in batches]).tolist() == labels.tolist()
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_split_is_refused(small: InMemoryDataset):
    with pytest.raises(UserError, match=r"unknown split 'val' \(known: test\)"):
        next(small.eval_batches("val", 4))


def test_the_arrays_are_copied_and_may_be_strided_or_read_only(small_arrays, small: InMemoryDataset):
    images, labels = small_arrays["train"]
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    planes.flags.writeable = labels.flags.writeable = False
    data = InMemoryDataset((planes.transpose(0, 2, 3, 1), labels), small_arrays["test"], **SETTINGS)
    assert data.fingerprint() == small.fingerprint()
    small_arrays["test"][0][:] = 0
    assert data.fingerprint() == small.fingerprint()


# Hold-out


def test_holding_out_nothing_returns_the_data_itself(small: InMemoryDataset):
    assert small.hold_out(0) is small


def test_held_out_images_become_a_split_and_leave_training(small: InMemoryDataset, small_arrays):
    images, labels = small_arrays["train"]
    data = small.hold_out(20)
    assert (data.num_samples, data.splits, data.size("val"), data.size("test")) == (37, ("val", "test"), 20, 23)
    assert data.info(50).num_samples == data.info(50).batch_size == 37
    assert data.notes == small.notes
    view = torch.full((37,), augment.identity(2, True))
    kept = data.train_batch(torch.arange(37), view)
    val_image, val_target = next(data.eval_batches("val", 100))
    both = torch.cat([kept.image, val_image]), torch.cat([kept.target, val_target])
    rows = {image.numpy().tobytes(): int(target) for image, target in zip(*both, strict=True)}
    assert rows == {row.numpy().tobytes(): int(label) for row, label in zip(normalised(images), labels, strict=True)}
    assert small.num_samples == 57  # the original is as it was
    assert small.splits == ("test",)


@pytest.mark.parametrize(
    ("count", "per_class"),
    [
        (5, [1, 1, 1, 1, 1]),
        (8, [1, 1, 2, 2, 2]),  # the rest is spread over different classes
        (10, [2, 2, 2, 2, 2]),
        (20, [2, 4, 4, 5, 5]),  # the smallest classes are used up
        (56, [2, 4, 9, 12, 29]),
    ],
)
def test_hold_out_is_as_even_as_the_classes_allow(small: InMemoryDataset, count: int, per_class: list[int]):
    _, target = next(small.hold_out(count).eval_batches("val", 100))
    assert sorted(np.bincount(target.numpy(), minlength=5).tolist()) == per_class


def test_the_choice_is_fixed(small: InMemoryDataset, small_arrays):
    """Recorded when the hold-out was defined; validation accuracies are comparable only while it stays."""
    torch.manual_seed(123)
    chosen = [18, 27, 34, 42, 49, 54, 56]
    found, target = next(small.hold_out(7).eval_batches("val", 100))
    assert target.tolist() == small_arrays["train"][1][chosen].tolist()
    assert torch.equal(found, normalised(small_arrays["train"][0][chosen]))


def test_smaller_hold_outs_are_part_of_larger_ones(small: InMemoryDataset):
    few, many = (
        {image.numpy().tobytes() for image in next(small.hold_out(count).eval_batches("val", 100))[0]}
        for count in (7, 20)
    )
    assert few < many


@pytest.mark.parametrize("count", [-1, 57, 1000])
def test_an_impossible_hold_out_is_refused(small: InMemoryDataset, count: int):
    with pytest.raises(UserError, match=rf"data\.holdout must be from 0 to 56, .* found {count}$"):
        small.hold_out(count)


def test_holding_out_twice_is_refused(small: InMemoryDataset):
    with pytest.raises(UserError, match=r"data\.holdout: 5 training images are already held out"):
        small.hold_out(5).hold_out(5)


# Fingerprint and device


def test_the_fingerprint_changes_with_everything_that_decides_an_image(small: InMemoryDataset, small_arrays):
    def changed(part: str, which: int) -> InMemoryDataset:
        arrays = {split: (images.copy(), labels.copy()) for split, (images, labels) in small_arrays.items()}
        flat = arrays[part][which].reshape(-1)
        flat[0] = 2 if flat[0] == 1 else 1
        return InMemoryDataset(**arrays, **SETTINGS)

    others = [changed(part, which) for part in ("train", "test") for which in (0, 1)]
    others += [
        InMemoryDataset(**small_arrays, **{**SETTINGS, **change})
        for change in ({"mean": (0.5, 0.4, 0.31)}, {"std": (0.2, 0.25, 0.31)}, {"padding": 3}, {"flip": False})
    ]
    others.append(small.hold_out(5))
    prints = {data.fingerprint() for data in [small, *others]}
    assert len(prints) == len(others) + 1
    assert all(len(value) == 64 for value in prints)


def test_the_fingerprint_is_of_the_content_alone(small: InMemoryDataset, small_arrays):
    images, labels = small_arrays["train"]
    same = InMemoryDataset((images, labels.astype(np.uint8)), small_arrays["test"], **SETTINGS, notes=["other notes"])
    assert same.fingerprint() == small.fingerprint()


@pytest.mark.parametrize("held", [0, 4])
def test_images_normalised_beforehand_are_the_same_to_the_last_bit(
    held: int, small_arrays, monkeypatch: pytest.MonkeyPatch
):
    """Every view of every image, padding included, whichever way the pixels are kept."""

    def batch(room: int) -> torch.Tensor:
        monkeypatch.setattr("mdistill.data.dataset.NORMALIZED_BYTES", room)
        data = InMemoryDataset(**small_arrays, **SETTINGS).hold_out(held).to("cpu")
        assert (data._normalized is not None) == (room > 0)
        index = torch.arange(data.num_samples).repeat_interleave(data.num_views)
        return data.train_batch(index, torch.arange(data.num_views).repeat(data.num_samples)).image

    now, beforehand = batch(0), batch(2**30)
    assert torch.equal(now, beforehand)
    assert beforehand.is_contiguous(memory_format=torch.channels_last)


def test_hold_out_after_moving_keeps_the_normalised_images(small_arrays):
    index, view = torch.arange(5), torch.arange(5) * 7
    late = InMemoryDataset(**small_arrays, **SETTINGS).to("cpu").hold_out(4).train_batch(index, view)
    early = InMemoryDataset(**small_arrays, **SETTINGS).hold_out(4).to("cpu").train_batch(index, view)
    assert torch.equal(late.image, early.image)


def test_to_moves_and_returns_self(small: InMemoryDataset):
    held = small.hold_out(5)
    before = small.fingerprint()
    assert small.to("cpu") is small
    assert small.to(torch.device("meta")) is small
    assert small.train_batch(torch.arange(4, device="meta"), torch.arange(4, device="meta")).image.device.type == "meta"
    assert next(small.eval_batches("test", 4))[0].device.type == "meta"
    assert held.train_batch(torch.arange(4), torch.arange(4)).image.device.type == "cpu"  # its own device
    assert before != held.fingerprint()


@pytest.mark.gpu
def test_a_cuda_device_gives_the_same_bits(small: InMemoryDataset):
    index, view = torch.arange(57), torch.arange(57) % 50
    expected, print_before = small.train_batch(index, view), small.fingerprint()
    found = small.to("cuda").train_batch(index.cuda(), view.cuda())
    assert torch.equal(found.image.cpu(), expected.image)
    assert torch.equal(found.target.cpu(), expected.target)
    assert small.fingerprint() == print_before


# What is refused


def images(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (
            (images(4, 8, 8, 3).astype(np.float32), np.arange(4)),
            r"^train images must be uint8 .* found float32 \(4, 8, 8, 3\)$",
        ),
        ((images(4, 3, 8, 8), np.arange(4)), r"train images must be uint8 \(N, S, S, 3\), found uint8 \(4, 3, 8, 8\)"),
        ((images(4, 8, 9, 3), np.arange(4)), r"train images .* found uint8 \(4, 8, 9, 3\)"),
        ((images(4, 192), np.arange(4)), r"train images .* found uint8 \(4, 192\)"),
        ((images(0, 8, 8, 3), np.arange(0)), "train images must not be empty"),
        ((images(4, 8, 8, 3), np.arange(5)), "train: 4 images but 5 labels"),
        ((images(4, 8, 8, 3), np.arange(4) / 2), r"train labels must be integers \(N,\), found float64 \(4,\)"),
        ((images(4, 8, 8, 3), np.eye(4, dtype=int)), r"train labels must be integers \(N,\), found int64 \(4, 4\)"),
        ((images(4, 8, 8, 3), np.arange(4) + 2), "train labels must be from 0 to 4, found 2 to 5"),
        ((images(4, 8, 8, 3), np.arange(4) - 1), "train labels must be from 0 to 4, found -1 to 2"),
        ((images(4, 8, 8, 3), [0, 1, 2, 3]), "train labels must be a NumPy array, found list"),
        ((images(4, 6, 6, 3), np.arange(4)), "images differ in size: 6 pixels in train, 8 in test"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(train: Any, text: str):
    with pytest.raises(UserError, match=text) as error:
        InMemoryDataset(train, (images(2, 8, 8, 3), np.arange(2)), **SETTINGS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, found 1"),
        ({"mean": (0.5,)}, r"mean must be 3 numbers, one for each channel, found \[0.5\]"),
        ({"std": (0.2, 0.0, 0.2)}, r"std must be 3 positive numbers, .* found \[0.2, 0.0, 0.2\]"),
        ({"padding": -1}, "padding must be 0 or more pixels, found -1"),
    ],
)
def test_settings_out_of_range_are_refused(small_arrays, settings: dict[str, Any], text: str):
    with pytest.raises(UserError, match=text):
        InMemoryDataset(**small_arrays, **{**SETTINGS, **settings})
