"""The order and the views of an epoch, drawn on the host from (seed, stream, epoch) and from nothing else.

The generator is Philox4x64-10 with the 128-bit key (seed, stream * 2**32 + epoch): two different triples never share a
key. Only its raw 64-bit words are used, which NumPy keeps the same in every release (its ``Generator`` methods may
change), so an epoch's plan is the same for every method, teacher, device and version.

Streams; a number is never used again for something else:

====== ============= ==================================================
number name          what it draws
====== ============= ==================================================
1      permutation   the order of the samples in an epoch
2      view          the augmentation of each sample in an epoch
3      strong_view   the second, strongly augmented view of each sample
4      mixing        partners, shares and boxes of mixed samples (``mixing.py``)
5      holdout       which training images are held out (seed 0, epoch 0)
6, 7   (crops)       boxes of resized crops, plain and strong, with words of their own (``resized_crop.py``)
8      transfer      the order of features in an epoch of a linear classifier
====== ============= ==================================================
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

STREAMS = {"permutation": 1, "view": 2, "strong_view": 3, "mixing": 4, "holdout": 5, "transfer": 8}


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch shows, in order: view ``view[k]`` of sample ``index[k]``."""

    index: npt.NDArray[np.int64]  # (N,), a permutation of 0..N-1
    view: npt.NDArray[np.int64]  # (N,), in 0..num_views-1


def random_words(seed: int, stream: str, epoch: int, count: int) -> npt.NDArray[np.uint64]:
    """``count`` independent uniform 64-bit words, (count,), fixed by (seed, stream, epoch).

    Args:
        seed: 0 to 2**64 - 1.
        stream: a name in ``STREAMS``.
        epoch: 0 to 2**32 - 1.

    Raises:
        ValueError: ``seed`` or ``epoch`` out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, found {seed}")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch must be from 0 to 2**32 - 1, found {epoch}")
    key = np.array([seed, (STREAMS[stream] << 32) + epoch], dtype=np.uint64)
    words: npt.NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
    return words


def epoch_plan(seed: int, epoch: int, num_samples: int, num_views: int | None) -> EpochPlan:
    """The permutation and the uniform views of an epoch.

    Args:
        seed: the run's seed, 0 to 2**64 - 1.
        epoch: which epoch, 0 to 2**32 - 1.
        num_samples: N, the number of training samples.
        num_views: how many views a sample has; None (not enumerable) draws from 0 to 2**63 - 1.

    Raises:
        ValueError: ``seed`` or ``epoch`` out of range.
    """
    index = np.argsort(random_words(seed, "permutation", epoch, num_samples), kind="stable")
    words = random_words(seed, "view", epoch, num_samples)
    view = words % np.uint64(num_views) if num_views is not None else words >> np.uint64(1)
    return EpochPlan(index=index.astype(np.int64), view=view.astype(np.int64))


def strong_views(seed: int, epoch: int, num_samples: int) -> npt.NDArray[np.int64]:
    """The second view of each sample of an epoch in its order, (N,), uniform from 0 to 2**63 - 1."""
    words = random_words(seed, "strong_view", epoch, num_samples)
    return np.asarray(words >> np.uint64(1), dtype=np.int64)


def derive_seed(seed: int, stream: str) -> int:
    """A seed (0 to 2**63 - 1) for a generator of another library, such as the one that initialises the student.

    Any name may be a stream here: the seed is the start of SHA-256 of both, apart from the Philox streams above.
    """
    digest = hashlib.sha256(f"mdistill/{stream}/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
