"""What only a CUDA device can show; ``make test-pretend`` tries most of it on a pretended one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdistill.data import DATASETS
from mdistill.data.loader import BatchLoader
from mdistill.data.mixing import Mixing
from mdistill.data.sampling import epoch_plan
from mdistill.engine import teacher
from mdistill.engine.active_trial import ActiveTrial
from mdistill.engine.build import Experiment
from mdistill.engine.trainer import train_step
from mdistill.precision import computing

from .. import runs
from ..conftest import PRETENDED
from ..distillers.examples import METHODS
from .scenarios import DETERMINISTIC, SCENARIOS

pytestmark = pytest.mark.gpu

EXACT = ("run.precision=fp32", DETERMINISTIC)  # without deterministic kernels, cuDNN is tuned anew each time
CLOSE = 0.02  # of a loss after a few steps: TF32 rounds factors to 2^-11, and each engine's kernels sum in other orders
ENGINES = ["eager", "graph", pytest.param("compile", marks=pytest.mark.skipif(PRETENDED, reason="needs a GPU"))]


@pytest.fixture(autouse=True)
def _teacher_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several in an epoch; numerics as before afterwards."""
    monkeypatch.setattr(teacher, "BATCH", {**teacher.BATCH, "cuda": 16})
    yield
    torch.use_deterministic_algorithms(False)


def write_config(folder: Path, method: str) -> Path:
    return runs.write_config(folder, method, student="resnet8", data={"images": 150})


def start(cfg: Path, *overrides: str) -> tuple[Experiment, ActiveTrial]:
    """The first trial of a run whose logits are cached beside ``cfg``."""
    experiment = runs.experiment(cfg, *overrides, device="cuda")
    return experiment, ActiveTrial(experiment, experiment.trials[0])


def train_epoch(trial: ActiveTrial, epoch: int, after_step: Callable[[], None] = lambda: None) -> None:
    trial.begin_epoch(epoch)
    for step in range(trial.loader.steps):
        trial.run(train_step, trial.loader.fetch(step))
        after_step()


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_captured_run_equals_an_eager_one(name: str, tmp_path: Path) -> None:
    """Bit for bit, with convolutions; in one run the teacher's logits come from captured batches, in the other not."""
    if name == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("needs a GPU with bfloat16 units")
    small = SCENARIOS[name]
    overrides = tuple(value.replace("tiny_net", "resnet8") for value in (*EXACT, *small.overrides))
    scenario = replace(small, student="resnet8", overrides=overrides)
    cfg = scenario.write(tmp_path)
    scenario.run(cfg, tmp_path / "eager", "eager")
    scenario.compare(cfg, tmp_path / "eager", tmp_path / "graph")


@pytest.mark.pretended
def test_strong_views_and_mixed_images_are_those_of_the_cpu(tmp_path: Path) -> None:
    """Strong views and CutMix bit for bit; mixup up to the rounding of a product."""
    images: dict[str, list[torch.Tensor]] = {"cpu": [], "cuda": []}
    for device, found in images.items():
        data = DATASETS.get("tiny")(tmp_path, False, images=600).to(device)
        for options in ({"strong": True}, {"mixing": Mixing("cutmix", 1.0)}, {"mixing": Mixing("mixup", 1.0)}):
            loader = BatchLoader(data, seed=0, batch_size=600, device=torch.device(device), **options)
            loader.begin(1, 0)
            batch = loader.batch(600)
            found.append((batch.image if batch.strong_image is None else batch.strong_image).cpu())
    for on_cuda, on_cpu in zip(images["cuda"][:2], images["cpu"][:2], strict=True):
        assert torch.equal(on_cuda, on_cpu)
    torch.testing.assert_close(images["cuda"][2], images["cpu"][2])


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_losses_agree_in_the_fast_setting(
    method: str, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch, whose last full steps are replayed, with TF32 and cuDNN's choice of kernels."""
    losses: dict[str, list[float]] = {"eager": [], engine: []}
    for name, found in losses.items():
        folder = tmp_path / name  # and so a cache of its own
        folder.mkdir()
        _, trial = start(write_config(folder, method), f"run.engine={name}")

        def note(trial: ActiveTrial = trial, found: list[float] = found) -> None:
            found.append(trial.metrics.read(1).loss)
            trial.metrics.reset()

        with trial.stream:
            train_epoch(trial, 1, note)
    out = capsys.readouterr().out
    assert "could not be captured" not in out
    assert "failed" not in out
    assert len(losses[engine]) == 7
    assert losses[engine] == pytest.approx(losses["eager"], rel=CLOSE)


@pytest.mark.pretended
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_an_epoch_never_makes_the_host_wait(engine: str, tmp_path: Path) -> None:
    _, trial = start(write_config(tmp_path, "kd"), f"run.engine={engine}")
    with trial.stream:
        for epoch in (1, 2):  # the first one fills the allocator and captures
            trial.loader.prepare(epoch)
            trial.metrics.reset()
            torch.cuda.set_sync_debug_mode("error" if epoch == 2 else "default")
            try:
                train_epoch(trial, epoch)
                trial.end_training()
                evaluations = trial.launch_evaluations(epoch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            trial.loader.finish()
            assert trial.metrics.read(epoch).images == 150
        assert evaluations["test"].read().images == 60


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_equals_an_unbroken_one(engine: str, tmp_path: Path) -> None:
    cfg, options = write_config(tmp_path, "mcld"), (*EXACT, f"run.engine={engine}")
    runs.train(cfg, tmp_path / "whole", *options, device="cuda")
    runs.train(cfg, tmp_path / "parts", *options, device="cuda", stop_at=10)
    assert runs.place(tmp_path / "parts") == (2, 3)
    runs.train(cfg, tmp_path / "parts", *options, device="cuda", mode="resume")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_trials_together_equal_each_alone(tmp_path: Path) -> None:
    cfg = write_config(tmp_path, "mcld")
    runs.train(cfg, tmp_path / "together", *EXACT, device="cuda", seeds=(0, 1, 2))
    for seed in range(3):
        runs.train(cfg, tmp_path / "alone", *EXACT, device="cuda", seeds=(seed,))
        runs.assert_same_runs(tmp_path / "together", tmp_path / "alone", seed=seed)


@pytest.mark.pretended
def test_cached_logits_are_the_teacher_s(tmp_path: Path) -> None:
    """Against the unfolded teacher, all images at once: what was computed, and what a second run reads."""
    cfg = write_config(tmp_path, "kd")
    for _ in range(2):
        experiment, trial = start(cfg, "run.precision=fp32", "run.teacher_logits=float32", "run.engine=graph")
        network, cache = trial.distiller.teacher, experiment.cache
        assert network is not None
        assert cache is not None
        plan = epoch_plan(0, 1, 150, 162)
        with trial.stream:
            train_epoch(trial, 1)
            trial.loader.finish()
            index, view = (torch.from_numpy(part).cuda() for part in (plan.index, plan.view))
            with torch.no_grad(), computing("fp32", experiment.device):
                expected = network(experiment.dataset.train_batch(index, view).image).cpu()
        largest = float(expected.abs().max())
        torch.testing.assert_close(cache.read(plan.index * 162 + plan.view), expected, rtol=0, atol=1e-4 * largest)


def test_bf16_learns(tmp_path: Path) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("needs a GPU with bfloat16 units")
    (metrics,) = runs.train(write_config(tmp_path, "kd"), tmp_path, "run.precision=bf16", device="cuda")
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
