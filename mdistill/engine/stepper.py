"""The steps of one run, on static tensors: where in the epoch a step is, it reads from device memory.

Letters: N training samples, B batch.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mdistill.data import Batch, Dataset
from mdistill.data.feed import Feed
from mdistill.data.mixing import Columns, Mixing
from mdistill.data.sampling import EpochPlan, epoch_plan
from mdistill.distillers import Distiller
from mdistill.engine.cuda_graph import (
    Engine,
    Launcher,
    compile_network,
    cuda_graph,
    in_one_line,
    uncompiled,
    undo_compile,
    upload,
)
from mdistill.engine.teacher import Request, TeacherRows

MakeRows = Callable[[Tensor], TeacherRows]
"""From the pairs (2, N + 1) of an epoch to where their teacher logits come from."""


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What the host has prepared of an epoch from step ``step`` on."""

    epoch: int
    step: int
    plan: EpochPlan
    columns: Columns  # of the feed
    request: Request | None


class Stepper:
    """Walks through epochs batch by batch; which images, in which order and view, is fixed by (seed, epoch) alone.

    Args:
        distiller: the method; its student is compiled if ``engine`` says so.
        step: one training step, given a batch and the epoch () on the device.
        dataset: on the device.
        seed: fixes order and views.
        batch_size: B; the last batch of an epoch may be smaller.
        mixing: how images are mixed; None: not at all.
        engine: how steps are launched.
        make_rows: where teacher logits come from; None leaves the teacher to the method.
        say: told in one line when a capture or a compilation fails; the step then runs as plain Python.
    """

    def __init__(
        self,
        distiller: Distiller,
        step: Callable[[Batch, Tensor], None],
        dataset: Dataset,
        *,
        seed: int,
        batch_size: int,
        mixing: Mixing | None,
        device: torch.device,
        engine: Engine,
        make_rows: MakeRows | None,
        say: Callable[[str], None],
    ) -> None:
        self.steps = -(-dataset.num_samples // batch_size)  # in an epoch
        self._distiller, self._step, self._dataset = distiller, step, dataset
        self._seed, self._batch_size, self._device, self._say = seed, batch_size, device, say
        record = cuda_graph(list(distiller.generators.values())) if engine.captures else None
        self._pairs = torch.zeros(2, dataset.num_samples + 1, dtype=torch.int64, device=device)  # index, view
        self._at = torch.zeros((), dtype=torch.int64, device=device)  # images of the epoch already seen
        self._epoch = torch.ones((), dtype=torch.int64, device=device)
        self._offsets = torch.arange(min(batch_size, dataset.num_samples), device=device)
        strong = distiller.needs.views > 1
        self._feed = Feed(dataset, seed=seed, strong=strong, mixing=mixing, device=device)
        self._rows = make_rows(self._pairs) if make_rows else None
        self._launch = Launcher(
            partial(self._one, batch_size), record=record, on_failure=partial(self._fell_back, "graph")
        )
        self._compiled = engine.name == "compile"
        self._untried = self._compiled
        self._ahead: Ahead | None = None
        if self._compiled:
            compile_network(distiller.student, features=distiller.needs.student_features)

    def look_ahead(self, epoch: int, step: int = 0) -> None:
        """Prepare an epoch on the host: its plan, and the teacher logits that are known. Does not touch the device."""
        plan = epoch_plan(self._seed, epoch, self._dataset.num_samples, self._dataset.num_views)
        request = self._rows.look_up(plan.index, plan.view, first=step * self._batch_size) if self._rows else None
        self._ahead = Ahead(epoch, step, plan, self._feed.plan(epoch), request)

    def begin(self, epoch: int, step: int) -> None:
        """Go to ``step`` (from 0) of ``epoch`` (from 1)."""
        if self._ahead is None or (self._ahead.epoch, self._ahead.step) != (epoch, step):
            self.look_ahead(epoch, step)
        assert self._ahead is not None
        plan, request = self._ahead.plan, self._ahead.request
        self._pairs[:, :-1].copy_(upload(np.stack([plan.index, plan.view]), self._device))
        if len(self._ahead.columns):
            self._feed.begin(upload(self._ahead.columns, self._device))
        self._at.fill_(step * self._batch_size)
        self._epoch.fill_(epoch)
        if self._rows is not None and request is not None:
            self._rows.begin(request, first=step * self._batch_size)
        self._ahead = None

    def step(self, number: int) -> None:
        """Launch step ``number`` (from 0) of the epoch; the host never waits for it."""
        start = number * self._batch_size
        size = min(self._batch_size, self._dataset.num_samples - start)
        if self._rows is not None:
            self._rows.require(start + size)
        if size < self._batch_size:
            with uncompiled() if self._compiled else nullcontext():
                self._one(size)
        elif self._untried:
            self._try_compiled()
        else:
            self._launch()

    def finish(self) -> None:
        """Keep the teacher logits computed so far. The host waits for the device."""
        if self._rows is not None:
            self._rows.flush()

    def _one(self, size: int) -> None:
        slots = self._at + self._offsets[:size]
        index, view = self._pairs.index_select(1, slots).unbind()
        batch = self._feed.batch(index, view, slots)
        if self._rows is not None:
            batch = dataclasses.replace(batch, teacher_logits=self._rows.logits.index_select(0, slots))
        self._step(batch, self._epoch)
        self._at.add_(size)

    def _try_compiled(self) -> None:
        """The first compiled step; when compilation fails, put everything back and do it as plain Python."""
        self._untried = False
        state = {name: value.clone() for name, value in self._distiller.training_state().items()}
        drawn = {name: generator.get_state() for name, generator in self._distiller.generators.items()}
        at = self._at.clone()
        try:
            self._launch()
        except Exception as error:
            undo_compile(self._distiller.student)
            self._compiled = False
            self._distiller.load_training_state(state)
            for name, generator in self._distiller.generators.items():
                generator.set_state(drawn[name])
            self._at.copy_(at)
            self._fell_back("compile", in_one_line(error))
            self._launch()

    def _fell_back(self, what: str, reason: str) -> None:
        self._say(f"engine: {what} failed ({reason}); going on eagerly, with the same results")
