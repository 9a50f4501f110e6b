"""Runs beyond one teacher, one view and one student: what they write, tell, keep apart and refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mdistill import config
from mdistill.data import DATASETS, InMemoryDataset
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.engine import trainer
from mdistill.engine.run_folder import Mode, RunFolder, read_metrics
from mdistill.errors import UserError
from mdistill.models.ensemble import Ensemble

from .. import runs
from ..conftest import TinyNet, tiny_arrays

Train = Callable[..., int]


@DISTILLERS.register("soft_label_method")
class SoftLabelMethod(Distiller):
    """Its own term reads class probabilities."""

    needs = Needs(labels="soft")

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        return {"own": F.cross_entropy(signals.student_logits, signals.target)}


@DISTILLERS.register("needs_by_setting")
class NeedsBySetting(Distiller):
    """What it reads is a setting."""

    needs = Needs(labels="hard")

    def __init__(self, *networks: Any, labels: Literal["none", "hard"], views: Literal[1, 2], **shared: Any) -> None:
        self.needs = Needs(labels=labels, views=views)
        super().__init__(*networks, **shared)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        return {"own": (signals.student_logits - signals.teacher_logits).square().mean()}


@DATASETS.register("one_view")
def one_view(root: Path, download: bool) -> InMemoryDataset:
    data = InMemoryDataset(tiny_arrays(40, 10), tiny_arrays(20, 10), num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)
    data.strong_views = False
    return data


def run(cfg: Path, *overrides: str, mode: Mode = "new", cache: bool = True) -> tuple[Path, list[dict[str, Any]]]:
    """A run in the folder that its configuration names, and its metrics."""
    experiment = runs.experiment(cfg, *overrides, cache=cache)
    folder = cfg.parent / "runs" / experiment.trials[0].config.run_folder()
    metrics = trainer.fit(experiment, [RunFolder(folder, mode)])
    return folder, metrics[0]


@pytest.fixture
def two_views_cfg(kd_cfg: Path) -> Path:
    settings = "ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0, extra_temperatures: [3.0, 2.0], variant: published"
    path = kd_cfg.with_name("two_views.yaml")
    path.write_text("\n".join([*kd_cfg.read_text().splitlines()[:-1], f"distiller: {{name: mlkd, {settings}}}"]) + "\n")
    return path


@pytest.fixture
def ensemble_cfg(kd_cfg: Path, teacher_file: Path) -> Path:
    """Two different teachers."""
    torch.manual_seed(6)
    torch.save({"model": TinyNet(10, 8).state_dict()}, kd_cfg.with_name("second.pt"))
    path = kd_cfg.with_name("ensemble.yaml")
    member = "{name: tiny_net, width: 8, checkpoint: second.pt}"
    text = kd_cfg.read_text().replace("checkpoint: teacher.pt}", f"checkpoint: teacher.pt, ensemble: [{member}]}}")
    path.write_text(text)
    return path


class TestTwoViews:
    @pytest.mark.slow
    def test_the_weak_view_s_logits_are_cached_which_changes_nothing(self, two_views_cfg, teacher_file):
        experiment = runs.experiment(two_views_cfg)
        assert experiment.cache is not None
        assert experiment.teacher_note.endswith("those of the strong views in every step")
        folder, cached = run(two_views_cfg)
        state = torch.load(folder / "last.pt", weights_only=True)["model"]
        again, live = run(two_views_cfg, "variant=live", cache=False)
        without = torch.load(again / "last.pt", weights_only=True)["model"]
        assert [line["train/loss"] for line in cached] == [line["train/loss"] for line in live]
        assert all(torch.equal(value, without[key]) for key, value in state.items())
        assert {"train/loss_ce", "train/loss_ce_strong", "train/loss_strong"} <= cached[0].keys()

    def test_a_data_set_with_one_view_is_refused(self, two_views_cfg, teacher_file, train: Train, capsys):
        assert train(two_views_cfg, "data.name=one_view") == 2
        assert capsys.readouterr().err == (
            "error: distiller.name: 'mlkd' needs a second, strongly augmented view of each image and the data set"
            " 'one_view' gives one view\n"
        )


class TestMixedImages:
    MIXUP = "data.mixing={name: mixup, alpha: 1.0}"

    def test_what_a_method_needs_with_its_settings_decides(self, kd_cfg, teacher_file):
        def build(labels: str, views: int) -> object:
            return runs.experiment(
                kd_cfg,
                self.MIXUP,
                f"distiller={{name: needs_by_setting, ce_weight: 1, labels: {labels}, views: {views}}}",
            )

        build("none", 1)
        for labels, views, line in (
            ("hard", 1, "needs one class per image"),
            ("none", 2, "in one view and the method"),
        ):
            with pytest.raises(UserError, match=line):
                build(labels, views)

    def test_the_teacher_sees_the_same_mixed_images(self, kd_cfg, teacher_file):
        experiment = runs.experiment(kd_cfg, self.MIXUP)
        assert experiment.cache is None
        assert experiment.teacher is None
        assert experiment.teacher_note == "runs in every step: images are mixed"
        distiller = experiment.trials[0].distiller
        seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
        for name, network in (("student", distiller.student), ("teacher", distiller.teacher)):
            network.register_forward_pre_hook(lambda module, given, name=name: seen[name].append(given[0].clone()))
        trainer.dry_run(experiment)
        ((student,), (teacher,)) = seen.values()
        assert torch.equal(student, teacher)
        plain = runs.experiment(kd_cfg).dataset
        assert not torch.isin(student[0].flatten(), plain.train_batch(torch.arange(150), torch.arange(150)).image).all()

    def test_a_run_learns(self, kd_cfg, teacher_file):
        _, metrics = run(kd_cfg, self.MIXUP)
        assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]

    @pytest.mark.parametrize(
        ("overrides", "line"),
        [
            (["data.mixing={name: mixup,alpha: 1}", "distiller={name: la, ce_weight: 0, kd_weight: 1, temperature: 4}"],
             "data.mixing: 'mixup' makes soft labels and the method 'la' needs one class per image;"
             " remove data.mixing or take another method"),
            (["data.mixing={name: mixup, alpha: 0}"],
             "command line: data.mixing.alpha: should be greater than 0, found 0"),
            (["data.mixing={name: mix, alpha: 1}"],
             "command line: data.mixing.name: should be 'mixup', 'cutmix' or 'cutmix_pick', found 'mix'"),
            (["data.mixing={name: mixup, alpha: 1, alfa: 1}"],
             "command line: data.mixing.alfa: unknown key (value 1); did you mean 'alpha'? (allowed: name, alpha,"
             " probability, candidates, pick, mode, share, partner, larger_share)"),
            (["data.mixing={name: mixup, alpha: 1, pick: student}"],
             "command line: data.mixing.pick: cutmix_pick alone picks, found 'student' with 'mixup'"),
            (["data.mixing={name: mixup, alpha: 1, share: epoch}"],
             "command line: data.mixing.share: should be 'image' or 'batch', found 'epoch'"),
            (["data.mixing={name: mixup,alpha: 1,mode: beside}", "distiller={name: soft_label_method, ce_weight: 1}"],
             "data.mixing.mode: 'beside' computes a method's own terms on mixed images, which have no label there, and"
             " the method 'soft_label_method' reads labels; set it to replace or take another method"),
            (["data.mixing={name: mixup,alpha: 1,mode: beside}",
              "distiller={name: la, ce_weight: 0, kd_weight: 1, temperature: 4}"],
             "data.mixing.mode: 'beside' computes a method's own terms on mixed images, which have no label there, and"
             " the method 'la' reads labels; remove data.mixing or take another method"),
            (["solver.average_statistics=first"],
             "command line: solver.average_statistics: 'first' is of the average that solver.average_from begins, which"
             " is null"),
            (["data.mixing={name: cutmix, alpha: 1, candidates: 2}"],
             "command line: data.mixing.candidates: cutmix_pick needs a number of 2 or more and the others take none,"
             " found 2 with 'cutmix'"),
            (["data.mixing={name: cutmix_pick, alpha: 1}"],
             "command line: data.mixing.candidates: cutmix_pick needs a number of 2 or more and the others take none,"
             " found None with 'cutmix_pick'"),
        ],
    )  # fmt: skip
    def test_bad_settings_are_one_clear_line(self, overrides, line, kd_cfg, teacher_file, train: Train, capsys):
        assert train(kd_cfg, *overrides) == 2
        assert capsys.readouterr().err == f"error: {line}\n"

    def test_mixed_images_and_two_views_are_refused(self, two_views_cfg, teacher_file, train: Train, capsys):
        assert train(two_views_cfg, self.MIXUP) == 2
        assert capsys.readouterr().err == (
            "error: data.mixing: images are mixed in one view and the method 'mlkd' needs two; remove data.mixing or"
            " take another method\n"
        )

    def test_picking_needs_a_teacher(self, student_cfg, train: Train, capsys):
        mixing = "name: cutmix_pick, alpha: 1, candidates: 2"
        assert train(student_cfg, f"data.mixing={{{mixing}, pick: student}}", "--dry-run") == 0
        capsys.readouterr()
        assert train(student_cfg, f"data.mixing={{{mixing}}}") == 2
        assert capsys.readouterr().err == (
            "error: command line: data.mixing.name: cutmix_pick lets the teacher pick, and the configuration has no"
            " teacher\n"
        )


class TestMixedImagesBeside:
    MIXING = "data.mixing={name: cutmix_pick, alpha: 1, candidates: 2, pick: student, mode: beside, partner: batch}"

    @pytest.mark.slow
    def test_plain_images_have_cached_logits_which_changes_nothing(self, kd_cfg, teacher_file):
        experiment = runs.experiment(kd_cfg, self.MIXING)
        assert experiment.cache is not None
        assert experiment.teacher_note.endswith("those of the mixed images in every step")
        folder, cached = run(kd_cfg, self.MIXING)
        state = torch.load(folder / "last.pt", weights_only=True)["model"]
        again, live = run(kd_cfg, self.MIXING, "variant=live", cache=False)
        without = torch.load(again / "last.pt", weights_only=True)["model"]
        assert [line["train/loss"] for line in cached] == [line["train/loss"] for line in live]
        assert all(torch.equal(value, without[key]) for key, value in state.items())
        assert {"train/loss_ce", "train/loss_kd", "train/loss_kd_mixed"} <= cached[0].keys()
        assert cached[-1]["train/loss"] < cached[0]["train/loss"]

    @pytest.mark.slow
    def test_a_stopped_run_goes_on_exactly(self, tmp_path):
        cfg = runs.write_config(tmp_path, "kd", solver={"average_from": 2, "average_statistics": "first"})
        runs.train(cfg, tmp_path / "whole", self.MIXING)
        runs.train(cfg, tmp_path / "parts", self.MIXING, stop_at=7)
        runs.train(cfg, tmp_path / "parts", self.MIXING, mode="resume")
        runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")

    def test_a_method_without_terms_of_its_own_is_refused(self, student_cfg, train: Train, capsys):
        assert train(student_cfg, self.MIXING) == 2
        assert capsys.readouterr().err == (
            "error: data.mixing.mode: 'beside' computes a method's own terms on mixed images, and the method 'vanilla'"
            " has none; set it to replace or take another method\n"
        )


class TestEnsemble:
    def test_it_is_one_teacher_with_a_cache_and_a_folder_of_its_own(self, ensemble_cfg):
        experiment = runs.experiment(ensemble_cfg)
        teacher = experiment.trials[0].distiller.teacher
        assert isinstance(teacher, Ensemble)
        assert [member.hidden.out_features for member in teacher.members] == [32, 8]
        image = torch.zeros(2, 3, 32, 32)
        both = [network(image).softmax(dim=1) for network in teacher.members]
        torch.testing.assert_close(teacher(image).softmax(dim=1), (both[0] + both[1]) / 2)
        assert experiment.cache is not None
        folder, metrics = run(ensemble_cfg)
        assert folder.parent.name == "tiny_net+tiny_net_tiny_net"
        assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
        (session,) = json.loads((folder / "env.json").read_text())["sessions"]
        assert len(session["teacher"]["files"]) == 2

    def test_what_is_averaged_and_who_is_in_it_have_caches_of_their_own(self, ensemble_cfg, kd_cfg):
        paths = set()
        for cfg, *overrides in ((ensemble_cfg,), (ensemble_cfg, "teacher.average=logits"), (kd_cfg,)):
            cache = runs.experiment(cfg, *overrides).cache
            assert cache is not None
            paths.add(cache.path)
        assert len(paths) == 3

    def test_every_member_s_accuracy_is_checked(self, ensemble_cfg):
        text = ensemble_cfg.read_text()
        ensemble_cfg.write_text(text.replace("checkpoint: second.pt", "checkpoint: second.pt, expected_top1: 99.0"))
        with pytest.raises(UserError, match=r"^teacher.ensemble.0.expected_top1: .*second.pt reaches"):
            runs.experiment(ensemble_cfg)

    def test_features_of_several_networks_are_refused(self, ensemble_cfg, train: Train, capsys):
        settings = "ce_weight: 1, kd_weight: 1, kd_warmup_epochs: 20, temperature: 4, nd_weight: 1, embedding: linear"
        nd = f"distiller={{name: nd, {settings}}}"
        overrides = ("student={name: resnet8}", "teacher.name=resnet8", nd)
        text = ensemble_cfg.read_text().replace("name: tiny_net, width: 32", "name: resnet8")
        ensemble_cfg.write_text(text)
        assert train(ensemble_cfg, *overrides) == 2
        assert capsys.readouterr().err == (
            "error: teacher.ensemble: the method 'nd' reads the teacher's features, and several networks share none;"
            " remove teacher.ensemble or take another method\n"
        )

    @pytest.mark.parametrize(
        ("member", "line"),
        [
            ("{name: tiny_nut, checkpoint: a.pt}",
             r"teacher.ensemble.0.name: unknown model 'tiny_nut'; did you mean 'tiny_net'\?"),
            ("{name: tiny_net}", r"teacher.ensemble.0.checkpoint: missing"),
            ("{name: tiny_net, wdth: 3, checkpoint: a.pt}", r"teacher.ensemble.0.wdth: unknown key .*'width'"),
            ("tiny_net", r"teacher.ensemble.0: should be a section"),
            ("{name: tiny_net, checkpoint: nowhere.pt}",
             r"teacher.ensemble.0.checkpoint: no tiny_net .*in the file, set checkpoint of teacher.ensemble.0 to"),
            ("{name: tiny_net, checkpoint: runs/a/seed3}",
             r"teacher.ensemble.0.checkpoint: .*seed3 .*It is a run folder: do that run first, or give"),
        ],
    )  # fmt: skip
    def test_bad_members_are_one_clear_line(self, member, line, kd_cfg, teacher_file):
        kd_cfg.write_text(kd_cfg.read_text().replace("teacher.pt}", f"teacher.pt, ensemble: [{member}]}}"))
        with pytest.raises(UserError, match=line) as error:
            runs.experiment(kd_cfg)
        assert len(str(error.value).splitlines()) == 1


class TestAverages:
    SETTINGS = ("solver.ema_decay=0.9", "solver.average_from=2")

    def test_they_are_evaluated_and_exported_beside_the_student(self, kd_cfg, teacher_file, evaluate_tool, capsys):
        folder, metrics = run(kd_cfg, *self.SETTINGS)
        assert {"student.pt", "ema.pt", "average.pt"} <= {path.name for path in folder.iterdir()}
        assert {"test/top1", "ema/test/top1", "average/test/top1", "average/test/loss"} <= metrics[0].keys()
        out = capsys.readouterr().out
        assert f"  ema {metrics[-1]['ema/test/top1']:.2f}  average {metrics[-1]['average/test/top1']:.2f}" in out
        for name in ("ema", "average"):
            assert evaluate_tool([str(folder / f"{name}.pt"), "--json", "--device", "cpu"]) == 0
            top1 = json.loads(capsys.readouterr().out)["top1"]
            assert top1 == pytest.approx(metrics[-1][f"{name}/test/top1"])

    def test_the_student_trains_as_without_them(self, kd_cfg, teacher_file):
        folder, _ = run(kd_cfg, *self.SETTINGS)
        plain, _ = run(kd_cfg)
        averaged, expected = (torch.load(path / "student.pt", weights_only=True)["model"] for path in (folder, plain))
        assert all(torch.equal(value, expected[key]) for key, value in averaged.items())


class TestSolver:
    DOT = ("solver.name=dot", "solver.delta=0.05")

    def test_a_run_with_two_gradients_learns(self, kd_cfg, teacher_file):
        _, metrics = run(kd_cfg, *self.DOT)
        assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]

    @pytest.mark.parametrize(
        ("distiller", "missing"),
        [
            ("{name: la, ce_weight: 0, kd_weight: 1, temperature: 4}", "task"),
            ("{name: kd, ce_weight: 1, kd_weight: 0, temperature: 4}", "distillation"),
        ],
    )
    def test_it_needs_terms_of_both_kinds(self, distiller, missing, kd_cfg, teacher_file, train: Train, capsys):
        assert train(kd_cfg, *self.DOT, f"distiller={distiller}") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: solver.name: dot")
        assert missing in error
        assert len(error.splitlines()) == 1
        assert not list(kd_cfg.parent.rglob("config.yaml"))

    def test_it_is_not_compiled(self, kd_cfg, teacher_file, train: Train, capsys):
        """A compiled network's backward pass may overwrite what a second one would read."""
        assert train(kd_cfg, *self.DOT, "run.engine=compile") == 2
        assert capsys.readouterr().err == (
            "error: run.engine: what is compiled allows one backward pass a step and the solver 'dot' takes 2;"
            " use auto, eager or graph\n"
        )

    def test_the_rate_follows_the_cosine(self, student_cfg):
        recipe = student_cfg.with_name("recipe.yaml")
        text = recipe.read_text().replace("milestones: [2]", "milestones: []")
        recipe.write_text(text.replace("epochs: 3", "schedule: cosine, epochs: 2"))
        folder, _ = run(student_cfg)
        assert [line["lr"] for line in read_metrics(folder)] == pytest.approx([0.05, 0.025])
        recipe.write_text(text.replace("epochs: 3", "schedule: cosine, epochs: 4"))
        with pytest.raises(UserError, match=r"was 2, now 4\); under a cosine schedule not even solver.epochs may grow"):
            run(student_cfg, mode="resume")

    def test_runs_of_different_length_have_folders_of_their_own_under_a_cosine(self, student_cfg):
        cosine = ["solver.schedule=cosine", "solver.milestones=[]"]
        folders = {config.load(student_cfg, [*cosine, *more]).run_folder() for more in ([], ["solver.epochs=9"])}
        assert len(folders) == 2
        assert config.load(student_cfg, ["solver.epochs=9"]).run_folder() == config.load(student_cfg).run_folder()

    def test_a_cosine_takes_no_milestones(self, student_cfg):
        with pytest.raises(
            UserError, match=r"solver.milestones: a cosine schedule takes none, found \[2\]; set it to \[\]"
        ):
            config.load(student_cfg, ["solver.schedule=cosine"])


