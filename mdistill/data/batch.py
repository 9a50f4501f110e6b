"""What a batch is. Letters: B batch, C classes, H and W height and width."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Everything a training step sees of the data.

    ``image`` is a pure function of (``index``, ``view``): the data set alone knows what a view does to an image.
    """

    image: Tensor  # (B, 3, H, W) float32, normalised
    target: Tensor  # (B,) int64, class of each image
    index: Tensor  # (B,) int64, which training sample
    view: Tensor  # (B,) int64, which augmentation of it
    teacher_logits: Tensor | None = None  # (B, C), when the engine already has them; the teacher then does not run


@dataclass(frozen=True)
class DataInfo:
    """What a method may know of the data when it is built."""

    num_classes: int
    num_samples: int  # training samples (after any hold-out)
    image_size: int  # pixels, height and width
    num_views: int | None  # how many augmentations an image has; None where they cannot be enumerated
    batch_size: int  # the largest batch that a step will see
