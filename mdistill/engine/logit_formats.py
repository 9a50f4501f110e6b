"""What a teacher's outputs are stored as: all of them, or the largest probabilities alone.

Letters: B images, C classes, D pooled features that are stored with the logits (0: none), k the classes that a sparse
row keeps.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistill.config import RunConfig
from mdistill.errors import UserError

CACHE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
"""Of dense rows: rounding to float16 moves a logit by at most 2^-11 of itself (2^-25 below 2^-14)."""

HALF = torch.finfo(torch.float16)


class LogitFormat(ABC):
    """How what a teacher says of an image, C logits and then D pooled features, becomes a row of numbers, and back.

    Attributes:
        name: as ``run.teacher_logits`` has it.
        classes: C.
        pooled: D.
        width: numbers in a row.
        dtype: of these numbers.
        largest: the largest |number| that can be stored.
        loss: what storing logits so does to them, in words; empty where they stay as they are.
        advice: what to do where that is too much, in words.
    """

    name: str
    classes: int
    pooled: int = 0
    width: int
    dtype: torch.dtype
    largest: float
    loss: str
    advice: str

    @property
    def identity(self) -> dict[str, object]:
        """What tells rows of this format from others of the same width and type."""
        return {}

    @abstractmethod
    def encode(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Rows of outputs. Static shapes, no read by the host.

        Args:
            outputs: (B, C + D) float32.
            target: (B,) int64, the true classes.

        Returns:
            (B, ``width``) in ``dtype``.
        """

    @abstractmethod
    def decode(self, rows: Tensor, target: Tensor) -> Tensor:
        """Outputs of rows: (B, ``width``), (B,) -> (B, C + D), floating point. Static shapes, no read by the host."""


class Dense(LogitFormat):
    """All outputs, rounded to ``dtype``."""

    def __init__(self, classes: int, dtype: torch.dtype, *, pooled: int = 0) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self.classes, self.pooled, self.width = classes, pooled, classes + pooled
        self.dtype, self.largest = dtype, torch.finfo(dtype).max
        self.loss = "" if dtype == torch.float32 else f"rounding to {self.name}"
        self.advice = "run.teacher_logits=float32 is exact"

    @property
    def identity(self) -> dict[str, object]:
        """D, where there are any."""
        return {"pooled": self.pooled} if self.pooled else {}

    def encode(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Rounded."""
        return outputs.to(self.dtype)

    def decode(self, rows: Tensor, target: Tensor) -> Tensor:
        """As they are."""
        return rows


class Sparse(LogitFormat):
    """The k largest log-probabilities at temperature 1, that of the true class, and the log of the remaining mass.

    A row is 2 k + 2 int16 numbers: the bits of k log-probabilities in float16, largest first (of equal ones the lower
    class first); their classes as uint16; the bits of the true class's log-probability and of the log of the mass
    outside all of these. The true class itself is known from the label. A log-probability below -65504 becomes that.

    Args:
        classes: C, at most 65,536.
        top_k: k, at most C.
    """

    name = "sparse"

    def __init__(self, classes: int, top_k: int) -> None:
        self.classes, self.top_k = classes, top_k
        self.width, self.dtype, self.largest = 2 * top_k + 2, torch.int16, torch.finfo(torch.float32).max
        self.loss = f"keeping the {top_k} largest probabilities"
        self.advice = "run.teacher_logits=float16 keeps all"

    @property
    def identity(self) -> dict[str, object]:
        """C and k."""
        return {"sparse": {"classes": self.classes, "top_k": self.top_k}}

    def encode(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The row of each image."""
        log_probs = F.log_softmax(outputs, dim=1)
        ordered, order = log_probs.sort(dim=1, descending=True, stable=True)
        top, classes = ordered[:, : self.top_k], order[:, : self.top_k]
        of_target = log_probs.gather(1, target[:, None])  # (B, 1)
        left = ordered[:, self.top_k :].masked_fill(order[:, self.top_k :] == target[:, None], -torch.inf)
        # One more column, so that nothing left is a sum over something.
        rest = F.pad(left, (0, 1), value=-torch.inf).logsumexp(dim=1, keepdim=True)
        numbers = torch.cat([top, of_target, rest], dim=1).clamp(min=HALF.min).half().view(torch.int16)
        return torch.cat([numbers[:, : self.top_k], classes.to(torch.int16), numbers[:, self.top_k :]], dim=1)

    def decode(self, rows: Tensor, target: Tensor) -> Tensor:
        """Pseudo-logits: the log-probabilities stored, and for each other class an even share of the remaining mass."""
        images, k = len(rows), self.top_k
        classes = rows[:, k : 2 * k].to(torch.int64) & 0xFFFF  # (B, k)
        top = rows[:, :k].contiguous().view(torch.float16).float()
        of_target, rest = rows[:, 2 * k :].contiguous().view(torch.float16).float().unbind(dim=1)
        stored = k + (classes != target[:, None]).all(dim=1)  # (B,), the true class among them
        share = rest - (self.classes - stored).clamp(min=1).log()
        logits = share[:, None].expand(-1, self.classes).flatten()  # flat, for kernels that are deterministic
        start = torch.arange(images, device=rows.device) * self.classes
        logits = logits.index_copy(0, (start[:, None] + classes).flatten(), top.flatten())
        return logits.index_copy(0, start + target, of_target).view(images, self.classes)


def format_of(run: RunConfig, classes: int, *, pooled: int = 0) -> LogitFormat:
    """What a run's teacher logits, and as many pooled features, are stored as.

    Raises:
        UserError: there are too few or too many classes for a sparse row.
    """
    if run.teacher_logits != "sparse":
        return Dense(classes, CACHE_DTYPES[run.teacher_logits], pooled=pooled)
    if run.teacher_top_k >= classes:
        raise UserError(
            f"run.teacher_top_k: should be below the number of classes, {classes}, found {run.teacher_top_k};"
            " run.teacher_logits=float16 keeps all classes and takes less"
        )
    if classes > 2**16:
        raise UserError(
            f"run.teacher_logits: 'sparse' holds at most {2**16:,} classes, found {classes:,}; take float16"
        )
    return Sparse(classes, run.teacher_top_k)
