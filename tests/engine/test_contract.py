"""Every hook of the contract in whole runs: each trains, is stopped and resumed, and exports what it evaluated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mdistill import config
from mdistill.data import loader
from mdistill.distillers import Signals, StepOutput
from mdistill.engine import build, trainer
from mdistill.engine.evaluate import evaluate
from mdistill.engine.run_folder import RunFolder
from mdistill.errors import UserError
from mdistill.models.weights import load_weights

from .. import runs, streamed
from ..distillers import hooks
from ..distillers.examples import SETTINGS

AVERAGES = {"ema_decay": 0.9, "average_from": 2}
STREAMED = {"name": "streamed_blobs"}
QUEUE = {**SETTINGS["mcld"], "queue_size": 70}  # wraps around within an epoch

CASES: dict[str, dict[str, Any]] = {
    # a projector with a rate of its own, a running mean, and another network at inference than the bare student
    "projector": {"method": "hooks_projector", "distiller": hooks.SETTINGS["hooks_projector"]},
    "projector with averages": {
        "method": "hooks_projector",
        "distiller": {**hooks.SETTINGS["hooks_projector"], "warmup_epochs": 2},
        "solver": AVERAGES,
    },
    "projector and the teacher's classifier": {"method": "simkd"},
    # draws within a step, by counter, and a memory of all samples
    "memory": {"method": "hooks_memory", "distiller": hooks.SETTINGS["hooks_memory"]},
    "batch statistics": {"method": "hooks_batch_statistics", "distiller": hooks.SETTINGS["hooks_batch_statistics"]},
    # images that are read while training goes on
    "streamed": {"method": "kd", "data": STREAMED},
    "streamed with a queue": {"method": "mcld", "distiller": QUEUE, "data": STREAMED, "solver": AVERAGES},
    "streamed with a memory": {
        "method": "hooks_memory",
        "distiller": hooks.SETTINGS["hooks_memory"],
        "data": STREAMED,
    },
    "streamed with two gradients": {"method": "kd", "data": STREAMED, "solver": {"name": "dot", "delta": 0.05}},
}
cases = pytest.mark.parametrize("case", CASES)


def write(case: str, folder: Path) -> Path:
    return runs.write_config(folder, **CASES[case])


@cases
@pytest.mark.slow
def test_a_run_stopped_in_mid_epoch_and_resumed_equals_an_unbroken_one(case: str, tmp_path: Path) -> None:
    """Bit for bit: weights, momentum, averages, the method's state, metrics and exported networks."""
    cfg = write(case, tmp_path)
    ((first, *_, last),) = runs.train(cfg, tmp_path / "whole")
    assert last["train/loss"] < first["train/loss"]
    runs.train(cfg, tmp_path / "parts", stop_at=7)
    assert runs.place(tmp_path / "parts") == (2, 2)
    runs.train(cfg, tmp_path / "parts", mode="resume", stop_at=1)
    assert runs.place(tmp_path / "parts") == (2, 3)
    runs.train(cfg, tmp_path / "parts", mode="resume")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@cases
def test_exported_networks_score_as_the_run_s_last_line_tells(case: str, tmp_path: Path) -> None:
    """Rebuilt from the configuration and the files alone; the weights that they begin with do not matter."""
    cfg = write(case, tmp_path)
    ((*_, last),) = runs.train(cfg, tmp_path)
    settings, built = config.load(tmp_path / "seed0" / "config.yaml", seed=1), runs.experiment(cfg)
    students = build.build_students(settings, built.dataset.info(settings.data.batch_size))
    exported = {path.stem for path in (tmp_path / "seed0").glob("*.pt")} - {"last"}
    assert students.keys() == exported
    for number, (name, network) in enumerate(students.items()):
        load_weights(network, tmp_path / "seed0" / f"{name}.pt", name=name)
        result = evaluate(network, built.dataset, "test", batch_size=60, precision=settings.run.precision)
        prefix = f"{name}/" if number else ""
        assert {key: last[f"{prefix}test/{key}"] for key in ("top1", "top5", "loss")} == {
            "top1": result.top1, "top5": result.top5, "loss": result.loss
        }  # fmt: skip


def test_a_method_s_own_network_is_exported_and_not_the_bare_student(tmp_path: Path) -> None:
    ((*_, last),) = runs.train(write("projector", tmp_path), tmp_path)
    exported = torch.load(tmp_path / "seed0" / "student.pt", weights_only=True)["model"]
    assert {key.split(".")[0] for key in exported} == {"network", "projector", "classifier"}
    assert last["test/loss"] != last["bare/test/loss"]


