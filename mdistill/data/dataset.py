"""What the engine sees of a data set, and the data set that holds its pixels on the device.

Letters: N images, B batch, S image size (height and width), V views.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from mdistill.data import augment, randaugment
from mdistill.data.batch import Batch, DataInfo
from mdistill.data.sampling import random_words
from mdistill.errors import UserError
from mdistill.registry import Registry

DATASETS: Registry["Dataset"] = Registry("data set")
"""Builders take (root: Path, download: bool); their keyword-only parameters come from the configuration's ``data:``."""

Split = tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]
"""Images (N, S, S, 3) uint8 and their labels (N,)."""


class Dataset(ABC):
    """The contract: training batches by (index, view), and splits that are evaluated in order."""

    num_classes: int
    num_samples: int  # training samples, without those held out
    image_size: int  # pixels, height and width
    num_views: int | None  # views of an image; None where they cannot be enumerated
    splits: tuple[str, ...]  # what is evaluated: ("test",), or ("val", "test") with a hold-out
    notes: list[str]  # what a run prints and records about the data
    labels: Tensor | None = None  # (N,) int64 on the CPU, the class of every training sample
    class_names: tuple[str, ...] = ()  # of each class, where they are known
    mean: tuple[float, ...] = ()  # of the channels, on the scale 0 to 1, that images are normalised by; () if not known
    std: tuple[float, ...] = ()  # of the same
    strong_views = False  # whether there is a second, strongly augmented view of an image: ``strong_image``

    def info(self, batch_size: int) -> DataInfo:
        """What a method may know of the data, trained in batches of at most ``batch_size``."""
        return DataInfo(
            num_classes=self.num_classes,
            num_samples=self.num_samples,
            image_size=self.image_size,
            num_views=self.num_views,
            batch_size=min(batch_size, self.num_samples),
            strong_views=self.strong_views,
            labels=self.labels,
            class_names=self.class_names,
            mean=self.mean,
            std=self.std,
        )

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move the pixels to ``device`` and return self."""

    @abstractmethod
    def hold_out(self, count: int) -> "Dataset":
        """A data set without ``count`` of the training images, which become the split "val"; 0 returns self.

        The choice is as even over the classes as can be, and the same for every run, whatever its seed.

        Raises:
            UserError: ``count`` is negative or leaves no training image.
        """

    def train_batch(self, index: Tensor, view: Tensor) -> Batch:
        """View ``view[b]`` of training sample ``index[b]``, of a data set whose pixels are on the device.

        The image is a pure function of (index, view): no randomness, no read by the host, static shapes.

        Args:
            index: (B,) int64, on the device.
            view: (B,) int64, on the device.
        """
        raise NotImplementedError(f"{type(self).__name__} holds no pixels on the device")

    def strong_image(self, index: Tensor, strong_view: Tensor) -> Tensor:
        """The strongly augmented view ``strong_view[b]``, from 0 to 2**63 - 1, of training sample ``index[b]``.

        Like ``train_batch`` a pure function with static shapes: (B,), (B,) int64 -> (B, 3, S, S) float32.
        """
        raise NotImplementedError(f"{type(self).__name__} has one view of an image, no strong one")

    @abstractmethod
    def eval_batches(
        self, split: str, batch_size: int, *, first: int = 0, stride: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All of a split in order: (image (B, 3, S, S) float32, target (B,) int64), the last batch perhaps smaller.

        Args:
            split: one of ``splits``.
            batch_size: B.
            first: number of the first image.
            stride: take every ``stride``-th image from there on, as processes do that share a split.
        """

    def plain_batches(self, index: npt.NDArray[np.int64], batch_size: int) -> Iterator[Tensor]:
        """Training images as images are evaluated, without augmentation: (B, 3, S, S) float32, in the order given.

        Args:
            index: (n,) int64, on the host, which training samples.
            batch_size: B; the last batch is perhaps smaller.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no training image without augmentation")

    @abstractmethod
    def size(self, split: str) -> int:
        """The number of images in a split that is evaluated."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that decides the images and labels that are trained on and evaluated."""