class TestSettings:
    def test_a_run_that_was_begun_before_a_setting_existed_goes_on(self, student_cfg):
        folder, _ = run(student_cfg, "solver.epochs=2")
        state = torch.load(folder / "last.pt", weights_only=True)
        del state["config"]["solver"]["schedule"]
        torch.save(state, folder / "last.pt")
        _, metrics = run(student_cfg, "solver.epochs=3", mode="resume")
        assert [line["epoch"] for line in metrics] == [1, 2, 3]
        del state["config"]["solver"]["lr"]
        torch.save(state, folder / "last.pt")
        with pytest.raises(UserError, match=r"solver.lr: was None, now 0.05"):
            run(student_cfg, "solver.epochs=4", mode="resume")

    def test_an_average_that_never_begins_is_warned_of(self, student_cfg, train: Train, capsys):
        assert train(student_cfg, "solver.average_from=9", "--dry-run") == 0
        assert capsys.readouterr().err == (
            f"warning: {student_cfg}: solver.average_from: 9 lies past the last epoch (3), so nothing is averaged\n"
        )

    def test_an_average_of_one_teacher_is_refused(self, kd_cfg, teacher_file, train: Train, capsys):
        assert train(kd_cfg, "teacher.average=logits") == 2
        assert capsys.readouterr().err == (
            "error: command line: teacher.average: 'logits' says what to average over teacher.ensemble,"
            " which is empty\n"
        )
