"""The teacher's logits as runs see them: from the network or from the cache, the same bits."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from mdistill import config
from mdistill.data import DATASETS, Batch, InMemoryDataset
from mdistill.data.sampling import epoch_plan
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.engine import build, trainer
from mdistill.engine import teacher as engine_teacher
from mdistill.engine.logit_cache import Ids, LogitCache
from mdistill.engine.logit_formats import CACHE_DTYPES, Dense
from mdistill.engine.run_folder import RunFolder
from mdistill.engine.teacher import (
    BATCH,
    Filler,
    FrozenTeacher,
    TeacherLogits,
    decisions_differ,
    describe,
    entries_of_epochs,
)
from mdistill.errors import RunFailed, Stopped, UserError
from mdistill.models import MODELS
from mdistill.models.base import Features, Network
from mdistill.precision import Precision, require_precision

from ..conftest import tiny
from ..same import assert_same

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
VIEWS, IMAGES, EPOCHS = 162, 150, 3  # of the tiny data set and of its recipe
SMALL = 16  # images a teacher batch, where the size itself is not what is tested
Train = Callable[..., int]


@DISTILLERS.register("listening_method")
class Listening(Distiller):
    """Pulls the student to the teacher, and writes down which logits it was given for which pair.

    The first entry is of the step that is tried when it is built.
    """

    needs = Needs(teacher="logits")

    def __init__(self, *arguments: Any, **shared: Any) -> None:
        super().__init__(*arguments, **shared)
        self.heard: list[tuple[Tensor, Tensor]] = []

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        self.heard.append((signals.index, signals.raw_teacher_logits))
        return {"gap": (signals.student_logits - signals.teacher_logits).square().mean()}


@DISTILLERS.register("feature_method")
class FeatureMethod(Distiller):
    """Reads more of the teacher than its logits."""

    needs = Needs(teacher="features")

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        assert signals.student_features is not None
        assert signals.teacher_features is not None
        return {"pooled": (signals.student_features.pooled - signals.teacher_features.pooled).square().mean()}


@MODELS.register("featured_net")
class FeaturedNet(Network):
    """The smallest network with features."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.classifier = nn.Linear(8, num_classes)

    def forward_features(self, x: Tensor) -> Features:
        last_map = self.stem(x)
        pooled = last_map.mean((2, 3))
        return Features(self.classifier(pooled), (last_map,), (last_map,), last_map, pooled)


class Endless(InMemoryDataset):
    """Views that cannot be enumerated: any number is one."""

    def train_batch(self, index: Tensor, view: Tensor) -> Batch:
        return super().train_batch(index, view % VIEWS)


@DATASETS.register("endless")
def endless(root: Path, download: bool) -> Endless:
    made = tiny(root, download)
    made.__class__ = Endless
    made.num_views = None
    return made