class StreamedDataset(Dataset):
    """Images that are read while training goes on: the host decodes and crops, the device does the rest.

    Both halves are pure functions of (index, view), so that neither the number of workers nor the step at which a run
    resumes changes a bit.
    """

    num_views: int | None = None  # all words from 0 to 2**63 - 1; V: those from 0 to V - 1

    @abstractmethod
    def read(self, index: npt.NDArray[np.int64], view: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The cropped pixels of a batch, on the host; called in a thread, ahead of the step.

        Args:
            index: (B,) int64, which training samples.
            view: (B,) int64, from 0 to ``num_views`` - 1 or 2**63 - 1, which augmentation of each.

        Returns:
            (B, S, S, 3) uint8.
        """

    def read_into(self, out: npt.NDArray[np.uint8], index: npt.NDArray[np.int64], view: npt.NDArray[np.int64]) -> None:
        """What ``read`` gives, into ``out`` (B, S, S, 3): for data sets that need not copy it there."""
        out[...] = self.read(index, view)

    def read_both_into(
        self,
        out: npt.NDArray[np.uint8],
        strong_out: npt.NDArray[np.uint8],
        index: npt.NDArray[np.int64],
        view: npt.NDArray[np.int64],
        strong_view: npt.NDArray[np.int64],
    ) -> None:
        """As ``read_into``, and the pixels of the strong views (B,) into ``strong_out``; with ``strong_views`` only."""
        raise NotImplementedError(f"{type(self).__name__} has one view of an image, no strong one")

    @abstractmethod
    def finish_batch(self, pixels: Tensor, index: Tensor, view: Tensor) -> Batch:
        """The batch, on the device: flipped and normalised. Static shapes, no read by the host.

        Args:
            pixels: (B, S, S, 3) uint8, what ``read`` gave.
            index: (B,) int64.
            view: (B,) int64.
        """

    def finish_strong(self, pixels: Tensor, index: Tensor, strong_view: Tensor) -> Tensor:
        """The strong views on the device, (B, 3, S, S) float32, from what ``read_both_into`` gave of them."""
        raise NotImplementedError(f"{type(self).__name__} has one view of an image, no strong one")


NORMALIZED_BYTES = 2**30
"""Training images are held normalised where they take no more than this (CIFAR-100: 0.65 GB), else as uint8 alone."""


class InMemoryDataset(Dataset):
    """Small images, held as one uint8 tensor for each split on the device; cropped, flipped and normalised there.

    Normalising is done once where there is room (``NORMALIZED_BYTES``), with the same result to the last bit.

    Args:
        train: images (N, S, S, 3) uint8 in RGB, and labels (N,), integers from 0 to ``num_classes`` - 1.
        test: the same for the images that are evaluated.
        num_classes: how many classes there are.
        mean: of the three channels, on the scale 0 to 1.
        std: of the three channels, on the same scale.
        padding: zero pixels on each side before an S by S crop is taken; 0 takes the image itself.
        flip: mirror half of the views left to right.
        notes: what a run prints and records about the data.
        class_names: of each class, where they are known.

    Raises:
        UserError: the arrays do not fit this description; says which and what was found.
    """

    def __init__(
        self,
        train: Split,
        test: Split,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int = 4,
        flip: bool = True,
        notes: Sequence[str] = (),
        class_names: Sequence[str] = (),
    ) -> None:
        _check_settings(num_classes, mean, std, padding)
        _check_split("train", *train, num_classes)
        _check_split("test", *test, num_classes)
        if train[0].shape[1] != test[0].shape[1]:
            raise UserError(f"images differ in size: {train[0].shape[1]} pixels in train, {test[0].shape[1]} in test")
        self.num_classes = num_classes
        self.num_samples, self.image_size = train[0].shape[:2]
        self._crops = padding, flip
        self.num_views = augment.count(padding, flip)
        self.strong_views = self.num_views is not None and self.num_views <= randaugment.MOST_VIEWS
        self.splits = ("test",)
        self.notes = list(notes)
        self.mean, self.std = tuple(mean), tuple(std)
        self._normalize = augment.Normalization(self.image_size, self.mean, self.std)
        fits = self.num_samples * (self.image_size + 1) ** 2 < 2**31
        tables = augment.offset_tables(self.image_size, padding, flip)
        self._rows, self._columns = (table.to(torch.int32 if fits else torch.int64) for table in tables)
        self._settings = f"{num_classes} {[*map(float, mean)]} {[*map(float, std)]} {padding} {bool(flip)}"
        self._train = augment.store(train[0])  # (N, S+1, S+1, 3) uint8
        self.labels = torch.tensor(train[1], dtype=torch.int64)
        self.class_names = tuple(class_names)
        self._train_labels = self.labels  # (N,), on the device
        self._strengthen: randaugment.Strengthen | None = None  # made when it is first asked for
        self._normalized: Tensor | None = None  # ``_train`` as float32, where that is small enough; made by ``to``
        self._eval = {"test": (torch.tensor(test[0]), torch.tensor(test[1], dtype=torch.int64))}

    def to(self, device: torch.device | str) -> Self:
        self._normalize, self._strengthen = self._normalize.to(device), None
        self._rows, self._columns = self._rows.to(device), self._columns.to(device)
        self._train, self._train_labels = self._train.to(device), self._train_labels.to(device)
        self._normalized = self._normalize_once() if 4 * self._train.numel() <= NORMALIZED_BYTES else None
        self._eval = {split: (image.to(device), label.to(device)) for split, (image, label) in self._eval.items()}
        return self

    def hold_out(self, count: int) -> "InMemoryDataset":
        if count == 0:
            return self
        if "val" in self._eval:
            raise UserError(f"data.holdout: {self.size('val')} training images are already held out")
        held, remaining = held_out(self._train_labels.cpu().numpy(), count)
        held, remaining = held.to(self._train.device), remaining.to(self._train.device)
        size = self.image_size
        other = copy.copy(self)
        other.num_samples = len(remaining)
        other.splits = ("val", *self.splits)
        other.notes = list(self.notes)
        other._train, other._train_labels = self._train[remaining], self._train_labels[remaining]
        other.labels = other._train_labels.cpu()
        other._normalized = None if self._normalized is None else self._normalized[remaining]
        val = self._train[held][:, :size, :size].contiguous(), self._train_labels[held]
        other._eval = {"val": val, **self._eval}
        return other

    def train_batch(self, index: Tensor, view: Tensor) -> Batch:
        target = self._train_labels.index_select(0, index)
        if self._normalized is not None:
            image = augment.crop_and_flip(self._normalized, index, view, self._rows, self._columns).permute(0, 3, 1, 2)
        else:
            image = self._normalize(augment.crop_and_flip(self._train, index, view, self._rows, self._columns))
        return Batch(image=image, target=target, index=index, view=view)

    def strong_image(self, index: Tensor, strong_view: Tensor) -> Tensor:
        if self._strengthen is None:
            self._strengthen = randaugment.Strengthen(self.image_size).to(self._train.device)
        parts = randaugment.decode(strong_view, augment.count(*self._crops))
        pixels = augment.crop_and_flip(self._train, index, parts.view, self._rows, self._columns)
        return self._normalize(self._strengthen(pixels, parts))

    def eval_batches(
        self, split: str, batch_size: int, *, first: int = 0, stride: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = (values[first::stride] for values in self._split(split))
        for start in range(0, len(labels), batch_size):
            yield self._normalize(images[start : start + batch_size]), labels[start : start + batch_size]

    def plain_batches(self, index: npt.NDArray[np.int64], batch_size: int) -> Iterator[Tensor]:
        size = self.image_size
        for start in range(0, len(index), batch_size):
            rows = torch.from_numpy(index[start : start + batch_size]).to(self._train.device)
            yield self._normalize(self._train.index_select(0, rows)[:, :size, :size])

    def size(self, split: str) -> int:
        return len(self._split(split)[1])

    def fingerprint(self) -> str:
        size = self.image_size
        splits = {"train": (self._train, self._train_labels), **self._eval}
        digest = hashlib.sha256(self._settings.encode())
        for split, (images, labels) in splits.items():
            digest.update(f"{split} {len(labels)} {size}".encode())
            for start in range(0, len(labels), 8192):
                digest.update(images[start : start + 8192, :size, :size].cpu().numpy().tobytes())
            digest.update(labels.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def _normalize_once(self) -> Tensor:
        """(N, S+1, S+1, 3) float32: a view only moves pixels, so that each is the same before as after."""
        normalize = augment.Normalization(self.image_size + 1, self.mean, self.std).to(self._train.device)
        normalized = torch.empty(self._train.shape, device=self._train.device)
        for start in range(0, len(normalized), 4096):
            part = slice(start, start + 4096)
            normalized[part] = normalize(self._train[part]).permute(0, 2, 3, 1)
        return normalized

    def _split(self, split: str) -> tuple[Tensor, Tensor]:
        if split not in self._eval:
            raise UserError(f"unknown split {split!r} (known: {', '.join(self.splits)})")
        return self._eval[split]


def held_out(labels: npt.NDArray[np.int64], count: int) -> tuple[Tensor, Tensor]:
    """Which samples are held out and which remain, both ascending.

    The samples are shuffled, then one of each class is taken in turn until there are ``count``.

    Raises:
        UserError: ``count`` is negative or leaves no sample.
    """
    if not 0 < count < len(labels):
        raise UserError(
            f"data.holdout must be from 0 to {len(labels) - 1}, fewer than the training images; found {count}"
        )
    shuffled = np.argsort(random_words(0, "holdout", 0, len(labels)), kind="stable")
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class by class, shuffled within each
    turn = np.empty(len(labels), dtype=np.int64)  # the turn in which each sample's class gives it
    _, first, per_class = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn[by_class] = np.arange(len(labels)) - np.repeat(first, per_class)
    order = shuffled[np.argsort(turn[shuffled], kind="stable")]
    return torch.from_numpy(np.sort(order[:count])), torch.from_numpy(np.sort(order[count:]))


def _check_settings(num_classes: int, mean: Sequence[float], std: Sequence[float], padding: int) -> None:
    if num_classes < 2:
        raise UserError(f"num_classes must be at least 2, found {num_classes}")
    if len(mean) != 3:
        raise UserError(f"mean must be 3 numbers, one for each channel, found {list(mean)}")
    if len(std) != 3 or not all(value > 0 for value in std):
        raise UserError(f"std must be 3 positive numbers, one for each channel, found {list(std)}")
    if padding < 0:
        raise UserError(f"padding must be 0 or more pixels, found {padding}")


def _check_split(split: str, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer], num_classes: int) -> None:
    for name, array in (("images", images), ("labels", labels)):
        if not isinstance(array, np.ndarray):
            raise UserError(f"{split} {name} must be a NumPy array, found {type(array).__name__}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise UserError(f"{split} images must be uint8 (N, S, S, 3), found {images.dtype} {images.shape}")
    if images.size == 0:
        raise UserError(f"{split} images must not be empty, found shape {images.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise UserError(f"{split} labels must be integers (N,), found {labels.dtype} {labels.shape}")
    if len(images) != len(labels):
        raise UserError(f"{split}: {len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"{split} labels must be from 0 to {num_classes - 1}, found {labels.min()} to {labels.max()}")
