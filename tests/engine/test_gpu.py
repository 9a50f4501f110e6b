"""What only a CUDA device can show."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mdistill import config
from mdistill.data import DATASETS
from mdistill.data.feed import Feed
from mdistill.data.mixing import Mixing
from mdistill.data.sampling import epoch_plan
from mdistill.distillers import DISTILLERS
from mdistill.engine import build, trainer
from mdistill.engine.cuda_graph import choose_engine, own_stream
from mdistill.engine.metrics import EpochSums
from mdistill.engine.run_folder import RunFolder
from mdistill.models import MODELS
from mdistill.precision import computing

from .. import same
from ..distillers.examples import METHODS, SETTINGS
from .test_accelerate import RECIPES

pytestmark = pytest.mark.gpu

EXACT = ("run.precision=fp32", "run.deterministic=true")  # without deterministic kernels, cuDNN is tuned anew each time
assert_same = partial(same.assert_same, ignore={"config"})  # which names the engine


def configuration(folder: Path, method: str) -> Path:
    """Convolutional networks on 1,000 images under ``method``: 16 steps an epoch, the last of 40 images."""
    torch.manual_seed(5)
    torch.save({"model": MODELS.build("resnet20", 10).state_dict()}, folder / "conv.pt")
    settings: dict[str, Any] = {
        "data": {"name": "tiny", "images": 1000, "batch_size": 64, "eval_batch_size": 60},
        "student": {"name": "resnet8"},
        "distiller": {"name": method, **SETTINGS[method]},
        "solver": {"name": "sgd", "epochs": 13, "lr": 0.05, "milestones": [6], "gamma": 0.1}
        | {"momentum": 0.9, "weight_decay": 5e-4},
    }
    if DISTILLERS.get(method).needs.teacher != "none":
        settings["teacher"] = {"name": "resnet20", "checkpoint": "conv.pt"}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def experiment(cfg: Path, *overrides: str, seeds: tuple[int, ...] = (0,)) -> build.Experiment:
    settings = [config.load(cfg, overrides, seed=seed) for seed in seeds]
    for each in settings:
        object.__setattr__(each, "variant", "")  # the same folder whatever the overrides
    roots = {"data_root": cfg.parent, "checkpoint_root": cfg.parent, "output_root": cfg.parent}
    return build.build(settings, torch.device("cuda"), **roots, cache_root=cfg.parent / "cache")


def run(cfg: Path, output: Path, *overrides: str, mode: str = "new", **options: Any) -> list[list[dict[str, Any]]]:
    made = experiment(cfg, *overrides, **options)
    folders = [RunFolder(output / trial.config.run_folder(), mode) for trial in made.trials]
    return trainer.fit(made, folders)


def states(output: Path) -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=True) for path in sorted(output.rglob("last.pt"))]


@pytest.fixture
def captures(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing falls back: a step that cannot be captured would be compared with itself."""
    yield
    assert "failed" not in capsys.readouterr().out


@pytest.mark.usefixtures("captures")
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_run_equals_an_eager_one(method: str, tmp_path: Path) -> None:
    """Bit for bit over 208 steps, a drop of the rate, smaller last batches, queue and BatchNorm buffers included."""
    cfg = configuration(tmp_path, method)
    run(cfg, tmp_path / "eager", *EXACT, "run.engine=eager")
    run(cfg, tmp_path / "graph", *EXACT, "run.engine=graph")
    assert_same(states(tmp_path / "eager"), states(tmp_path / "graph"))


@pytest.mark.usefixtures("captures")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_captured_recipe_equals_an_eager_one(recipe: str, tmp_path: Path) -> None:
    """Mixed images, averaged students, DOT and two views, as ``test_accelerate.py`` emulates them."""
    method, *words = RECIPES[recipe]
    cfg = configuration(tmp_path, method)
    words += ["solver.epochs=3", "solver.milestones=[]"]
    run(cfg, tmp_path / "eager", *EXACT, *words, "run.engine=eager")
    run(cfg, tmp_path / "graph", *EXACT, *words, "run.engine=graph")
    assert_same(states(tmp_path / "eager"), states(tmp_path / "graph"))


def test_strong_views_and_mixed_images_are_those_of_the_cpu(tmp_path: Path) -> None:
    """Strong views bit for bit; mixup up to the rounding of a product."""
    images = {}
    for device in ("cpu", "cuda"):
        data = DATASETS.build("tiny", tmp_path, False, images=600).to(device)
        options = [(True, None), (False, Mixing("mixup", 1.0)), (False, Mixing("cutmix", 1.0))]
        feeds = [Feed(data, seed=0, strong=s, mixing=m, device=torch.device(device)) for s, m in options]
        slots = torch.arange(600, device=device)
        for feed in feeds:
            feed.begin(torch.from_numpy(feed.plan(1)).to(device))
        strong, mixup, cutmix = (feed.batch(slots, slots % 162, slots) for feed in feeds)
        images[device] = [strong.strong_image.cpu(), cutmix.image.cpu(), mixup.image.cpu()]
    for found, expected in zip(images["cuda"][:2], images["cpu"][:2], strict=True):
        assert torch.equal(found, expected)
    torch.testing.assert_close(images["cuda"][2], images["cpu"][2])


