"""What a run is, and by what its cell in a table is known."""

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from mdistill.config import Config, cell_identity, load
from mdistill.config.schema import ADDED
from mdistill.data import DATASETS, InMemoryDataset
from mdistill.distillers import DISTILLERS

from ..conftest import tiny_arrays
from ..distillers.examples import SETTINGS

PRINTS = {"data": "d" * 64, "teacher": "t" * 64}


@DATASETS.register("tiny_folder")
def tiny_folder(root: Path, download: bool, *, folder: Path, images: int = 150) -> InMemoryDataset:
    """A data set that is told where it lies."""
    return InMemoryDataset(
        tiny_arrays(images, 10), tiny_arrays(60, 10), num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3
    )


def identity(cfg: Path, *overrides: str, **arguments: Any) -> str:
    return cell_identity(load(cfg, overrides, **arguments), PRINTS)


def test_is_16_hex_digits_that_last(kd_cfg: Path) -> None:
    """A number once recorded must be found again: another value here breaks every table."""
    assert identity(kd_cfg) == "d050416183a46d01"


@pytest.mark.parametrize(
    "override",
    [
        "seed=5",
        "variant=mine",
        "imports=[json]",
        "teacher.checkpoint=elsewhere.pt",
        "teacher.expected_top1=50",
        "data.eval_batch_size=7",
        "run.engine=eager",
        "run.evaluate_every=3",
        # defaults spelled out
        "distiller.warmup_epochs=0",
        "distiller.standardize_logits=false",
        "solver.nesterov=false",
        "solver.schedule=step",
        "solver.lr=5.0e-2",
        "solver.ema_decay=null",
        "solver.lr_warmup_epochs=0",
        "solver.decay_norms=true",
        "solver.clip_grad_norm=null",
        "distiller.label_smoothing=0.0",
        "data.images=150",
        "data.holdout=0",
        "data.mixing=null",
        "run.precision=tf32",
        "run.teacher_precision=tf32",
        "teacher.ensemble=[]",
    ],
)
def test_is_the_same_where_results_are(kd_cfg: Path, override: str) -> None:
    assert identity(kd_cfg, override) == identity(kd_cfg)


MIXED = ["", ", pick: student", ", mode: beside", ", share: batch", ", partner: batch", ", larger_share: true"]
CHANGES = [
    "solver.epochs=4",
    "solver.milestones=[1]",
    "solver.lr=0.1",
    "solver.nesterov=true",
    "solver.ema_decay=0.9",
    "solver.lr_warmup_epochs=1",
    "solver.decay_norms=false",
    "solver.clip_grad_norm=1.0",
    "distiller.label_smoothing=0.1",
    "solver.average_from=1",
    "solver.average_from=2",
    "distiller.temperature=2",
    "distiller.standardize_logits=true",
    "student.width=8",
    "teacher.width=8",
    "teacher.ensemble=[{name: tiny_net, checkpoint: a.pt}]",
    "teacher.ensemble=[{name: tiny_net, width: 8, checkpoint: a.pt}]",
    "data.batch_size=32",
    "data.images=100",
    "data.holdout=10",
    "data.mixing={name: mixup, alpha: 1}",
    *(f"data.mixing={{name: cutmix_pick, alpha: 1, candidates: 2{more}}}" for more in MIXED),
    "run.precision=bf16",
    "run.teacher_precision=fp32",
    "run.teacher_logits=float32",
    "run.deterministic=true",
]


def test_differs_with_each_setting_that_changes_results(kd_cfg: Path) -> None:
    identities = {override: identity(kd_cfg, override) for override in ("seed=0", *CHANGES)}
    same = [pair for pair in itertools.combinations(identities, 2) if identities[pair[0]] == identities[pair[1]]]
    assert same == []