class Asked:
    """Which pairs went through frozen teachers, as ids index * V + view, and how many images at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ids: list[int] = []
        self.batches: list[int] = []
        latest: list[Tensor] = []
        look, ask = InMemoryDataset.train_batch, FrozenTeacher.__call__

        def looked(dataset: InMemoryDataset, index: Tensor, view: Tensor) -> Batch:
            batch = look(dataset, index, view)
            latest[:] = [index * (dataset.num_views or 0) + view, batch.image]
            return batch

        def asked(teacher: FrozenTeacher, image: Tensor) -> Tensor:
            assert image is latest[1]
            self._ids += latest[0].tolist()
            self.batches.append(len(image))
            return ask(teacher, image)

        monkeypatch.setattr(InMemoryDataset, "train_batch", looked)
        monkeypatch.setattr(FrozenTeacher, "__call__", asked)

    def take(self) -> list[int]:
        """The ids since the last time, ascending, each as often as it was asked; without 0, which pads batches."""
        taken = sorted(number for number in self._ids if number)
        self._ids.clear()
        self.batches.clear()
        return taken


@pytest.fixture(autouse=True)
def _alike_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and nothing of the caller's environment."""
    monkeypatch.delenv("MDISTILL_CACHE", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(BATCH, "cpu", SMALL)
    return SMALL


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


@pytest.fixture
def dkd_cfg(kd_cfg: Path) -> Path:
    """Another method, and another student, of the same teacher."""
    return changed(
        kd_cfg,
        student={"name": "tiny_net", "width": 8},
        distiller={"name": "dkd", "ce_weight": 1.0, "alpha": 1.0, "beta": 8.0, "temperature": 4.0},
    )


@pytest.fixture
def listening_cfg(kd_cfg: Path) -> Path:
    return changed(kd_cfg, distiller={"name": "listening_method", "ce_weight": 1.0})


@pytest.fixture
def conv_cfg(tmp_path: Path) -> Path:
    """A convolutional teacher with BatchNorm statistics of its own, a convolutional student, and 96 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = MODELS.build("resnet20", 10)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
        network.train()(torch.randn(32, 3, 32, 32))
        with torch.no_grad():
            network.classifier.weight.mul_(10)
    torch.save({"model": network.state_dict()}, tmp_path / "conv.pt")
    path = tmp_path / "conv.yaml"
    settings = {
        "data": {"name": "tiny", "images": 96, "batch_size": 40, "eval_batch_size": 60},
        "teacher": {"name": "resnet20", "checkpoint": "conv.pt"},
        "student": {"name": "resnet8"},
        "distiller": {"name": "kd", "ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0},
        "solver": {"name": "sgd", "epochs": 1, "lr": 0.05, "milestones": [], "gamma": 0.1}
        | {"momentum": 0.9, "weight_decay": 5e-4},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def changed(cfg: Path, **sections: Any) -> Path:
    """A copy of ``cfg`` beside it with other sections."""
    path = cfg.with_name(f"{sections['distiller']['name']}.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(cfg.read_text()) | sections))
    return path


def experiment(cfg: Path, cache: Path | None, *overrides: str, seeds: tuple[int, ...] = (0,)) -> build.Experiment:
    settings = [config.load(cfg, overrides, seed=seed) for seed in seeds]
    inputs, output = cfg.parent, cfg.parent / "runs"
    return build.build(settings, CPU, data_root=inputs, checkpoint_root=inputs, output_root=output, cache_root=cache)


def fit(made: build.Experiment, output: Path, mode: str = "new", *, stop_after: int | None = None) -> Path:
    """Run ``made`` in folders below ``output``; returns the (first) one. SIGTERM comes after ``stop_after`` steps."""
    if stop_after is not None:
        steps, original = [0], made.trials[0].distiller.after_step

        def counted(*signals: Any) -> None:
            steps[0] += 1
            if steps[0] == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            original(*signals)

        made.trials[0].distiller.after_step = counted
    folders = [RunFolder(output / trial.config.run_folder(), mode) for trial in made.trials]
    trainer.fit(made, folders)
    return folders[0].path


def assert_same_run(left: Path, right: Path) -> None:
    """Bit for bit: the whole checkpoint, and every metric that is not a time."""
    assert left != right
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (left, right)]
    assert_same(states[0], states[1])
    metrics = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (left, right)]
    assert_same(metrics[0], metrics[1])


def only_run(root: Path) -> Path:
    (found,) = root.rglob("last.pt")
    return found.parent


def stored(root: Path) -> Path:
    """The only cache below ``root``."""
    (found,) = root.iterdir()
    return found


def ids_of(seed: int, epoch: int, images: int = IMAGES) -> Ids:
    """What an epoch shows, in order."""
    plan = epoch_plan(seed, epoch, images, VIEWS)
    return plan.index * VIEWS + plan.view


def distinct(*seeds: int, epochs: int = EPOCHS, images: int = IMAGES) -> list[int]:
    """The entries that runs read, without entry 0."""
    every = [ids_of(seed, epoch, images) for seed in seeds for epoch in range(1, epochs + 1)]
    return [int(number) for number in np.unique(np.concatenate(every)) if number]


def computed(*epochs: int, images: int = IMAGES) -> list[int]:
    """What a run that begins with nothing computes: the next epoch is looked up before this one is written."""
    asked: list[int] = []
    shown: list[set[int]] = [set()]
    for epoch in epochs:
        ids = set(ids_of(0, epoch, images).tolist()) - {0}
        asked += ids - set.union(set(), *shown[:-1])
        shown.append(ids)
    return sorted(asked)


def filled(cache: LogitCache) -> list[int]:
    return np.flatnonzero(~cache.missing(np.arange(cache.entries))).tolist()


def answers(teacher: FrozenTeacher, dataset: Any, ids: Ids) -> Tensor:
    """The float32 logits of the entries ``ids``, asked for in descending order, batches padded with the first."""
    descending, size = np.sort(ids)[::-1], teacher.batch_size
    found: dict[int, Tensor] = {}
    for start in range(0, len(ids), size):
        part = descending[start : start + size]
        padded = torch.from_numpy(np.concatenate([part, np.full(size - len(part), descending[0])]))
        logits = teacher(dataset.train_batch(padded // VIEWS, padded % VIEWS).image)
        found.update(zip(part.tolist(), logits, strict=False))
    return torch.stack([found[int(number)] for number in ids])


def require(precision: Precision) -> None:
    try:
        require_precision(precision, CPU, "run.precision")
    except UserError as error:
        pytest.skip(str(error))


# --- the same bits ---


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_cache_that_was_filled_in_another_order_changes_no_bit(
    precision: Precision, dtype: str, conv_cfg: Path, tmp_path: Path, asked: Asked
) -> None:
    require(precision)
    overrides = (f"run.precision={precision}", f"run.teacher_logits={dtype}")
    without = fit(experiment(conv_cfg, None, *overrides), tmp_path / "without")
    assert asked.batches == [64, 64]
    made = experiment(conv_cfg, tmp_path / "cache", *overrides)
    assert made.teacher is not None
    assert made.cache is not None
    assert made.teacher.folded > 0
    backwards = np.union1d(entries_of_epochs(made.dataset, 1, [0]), np.arange(5, made.cache.entries, 1501))[::-1]
    order = np.concatenate([backwards[1::2], backwards[::2]])  # neighbours of other epochs are far from one another
    prefill(made, order)
    asked.take()
    within = fit(made, tmp_path / "within")
    assert asked.take() == []
    assert_same_run(without, within)


def prefill(made: build.Experiment, ids: Ids) -> None:
    assert made.teacher is not None
    assert made.cache is not None
    assert made.logit_format is not None
    Filler(made.teacher, made.dataset, form=made.logit_format).fill(made.cache, ids, advance=lambda count: None)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.slow
def test_a_stored_logit_is_the_teachers_rounded_once(dtype: str, conv_cfg: Path, tmp_path: Path) -> None:
    """Against the frozen teacher itself, and against the network as it came, in float64."""
    made = experiment(conv_cfg, tmp_path / "cache", "run.precision=fp32", f"run.teacher_logits={dtype}")
    assert made.teacher is not None
    assert made.cache is not None
    ids = ids_of(seed=0, epoch=1, images=96)
    prefill(made, ids)
    stored = made.cache.read(ids)
    exact = answers(made.teacher, made.dataset, ids)
    assert torch.equal(stored, exact.to(CACHE_DTYPES[dtype]))
    if dtype == "float16":
        assert (stored.float() != exact).any()
        assert ((stored.double() - exact.double()).abs() <= exact.double().abs() * 2**-11 + 2**-25).all()
    assert made.cache.changed == decisions_differ(exact, stored.float(), targets(made, ids)).float().mean()

    network = MODELS.build("resnet20", 10)
    network.load_state_dict(torch.load(conv_cfg.with_name("conv.pt"), weights_only=True)["model"])
    index, view = torch.from_numpy(ids // VIEWS), torch.from_numpy(ids % VIEWS)
    with torch.no_grad():
        truth = network.double().eval()(made.dataset.train_batch(index, view).image.double())
    bound = 2**-11 * truth.abs() if dtype == "float16" else 0.0
    assert truth.std() > 0.1
    assert ((stored.double() - truth).abs() <= bound + 1e-5 * truth.abs().max()).all()


def targets(made: build.Experiment, ids: Ids) -> Tensor:
    index, view = torch.from_numpy(ids // VIEWS), torch.from_numpy(ids % VIEWS)
    return made.dataset.train_batch(index, view).target


@pytest.mark.slow
def test_the_teacher_has_a_precision_of_its_own(conv_cfg: Path) -> None:
    require("bf16")
    ids = ids_of(seed=0, epoch=1, images=96)[:64]
    logits = {}
    for precision, overrides in {
        "fp32": ["run.precision=fp32"],
        "bf16": ["run.precision=bf16"],
        "mixed": ["run.precision=fp32", "run.teacher_precision=bf16"],
    }.items():
        made = experiment(conv_cfg, None, *overrides)
        assert made.teacher is not None
        logits[precision] = answers(made.teacher, made.dataset, ids)
        assert logits[precision].dtype == torch.float32
    assert torch.equal(logits["mixed"], logits["bf16"])
    gap = (logits["bf16"] - logits["fp32"]).abs().max() / logits["fp32"].abs().max()
    assert 1e-4 < gap < 0.1


@pytest.mark.slow
def test_what_changes_a_logit_has_a_cache_of_its_own_and_nothing_else_has(
    kd_cfg: Path, dkd_cfg: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(cfg: Path, *overrides: str, seeds: tuple[int, ...] = (0,)) -> Path:
        cache = experiment(cfg, tmp_path / "cache", *overrides, seeds=seeds).cache
        assert cache is not None
        return cache.path

    plain = place(kd_cfg, "run.precision=fp32")
    for same in (
        place(dkd_cfg, "run.precision=fp32", seeds=(1, 2)),
        place(kd_cfg, "run.precision=fp32", "solver.lr=0.1", "data.batch_size=7", "data.eval_batch_size=3"),
        place(kd_cfg, "run.precision=tf32", "run.teacher_precision=fp32", "run.evaluate_every=2"),
    ):
        assert same == plain
    assert place(kd_cfg, "run.precision=tf32") == plain  # the same arithmetic on a CPU
    others = [place(kd_cfg, "run.precision=fp32", "run.teacher_logits=float32")]
    others += [place(kd_cfg, "run.precision=fp32", f"data.{key}") for key in ("images=149", "holdout=10")]
    with monkeypatch.context() as patch:
        patch.setattr(InMemoryDataset, "fingerprint", lambda dataset: "0" * 64)
        others += [place(kd_cfg, "run.precision=fp32")]
    with monkeypatch.context() as patch:
        patch.setitem(BATCH, "cpu", 32)
        others += [place(kd_cfg, "run.precision=fp32")]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 99)
        others += [place(kd_cfg, "run.precision=fp32")]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.1")
        others += [place(kd_cfg, "run.precision=fp32")]
    spoil(teacher_file, 0.25)
    others += [place(kd_cfg, "run.precision=fp32")]
    assert len({plain, *others}) == 1 + len(others)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_method_is_given_the_logits_of_its_own_images(
    dtype: str, cached: bool, listening_cfg: Path, teacher_file: Path, tmp_path: Path, small: int
) -> None:
    """Also in the third epoch, some of whose entries are in the cache."""
    overrides = ("solver.epochs=3", f"run.teacher_logits={dtype}")
    made = experiment(listening_cfg, tmp_path / "cache" if cached else None, *overrides)
    fit(made, tmp_path / "runs")
    method = made.trials[0].distiller
    assert isinstance(method, Listening)
    index, logits = (torch.cat(part) for part in zip(*method.heard[1:], strict=True))
    shown = np.concatenate([ids_of(seed=0, epoch=epoch) for epoch in (1, 2, 3)])
    assert index.tolist() == (shown // VIEWS).tolist()
    assert made.teacher is not None
    assert torch.equal(logits, answers(made.teacher, made.dataset, shown).to(CACHE_DTYPES[dtype]).float())


@pytest.mark.slow
def test_seeds_trained_together_share_a_cache_and_change_no_bit(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, small: int, asked: Asked
) -> None:
    together = experiment(kd_cfg, tmp_path / "cache", seeds=(0, 1))
    fit(together, tmp_path / "together")
    assert sorted(set(asked.take())) == distinct(0, 1)
    assert together.cache is not None
    assert sorted({0, *filled(together.cache)}) == [0, *distinct(0, 1)]  # what either has written
    for seed in (0, 1):
        alone = fit(experiment(kd_cfg, None, seeds=(seed,)), tmp_path / "alone")
        assert_same_run(alone, tmp_path / "together" / alone.relative_to(tmp_path / "alone"))


# --- what is computed ---


@pytest.mark.slow
def test_a_run_computes_what_the_cache_lacks_and_no_later_run_computes_it_again(
    kd_cfg: Path, dkd_cfg: Path, teacher_file: Path, tmp_path: Path, small: int, asked: Asked
) -> None:
    first = experiment(kd_cfg, tmp_path / "cache")
    live = watch_live_teacher(first)
    fit(first, tmp_path / "runs")
    assert len(distinct(0)) < EPOCHS * IMAGES - 1  # some entries come again in a later epoch
    assert set(asked.batches) == {small}
    assert asked.take() == computed(1, 2, 3)
    assert live == []

    other = experiment(dkd_cfg, tmp_path / "cache")
    live = watch_live_teacher(other)
    assert other.cache is not None
    assert filled(other.cache) == distinct(0)
    assert len(list(other.cache.path.iterdir())) == EPOCHS  # a chunk for each
    other_run = fit(other, tmp_path / "runs")
    assert asked.take() == []
    assert live == []
    assert_same_run(fit(experiment(dkd_cfg, None), tmp_path / "uncached"), other_run)
    asked.take()

    fit(experiment(kd_cfg, tmp_path / "cache", seeds=(1,)), tmp_path / "runs")
    lacking = set(distinct(1)) - set(distinct(0))
    assert len(lacking) < len(distinct(1))
    assert sorted(set(asked.take())) == sorted(lacking)


def watch_live_teacher(made: build.Experiment) -> list[int]:
    """How many images the method's own teacher is shown each time it runs."""
    calls: list[int] = []
    live = made.trials[0].distiller.teacher
    assert live is not None
    live.register_forward_pre_hook(lambda module, images: calls.append(len(images[0])))
    return calls


def test_without_a_cache_the_teacher_sees_every_image_of_every_epoch(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, small: int, asked: Asked
) -> None:
    made = experiment(kd_cfg, None)
    live = watch_live_teacher(made)
    fit(made, tmp_path / "runs")
    shown = [int(number) for epoch in (1, 2, 3) for number in ids_of(0, epoch) if number]
    assert set(asked.batches) == {small}
    assert len(asked.batches) == EPOCHS * -(-IMAGES // small)  # full ones, whatever the student's batch is
    assert asked.take() == sorted(shown)
    assert live == []


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_stopped_run_keeps_what_was_computed_and_computes_the_rest(
    stop_after: int, kd_cfg: Path, teacher_file: Path, tmp_path: Path, small: int, asked: Asked
) -> None:
    whole = fit(experiment(kd_cfg, None), tmp_path / "whole")
    asked.take()
    with pytest.raises(Stopped):
        fit(experiment(kd_cfg, tmp_path / "cache"), tmp_path / "runs", stop_after=stop_after)
    before = sorted(set(asked.take()))
    again = experiment(kd_cfg, tmp_path / "cache")
    assert again.cache is not None
    assert filled(again.cache) == before
    epoch, step = divmod(stop_after, 3)
    shown = np.concatenate([ids_of(0, number) for number in range(1, epoch + 2)])[: epoch * IMAGES + step * 64]
    assert set(shown.tolist()) - {0} <= set(before)
    assert len(before) <= len(shown) + small  # only so far ahead of the steps
    resumed = fit(again, tmp_path / "runs", "resume")
    assert set(asked.take()) == set(distinct(0)) - set(before)
    assert_same_run(whole, resumed)


def test_a_run_that_fails_within_an_epoch_keeps_what_was_computed(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, small: int, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = experiment(kd_cfg, tmp_path / "cache")

    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(made.trials[0].distiller, "after_step", broken)
    with pytest.raises(ZeroDivisionError):
        fit(made, tmp_path / "runs")
    assert made.cache is not None
    assert filled(made.cache) == asked.take() == sorted(ids_of(0, 1)[:64].tolist())


@pytest.mark.slow
def test_a_run_resumes_within_an_epoch_whose_entries_are_all_in_the_cache(
    kd_cfg: Path, dkd_cfg: Path, teacher_file: Path, tmp_path: Path, small: int, asked: Asked
) -> None:
    whole = fit(experiment(dkd_cfg, None), tmp_path / "whole")
    fit(experiment(kd_cfg, tmp_path / "cache"), tmp_path / "runs")
    asked.take()
    with pytest.raises(Stopped):
        fit(experiment(dkd_cfg, tmp_path / "cache"), tmp_path / "runs", stop_after=4)
    resumed = fit(experiment(dkd_cfg, tmp_path / "cache"), tmp_path / "runs", "resume")
    assert asked.take() == []
    assert_same_run(whole, resumed)


@pytest.mark.slow
def test_steps_that_are_done_are_not_asked_about_again_without_a_cache(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, small: int, asked: Asked
) -> None:
    whole = fit(experiment(kd_cfg, None), tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(experiment(kd_cfg, None), tmp_path / "runs", stop_after=4)
    asked.take()
    resumed = fit(experiment(kd_cfg, None), tmp_path / "runs", "resume")
    rest = [int(number) for number in (*ids_of(0, 2)[64:], *ids_of(0, 3)) if number]
    assert asked.take() == sorted(rest)
    assert_same_run(whole, resumed)


def test_a_bad_chunk_is_told_of_and_computed_again(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, small: int, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    one_epoch = "solver.epochs=1"
    whole = fit(experiment(kd_cfg, tmp_path / "cache", one_epoch), tmp_path / "whole")
    before = asked.take()
    (chunk,) = stored(tmp_path / "cache").iterdir()
    data = bytearray(chunk.read_bytes())
    data[-200] ^= 1  # within the logits
    chunk.write_bytes(data)
    capsys.readouterr()
    again = fit(experiment(kd_cfg, tmp_path / "cache", one_epoch), tmp_path / "again")
    assert "chunk files in" in capsys.readouterr().out.splitlines()[0]
    assert asked.take() == before
    assert_same_run(whole, again)


# --- logits that cannot be stored ---


def spoil(teacher_file: Path, value: float) -> None:
    """Give one class a bias of ``value``, so that its logits are about that."""
    state = torch.load(teacher_file, weights_only=True)
    state["model"]["classifier.bias"][3] = value
    torch.save(state, teacher_file)


@pytest.mark.parametrize("value", [1e5, -65600.0])
def test_a_logit_beyond_float16_is_refused_in_one_line(
    value: float,
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(teacher_file, value)
    for flags in ([], ["--no-cache", "--overwrite"], ["--dry-run"]):
        assert train(kd_cfg, *flags) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: the teacher's logits reach ")
        assert "float16 holds 65504: set run.teacher_logits=float32" in line
    assert list(stored(tmp_path / "runs" / "teacher_cache").iterdir()) == []


def opened(root: Path) -> LogitCache:
    """The only cache below ``root``, as its first chunk describes it."""
    with safe_open(next(stored(root).glob("*.safetensors")), "pt") as file:
        content = json.loads(file.metadata()["identity"])
    dtype = CACHE_DTYPES[content["dtype"]]
    return LogitCache(root, content["identity"], entries=content["entries"], width=content["classes"], dtype=dtype)


def test_float32_holds_logits_beyond_float16(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(teacher_file, 1e5)
    assert train(kd_cfg, "run.teacher_logits=float32", "solver.epochs=1") == 0
    assert opened(tmp_path / "runs" / "teacher_cache").read(ids_of(0, 1))[:, 3].min() > 9e4
    assert "rounding" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_teacher_without_finite_logits_is_refused_in_one_line(
    dtype: str, kd_cfg: Path, teacher_file: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(teacher_file, weights_only=True)
    state["model"]["classifier.weight"].sign_().mul_(3e38)  # sums of these are no numbers
    torch.save(state, teacher_file)
    assert train(kd_cfg, f"run.teacher_logits={dtype}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the teacher's logits are not finite: wrong weights?")
    assert list(stored(tmp_path / "runs" / "teacher_cache").iterdir()) == []


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_a_bad_logit_lets_nothing_after_it_be_written(value: float, toy: "Toy") -> None:
    cache = toy.cache()
    logits = toy.logits(capacity=12, cache=cache)
    ids = np.arange(100, 112)
    network = toy.teacher.network
    assert isinstance(network, PixelTeacher)
    network.special, network.answer = toy.image(ids[6]), value
    load(logits, ids)
    logits.require(4)
    logits.flush()
    logits.require(12)
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"reach 7e\+04, float16 holds 65504" if value == 7e4 else "not finite"):
            logits.flush()
        assert filled(cache) == ids[:4].tolist()


# --- what rounding changes ---


@pytest.mark.parametrize(
    ("exact", "rounded", "target", "differ"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0, False),
        ([1.0, 2.0, 3.0], [1.1, 1.9, 3.2], 1, False),  # values move, no order does
        ([0.0, 2.0, 2.1], [0.0, 2.1, 2.0], 0, True),  # another class is predicted; both were above the true one
        ([0.0, 2.0, 2.1, 9.0], [0.0, 2.1, 2.0, 9.0], 0, False),  # those above the true one swap, below the top
        ([9.0, 2.0, 2.1, 0.0], [9.0, 2.1, 2.0, 0.0], 0, False),  # those below it swap
        ([1.0, 0.9, 5.0], [0.9, 1.0, 5.0], 0, True),  # one comes to be above the true one
        ([1.0, 0.9, 5.0], [1.0, 1.0, 5.0], 0, True),  # or level with it
        ([0.9, 1.0, 5.0], [1.0, 0.9, 5.0], 0, True),  # or below it
        ([1.0, 1.0, 5.0], [1.0, 0.9, 5.0], 0, True),  # or no longer level
        ([1.0, 1.0, 5.0], [1.0, 1.0, 5.0], 0, False),  # level before and after
        ([0.9, 1.0, 5.0], [1.0, 1.0, 5.0], 0, False),  # at least as much before and after
        ([5.0, 1.0, 0.9], [5.0, 1.0, 1.0], 1, True),
        ([5.0, 4.9, 0.0], [5.0, 5.0, 0.0], 0, True),  # a tie at the top, with the true class
        ([4.9, 5.0, 0.0], [5.0, 5.0, 0.0], 2, True),  # a tie at the top, of two others: the first is predicted
    ],
)
def test_decisions_differ(exact: list[float], rounded: list[float], target: int, differ: bool) -> None:
    same = torch.tensor([3.0, *[0.0] * (len(exact) - 1)])
    for row in (0, 1):  # each row on its own
        before, after = torch.stack([same, same]), torch.stack([same, same])
        before[row], after[row] = torch.tensor(exact), torch.tensor(rounded)
        labels = torch.zeros(2, dtype=torch.int64)
        labels[row] = target
        found = decisions_differ(before, after, labels)
        assert found.dtype == torch.bool
        assert found.tolist() == [differ and row == 0, differ and row == 1]


def test_a_tie_that_rounding_makes_is_a_change() -> None:
    exact = torch.tensor([[1.0, 1.0 - 2**-13, -4.0], [1.0, 1.0 - 2**-10, -4.0]])
    assert decisions_differ(exact, exact.half().float(), torch.zeros(2, dtype=torch.int64)).tolist() == [True, False]


@pytest.mark.parametrize(("changes", "advised"), [(0, False), (4, False), (5, False), (6, True), (1000, True)])
def test_the_share_is_told_and_float32_advised_above_half_a_percent(
    changes: int, advised: bool, tmp_path: Path
) -> None:
    cache = LogitCache(tmp_path, {}, entries=4000, width=2, dtype=torch.float16)
    cache.write(np.arange(1000), torch.zeros(1000, 2, dtype=torch.float16), np.arange(1000) < changes)
    line = describe(cache, Dense(2, torch.float16))
    assert line.startswith("teacher cache: 1,000 of 4,000 entries; rounding to float16 changes the predicted class")
    assert f" in {changes / 10:.3f} % of them" in line
    assert ("more than 0.5 %: run.teacher_logits=float32 is exact" in line) == advised
    assert line.endswith("exact" if advised else "of them")


def test_a_float32_cache_has_nothing_to_tell_about_rounding(tmp_path: Path) -> None:
    cache = LogitCache(tmp_path, {}, entries=40, width=2, dtype=torch.float32)
    assert describe(cache, Dense(2, torch.float32)) == "teacher cache: 0 of 40 entries"


@pytest.mark.parametrize(("bias", "advised"), [(0.0, False), (100.0, True)])
def test_a_run_ends_with_the_share_of_its_cache(
    bias: float,
    advised: bool,
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Logits near 100 are sixteenths in float16: too coarse for the small differences of an untrained teacher."""
    state = torch.load(teacher_file, weights_only=True)
    state["model"]["classifier.bias"] += bias
    torch.save(state, teacher_file)
    assert train(kd_cfg, "solver.epochs=1") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    made, ids = experiment(kd_cfg, None), ids_of(seed=0, epoch=1)
    assert made.teacher is not None
    exact = answers(made.teacher, made.dataset, ids)
    changes = int(decisions_differ(exact, exact.half().float(), targets(made, ids)).sum())
    assert (10 < changes < 140) == advised
    assert line.startswith("teacher cache: 150 of 24,300 entries; rounding to float16 changes")
    assert f" in {changes / 1.5:.3f} % of them" in line
    assert line.endswith(", more than 0.5 %: run.teacher_logits=float32 is exact") == advised


# --- runs that store nothing ---


def test_a_method_that_reads_features_runs_the_live_teacher_and_says_so(
    kd_cfg: Path, tmp_path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": FeaturedNet(10).state_dict()}, tmp_path / "featured.pt")
    cfg = changed(
        kd_cfg,
        teacher={"name": "featured_net", "checkpoint": "featured.pt"},
        student={"name": "featured_net"},
        distiller={"name": "feature_method", "ce_weight": 1.0},
    )
    made = experiment(cfg, tmp_path / "cache", "solver.epochs=1")
    live: list[int] = []
    teacher = made.trials[0].distiller.teacher
    assert isinstance(teacher, FeaturedNet)
    teacher.stem.register_forward_pre_hook(lambda module, images: live.append(len(images[0])))
    fit(made, tmp_path / "runs")
    assert live == [64, 64, 22]
    assert asked.take() == []
    assert not (tmp_path / "cache").exists()
    out = capsys.readouterr().out
    assert "teacher: runs in every step: this method reads more of it than its logits and pooled features\n" in out
    assert "teacher cache" not in out


@DISTILLERS.register("pooled_reader")
class PooledMethod(FeatureMethod):
    """Reads logits and pooled features, and writes down which."""

    needs = Needs(teacher="pooled", features=("pooled",))

    def __init__(self, *arguments: Any, **shared: Any) -> None:
        super().__init__(*arguments, **shared)
        self.heard: list[tuple[Tensor, Tensor, Tensor]] = []

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        assert signals.student_features is not None
        assert signals.teacher_pooled is not None
        assert signals.teacher_features is None
        self.heard.append((signals.index, signals.raw_teacher_logits, signals.teacher_pooled))
        gap = signals.student_features.pooled - signals.teacher_pooled
        return {"pooled": gap.square().mean(), "logits": (signals.student_logits - signals.teacher_logits).abs().mean()}


@pytest.fixture
def pooled_cfg(kd_cfg: Path, tmp_path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        torch.save({"model": FeaturedNet(10).state_dict()}, tmp_path / "featured.pt")
    return changed(
        kd_cfg,
        teacher={"name": "featured_net", "checkpoint": "featured.pt"},
        student={"name": "featured_net"},
        distiller={"name": "pooled_reader", "ce_weight": 1.0},
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pooled_features_come_with_the_logits_from_a_cache_that_changes_no_bit(
    dtype: str, pooled_cfg: Path, tmp_path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped within an epoch and resumed, on a cache that is filled beforehand."""
    overrides = ("solver.epochs=2", f"run.teacher_logits={dtype}")
    without = fit(experiment(pooled_cfg, None, *overrides), tmp_path / "without")
    made = experiment(pooled_cfg, tmp_path / "cache", *overrides)
    assert made.cache is not None
    assert made.cache.width == 10 + 8
    prefill(made, np.unique(np.concatenate([ids_of(0, 1), ids_of(0, 2)])))
    asked.take()
    capsys.readouterr()
    with pytest.raises(Stopped):
        fit(made, tmp_path / "within", stop_after=2)
    within = fit(experiment(pooled_cfg, tmp_path / "cache", *overrides), tmp_path / "within", "resume")
    assert asked.take() == []
    assert_same_run(without, within)
    assert (
        f"teacher: logits and pooled features come from the cache {made.cache.path} ({dtype}" in capsys.readouterr().out
    )
    heard = made.trials[0].distiller.heard[1:]
    teacher = made.trials[0].distiller.teacher
    assert isinstance(teacher, FeaturedNet)
    with torch.no_grad():
        said = teacher.forward_features(made.dataset.train_batch(*pairs_of(1)).image)
    for found, exact in ((heard[0][1], said.logits), (heard[0][2], said.pooled)):
        torch.testing.assert_close(found, exact[:64], rtol=2**-10 if dtype == "float16" else 1e-5, atol=1e-5)


def test_pooled_features_are_not_among_the_largest_probabilities(
    pooled_cfg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PooledMethod, "needs", replace(PooledMethod.needs, sparse_logits=()))
    with pytest.raises(
        UserError, match=r"cannot read 'sparse' logits here: it reads the teacher's pooled features too"
    ):
        experiment(pooled_cfg, None, "run.teacher_logits=sparse", "run.teacher_top_k=5")


def pairs_of(epoch: int) -> tuple[Tensor, Tensor]:
    plan = epoch_plan(0, epoch, IMAGES, VIEWS)
    return torch.from_numpy(plan.index), torch.from_numpy(plan.view)


def test_rows_with_pooled_features_have_a_cache_of_their_own(pooled_cfg: Path, tmp_path: Path) -> None:
    logits_alone = changed(pooled_cfg, distiller={"name": "listening_method", "ce_weight": 1.0})
    paths = {experiment(cfg, tmp_path / "cache").cache.path for cfg in (pooled_cfg, logits_alone)}
    assert len(paths) == 2
    forms = [experiment(cfg, None).logit_format for cfg in (pooled_cfg, logits_alone)]
    assert [form.identity for form in forms] == [{"pooled": 8}, {}]


def test_a_pooled_feature_beyond_float16_is_refused_in_one_line(pooled_cfg: Path, tmp_path: Path) -> None:
    weights = torch.load(tmp_path / "featured.pt", weights_only=True)
    weights["model"]["stem.bias"][0] = 1e5
    weights["model"]["classifier.weight"][:, 0] = 0.0  # the logits alone would do
    torch.save(weights, tmp_path / "featured.pt")
    told = r"^the teacher's logits or pooled features reach 1e\+05, float16 holds 65504: set run.teacher_logits=float32"
    with pytest.raises(RunFailed, match=told):
        fit(experiment(pooled_cfg, tmp_path / "cache"), tmp_path / "runs")


def test_a_method_without_a_teacher_says_nothing_of_one(
    student_cfg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(experiment(student_cfg, tmp_path / "cache", "solver.epochs=1"), tmp_path / "runs")
    assert "teacher" not in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_views_that_cannot_be_enumerated_are_computed_every_time_and_the_run_says_so(
    listening_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
    small: int,
    asked: Asked,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = changed(
        listening_cfg,
        data={"name": "endless", "batch_size": 64, "eval_batch_size": 50},
        distiller={"name": "listening_method", "ce_weight": 1.0},
    )
    made = experiment(cfg, tmp_path / "cache", "solver.epochs=2")
    fit(made, tmp_path / "runs")
    assert len(asked.batches) == 2 * -(-IMAGES // small)
    assert not (tmp_path / "cache").exists()
    out = capsys.readouterr().out
    assert "teacher: runs on every image: the views of this data set cannot be enumerated\n" in out
    assert "teacher cache" not in out
    plans = [epoch_plan(0, epoch, IMAGES, None) for epoch in (1, 2)]
    shown = np.concatenate([plan.index * VIEWS + plan.view % VIEWS for plan in plans])
    method = made.trials[0].distiller
    assert isinstance(method, Listening)
    logits = torch.cat([logits for _, logits in method.heard[1:]])
    assert made.teacher is not None
    assert torch.equal(logits, answers(made.teacher, made.dataset, shown).half().float())
    with pytest.raises(UserError, match="views of this data set cannot be enumerated"):
        entries_of_epochs(made.dataset, 1, [0])


@pytest.mark.slow
def test_no_cache_says_so_and_changes_nothing(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(kd_cfg, "--no-cache") == 0
    out = capsys.readouterr().out
    assert "teacher: runs on every image: no cache was asked for\n" in out
    assert "teacher cache" not in out
    assert not (tmp_path / "runs" / "teacher_cache").exists()
    without = only_run(tmp_path / "runs").rename(tmp_path / "without")
    assert train(kd_cfg) == 0
    out = capsys.readouterr().out
    assert (
        f"teacher: logits come from the cache {stored(tmp_path / 'runs' / 'teacher_cache')} (float16, 0.0 % of 24,3"
        in out
    )
    assert_same_run(without, only_run(tmp_path / "runs"))


@pytest.mark.parametrize("cause", ["headroom", "limit", "read-only"])
@pytest.mark.slow
def test_a_run_that_cannot_add_to_its_cache_reads_on_and_changes_nothing(
    cause: str,
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    asked: Asked,
    small: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(kd_cfg, "--no-cache") == 0
    without = only_run(tmp_path / "runs").rename(tmp_path / "without")
    assert train(kd_cfg, "solver.epochs=1") == 0
    shutil.rmtree(only_run(tmp_path / "runs"))
    chunks = list(stored(tmp_path / "runs" / "teacher_cache").iterdir())
    asked.take()
    capsys.readouterr()

    if cause == "headroom":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    else:
        number = {"read-only": errno.EACCES, "limit": errno.EFBIG}[cause]

        def refuse(*arguments: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "write_bytes", refuse)
    assert train(kd_cfg) == 0
    captured = capsys.readouterr()
    (line,) = [line for line in captured.out.splitlines() if "without adding" in line]
    assert line.startswith("teacher: continuing without adding to the cache: ")
    reason = {"headroom": "must stay free beside them", "limit": "File too large", "read-only": "Permission denied"}
    assert reason[cause] in line
    assert captured.err == ""
    assert list(stored(tmp_path / "runs" / "teacher_cache").iterdir()) == chunks
    lacking = [set(ids_of(0, epoch).tolist()) - set(ids_of(0, 1).tolist()) - {0} for epoch in (2, 3)]
    assert asked.take() == sorted([*lacking[0], *lacking[1]])
    assert_same_run(without, only_run(tmp_path / "runs"))


# --- what is in the way ---


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line that a command printed when it refused, after its warnings."""
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ")
    return line


def test_a_cache_root_that_is_a_file_is_refused_in_one_line(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cache"
    file.write_text("mine")
    for root in (file, file / "below"):
        line = refused(capsys, train(kd_cfg, "--cache-root", str(root)))
        assert f"--cache-root: {root} cannot be written" in line
    assert file.read_text() == "mine"
    assert not (tmp_path / "runs").exists()


def test_a_resumed_run_is_left_as_it_was_when_its_cache_root_is_bad(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(kd_cfg, "solver.epochs=1") == 0
    capsys.readouterr()
    folder = only_run(tmp_path / "runs")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    file = tmp_path / "cache"
    file.write_text("mine")
    for flag in ("--resume", "--overwrite"):
        line = refused(capsys, train(kd_cfg, "solver.epochs=2", flag, "--cache-root", str(file)))
        assert "--cache-root" in line
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_folder_of_caches_comes_from_flag_environment_and_output_in_this_order(
    kd_cfg: Path, teacher_file: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folders() -> set[str]:
        return {chunk.parents[1].relative_to(tmp_path).as_posix() for chunk in tmp_path.rglob("*.safetensors")}

    one = ("solver.epochs=1", "--overwrite")
    monkeypatch.setenv("MDISTILL_CACHE", str(tmp_path / "of_environment"))
    assert train(kd_cfg, *one, "--cache-root", str(tmp_path / "of_flag")) == 0
    assert folders() == {"of_flag"}
    assert train(kd_cfg, *one) == 0
    assert folders() == {"of_flag", "of_environment"}
    monkeypatch.setenv("MDISTILL_CACHE", "")
    assert train(kd_cfg, *one) == 0
    assert folders() == {"of_flag", "of_environment", "runs/teacher_cache"}


# --- kill -9 ---

KILLER = '''
"""Kills its own process when the teacher is asked for the N-th time."""
import os
import signal

from mdistill.engine.teacher import FrozenTeacher

left = int(os.environ.get("KILL_AT", "0"))
if left:
    ask = FrozenTeacher.__call__

    def asked(teacher, image):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(teacher, image)

    FrozenTeacher.__call__ = asked
'''


@pytest.mark.slow
def test_a_run_that_is_killed_within_an_epoch_resumes_exactly_and_its_cache_is_right(
    conv_cfg: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies in the second epoch, whose teacher batches are lost; the first is in the cache."""
    (tmp_path / "killed_when_asked.py").write_text(KILLER)
    settings = yaml.safe_load(conv_cfg.read_text())
    sizes = {"superclasses": 2, "fine_classes": 5, "train_images": 256, "test_images": 32}
    settings |= {"data": {"name": "synthetic", "batch_size": 32, **sizes}, "imports": ["killed_when_asked"]}
    settings["solver"]["epochs"] = 2
    cfg = tmp_path / "killed.yaml"
    cfg.write_text(yaml.safe_dump(settings))
    flags = ["--device", "cpu", "--output", str(tmp_path / "runs"), "--checkpoint-root", str(tmp_path)]
    killed = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train.py"), "--cfg", str(cfg), *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "KILL_AT": "7"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "epoch 1/2" in killed.stdout
    root = tmp_path / "runs" / "teacher_cache"
    first = set(ids_of(0, 1, images=256).tolist())
    assert filled(opened(root)) == sorted(first)

    asked = Asked(monkeypatch)
    assert train(cfg, "--resume") == 0
    assert asked.take() == sorted(set(ids_of(0, 2, images=256).tolist()) - first - {0})
    resumed = only_run(tmp_path / "runs").rename(tmp_path / "resumed")
    cache = opened(root)
    ids = np.array(filled(cache))
    assert set(ids.tolist()) | {0} == {0, *distinct(0, epochs=2, images=256)}
    made = experiment(cfg, None)
    assert made.teacher is not None
    assert torch.equal(cache.read(ids), answers(made.teacher, made.dataset, ids).half())
    assert train(cfg, "--cache-root", str(tmp_path / "own")) == 0
    assert_same_run(only_run(tmp_path / "runs"), resumed)


# --- lists of pairs, by hand ---


class PixelTeacher(nn.Module):
    """Its logits are ten of the pixels, so there is nothing to round; one image may get its own answer."""

    def __init__(self) -> None:
        super().__init__()
        self.special: Tensor | None = None
        self.answer = 0.0

    def forward(self, image: Tensor) -> Tensor:
        logits = image[:, 0, 2::3, 7].clone()
        if self.special is not None:
            logits[(image == self.special).flatten(1).all(dim=1), 5] = self.answer
        return logits


class Toy:
    """Ten images, a teacher in batches of four, and what it is asked."""

    def __init__(self, root: Path, asked: Asked) -> None:
        self.root, self.asked = root, asked
        self.dataset = tiny(root, False, images=10)
        self.teacher = FrozenTeacher(PixelTeacher(), CPU, "fp32")

    def cache(self) -> LogitCache:
        return LogitCache(self.root, {}, entries=10 * VIEWS, width=10, dtype=torch.float16)

    def logits(self, capacity: int, cache: LogitCache | None) -> TeacherLogits:
        pairs = torch.zeros(2, capacity + 1, dtype=torch.int64)
        return TeacherLogits(
            self.teacher, self.dataset, pairs, capacity, form=Dense(10, torch.float16), cache=cache, capture=False
        )

    def image(self, number: int) -> Tensor:
        index, view = divmod(int(number), VIEWS)
        return self.dataset.train_batch(torch.tensor([index]), torch.tensor([view])).image[0]

    def truth(self, ids: Ids) -> Tensor:
        """From the teacher directly, each image alone."""
        alone = [self.teacher.network(self.image(number)[None]) for number in ids]
        return torch.cat([torch.zeros(0, 10), *alone]).half()

    def check(self, logits: TeacherLogits, ids: Ids, first: int = 0, count: int | None = None) -> None:
        """The logits from ``first`` to ``count`` are those of ``ids``."""
        part = slice(first, count if count is not None else len(ids))
        assert torch.equal(logits.rows[part], self.truth(ids[part]))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Asked) -> Toy:
    monkeypatch.setitem(BATCH, "cpu", 4)
    return Toy(tmp_path, asked)


def drawn(count: int, seed: int) -> Ids:
    """Ids of the toy's entries, in any order, 0 not among them."""
    return 1 + np.random.default_rng(seed).permutation(10 * VIEWS - 1)[:count].astype(np.int64)


def load(logits: TeacherLogits, ids: Ids, *, first: int = 0) -> None:
    """Begin with the list ``ids`` as an epoch does."""
    index, view = ids // VIEWS, ids % VIEWS
    logits.pairs[:, : len(ids)] = torch.from_numpy(np.stack([index, view]))
    logits.begin(logits.look_up(index, view, first=first))


@pytest.mark.parametrize("cached", [True, False])
def test_lists_of_any_length_follow_one_another(cached: bool, toy: Toy) -> None:
    cache = toy.cache() if cached else None
    logits = toy.logits(capacity=11, cache=cache)
    ids = drawn(40, seed=1)
    for part in (ids[:11], ids[11:14], ids[14:18], ids[18:26], ids[26:27], ids[:0], ids[27:38], ids[38:]):
        load(logits, part)
        logits.require(len(part))
        logits.flush()
        toy.check(logits, part)
        assert toy.asked.batches == [4] * -(-len(part) // 4)
        assert toy.asked.take() == sorted(part.tolist())
    if cache is not None:
        assert filled(cache) == sorted(ids.tolist())  # of the padding nothing
        assert torch.equal(cache.read(ids), toy.truth(ids))


def test_only_as_much_is_computed_as_is_required_and_written_when_told(toy: Toy) -> None:
    cache = toy.cache()
    logits, ids = toy.logits(capacity=10, cache=cache), drawn(10, seed=1)
    load(logits, ids)
    for count, done in ((0, 0), (1, 4), (4, 4), (5, 8), (7, 8)):
        logits.require(count)
        toy.check(logits, ids, count=done)
    assert cache.filled == 0
    logits.flush()
    assert filled(cache) == sorted(ids[:8].tolist())
    logits.flush()
    logits.require(10)
    logits.flush()
    assert filled(cache) == sorted(ids.tolist())
    assert len(toy.asked.batches) == 3
    assert len(list(cache.path.iterdir())) == 2


def test_what_the_cache_has_is_read_and_what_it_lacks_is_computed(toy: Toy) -> None:
    cache = toy.cache()
    logits, ids = toy.logits(capacity=10, cache=cache), drawn(10, seed=2)
    known = ids[[0, 3, 4, 8]]
    another_process = toy.cache()
    another_process.write(known, toy.truth(known) + 1, np.zeros(4, bool))  # so that it shows where one is from
    load(logits, ids)
    logits.require(10)
    expected = toy.truth(ids)
    expected[[0, 3, 4, 8]] += 1
    assert torch.equal(logits.rows[:10], expected)
    assert toy.asked.take() == sorted(set(ids.tolist()) - set(known.tolist()))
    logits.flush()
    load(logits, ids[::-1])
    logits.require(10)
    assert torch.equal(logits.rows[:10], expected.flip(0))
    assert toy.asked.batches == []  # nothing was missing


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("first", [1, 4, 9])
def test_a_list_may_start_in_the_middle(cached: bool, first: int, toy: Toy) -> None:
    cache = toy.cache() if cached else None
    logits, ids = toy.logits(capacity=10, cache=cache), drawn(10, seed=3)
    known = ids[[0, 2, 5, 7]]
    if cache is not None:
        cache.write(known, toy.truth(known), np.zeros(4, bool))
    load(logits, ids, first=first)
    logits.require(first)
    assert toy.asked.batches == []
    logits.require(10)
    toy.check(logits, ids, first=first)
    needed = set(ids[first:].tolist()) - (set(known.tolist()) if cached else set())
    assert toy.asked.take() == sorted(needed)


def test_the_next_list_may_be_looked_up_before_this_one_is_done(toy: Toy) -> None:
    """A look-up stays what it was, whatever is computed before it begins."""
    cache = toy.cache()
    logits = toy.logits(capacity=8, cache=cache)
    this, following = drawn(8, seed=4), drawn(8, seed=5)
    following[2], following[6] = this[1], this[7]  # the one written by then, the other not yet
    load(logits, this)
    logits.require(4)
    logits.flush()
    found = logits.look_up(following // VIEWS, following % VIEWS)
    assert found.missing.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert len(toy.asked.batches) == 1  # on the host alone
    toy.check(logits, this, count=4)
    logits.require(8)
    logits.flush()
    toy.check(logits, this)
    logits.pairs[:, :8] = torch.from_numpy(np.stack([following // VIEWS, following % VIEWS]))
    logits.begin(found)
    logits.require(8)
    logits.flush()
    toy.check(logits, following)
    assert filled(cache) == sorted({*this.tolist(), *following.tolist()})


def test_a_pair_that_comes_twice_in_a_list_is_right_in_both_places(toy: Toy) -> None:
    cache = toy.cache()
    logits, ids = toy.logits(capacity=9, cache=cache), drawn(9, seed=6)
    ids[[5, 8]] = ids[1]
    load(logits, ids)
    logits.require(9)
    logits.flush()
    toy.check(logits, ids)
    assert filled(cache) == sorted(set(ids.tolist()))


def test_entry_0_is_one_like_any_other(toy: Toy) -> None:
    """Its pair also pads batches."""
    cache = toy.cache()
    logits, ids = toy.logits(capacity=6, cache=cache), np.array([7, 0, 9])
    load(logits, ids)
    logits.require(3)
    logits.flush()
    toy.check(logits, ids)
    assert filled(cache) == [0, 7, 9]


def test_a_whole_cache_is_filled_chunk_by_chunk(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_teacher, "CHUNK", 12)
    cache = toy.cache()
    ids = np.append(drawn(30, seed=7), 0)
    before = ids[[2, 20]]
    cache.write(before, toy.truth(before), np.zeros(2, bool))
    filler = Filler(toy.teacher, toy.dataset, form=Dense(10, torch.float16))
    told: list[int] = []
    filler.fill(cache, ids, advance=told.append)
    assert told == [4, 4, 4, 4, 4, 4, 4, 1]
    assert len(list(cache.path.iterdir())) == 1 + 3
    assert filled(cache) == sorted(ids.tolist())
    assert torch.equal(cache.read(ids), toy.truth(ids))
    assert toy.asked.take() == sorted(set(ids.tolist()) - set(before.tolist()) - {0})
    filler.fill(cache, ids, advance=told.append)
    assert len(told) == 8


def test_a_filler_that_is_stopped_writes_what_it_has(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_teacher, "CHUNK", 12)
    cache, ids, told = toy.cache(), np.sort(drawn(30, seed=8)), []

    def advance(count: int) -> None:
        told.append(count)
        if len(told) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Filler(toy.teacher, toy.dataset, form=Dense(10, torch.float16)).fill(cache, ids, advance=advance)
    assert filled(cache) == ids[:20].tolist()


def test_the_entries_of_epochs_are_those_that_runs_read(toy: Toy) -> None:
    expected = np.unique(np.concatenate([ids_of(seed, epoch, images=10) for seed in (3, 5) for epoch in (1, 2)]))
    assert entries_of_epochs(toy.dataset, 2, [3, 5]).tolist() == expected.tolist()
    assert entries_of_epochs(toy.dataset, None, [3]).tolist() == list(range(10 * VIEWS))
