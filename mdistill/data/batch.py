"""What a batch is. Letters: B batch, C classes, H and W height and width, N training samples."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor

Pick = Literal["teacher", "student"]
"""Whose entropy decides which of several mixed images are trained on."""


@dataclass(frozen=True)
class Batch:
    """Everything a training step sees of the data.

    ``image`` is a pure function of (``index``, ``view``): the data set alone knows what a view does to an image.
    """

    image: Tensor  # (B, 3, H, W) float32, normalised
    target: Tensor  # (B,) int64, class of each image; of mixed images (B, C) float32, the share of each class
    index: Tensor  # (B,) int64, which training sample
    view: Tensor  # (B,) int64, which augmentation of it
    teacher_logits: Tensor | None = None  # (B, C), where they are known; the teacher then does not run
    teacher_pooled: Tensor | None = None  # (B, D), its pooled features, known with the logits where a method needs both
    strong_image: Tensor | None = None  # (B, 3, H, W), a second, strongly augmented view, when a method asks for two
    strong_view: Tensor | None = None  # (B,) int64, which one
    partner: Tensor | None = None  # (B,) int64, the sample that each image is mixed with
    lam: Tensor | None = None  # (B,) float32, the share of ``index`` in a mixed image; ``partner`` has the rest
    keep: int | None = None  # train on this many images, those of which ``pick`` is least certain; None: on all
    pick: Pick = "teacher"
    mixed: "Batch | None" = None  # as many mixed images beside these; their target is the class of ``index`` alone
    rank_counts: tuple[int, ...] = ()  # of processes that train together, each one's images in this step; () for one

    def select(self, rows: Tensor, *, teacher_logits: Tensor | None) -> "Batch":
        """Only the images ``rows`` (K,) int64, with their ``teacher_logits`` (K, C) where they are known."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen = {name: value.index_select(0, rows) for name, value in values.items() if isinstance(value, Tensor)}
        selected = Batch(**chosen)  # type: ignore[arg-type]
        return replace(selected, teacher_logits=teacher_logits, rank_counts=self.rank_counts)


@dataclass(frozen=True)
class DataInfo:
    """What a method may know of the data when it is built."""

    num_classes: int
    num_samples: int  # training samples (after any hold-out)
    image_size: int  # pixels, height and width
    num_views: int | None  # how many augmentations an image has; None where they cannot be enumerated
    batch_size: int  # the largest batch that a step will see
    strong_views: bool = False  # whether it has a second, strongly augmented view of an image
    labels: Tensor | None = None  # (N,) int64 on the CPU, the class of every training sample
    class_names: tuple[str, ...] = ()  # of each class, where they are known
    mean: tuple[float, ...] = ()  # of the channels, on the scale 0 to 1, that images are normalised by; () if not known
    std: tuple[float, ...] = ()  # of the same
