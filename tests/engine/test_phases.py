"""Runs of several phases: what is trained, logged, saved and read in each, and that all of them can be resumed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mdistill.config import cell_identity, load
from mdistill.data.loader import BatchLoader
from mdistill.distillers import DISTILLERS, Signals
from mdistill.engine import checkpoint, trainer
from mdistill.engine.active_trial import ActiveTrial
from mdistill.engine.run_folder import read_metrics
from mdistill.errors import UserError

from .. import replay, runs
from ..conftest import refused
from ..distillers import examples, hooks
from ..same import assert_same

PHASES = {"projector": {"epochs": 1, "lr": 0.02}, "student": {"epochs": 1}}
AVERAGES = {"epochs": 2, "ema_decay": 0.9, "average_from": 2}


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    return runs.write_config(tmp_path, "hooks_phases", solver=AVERAGES, phases=PHASES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run, with copies of its folder: of before and after each checkpoint."""
    folder = tmp_path_factory.mktemp("phases")
    path = runs.write_config(folder, "hooks_phases", solver=AVERAGES, phases=PHASES)
    write, count = checkpoint.write, iter(range(100))

    def copied(target: Path, state: Any) -> None:
        number = next(count)
        shutil.copytree(folder / "whole", folder / f"before{number}")
        write(target, state)
        shutil.copytree(folder / "whole", folder / f"after{number}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", copied)
        runs.train(path, folder / "whole")
    return folder


def test_a_line_of_metrics_names_its_first_phase_and_an_epoch_counts_over_all(whole: Path) -> None:
    lines = read_metrics(whole / "whole" / "seed0")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line.get("phase") for line in lines] == ["projector", "student", None, None]
    assert [line["lr"] for line in lines] == [0.02, 0.05, 0.05, 0.05]
    for line, term in zip(lines, ("projector", "student", "map", "map"), strict=True):
        assert f"train/loss_{term}" in line
        of_last = {"train/loss_ce", "train/top1", "test/top1", "ema/test/top1", "best/top1"}
        assert of_last & line.keys() == (of_last if term == "map" else set())


def test_networks_are_written_in_the_last_phase_alone(whole: Path) -> None:
    for number in (0, 1):  # after the first phases
        assert {path.stem for path in (whole / f"after{number}" / "seed0").glob("*.pt")} == {"last"}
    assert {path.stem for path in (whole / "after3" / "seed0").glob("*.pt")} == {"last", "student", "ema", "average"}
    assert runs.state(whole / "after0")["averages"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("copy", ["before0", "after0", "before1", "after1", "after2"])
def test_a_run_that_is_killed_at_a_checkpoint_continues_bit_for_bit(copy: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / copy, tmp_path / "killed")
    runs.train(whole / "hooks_phases.yaml", tmp_path / "killed", mode="resume")
    runs.assert_same_runs(whole / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 5, 6, 13])