@pytest.mark.slow
def test_a_method_s_state_changes_from_epoch_to_epoch(tmp_path: Path) -> None:
    for case, key in (("projector", "center"), ("memory", "memory"), ("streamed with a queue", "queue.logits")):
        folder = tmp_path / key
        folder.mkdir()
        cfg = write(case, folder)
        states = []
        for epochs in (1, 2):
            runs.train(cfg, folder / str(epochs), f"solver.epochs={epochs}")
            model = runs.state(folder / str(epochs))["model"]
            states.append(next(value for name, value in model.items() if name.startswith(key.split(".")[0])))
        assert not torch.equal(*states)


@cases
def test_a_dry_run_writes_nothing(case: str, tmp_path: Path) -> None:
    cfg = write(case, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    line = trainer.dry_run(runs.experiment(cfg, cache=False))
    assert line.startswith("dry run: one step of 24 images on cpu, loss ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", ["projector", "streamed"])
def test_after_step_gets_the_signals_of_each_training_step_once_the_solver_has_stepped(
    case: str, tmp_path: Path
) -> None:
    """Never in evaluation, and without gradients."""
    experiment = runs.experiment(write(case, tmp_path), output=tmp_path)
    trial = experiment.trials[0]
    calls: list[tuple[str, Any]] = []
    watch(calls, "forward", trial.distiller, "forward", lambda output: output.signals)
    watch(calls, "solver", trial.phases[-1].solver, "step", lambda nothing: None)
    after_step = trial.distiller.after_step

    def noted(signals: Signals) -> None:
        assert not torch.is_grad_enabled()
        calls.append(("after", signals))
        after_step(signals)

    trial.distiller.after_step = noted
    trainer.fit(experiment, [RunFolder(tmp_path / "seed0", "new")])
    steps = runs.EPOCHS * runs.STEPS
    assert [name for name, _ in calls] == ["forward", "solver", "after"] * steps
    assert all(calls[3 * step][1] is calls[3 * step + 2][1] for step in range(steps))


def watch(calls: list[tuple[str, Any]], name: str, owner: Any, method: str, read: Callable[[StepOutput], Any]) -> None:
    original = getattr(owner, method)

    def noted(*arguments: Any) -> Any:
        result = original(*arguments)
        calls.append((name, read(result)))
        return result

    setattr(owner, method, noted)


# --- images that are read while training goes on ---


@pytest.mark.parametrize("ahead", [1, 6])
def test_a_streamed_run_has_the_same_bits_however_far_ahead_it_reads(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = write("streamed", tmp_path)
    runs.train(cfg, tmp_path / "usual")
    monkeypatch.setattr(loader, "READ_AHEAD", ahead)
    runs.train(cfg, tmp_path / "other")
    runs.assert_same_runs(tmp_path / "usual", tmp_path / "other")


def test_a_streamed_run_that_is_resumed_reads_from_its_step_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = write("streamed", tmp_path)
    runs.train(cfg, tmp_path, stop_at=8)
    logs: list[int] = []
    read = streamed.StreamedBlobs.read

    def noted(self: streamed.StreamedBlobs, index: Any, view: Any) -> Any:
        logs.append(len(index))
        return read(self, index, view)

    monkeypatch.setattr(streamed.StreamedBlobs, "read", noted)
    runs.train(cfg, tmp_path, mode="resume")
    assert logs == [24, 4, 24, 24, 24, 24, 4]


def test_an_image_that_cannot_be_read_ends_the_run_in_one_line_and_costs_one_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = write("streamed", tmp_path)
    runs.train(cfg, tmp_path / "whole")
    read, count = streamed.StreamedBlobs.read, []

    def fails(self: streamed.StreamedBlobs, index: Any, view: Any) -> Any:
        count.append(len(index))
        if len(count) == runs.STEPS + 3:
            raise UserError("images/cat.jpg: truncated")
        return read(self, index, view)

    with monkeypatch.context() as patch:
        patch.setattr(streamed.StreamedBlobs, "read", fails)
        with pytest.raises(UserError, match=r"^images/cat\.jpg: truncated$"):
            runs.train(cfg, tmp_path / "parts")
    assert runs.place(tmp_path / "parts") == (2, 0)
    runs.train(cfg, tmp_path / "parts", mode="resume")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_several_trials_read_streamed_images_each_in_its_own_order(tmp_path: Path) -> None:
    cfg = write("streamed", tmp_path)
    runs.train(cfg, tmp_path / "together", seeds=(0, 1))
    for seed in (0, 1):
        runs.train(cfg, tmp_path / "alone", seeds=(seed,))
        runs.assert_same_runs(tmp_path / "together", tmp_path / "alone", seed=seed)


def test_streamed_images_cannot_be_mixed(tmp_path: Path) -> None:
    cfg = write("streamed", tmp_path)
    with pytest.raises(UserError, match=r"data\.mixing: the images of 'streamed_blobs' are streamed and cannot be"):
        runs.experiment(cfg, "data.mixing={name: mixup, alpha: 1}")
