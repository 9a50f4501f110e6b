"""The batches of an epoch: plain ones, with a strong second view, or mixed. Letters: N samples, B batch."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from mdistill.data import mixing
from mdistill.data.batch import Batch
from mdistill.data.dataset import Dataset
from mdistill.data.mixing import Columns, Mixing
from mdistill.data.sampling import strong_views


class Feed:
    """What an epoch plans beyond order and view, in memory that stays where it is, and the batches that come of it.

    Args:
        dataset: on the device.
        seed: fixes everything, together with the epoch.
        strong: whether batches have a second, strongly augmented view.
        mixing: how images are mixed; None: not at all.
        device: of the data.
    """

    def __init__(
        self, dataset: Dataset, *, seed: int, strong: bool, mixing: Mixing | None, device: torch.device
    ) -> None:
        assert not (strong and mixing is not None)
        self._dataset, self._seed, self._strong, self._mixing = dataset, seed, strong, mixing
        rows = 1 if strong else mixing.rows if mixing is not None else 0
        self._columns = torch.zeros(rows, dataset.num_samples, dtype=torch.int64, device=device)

    def plan(self, epoch: int) -> Columns:
        """Draw, on the host alone, what the epoch needs: (rows, N) int64."""
        data = self._dataset
        if self._strong:
            return strong_views(self._seed, epoch, data.num_samples)[None]
        if self._mixing is not None:
            return mixing.plan(self._mixing, self._seed, epoch, data.num_samples, data.num_views, data.image_size)
        return np.zeros((0, data.num_samples), dtype=np.int64)

    def begin(self, columns: Tensor) -> None:
        """Go over to a plan that is on the device."""
        self._columns.copy_(columns)

    def batch(self, index: Tensor, view: Tensor, slots: Tensor) -> Batch:
        """The batch of the samples and views at ``slots`` of the epoch: three times (B,) int64. Static shapes."""
        batch = self._dataset.train_batch(index, view)
        if self._strong:
            word = self._columns[0].index_select(0, slots)
            return dataclasses.replace(batch, strong_image=self._dataset.strong_image(index, word), strong_view=word)
        if self._mixing is not None:
            columns = self._columns.index_select(1, slots)
            candidates = [self._mixed(batch, each) for each in columns.chunk(self._mixing.candidates)]
            return candidates[0] if len(candidates) == 1 else mixing.together(candidates, kept=len(slots))
        return batch

    def _mixed(self, batch: Batch, columns: Tensor) -> Batch:
        assert self._mixing is not None
        partner = self._dataset.train_batch(columns[0], columns[1])
        return mixing.mix(self._mixing, batch, partner, columns, self._dataset.num_classes)