@pytest.mark.parametrize("engine", ["graph", "compile"])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_losses_agree_in_the_fast_setting(method: str, engine: str, tmp_path: Path) -> None:
    """Five steps, of which the last two are replayed, with TF32 and cuDNN's choice of kernels."""
    cfg = configuration(tmp_path, method)
    losses = {}
    for name in ("eager", engine):
        made = experiment(cfg, f"run.engine={name}")
        trial, sums, losses[name] = made.trials[0], EpochSums(made.device), []
        with own_stream(made.device):
            stepper = trainer.make_stepper(made, trial, sums, choose_engine(name, made.device))
            trial.solver.set_lr(0.05)
            trial.distiller.train()
            stepper.begin(1, 0)
            for number in range(5):
                stepper.step(number)
                losses[name].append(sums.read(1).loss)
                sums.reset()
    assert losses[engine] == pytest.approx(losses["eager"], rel=1e-4)


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_an_epoch_never_makes_the_host_wait(engine: str, tmp_path: Path) -> None:
    made = experiment(configuration(tmp_path, "kd"), f"run.engine={engine}")
    trial, sums = made.trials[0], EpochSums(made.device)
    with own_stream(made.device):
        stepper = trainer.make_stepper(made, trial, sums, choose_engine(engine, made.device))
        trial.solver.set_lr(0.05)
        trial.distiller.train()
        for epoch in (1, 2):  # the first one fills the allocator and captures
            stepper.look_ahead(epoch)
            torch.cuda.set_sync_debug_mode("error" if epoch == 2 else "default")
            try:
                sums.reset()
                stepper.begin(epoch, 0)
                for number in range(stepper.steps):
                    stepper.step(number)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            stepper.finish()
        assert sums.read(2).images == 1000


@pytest.mark.parametrize("engine", ["eager", "graph", "compile"])
def test_a_resumed_run_equals_an_unbroken_one(engine: str, tmp_path: Path) -> None:
    cfg = configuration(tmp_path, "mcld")
    exact = (*EXACT, f"run.engine={engine}")
    run(cfg, tmp_path / "whole", *exact, "solver.epochs=4")
    run(cfg, tmp_path / "parts", *exact, "solver.epochs=2")
    metrics = run(cfg, tmp_path / "parts", *exact, "solver.epochs=4", mode="resume")
    assert [line["epoch"] for line in metrics[0]] == [1, 2, 3, 4]
    assert_same(states(tmp_path / "whole"), states(tmp_path / "parts"))


def test_trials_together_equal_each_alone(tmp_path: Path) -> None:
    cfg = configuration(tmp_path, "mcld")
    run(cfg, tmp_path / "together", *EXACT, "solver.epochs=3", seeds=(0, 1, 2))
    for seed in range(3):
        run(cfg, tmp_path / "alone", *EXACT, "solver.epochs=3", seeds=(seed,))
    assert len(states(tmp_path / "alone")) == 3
    assert_same(states(tmp_path / "together"), states(tmp_path / "alone"))


def test_rows_of_the_table_are_the_teacher_s_logits(tmp_path: Path) -> None:
    """Against the unfolded teacher, image by image: what was computed, and what a second run reads."""
    cfg = configuration(tmp_path, "kd")
    for _ in range(2):
        made = experiment(cfg, "run.precision=fp32", "run.teacher_logits=float32")
        trial, teacher = made.trials[0], made.trials[0].distiller.teacher
        assert teacher is not None
        assert made.table is not None
        with own_stream(made.device):
            stepper = trainer.make_stepper(made, trial, EpochSums(made.device), choose_engine("graph", made.device))
            trial.distiller.train()
            stepper.begin(1, 0)
            for number in range(stepper.steps):
                stepper.step(number)
            stepper.finish()
            plan = epoch_plan(0, 1, 1000, 162)
            index, view = (torch.from_numpy(part).cuda() for part in (plan.index, plan.view))
            with torch.no_grad(), computing("fp32", made.device):
                expected = teacher(made.dataset.train_batch(index, view).image)
        found = made.table.read(plan.index * 162 + plan.view)
        torch.testing.assert_close(found, expected.cpu(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        made.table.close()


def test_bf16_learns(tmp_path: Path) -> None:
    (metrics,) = run(configuration(tmp_path, "kd"), tmp_path / "runs", "run.precision=bf16", "solver.epochs=4")
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