def test_a_run_that_is_stopped_in_any_phase_continues_bit_for_bit(step: int, whole: Path, tmp_path: Path) -> None:
    runs.train(whole / "hooks_phases.yaml", tmp_path / "parts", stop_at=step)
    assert runs.place(tmp_path / "parts") == (1 + step // 5, step % 5)
    runs.train(whole / "hooks_phases.yaml", tmp_path / "parts", mode="resume")
    runs.assert_same_runs(whole / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_trials_in_lockstep_are_those_alone_also_when_they_resume_in_different_phases(
    cfg: Path, whole: Path, tmp_path: Path
) -> None:
    runs.train(cfg, tmp_path / "together", seeds=(0,), stop_at=12)
    runs.train(cfg, tmp_path / "together", seeds=(1,), stop_at=3)
    runs.train(cfg, tmp_path / "together", seeds=(0, 1), mode="resume")
    runs.assert_same_runs(whole / "whole", tmp_path / "together")
    runs.train(cfg, tmp_path / "alone", seeds=(1,))
    runs.assert_same_runs(tmp_path / "alone", tmp_path / "together", seed=1)


@pytest.mark.slow
def test_a_captured_run_is_an_eager_one_and_each_phase_is_captured_anew(cfg: Path, whole: Path, tmp_path: Path) -> None:
    with replay.emulated() as recorder:
        runs.train(cfg, tmp_path / "captured")
    assert [recorded.calls for recorded in recorder.replays] == [1, 1, 5]
    runs.assert_same_runs(whole / "whole", tmp_path / "captured")


def test_no_phase_repeats_images_or_draws_of_another(
    cfg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, epochs = [], []
    begin = BatchLoader.begin
    distance = hooks.HooksPhases.distance

    def noted(loader: BatchLoader, epoch: int, step: int) -> None:
        begin(loader, epoch, step)
        orders.append(loader._pairs[0].tolist())

    def seen(self: Any, signals: Signals) -> Any:
        epochs.append(int(signals.epoch))
        return distance(self, signals)

    monkeypatch.setattr(BatchLoader, "begin", noted)
    experiment = runs.experiment(cfg, output=tmp_path)
    monkeypatch.setattr(hooks.HooksPhases, "distance", seen)
    trainer.fit(experiment, [runs.RunFolder(tmp_path / "seed0", "new")])
    assert len({tuple(order) for order in orders}) == len(orders) == 4
    assert sorted(set(epochs)) == [1, 2, 3, 4]


def test_each_phase_trains_its_modules_alone_and_starts_with_a_fresh_solver(cfg: Path) -> None:
    experiment = runs.experiment(cfg)
    trial = ActiveTrial(experiment, experiment.trials[0])
    changed = []
    for phase in experiment.trials[0].phases:
        trial.enter(phase)
        assert not trial.solver.state_dict()["state"]
        assert all(weight.grad is None for weight in trial.distiller.parameters())
        before = {name: value.clone() for name, value in trial.distiller.state_dict().items()}
        trial.begin_epoch(phase.before + 1)
        trainer.train_step(trial, trial.loader.fetch(0))
        after = trial.distiller.state_dict()
        changed.append({name for name, value in before.items() if not value.equal(after[name])} - {"seen"})
        assert [type(each).__name__ for each in trial.averages.values()] == (
            [] if phase.name else ["AveragedNetwork"] * 2
        )
    trial.loader.close()
    projector = {name for name in changed[0] if name.startswith("projector.")}
    assert changed[0] == projector != set()
    assert {name.split(".")[0] for name in changed[1]} == {"student"}
    assert not any("classifier" in name for name in changed[1])
    assert changed[2] == changed[0] | changed[1] | {"student.classifier.weight", "student.classifier.bias"}


def test_weights_that_the_student_has_frozen_stay_so_in_every_phase() -> None:
    distiller = DISTILLERS.build(
        "hooks_phases", student := examples.network(0), examples.network(1), examples.data_info(), ce_weight=1.0,
        map_weight=1.0,
    )  # fmt: skip
    student[1].bias.requires_grad_(False)
    for phase in ("student", None):
        distiller.enter_phase(phase)
        assert student[1].weight.requires_grad
        assert not student[1].bias.requires_grad


def test_the_warm_up_of_the_loss_counts_from_the_start_of_the_last_phase() -> None:
    distiller = examples.build("hooks_phases", warmup_epochs=4)
    distiller.enter_phase(None, epochs_before=10)
    output = distiller(examples.batch(), examples.epoch(12))
    assert output.distillation["map"] == distiller.distillation(output.signals)["map"] / 2
    distiller.enter_phase("student", epochs_before=1)
    output = distiller(examples.batch(), examples.epoch(2))
    assert output.task == {}
    assert output.total == distiller.first_phase("student", output.signals)["student"]


def test_a_plain_average_begins_with_its_epoch_of_the_last_phase(whole: Path) -> None:
    assert runs.state(whole / "after2")["averages"]["average"]["count"] == 0
    assert runs.state(whole / "whole")["averages"]["average"]["count"] == 5
    assert runs.state(whole / "whole")["averages"]["ema"]["count"] == 10


@pytest.mark.slow
def test_a_schedule_and_a_warm_up_of_the_rate_count_within_their_phase(cfg: Path, tmp_path: Path) -> None:
    overrides = ("solver.milestones=[1]", "phases.student={epochs: 2, schedule: cosine, milestones: []}")
    overrides += ("phases.projector.lr_warmup_epochs=1",)
    (lines,) = runs.train(cfg, tmp_path, *overrides)
    assert [line["lr"] for line in lines] == pytest.approx([0.02, 0.05, 0.025, 0.05, 0.005])


@pytest.mark.slow
def test_the_last_phase_alone_may_grow(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "whole", tmp_path / "grown")
    path = whole / "hooks_phases.yaml"
    with pytest.raises(UserError, match=r"another configuration \(phases\.student\.epochs: was 1, now 2\)"):
        runs.train(path, tmp_path / "grown", "phases.student.epochs=2", mode="resume")
    (lines,) = runs.train(path, tmp_path / "grown", "solver.epochs=3", mode="resume")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    runs.train(path, tmp_path / "long", "solver.epochs=3")
    assert_same(read_metrics(tmp_path / "long" / "seed0"), lines)


@pytest.mark.slow
def test_lines_that_are_printed_name_the_phase(cfg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.train(cfg, tmp_path, stop_at=3)
    runs.train(cfg, tmp_path, mode="resume")
    lines = capsys.readouterr().out.splitlines()
    assert f"resuming {tmp_path / 'seed0'} at epoch 1, step 3 (projector)" in lines
    shown = [line.split("  loss")[0] for line in lines if line.startswith("epoch ")]
    assert shown == [
        "epoch 1/4 (projector)  lr 0.02",
        "epoch 2/4 (student)  lr 0.05",
        "epoch 3/4  lr 0.05",
        "epoch 4/4  lr 0.05",
    ]


def test_events_of_a_first_phase_have_its_name(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "whole" / "seed0" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("projector/train/loss")] == [1]
    assert [event.step for event in events.Scalars("train/loss")] == [3, 4]


def test_a_dry_run_takes_a_step_of_each_phase(cfg: Path) -> None:
    line = trainer.dry_run(runs.experiment(cfg, cache=False))
    assert line.startswith("dry run: one step of each phase, of 24 images on cpu, projector: loss ")
    assert ", student: loss " in line
    assert "(ce 2." in line


def test_the_teacher_of_a_last_phase_on_labels_alone_runs_in_the_first_phases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = runs.write_config(tmp_path, "ab", solver={"epochs": 1})
    runs.train(cfg, tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher: "))
    assert line == (
        "teacher: runs in every step of the first phases: this method reads more of it than its logits and pooled"
        " features"
    )


# --- mistakes ---


def refusal(cfg: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(cfg, overrides)
    return str(caught.value)


def test_a_phase_that_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    cfg = runs.write_config(tmp_path, "ft", phases={})
    assert refusal(cfg) == (
        f"{cfg}: phases.paraphraser: missing; the method 'ft' trains it first: add phases: {{paraphraser: {{epochs:"
        " ...}}"
    )
    assert refusal(cfg, "phases.paraphrasr.epochs=1", "phases.paraphraser.epochs=1") == (
        "command line: phases.paraphrasr: no phase of the method 'ft'; did you mean 'paraphraser'? (allowed:"
        " paraphraser)"
    )
    kd = runs.write_config(tmp_path, "kd")
    assert refusal(kd, "phases.first.epochs=1") == (
        "command line: phases.first: no phase of the method 'kd' (it has none)"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["phases.student={}"], "phases.student.epochs: missing"),
        (["phases.student.epochs=0"], "phases.student.epochs: should be greater than 0, found 0"),
        (["phases.student=3"], "phases.student: should be a section of `key: value` lines, found 3"),
        (["phases=[student]"], "phases: should be a section of `key: value` lines, found ['student']"),
        (["phases.student.ema_decay=0.9"], "averages are of the last phase alone; set solver.ema_decay"),
        (["phases.student.average_statistics=first"], "are of the last phase alone; set solver.average_statistics"),
        (["phases.student.milestones=[2, 1]"], "phases.student.milestones: should be epochs from 1 in rising order"),
        (["phases.student.lrr=1"], "phases.student.lrr: unknown key (value 1) for solver 'sgd'; did you mean 'lr'?"),
        (["phases.student.name=sdg"], "phases.student.name: unknown solver 'sdg'; did you mean 'sgd'?"),
    ],
)
def test_mistakes_in_a_phase_are_one_line(overrides: list[str], message: str, cfg: Path) -> None:
    (line,) = refusal(cfg, *overrides).splitlines()
    assert message in line


def test_a_mistake_in_the_solver_is_told_once(cfg: Path) -> None:
    (line,) = refusal(cfg, "solver.lr=-1").splitlines()
    assert line.startswith("command line: solver.lr: ")


def test_a_solver_that_cannot_take_the_steps_of_a_phase_is_named(tmp_path: Path) -> None:
    cfg = runs.write_config(tmp_path, "hooks_phases")
    dot = ("solver.name=dot", "solver.delta=0.05")
    with pytest.raises(UserError, match=r"^phases\.projector\.name: 'dot' takes .* set phases\.projector\.name=sgd$"):
        runs.experiment(cfg, *dot)
    others = ("phases.projector.name=sgd", "phases.student.name=sgd")
    (first, *_, last) = runs.experiment(cfg, *dot, *others).trials[0].phases
    assert [type(phase.solver).__name__ for phase in (first, last)] == ["SGD", "DOT"]


def test_averages_of_the_last_phase_are_no_setting_of_the_first(cfg: Path) -> None:
    averaged = load(cfg, ["solver.average_from=1", "solver.average_statistics=first", "solver.ema_decay=0.9"])
    for phase in averaged.phases.values():
        assert (phase.average_from, phase.average_statistics, phase.ema_decay) == (None, "averaged", None)


def test_a_loss_that_trains_nothing_is_named(cfg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DISTILLERS.get("hooks_phases"), "trained", lambda self, phase: [self.teacher])
    with pytest.raises(UserError, match=r"distiller.name: param_groups\(\) of 'hooks_phases'"):
        runs.experiment(cfg)
    monkeypatch.undo()
    monkeypatch.setattr(
        DISTILLERS.get("hooks_phases"), "first_phase", lambda self, phase, signals: {"mine": torch.zeros(())}
    )
    with pytest.raises(UserError, match=r"^phases.projector: HooksPhases: no term of the loss depends on a weight"):
        runs.experiment(cfg)


def test_a_run_folder_in_its_first_phase_has_no_network_to_evaluate(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mdistill.cli import eval as eval_command

    folder = whole / "after0" / "seed0"
    line = refused(capsys, eval_command.main([str(folder), "--import", "tests.distillers.hooks"]))
    assert "student.pt" in line


# --- settings ---


def test_a_phase_is_a_solver_that_is_complete_in_the_order_of_the_method(cfg: Path) -> None:
    config = load(cfg, ["solver.lr=0.3", "solver.momentum=0.8"])
    assert list(config.phases) == ["projector", "student"]
    first, second = config.phases.values()
    assert (first.lr, second.lr, first.arguments["momentum"]) == (0.02, 0.3, 0.8)
    assert (first.epochs, first.ema_decay, second.average_from) == (1, None, None)
    cfg.with_name("again.yaml").write_text(config.to_yaml())
    assert load(cfg.with_name("again.yaml")) == config


def test_phases_are_part_of_a_cell_s_identity_by_what_they_come_to(cfg: Path) -> None:
    plain = cell_identity(load(cfg), {})
    assert cell_identity(load(cfg, ["phases.student.lr=0.05", "phases.student.nesterov=false"]), {}) == plain
    for override in ("phases.student.lr=0.04", "phases.student.epochs=2", "phases.student.nesterov=true"):
        assert cell_identity(load(cfg, [override]), {}) != plain
    assert load(cfg, ["phases.student.lr=0.04"]).variant == "student.lr=0.04"
    assert load(cfg, ["phases.student.epochs=2"]).variant == "student.epochs=2"


def test_phases_are_left_behind_with_their_method(cfg: Path) -> None:
    path = cfg.with_name("kd.yaml")
    path.write_text(f"base: {cfg.name}\ndistiller: {{name: kd, kd_weight: 0.9, temperature: 4.0}}\n")
    config = load(path)
    assert (config.distiller.name, config.phases) == ("kd", {})
