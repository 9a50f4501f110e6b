"""Small runs on "cuda", captured and eager, that have to be the same: on a GPU, or on the pretended one."""

import io
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from mdistill.distillers import DISTILLERS
from mdistill.engine import cuda_graph, teacher

from .. import runs, streamed
from ..distillers.examples import METHODS

assert streamed  # registers its data set


@dataclass(frozen=True)
class Scenario:
    """A run of two epochs of five steps; the teacher's batches should be of 16 images, seven in an epoch."""

    method: str = "kd"
    overrides: tuple[str, ...] = ()
    student: str = "tiny_net"
    data: dict[str, Any] = field(default_factory=dict)
    solver: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    cache: bool = True
    block_bytes: int = teacher.BLOCK_BYTES
    resumed: bool = False  # whether the captured run is stopped in its second epoch and resumed

    def write(self, folder: Path) -> Path:
        queue = {"queue_size": 70} if self.method == "mcld" else {}  # wraps around within an epoch
        more = {"student": self.student, "data": self.data, "solver": self.solver, "distiller": queue}
        return runs.write_config(folder, self.method, **more)

    def run(self, cfg: Path, output: Path, engine: str) -> None:
        """Train; with the engine "graph" each trial's step and teacher batch must have been captured."""
        overrides = ("solver.epochs=2", *self.overrides, f"run.engine={engine}")
        parts: list[dict[str, Any]] = [{"stop_at": 7}, {"mode": "resume"}]
        for options in parts if self.resumed and engine == "graph" else [{}]:
            options |= {"seeds": self.seeds, "cache": self.cache, "device": "cuda"}
            printed = io.StringIO()
            wrapped = mock.patch.object(cuda_graph, "capture_graph", wraps=cuda_graph.capture_graph)
            blocks = mock.patch.object(teacher, "BLOCK_BYTES", self.block_bytes)
            with redirect_stdout(printed), blocks, wrapped as capture:
                runs.train(cfg, output, *overrides, **options)
            lines = printed.getvalue().splitlines()
            fallen_back = [line for line in lines if "could not be captured" in line or "failed" in line]
            assert not fallen_back, fallen_back[0]
            in_every_step = any(line.startswith("teacher: runs in every step") for line in lines)
            ahead = any(line.startswith("teacher: ") for line in lines) and not in_every_step
            phases = 1 + len(DISTILLERS.get(self.method).phases)
            assert capture.call_count == (phases + ahead) * len(self.seeds) * (engine == "graph")

    def logits(self, cfg: Path, output: Path) -> tuple[list[int], Tensor]:
        """The entries that are in the teacher's cache, and their logits."""
        with redirect_stdout(io.StringIO()):
            cache = runs.experiment(cfg, *self.overrides, output=output, cache=self.cache, device="cuda").cache
        if cache is None:
            return [], torch.zeros(0)
        entries = np.arange(cache.entries)
        entries = entries[~cache.missing(entries)]
        assert len(entries)
        return entries.tolist(), cache.read(entries)

    def compare(self, cfg: Path, eager: Path, output: Path) -> None:
        """Run it captured in ``output``, with a cache of its own; it must be what was run in ``eager``."""
        self.run(cfg, output, "graph")
        try:
            for seed in self.seeds:
                runs.assert_same_runs(eager, output, seed=seed)
            runs.assert_same(self.logits(cfg, eager), self.logits(cfg, output), "cache")
        except AssertionError as error:
            raise AssertionError(f"differs from the eager run: {error}") from None


DETERMINISTIC = "run.deterministic=true"
ADAMW = {"name": "adamw", "lr": 0.001, "clip_grad_norm": 1.0, "lr_warmup_epochs": 2}
SPARSE = ("run.teacher_logits=sparse", "run.teacher_top_k=3", "distiller.temperature=1")
BESIDE = "name: cutmix_pick, alpha: 1, candidates: 2, pick: student, mode: beside, share: batch, partner: batch"
DOT = ("solver.name=dot", "solver.delta=0.075")
SCENARIOS = {
    **{method: Scenario(method, (DETERMINISTIC,)) for method in METHODS},
    "adamw": Scenario("kd", ("solver.epochs=3",), solver=ADAMW, resumed=True),
    "averages": Scenario("mcld", ("solver.ema_decay=0.9", "solver.average_from=2")),
    "bf16": Scenario("kd", ("run.precision=bf16",)),
    "convolutions": Scenario("nd", student="resnet8"),
    "cutmix": Scenario("dist", ("data.mixing={name: cutmix, alpha: 1.0, probability: 0.5}",)),
    "cutmix_pick": Scenario("kd", ("data.mixing={name: cutmix_pick, alpha: 1.0, candidates: 2}",)),
    "cutmix_pick beside": Scenario("kd", (f"data.mixing={{{BESIDE}}}",), student="resnet8"),
    "dot": Scenario("dkd", DOT),
    "dot with convolutions": Scenario("kd", DOT, student="resnet8"),
    "dot with two views": Scenario("mlkd", (*DOT, "solver.clip_grad_norm=1.0")),
    "clipped": Scenario("kd", ("solver.clip_grad_norm=0.5", "solver.decay_norms=false")),
    "drops of the rate": Scenario("kd", ("solver.milestones=[1,2]", "solver.epochs=3")),
    "ensemble": Scenario("dkd", ("teacher.ensemble=[{name: tiny_net, checkpoint: teacher.pt}]",)),
    "exact logits": Scenario("kd", ("run.teacher_logits=float32",)),
    "held out images": Scenario("kd", ("data.holdout=20",)),
    "mixup": Scenario("kd", ("data.mixing={name: mixup, alpha: 0.8}",)),
    "no cache": Scenario("kd", cache=False),
    "resumed": Scenario("mcld", ("solver.ema_decay=0.9", "solver.epochs=3"), resumed=True),
    "sparse logits": Scenario("dkd", (DETERMINISTIC, *SPARSE)),
    "sparse logits of streamed images": Scenario("kd", SPARSE, data={"name": "streamed_blobs", "views": 4}),
    "streamed": Scenario("kd", data={"name": "streamed_blobs"}),
    "streamed with two views": Scenario("mlkd", data={"name": "streamed_blobs"}),
    "streamed with a cache": Scenario(  # two batches a block
        "mcld",
        ("solver.epochs=3",),
        data={"name": "streamed_blobs", "views": 40},
        block_bytes=2 * 24 * 20,
        resumed=True,
    ),
    "two trials": Scenario("mcld", seeds=(0, 1)),
    "two trials with two views": Scenario("mlkd", seeds=(0, 1)),
}