@pytest.mark.parametrize("setting", ADDED)
def test_a_setting_that_came_later_is_in_no_identity_at_what_the_method_did_before(kd_cfg: Path, setting: str) -> None:
    method, key = setting.split(".")
    settings = {**SETTINGS[method], key: ADDED[setting]}
    choices = get_args(DISTILLERS.arguments(method)[key].annotation) if isinstance(ADDED[setting], str) else (1, True)
    other = next(value for value in choices if type(value) is type(ADDED[setting]) and value != ADDED[setting])
    earlier = {name: value for name, value in settings.items() if name != key}
    written, left_out, changed = (
        load(kd_cfg, [f"distiller={json.dumps({'name': method, **given})}"])
        for given in (settings, earlier, {**settings, key: other})
    )
    assert left_out.distiller == written.distiller
    assert left_out.distiller.arguments[key] == ADDED[setting]
    identities = [cell_identity(each, PRINTS) for each in (written, left_out, changed)]
    assert identities[0] == identities[1] != identities[2]


def test_differs_with_the_statistics_of_an_average(kd_cfg: Path) -> None:
    average = "solver.average_from=1"
    assert identity(kd_cfg, average, "solver.average_statistics=first") != identity(kd_cfg, average)
    assert identity(kd_cfg, average, "solver.average_statistics=averaged") == identity(kd_cfg, average)


def test_differs_with_the_weights_of_the_teacher_and_the_data(kd_cfg: Path) -> None:
    loaded = load(kd_cfg)
    prints = [PRINTS, {**PRINTS, "teacher": "u"}, {**PRINTS, "data": "e"}]
    assert len({cell_identity(loaded, each) for each in prints}) == 3
    assert cell_identity(loaded, dict(reversed(PRINTS.items()))) == cell_identity(loaded, PRINTS)


def test_is_the_same_for_a_member_s_checkpoint_and_defaults(kd_cfg: Path) -> None:
    members = [
        "{name: tiny_net, checkpoint: a.pt}",
        "{name: tiny_net, width: 16, checkpoint: b.pt, expected_top1: 50}",
    ]
    assert len({identity(kd_cfg, f"teacher.ensemble=[{member}]") for member in members}) == 1


def test_a_path_of_the_data_is_outside_it(kd_cfg: Path) -> None:
    data = [f"data={{name: tiny_folder, folder: {folder}, batch_size: 64}}" for folder in ("a", "b")]
    assert identity(kd_cfg, data[0]) == identity(kd_cfg, data[1]) != identity(kd_cfg)


def test_survives_the_record_of_a_run(kd_cfg: Path, tmp_path: Path) -> None:
    loaded = load(kd_cfg, ["data.mixing={name: mixup, alpha: 1}", "solver.milestones=[1, 2]"], seed=3)
    (tmp_path / "config.yaml").write_text(loaded.to_yaml())
    assert cell_identity(load(tmp_path / "config.yaml"), PRINTS) == cell_identity(loaded, PRINTS)


def test_two_ways_to_write_a_configuration_have_one(student_cfg: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.yaml"
    whole.write_text(
        "solver: {milestones: [2], momentum: 0.90, lr: 5e-2, weight_decay: 0.0005, epochs: 3, gamma: 1e-1, name: sgd}\n"
        "student: {width: 16, name: tiny_net}\ndata: {batch_size: 64, name: tiny}\n"
        "distiller: {ce_weight: 1, name: vanilla}\nseed: 4\n"
    )
    assert identity(whole) == identity(student_cfg)


@pytest.mark.parametrize(
    ("override", "warning"),
    [
        (
            "solver.milestones=[1,3,9]",
            "solver.milestones: [3, 9] lie at or past the last epoch (3) and have no effect",
        ),
        (
            "solver.average_from=9",
            "solver.average_from: 9 lies past the last epoch (3), so nothing is averaged",
        ),
    ],
)
def test_what_is_probably_not_meant_is_warned_of(student_cfg: Path, override: str, warning: str) -> None:
    assert load(student_cfg, [override]).warnings() == [warning]
    assert load(student_cfg, ["solver.average_from=3"]).warnings() == []


def test_a_solver_s_rate_follows_its_schedule(student_cfg: Path) -> None:
    solver = load(student_cfg).solver
    assert [solver.rate(epoch) for epoch in (1, 2, 3)] == pytest.approx([0.05, 0.05, 0.005])


def test_sections_cannot_be_changed(student_cfg: Path) -> None:
    loaded = load(student_cfg)
    assert isinstance(loaded, Config)
    with pytest.raises(ValueError, match="frozen"):
        loaded.solver.lr = 1.0
