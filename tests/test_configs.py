"""Every shipped YAML is complete, builds, and is where its content says."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mdistill.config import Config, load
from mdistill.data import DataInfo
from mdistill.distillers import DISTILLERS
from mdistill.engine import build
from mdistill.models import MODELS
from mdistill.models.names import SHORT_NAMES, pair_file_name
from mdistill.optim.solvers import SOLVERS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("_"))
CIFAR100 = [path for path in FILES if path.is_relative_to(CONFIGS / "cifar100")]

MAIN_TABLE_PAIRS = [  # MCLD paper, Tables 1 and 2; RLD paper, Tables 2 and 3
    ("resnet32x4", "shufflenet_v2"),
    ("resnet32x4", "wrn_16_2"),
    ("resnet32x4", "wrn_40_2"),
    ("wrn_40_2", "resnet8x4"),
    ("wrn_40_2", "mobilenet_v2"),
    ("vgg13", "mobilenet_v2"),
    ("resnet50", "mobilenet_v2"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
    ("wrn_40_2", "wrn_40_1"),
    ("wrn_40_2", "wrn_16_2"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet110", "resnet20"),
]
FOLDERS = {  # of all pairs
    *("kd", "dkd", "rld", "mcld", "ctkd", "mlkd", "mlkd_noaug", "la", "rc", "label_revision"),
    *("kd_lskd", "ctkd_lskd", "dkd_lskd", "mlkd_lskd", "rld_lskd", "kd_dot", "dkd_dot"),
    *("nkd", "ttm", "wttm", "dist", "dhkd", "luminet", "sinkd", "pesf_kd", "nd"),
}
FOLDERS_WITHOUT_TEACHER = {"uskd", "ps_kd"}
FOLDERS_OF_ONE_PAIR = {
    *("kd_function_matching", "kd_mixup", "kd_cutmix", "kd_cutmix_pick", "kd_ensemble", "kd_averaged")
}

LIGHT = {"mobilenet_v2", "shufflenet_v1", "shufflenet_v2"}
SCHEDULES: dict[str, tuple[int, float]] = {  # epochs and rate where they are not the recipe's
    "mlkd/res32x4_shuv2.yaml": (960, 0.01),
    "mlkd/res32x4_wrn16_2.yaml": (480, 0.025),
    "mlkd/res32x4_wrn40_2.yaml": (480, 0.025),
    "mlkd/wrn40_2_res8x4.yaml": (480, 0.025),
    "mlkd/wrn40_2_mv2.yaml": (480, 0.005),
    "mlkd/vgg13_mv2.yaml": (480, 0.01),
    "mlkd/res50_mv2.yaml": (480, 0.01),
    "mlkd/res32x4_res8x4.yaml": (240, 0.025),
    "mlkd/vgg13_vgg8.yaml": (240, 0.025),
    "mlkd/wrn40_2_wrn40_1.yaml": (240, 0.025),
    "mlkd/wrn40_2_wrn16_2.yaml": (240, 0.025),
    "mlkd/res56_res20.yaml": (240, 0.025),
    "mlkd/res110_res32.yaml": (240, 0.025),
    "mlkd/res110_res20.yaml": (480, 0.025),
    "mlkd_lskd/res32x4_shuv2.yaml": (960, 0.01),
    "mlkd_lskd/res32x4_wrn16_2.yaml": (480, 0.025),
    "mlkd_lskd/res32x4_wrn40_2.yaml": (480, 0.025),
    "mlkd_lskd/wrn40_2_res8x4.yaml": (480, 0.025),
    "mlkd_lskd/wrn40_2_mv2.yaml": (480, 0.005),
    "mlkd_lskd/vgg13_mv2.yaml": (480, 0.01),
    "mlkd_lskd/res50_mv2.yaml": (480, 0.01),
    "mlkd_lskd/res32x4_res8x4.yaml": (480, 0.025),
    "mlkd_lskd/vgg13_vgg8.yaml": (480, 0.01),
    "mlkd_lskd/wrn40_2_wrn40_1.yaml": (480, 0.025),
    "mlkd_lskd/wrn40_2_wrn16_2.yaml": (480, 0.025),
    "mlkd_lskd/res56_res20.yaml": (480, 0.025),
    "mlkd_lskd/res110_res32.yaml": (480, 0.025),
    "mlkd_lskd/res110_res20.yaml": (480, 0.025),
    "kd_function_matching/res32x4_res8x4.yaml": (1200, 0.05),
}

DISTILLER_VALUES: dict[str, dict[str, Any]] = {  # some of them, by hand from what is published
    "dkd/wrn40_2_mv2.yaml": {"alpha": 1.0, "beta": 6.0, "temperature": 4.0, "warmup_epochs": 20},
    "ctkd/vgg13_vgg8.yaml": {"ce_weight": 0.1, "kd_weight": 0.9, "module": "global", "temperature_range": 20.0},
    "mlkd/res50_mv2.yaml": {"kd_weight": 0.9, "temperature": 4.0, "extra_temperatures": [3.0, 5.0, 2.0, 6.0]},
    "la/res56_res20.yaml": {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": 4.0},
    "rc/res56_res20.yaml": {"ce_weight": 1.0, "kd_weight": 1.0, "rc_weight": 0.1, "temperature": 4.0},
    "label_revision/res56_res20.yaml": {"lambda1": 4.0, "lambda2": 1.0, "eta": 0.8},
    "kd_lskd/res32x4_res8x4.yaml": {"ce_weight": 0.1, "kd_weight": 9.0, "temperature": 2.0},
    "kd_lskd/res110_res20.yaml": {"ce_weight": 0.1, "kd_weight": 12.0, "temperature": 4.0},
    "kd_lskd/res50_mv2.yaml": {"ce_weight": 0.1, "kd_weight": 1.0, "temperature": 3.0},
    "ctkd_lskd/res110_res20.yaml": {"ce_weight": 0.1, "kd_weight": 9.0, "temperature_init": 1.0},
    "dkd_lskd/res32x4_res8x4.yaml": {"alpha": 9.0, "beta": 9.0 * 8.0, "temperature": 2.0, "warmup_epochs": 20},
    "dkd_lskd/vgg13_vgg8.yaml": {"alpha": 15.0, "beta": 15.0 * 2.0, "temperature": 2.0, "warmup_epochs": 20},
    "dkd_lskd/res56_res20.yaml": {"alpha": 18.0, "beta": 18.0 * 2.0, "temperature": 3.0, "ce_weight": 1.0},
    "mlkd_lskd/res32x4_shuv2.yaml": {"ce_weight": 0.1, "kd_weight": 6.0, "temperature": 2.0},
    "mlkd_lskd/res56_res20.yaml": {"ce_weight": 0.1, "kd_weight": 9.0, "temperature": 2.0},
    "rld_lskd/vgg13_mv2.yaml": {"alpha": 9.0, "beta": 72.0, "temperature": 2.0, "sc_temperature": None},
    "dkd_dot/res110_res32.yaml": {"alpha": 1.0, "beta": 2.0, "temperature": 4.0, "standardize_logits": False},
    "luminet/wrn40_2_wrn40_1.yaml": {"ce_weight": 1.0, "luminet_weight": (75 / 8) ** 2, "temperature": 8.0},
    "nd/res50_mv2.yaml": {"ce_weight": 1.0, "kd_weight": 3.0, "nd_weight": 0.5, "temperature": 4.0},
}

PUBLISHED = {  # figures as the comments should have them
    "kd/wrn40_2_res8x4.yaml": "73.07 (MCLD paper, Table 1); 73.97 (RLD paper, Table 2). Teacher 75.61, student alone",
    "la/vgg13_mv2.yaml": "top-1: 68.09 (RLD paper, Table 2, implemented anew there). Teacher 74.64",
    "rld_lskd/res50_mv2.yaml": "top-1: 71.06 (RLD paper, Table 6). Teacher",
    "rld_lskd/res56_res20.yaml": "Top-1: teacher 72.34, student alone 69.06.",
    "dkd_dot/vgg13_mv2.yaml": "top-1: 61.43 (MCLD paper, Table 1, marked with an asterisk). Teacher",
    "kd_lskd/res110_res20.yaml": "top-1: 71.48 (README of sunshangquan/logit-standardization-KD). Teacher",
    "mlkd_lskd/res32x4_res8x4.yaml": "top-1: 71.21 (MCLD paper, Table 3, 480 epochs); 78.28 (README of",
    "mlkd_lskd/res32x4_shuv2.yaml": "top-1: 78.76 (README of",
    "uskd/vgg8.yaml": "Top-1: student alone 70.36.",
}


def place(path: Path) -> str:
    return "/".join(path.parts[-2:])


@functools.cache
def loaded(path: Path) -> Config:
    return load(path)


@functools.cache
def network(make: Callable[..., nn.Module], section: str, name: str, info: DataInfo) -> nn.Module:
    """Each network once in each place: without values there is nothing that a method could change in it."""
    return make(section, name, {}, info, seed=0)


@pytest.fixture
def shared_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    make = build.build_network

    def shared(section: str, name: str, arguments: dict[str, Any], info: DataInfo, *, seed: int) -> nn.Module:
        return make(section, name, arguments, info, seed=seed) if arguments else network(make, section, name, info)

    monkeypatch.setattr(build, "build_network", shared)


def test_finds_all_files() -> None:
    expected = {f"{folder}/{pair_file_name(*pair)}" for folder in FOLDERS for pair in MAIN_TABLE_PAIRS}
    students = {student for _, student in MAIN_TABLE_PAIRS}
    expected |= {f"{folder}/{student}.yaml" for folder in FOLDERS_WITHOUT_TEACHER for student in students}
    expected |= {f"{folder}/res32x4_res8x4.yaml" for folder in FOLDERS_OF_ONE_PAIR}
    expected |= {"kd_assistant/res110_res56.yaml", "kd_assistant/res56_res20.yaml"}
    expected |= {f"vanilla/{model}.yaml" for model in SHORT_NAMES}
    assert len(expected) == 14 * 26 + 2 * 9 + 6 + 2 + 26
    assert expected <= {place(path) for path in CIFAR100}


def test_short_names_cover_the_zoo_and_are_unique() -> None:
    assert set(SHORT_NAMES) <= set(MODELS.names())
    assert len(SHORT_NAMES) == len(set(SHORT_NAMES.values())) == 26


@pytest.mark.usefixtures("shared_networks")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_loads_and_builds(path: Path) -> None:
    config = loaded(path)
    dataset, folder, name = path.relative_to(CONFIGS).parts
    info = DataInfo(
        num_classes=100,
        num_samples=50_000,
        image_size=32,
        num_views=162,
        batch_size=config.data.batch_size,
        strong_views=True,
    )
    with torch.device("meta"):
        distiller = build.build_distiller(config, info, build.build_teacher(config, info))
    assert isinstance(distiller, DISTILLERS.get(config.distiller.name))  # type: ignore[arg-type]
    solver = SOLVERS.build(config.solver.name, distiller.param_groups(), **config.solver.arguments)
    solver.set_lr(config.solver.lr)
    assert config.warnings() == []
    assert folder == "_".join(part for part in (config.distiller.name, config.variant) if part)
    assert config.teacher is None or (
        config.teacher.checkpoint and name == pair_file_name(config.teacher.name, config.student.name)
    )
    assert config.teacher is not None or name == f"{config.student.name}.yaml"
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"tools/train.py --cfg configs/{dataset}/{folder}/{name}" in comments[0]
    assert all(len(line) <= 120 for line in comments[1:])


@pytest.mark.parametrize("path", CIFAR100, ids=place)
def test_cifar100_recipe(path: Path) -> None:
    """64 images a step, 240 epochs, drops after 150, 180 and 210; 0.01 for light students; but for ``SCHEDULES``."""
    config = loaded(path)
    usual = (240, 0.01 if config.student.name in LIGHT else 0.05)
    assert (config.solver.epochs, config.solver.lr) == SCHEDULES.get(place(path), usual)
    assert (config.data.batch_size, config.solver.gamma) == (64, 0.1)
    cosine = path.parent.name == "kd_function_matching"
    assert (config.solver.schedule, config.solver.milestones) == (
        ("cosine", ()) if cosine else ("step", (150, 180, 210))
    )
    sgd = {"momentum": 0.9, "weight_decay": 5e-4}
    if config.variant == "dot":
        assert (config.solver.name, config.solver.arguments) == ("dot", {**sgd, "delta": 0.075})
    else:
        assert (config.solver.name, config.solver.arguments) == ("sgd", {**sgd, "nesterov": False})
    assert config.distiller.arguments["standardize_logits"] == (config.variant == "lskd")
    if config.distiller.name == "mcld":
        assert config.teacher is not None
        assert config.distiller.arguments["ce_weight"] == (config.teacher.name in {"resnet56", "resnet110"})
    if "epochs" in config.distiller.arguments:
        assert config.distiller.arguments["epochs"] == config.solver.epochs


@pytest.mark.parametrize("name", DISTILLER_VALUES)
def test_published_settings(name: str) -> None:
    arguments = loaded(CONFIGS / "cifar100" / name).distiller.arguments
    assert {key: arguments[key] for key in DISTILLER_VALUES[name]} == DISTILLER_VALUES[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    comments = [line[2:] for line in (CONFIGS / "cifar100" / name).read_text().splitlines() if line.startswith("#")]
    assert PUBLISHED[name] in " ".join(comments)


def test_recipes_set_what_they_are_named_after() -> None:
    def recipe(folder: str) -> Config:
        return loaded(CONFIGS / "cifar100" / folder / "res32x4_res8x4.yaml")

    for folder in ("kd_mixup", "kd_cutmix", "kd_cutmix_pick"):
        mixing = recipe(folder).data.mixing
        assert mixing is not None
        assert (f"kd_{mixing.name}", mixing.alpha, mixing.probability) == (folder, 1.0, 1.0)
    matching = recipe("kd_function_matching")
    assert matching.data.mixing is not None
    assert (matching.data.mixing.name, matching.distiller.arguments["ce_weight"]) == ("mixup", 0.0)
    ensemble = recipe("kd_ensemble").teacher
    assert ensemble is not None
    assert [(member.name, member.expected_top1) for member in ensemble.members] == [
        ("resnet32x4", 79.42),
        ("wrn_40_2", 75.61),
    ]
    averaged = recipe("kd_averaged").distiller.arguments
    assert (averaged["ema_decay"], averaged["average_from"]) == (0.999, 1)
    chain = CONFIGS / "cifar100" / "kd_assistant"
    first, second = loaded(chain / "res110_res56.yaml"), loaded(chain / "res56_res20.yaml")
    assert second.teacher is not None
    assert (second.teacher.checkpoint, second.teacher.expected_top1) == (f"runs/{first.run_folder()}", None)
    assert second.teacher.name == first.student.name
