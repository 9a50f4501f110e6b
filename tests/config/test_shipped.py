"""Every shipped YAML is complete, builds, is where its content says and holds nothing that is not published."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mdistill.config import Config, cell_identity, for_pair, load, sources
from mdistill.data import DataInfo
from mdistill.data.folder import IMAGENET_MEAN, IMAGENET_STD
from mdistill.data.mixing import Mixing
from mdistill.distillers import DISTILLERS
from mdistill.engine import build
from mdistill.errors import UserError
from mdistill.models import MODELS, base
from mdistill.models.names import IMAGENET_SHORT_NAMES, SHORT_NAMES, pair_file_name, student_file_name
from mdistill.optim.solvers import SOLVERS
from mdistill.reporting.published import read_published
from mdistill.settings import leaves

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
EVERY = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "tables")  # whose files are none
FILES = [path for path in EVERY if not any(part.startswith("_") for part in path.relative_to(CONFIGS).parts)]
BASES = [path for path in EVERY if path not in FILES]
CIFAR100 = [path for path in FILES if path.is_relative_to(CONFIGS / "cifar100")]
IMAGENET = [path for path in FILES if path.is_relative_to(CONFIGS / "imagenet")]
FIGURES = read_published(ROOT / "results" / "published.csv")
EXAMPLE = "res32x4_res8x4.yaml"

SMALL = {"num_classes": 100, "num_samples": 50_000, "image_size": 32, "num_views": 162}
LARGE = {"num_classes": 1000, "num_samples": 1_281_167, "image_size": 224, "num_views": None}
INFO: dict[str, dict[str, Any]] = {
    "cifar100": SMALL,
    "synthetic": SMALL,
    "imagenet": {**LARGE, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
}

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
OF_ALL_PAIRS = {
    *("kd", "dkd", "rld", "mcld", "ctkd", "mlkd", "la", "rc", "label_revision"),
    *("kd_lskd", "ctkd_lskd", "dkd_lskd", "mlkd_lskd", "dkd_dot"),
    "fitnet",
    "catkd",
    "simkd",
    "at",
    "rkd",
    "ofd",
    "crd",
}
FURTHER_PAIRS = {  # with a setting of their own; MCLD paper, Tables 6, 10 and 11
    "dkd": {
        *("vgg13_res20", "wrn40_2_res20", "res50_res20", "res32x4_res20", "res56_mv2", "res110_mv2", "res32x4_mv2"),
        *("wrn28_2_wrn16_2", "wrn16_4_wrn16_2", "wrn28_4_wrn16_2", "vgg13_wrn16_2", "res50_wrn16_2"),
    },
    "mcld": {"res56_mv2", "res110_mv2"},
}
OF_SOME_PAIRS = {
    "rld_lskd": 3,
    "kd_dot": 3,
    "ttm": 10,
    "wttm": 10,
    "dist": 5,
    "luminet": 9,
    "nd": 5,
    "kd_assistant": 2,
    "reviewkd": 13,
    "nst": 10,
    "sp": 10,
    "pkt": 10,
    "cc": 10,
    "vid": 10,
    "sld": 12,
    "gdkd": 11,
    "ckd": 11,
    "normkd_dkd": 11,
    "ikl": 11,
    "gkl": 11,
    "sdd_kd": 11,
    "sdd_dkd": 11,
    "sdd_nkd": 11,
    "wkd_l": 2,
    "ab": 10,
    "ft": 10,
    "fsp": 6,
}
WITH_ONE_EXAMPLE = {
    *("mlkd_noaug", "nkd", "dhkd", "sinkd", "pesf_kd", "bd_kd", "taid", "uskd", "ps_kd"),
    *("kd_function_matching", "kd_mixup", "kd_cutmix", "kd_cutmix_pick", "kd_ensemble", "kd_averaged"),
    *("crld", "normkd", "tekap", "ea_kd", "ea_dkd", "ea_mld", "ea_mld_lskd"),
}


IMAGENET_OF_BOTH_PAIRS = (
    *("kd", "dkd", "rld", "mcld", "mlkd", "ctkd", "la", "rc", "label_revision", "dist", "nkd", "luminet"),
    *("kd_dot", "dkd_lskd"),
    *("gdkd", "ckd", "normkd", "normkd_dkd"),
    *("ikl", "gkl", "wkd_l", "crd"),
)
IMAGENET_FILES = {
    "vanilla": {"resnet18", "mobilenet_v1"},
    **{folder: {"res34_res18"} for folder in ("kd_lskd", "ctkd_lskd")},
    **{folder: {"res34_res18"} for folder in ("crld", "sld", "ea_kd", "ea_dkd", "ea_dkd_lskd")},
    **{folder: {"res34_res18", "res50_mv1"} for folder in IMAGENET_OF_BOTH_PAIRS},
    **{folder: {"res34_res18", "res50_mv1"} for folder in ("at", "ofd", "reviewkd", "simkd", "catkd")},
}
IMAGENET_SETTINGS: dict[str, dict[str, Any]] = {  # some of them, by hand from what is published
    "kd/res34_res18": {"ce_weight": 0.5, "kd_weight": 0.5, "temperature": 1.0},
    "kd_lskd/res34_res18": {"ce_weight": 1.0, "kd_weight": 9.0, "temperature": 2.0, "standardize_logits": True},
    "dkd/res34_res18": {"alpha": 1.0, "beta": 0.5, "temperature": 1.0, "warmup_epochs": 1},
    "dkd/res50_mv1": {"alpha": 1.0, "beta": 2.0, "temperature": 1.0, "warmup_epochs": 1},
    "rld/res34_res18": {"alpha": 1.0, "beta": 0.5, "temperature": 1.0, "warmup_epochs": 1},
    "rld/res50_mv1": {"alpha": 1.0, "beta": 2.0, "temperature": 1.0, "warmup_epochs": 1},
    "mcld/res34_res18": {"ce_weight": 1.0, "temperature": 0.2, "queue_size": 65536},
    "mcld/res50_mv1": {"ce_weight": 0.0, "temperature": 0.2, "queue_size": 65536},
    "mlkd/res34_res18": {"ce_weight": 0.5, "kd_weight": 0.5, "temperature": 1.0},
    "ctkd/res34_res18": {"ce_weight": 1.0, "kd_weight": 1.0, "temperature_range": 20.0, "lambda_epochs": 5},
    "ctkd_lskd/res34_res18": {"ce_weight": 1.0, "kd_weight": 2.0, "standardize_logits": True},
    "la/res50_mv1": {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": 1.0},
    "rc/res50_mv1": {"ce_weight": 1.0, "kd_weight": 1.0, "rc_weight": 0.1, "temperature": 1.0},
    "label_revision/res34_res18": {"lambda1": 4.0, "lambda2": 1.0, "eta": 0.8},
    "nkd/res34_res18": {"gamma": 1.5, "temperature": 1.0},
    "at/res50_mv1": {"ce_weight": 1.0, "at_weight": 1000.0, "power": 2},
    "ofd/res50_mv1": {"ce_weight": 1.0, "ofd_weight": 1e-4, "teacher_batch_statistics": True},
    "reviewkd/res50_mv1": {"reviewkd_weight": 8.0, "max_width": 256, "student_preacts": True, "warmup_epochs": 1},
    "simkd/res34_res18": {"ce_weight": 0.0, "simkd_weight": 1.0, "factor": 2},
    "catkd/res34_res18": {"ce_weight": 1.0, "catkd_weight": 0.5, "resolution": 4, "normalize": False},
    "crd/res34_res18": {"ce_weight": 1.0, "crd_weight": 0.8, "negatives": 16384, "width": 128, "mode": "exact"},
    "luminet/res34_res18": {"ce_weight": 0.7, "luminet_weight": 4.0, "temperature": 1.0},
    "luminet/res50_mv1": {"ce_weight": 1.0, "luminet_weight": (2 / 0.7) ** 2, "temperature": 0.7},
    "crld/res34_res18": {"ce_weight": 2.0, "within_weight": 2.0, "cross_weight": 0.5, "temperature": 1.0},
    "sld/res34_res18": {"ce_weight": 0.5, "kd_weight": 0.5, "student_after": 150},
    "gdkd/res34_res18": {"k": 5, "w0": 0.5, "w1": 1.0, "w2": 1.0, "temperature": 1.0, "warmup_epochs": 1},
    "gdkd/res50_mv1": {"k": 5, "w0": 0.5, "w1": 2.0, "w2": 2.0, "temperature": 1.0, "warmup_epochs": 1},
    "ckd/res50_mv1": {"ce_weight": 1.0, "ckd_weight": 10.0, "temperature": 1.0},
    "normkd/res50_mv1": {"ce_weight": 0.5, "kd_weight": 0.5, "temperature_norm": 1.0},
    "normkd_dkd/res34_res18": {"alpha": 1.0, "beta": 1.0, "temperature_norm": 0.5, "warmup_epochs": 1},
    "normkd_dkd/res50_mv1": {"alpha": 1.0, "beta": 1.0, "temperature_norm": 0.75, "warmup_epochs": 1},
    "ea_kd/res34_res18": {"ce_weight": 1.0, "kd_weight": 0.5, "entropy_temperature": 2.0, "bound": None},
    "ea_dkd_lskd/res34_res18": {"alpha": 2.0, "beta": 1.0, "entropy_temperature": 3.0, "standardize_logits": True},
    "ikl/res34_res18": {"alpha": 1.0, "beta": 0.5, "temperature": 1.0, "weight_temperature": 1.0, "class_prior": True},
    "gkl/res50_mv1": {"alpha": 4.0, "beta": 1.0, "gamma": 0.5, "temperature": 1.0, "warmup_epochs": 5},
    "wkd_l/res50_mv1": {
        "wkd_weight": 25.0,
        "sharpen": 2.0,
        "temperature": 2.0,
        "distances": "logits",
        "decay_epoch": 0,
    },
}
IMAGENET_SCHEDULES = {  # images a step, epochs and rate where they are not the recipe's
    "ctkd/res34_res18": (256, 120, 0.1),
    "ctkd/res50_mv1": (256, 120, 0.1),
    "ctkd_lskd/res34_res18": (256, 120, 0.1),
    "mlkd/res34_res18": (512, 100, 0.1),
    "luminet/res50_mv1": (256, 100, 0.1),
    **dict.fromkeys(("ckd/res34_res18", "ckd/res50_mv1"), (512, 200, 0.2)),
    "ea_dkd_lskd/res34_res18": (512, 130, 0.2),
    "ofd/res50_mv1": (128, 100, 0.05),
    "reviewkd/res34_res18": (256, 100, 0.1),
    "reviewkd/res50_mv1": (256, 100, 0.1),
    "simkd/res34_res18": (256, 120, 0.1),
    "simkd/res50_mv1": (256, 120, 0.1),
    "crd/res34_res18": (256, 100, 0.1),
    "crd/res50_mv1": (256, 100, 0.1),
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
    **{
        f"ckd/{pair}.yaml": (480, 0.05)
        for pair in (
            "res32x4_res8x4",
            "vgg13_vgg8",
            "wrn40_2_wrn16_2",
            "wrn40_2_wrn40_1",
            "res56_res20",
            "res110_res32",
        )
    },
    **{
        f"ckd/{pair}.yaml": (480, 0.01)
        for pair in ("res32x4_shuv1", "res32x4_shuv2", "wrn40_2_shuv1", "vgg13_mv2", "res50_mv2")
    },
    **{
        f"sld/{pair}.yaml": (240, 0.025)
        for pair in ("res32x4_res8x4", "vgg13_vgg8", "wrn40_2_vgg8", "wrn40_2_wrn16_2", "wrn40_2_wrn40_1")
    },
    **{f"sld/{pair}.yaml": (240, 0.025) for pair in ("res56_res20", "res110_res32")},
    **{f"sld/{pair}.yaml": (240, 0.008) for pair in ("res50_mv2", "vgg13_mv2", "res32x4_shuv2")},
    "sld/res32x4_shuv1.yaml": (240, 0.009),
    "sld/wrn40_2_shuv1.yaml": (240, 0.01),
    **{f"{folder}/{EXAMPLE}": (480, 0.025) for folder in ("ea_mld", "ea_mld_lskd")},
    "ps_kd/resnet8x4.yaml": (300, 0.1),
    "uskd/resnet8x4.yaml": (200, 0.1),
    "nd/res32x4_res8x4.yaml": (240, 0.1),
    "nd/res32x4_shuv2.yaml": (240, 0.02),
    "nd/res50_mv2.yaml": (240, 0.1),
    "nd/res56_res20.yaml": (240, 0.1),
    "nd/wrn40_2_wrn40_1.yaml": (240, 0.1),
}
BATCHES_AND_DROPS = {  # images a step, drops of the rate and their factor where a method's are not the recipe's
    "uskd": (128, (60, 120, 160), 0.2),
    "nd": (128, (150, 180, 210), 0.1),
    "ps_kd": (128, (150, 225), 0.1),
}
BATCH_SIZES = {  # images a step where they are not 64
    f"ckd/{pair}.yaml": 32 for pair in ("res32x4_shuv1", "wrn40_2_shuv1", "res50_mv2", "vgg13_mv2", "wrn40_2_wrn40_1")
}
RELEASED = re.compile(  # owner/repository, then a file or folder; or a place in a paper
    r"certain: ([\w-]+/[\w.-]+ \S*\w[./]\S*\w|\w+ paper, (Tables?|Sections?|appendix|Eq\.|Algorithm) \S*\d)"
)
WITH_SETTINGS_OF_OTHERS = ("uskd", "dhkd", "ps_kd", "sinkd", "taid", "nkd", "wttm")
RECIPE = (
    "certain: RLD paper, appendix B.1; megvii-research/mdistiller configs/cifar100. The MCLD paper states SGD and 240"
    " epochs"
)
TOLD: dict[str, dict[str, str]] = {  # some of what a pair's file and its bases tell
    "cifar100/wkd_l/res32x4_res8x4": {
        "distiller.wkd_weight": "certain: JiamingLv/WKD configs/cifar100/wkd_l/res32x4_res8x4.yaml",
        "run.precision": "ours: JiamingLv/WKD runs both networks under float16 autocast",
    },
    "cifar100/mlkd/res50_mv2": {
        "solver.epochs": "certain: Jin-Ying/Multi-Level-Logit-Distillation configs/cifar100/ours/res50_mv2.yaml",
        "solver.momentum": RECIPE,
    },
    "cifar100/gdkd/res56_res20": {
        "distiller.w1": "certain: ZaberKo/GDKD configs/cifar100/gdkd/res56_res20.yaml, mdistiller/engine/cfg.py",
        "distiller.k": "certain: ZaberKo/GDKD mdistiller/engine/cfg.py",
    },
    "cifar100/dkd_dot/res56_res20": {
        "distiller.beta": "inferred: DKD's for the pair, without DOT",
        "solver.delta": "inferred: that of KD under DOT, megvii-research/mdistiller configs/cifar100/dot",
        "solver.epochs": RECIPE,
    },
    "cifar100/ft/res32x4_shuv2": {
        "distiller.ft_weight": "certain: HobbitLong/RepDistiller scripts/run_cifar_distill.sh, for all pairs",
        "distiller.paraphrase_rate": "certain: HobbitLong/RepDistiller models/util.py",
    },
    "imagenet/wkd_l/res50_mv1": {
        "distiller.sharpen": "certain: JiamingLv/WKD configs/imagenet/r50_mv1/wkd_l.yaml",
        "distiller.regularization": "inferred: as for CIFAR-100",
        "distiller.iterations": "inferred: as for CIFAR-100",
    },
    "imagenet/ikl/res34_res18": {
        "distiller.beta": "certain: jiequancui/DKL DKLv1/KD-dkl/imagenet_kd_dkl_configs/r34_r18_ikl_kd.yaml",
        "distiller.warmup_epochs": "inferred: its default, since the files name none",
    },
    "imagenet/sld/res34_res18": {
        "distiller.student_after": "certain: StephenEkaputra/Swapped-Logit-Distillation mdistiller/distillers/SLD.py",
        "distiller.kd_weight": (
            "certain: StephenEkaputra/Swapped-Logit-Distillation configs/imagenet/r34_r18/sld.yaml"
        ),
    },
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
    "ctkd_lskd/res110_res20.yaml": {"kd_weight": 9.0, "temperature_init": 2.0, "temperature_range": 40.0},
    "dist/wrn40_2_wrn40_1.yaml": {"ce_weight": 1.0, "beta": 2.0, "gamma": 2.0, "temperature": 4.0},
    "ps_kd/resnet8x4.yaml": {"ce_weight": 1.0, "alpha": 0.8, "epochs": 300},
    "dkd_lskd/res32x4_res8x4.yaml": {"alpha": 9.0, "beta": 9.0 * 8.0, "temperature": 2.0, "warmup_epochs": 20},
    "dkd_lskd/vgg13_vgg8.yaml": {"alpha": 15.0, "beta": 15.0 * 2.0, "temperature": 2.0, "warmup_epochs": 20},
    "dkd_lskd/res56_res20.yaml": {"alpha": 18.0, "beta": 18.0 * 2.0, "temperature": 3.0, "ce_weight": 1.0},
    "mlkd_lskd/res32x4_shuv2.yaml": {"ce_weight": 0.1, "kd_weight": 6.0, "temperature": 2.0},
    "mlkd_lskd/res56_res20.yaml": {"ce_weight": 0.1, "kd_weight": 9.0, "temperature": 2.0},
    "rld_lskd/vgg13_mv2.yaml": {"alpha": 9.0, "beta": 72.0, "temperature": 2.0, "sc_temperature": None},
    "dkd_dot/res110_res32.yaml": {"alpha": 1.0, "beta": 2.0, "temperature": 4.0, "standardize_logits": False},
    "luminet/wrn40_2_wrn40_1.yaml": {"ce_weight": 1.0, "luminet_weight": (75 / 8) ** 2, "temperature": 8.0},
    "fitnet/wrn40_2_mv2.yaml": {"ce_weight": 1.0, "fitnet_weight": 100.0, "hint": 2, "warmup_epochs": 0},
    "at/res110_res20.yaml": {"ce_weight": 1.0, "at_weight": 1000.0, "power": 2, "warmup_epochs": 0},
    "rkd/res110_res20.yaml": {"ce_weight": 1.0, "distance_weight": 25.0, "angle_weight": 50.0},
    "crd/wrn40_2_mv2.yaml": {"crd_weight": 0.8, "negatives": 16384, "temperature": 0.07, "momentum": 0.5, "width": 128},
    "nst/res32x4_shuv2.yaml": {"ce_weight": 1.0, "nst_weight": 50.0},
    "sp/res32x4_shuv2.yaml": {"ce_weight": 1.0, "sp_weight": 3000.0},
    "pkt/res32x4_shuv2.yaml": {"ce_weight": 1.0, "pkt_weight": 30000.0},
    "cc/res32x4_shuv2.yaml": {"ce_weight": 1.0, "cc_weight": 0.02, "width": 128},
    "vid/res32x4_shuv2.yaml": {"ce_weight": 1.0, "vid_weight": 1.0, "initial_variance": 5.0},
    "ab/res32x4_shuv2.yaml": {"ce_weight": 1.0, "margin": 1.0},
    "ft/res32x4_shuv2.yaml": {"ce_weight": 1.0, "ft_weight": 200.0, "paraphrase_rate": 0.5},
    "fsp/res110_res32.yaml": {"ce_weight": 1.0},
    "catkd/wrn40_2_wrn16_2.yaml": {"ce_weight": 1.0, "catkd_weight": 12.0, "resolution": 2, "normalize": False},
    "catkd/res32x4_shuv2.yaml": {"ce_weight": 1.0, "catkd_weight": 600.0, "resolution": 4, "normalize": True},
    "simkd/vgg13_vgg8.yaml": {"ce_weight": 0.0, "simkd_weight": 1.0, "factor": 2},
    "reviewkd/res56_res20.yaml": {"ce_weight": 1.0, "reviewkd_weight": 0.6, "max_width": 512, "warmup_epochs": 20},
    "ofd/wrn40_2_mv2.yaml": {"ce_weight": 1.0, "ofd_weight": 1e-3, "teacher_batch_statistics": True},
    "nd/res50_mv2.yaml": {"ce_weight": 1.0, "kd_weight": 3.0, "nd_weight": 0.5, "temperature": 4.0},
    "crld/res32x4_res8x4.yaml": {"ce_weight": 1.0, "weak_threshold": 0.9, "strong_threshold": 0.2},
    "sld/res50_mv2.yaml": {"kd_weight": 0.9, "temperatures": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "student_after": 150},
    "gdkd/wrn40_2_shuv1.yaml": {"k": 5, "w0": 1.0, "w1": 2.0, "w2": 6.0, "temperature": 4.0, "warmup_epochs": 20},
    "ckd/wrn40_2_wrn40_1.yaml": {"ce_weight": 1.0, "ckd_weight": 50.0, "temperature": 2.0},
    "ckd/res110_res32.yaml": {"ce_weight": 1.0, "ckd_weight": 10.0, "temperature": 1.0},
    "normkd_dkd/res32x4_shuv1.yaml": {"alpha": 0.5, "beta": 8.5, "temperature_norm": 2.0, "warmup_epochs": 20},
    "tekap/res32x4_res8x4.yaml": {"teachers": 3, "noise_weight": 0.1, "augmented_weight": 0.8, "temperature": 4.0},
    "ea_dkd/res32x4_res8x4.yaml": {"alpha": 1.0, "beta": 8.0, "entropy_temperature": 3.0, "bound": 100.0},
    "ea_mld_lskd/res32x4_res8x4.yaml": {"ce_weight": 0.1, "kd_weight": 4.0, "temperature": 2.0, "bound": None},
    "ikl/vgg13_mv2.yaml": {"alpha": 4.0, "beta": 12.0, "weight_temperature": 100.0, "class_prior": False},
    "gkl/res32x4_res8x4.yaml": {"alpha": 1.0, "beta": 16.0, "gamma": 0.05, "temperature": 4.0, "class_prior": True},
    "gkl/wrn40_2_wrn16_2.yaml": {"alpha": 3.0, "beta": 20.0, "gamma": 0.3, "class_prior": False},
    "sdd_kd/res32x4_shuv1.yaml": {"ce_weight": 0.1, "kd_weight": 0.9, "scales": [1, 2, 4], "warmup_epochs": 0},
    "sdd_dkd/vgg13_vgg8.yaml": {"alpha": 1.0, "beta": 6.0, "scales": [1, 2], "warmup_epochs": 20},
    "sdd_nkd/wrn40_2_vgg8.yaml": {"gamma": 8.0, "temperature": 4.0, "scales": [1, 2, 4], "warmup_epochs": 20},
    "wkd_l/wrn40_2_shuv1.yaml": {"wkd_weight": 200.0, "temperature": 6.0, "sharpen": 1.0, "distances": "last_map"},
}
SOLVERS_OF_METHODS: dict[str, dict[str, Any]] = {  # what is not the recipe's
    **{name: {"clip_grad_norm": 40.0} for name in ("sdd_kd", "sdd_dkd", "sdd_nkd")},
    **{name: {"nesterov": True} for name in ("wkd_l", "nd", "ps_kd")},
}

PUBLISHED = {  # some figures of results/published.csv, by hand: value, source, table
    "kd/wrn40_2_res8x4": [("73.07", "MCLD paper", "1"), ("73.97", "RLD paper", "2")],
    "fitnet/vgg13_mv2": [
        ("64.16", "MCLD paper", "1"),
        ("64.14", "README of HobbitLong/RepDistiller", ""),
        ("64.16", "RLD paper", "2"),
    ],
    "at/res110_res20": [
        ("70.65", "MCLD paper", "2"),
        ("70.22", "README of HobbitLong/RepDistiller", ""),
        ("70.65", "RLD paper", "3"),
    ],
    "rkd/res32x4_wrn16_2": [("74.86", "MCLD paper", "1"), ("74.86", "RLD paper", "2")],
    "crd/wrn40_2_mv2": [("70.28", "MCLD paper", "1"), ("70.28", "RLD paper", "2")],
    "nst/vgg13_mv2": [("58.16", "README of HobbitLong/RepDistiller", "")],
    "sp/res110_res32": [("72.69", "README of HobbitLong/RepDistiller", "")],
    "pkt/res32x4_res8x4": [("73.64", "README of HobbitLong/RepDistiller", "")],
    "cc/wrn40_2_wrn16_2": [("73.56", "README of HobbitLong/RepDistiller", "")],
    "vid/res50_mv2": [("67.57", "README of HobbitLong/RepDistiller", "")],
    "ab/res32x4_res8x4": [("73.17", "README of HobbitLong/RepDistiller", "")],
    "ft/res50_mv2": [("60.99", "README of HobbitLong/RepDistiller", "")],
    "fsp/wrn40_2_wrn16_2": [("72.91", "README of HobbitLong/RepDistiller", "")],
    "catkd/res50_mv2": [("71.36", "MCLD paper", "1"), ("71.36", "RLD paper", "2")],
    "simkd/res32x4_res8x4": [("78.08", "MCLD paper", "2"), ("78.08", "RLD paper", "3")],
    "reviewkd/res32x4_wrn16_2": [("76.11", "MCLD paper", "1"), ("76.11", "RLD paper", "2")],
    "ofd/wrn40_2_mv2": [("69.92", "MCLD paper", "1"), ("69.92", "RLD paper", "2")],
    "la/vgg13_mv2": [("68.09", "RLD paper", "2")],
    "rld_lskd/res50_mv2": [("71.06", "RLD paper", "6")],
    "dkd_dot/vgg13_mv2": [("61.43", "MCLD paper", "1")],
    "kd_lskd/res110_res20": [("71.48", "README of sunshangquan/logit-standardization-KD", "")],
    "mlkd_lskd/res32x4_res8x4": [
        ("66.51", "MCLD paper", "2"),
        ("71.21", "MCLD paper", "3"),
        ("78.28", "README of sunshangquan/logit-standardization-KD", ""),
    ],
    "mlkd_lskd/res32x4_shuv2": [
        ("72.13", "MCLD paper", "1"),
        ("78.76", "README of sunshangquan/logit-standardization-KD", ""),
    ],
    "ikl/wrn40_2_shuv1": [("77.19", "IKL paper", "13 and 14")],
    "sdd_dkd/res50_vgg8": [("75.86", "SDD paper", "2")],
    "wkd_l/res32x4_res8x4": [("76.53", "README of JiamingLv/WKD", "")],
    "vanilla/wrn_28_2": [("75.45", "MCLD paper", "10")],
}


def figures(folder: str, stem: str, dataset: str = "cifar100") -> list[tuple[str, str, str]]:
    """The top-1 figures that are published for a file of ``configs/<dataset>``."""
    return [
        (f"{figure.value:.2f}", figure.source, figure.table)
        for figure in FIGURES
        if (figure.dataset, figure.metric) == (dataset, "top1")
        and "_".join(part for part in (figure.method, figure.variant) if part) == folder
        and (pair_file_name(figure.teacher, figure.student) if figure.teacher else student_file_name(figure.student))
        == f"{stem}.yaml"
    ]


def place(path: Path) -> str:
    return "/".join(path.parts[-2:])


networks: dict[tuple[str, str, int, int], nn.Module] = {}
"""Each once in each place: without values there is nothing that a method could change in it."""
copied, traced = functools.cache(base._without_values), functools.cache(base._features)


def features(network: nn.Module, name: str, image_size: int) -> base.Features:
    """Each once too, where their shapes alone are read."""
    return (traced.__wrapped__ if torch.is_grad_enabled() else traced)(network, name, image_size)


@pytest.fixture
def shared_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_without_values", copied)
    monkeypatch.setattr(base, "_features", features)
    make = build.build_network

    def shared(section: str, name: str, arguments: dict[str, Any], info: DataInfo, *, seed: int) -> nn.Module:
        if arguments:
            return make(section, name, arguments, info, seed=seed)
        place = section, name, info.num_classes, info.image_size
        if place not in networks:
            networks[place] = make(section, name, {}, info, seed=0)
        return networks[place]

    monkeypatch.setattr(build, "build_network", shared)


def test_finds_all_files() -> None:
    pairs = {pair_file_name(*pair) for pair in MAIN_TABLE_PAIRS}
    names = {folder: {path.name for path in CIFAR100 if path.parent.name == folder} for folder in folders()}
    for folder, further in FURTHER_PAIRS.items():
        assert {f"{stem}.yaml" for stem in further} <= names[folder]
        names[folder] -= {f"{stem}.yaml" for stem in further}
    assert {folder for folder, files in names.items() if files == pairs} == OF_ALL_PAIRS
    assert {folder: len(names[folder]) for folder in OF_SOME_PAIRS} == OF_SOME_PAIRS
    assert names["vanilla"] == {f"{model}.yaml" for model in SHORT_NAMES}
    for folder in WITH_ONE_EXAMPLE:
        assert names[folder] == {"resnet8x4.yaml" if folder in {"uskd", "ps_kd"} else EXAMPLE}
    assert set(names) == {*OF_ALL_PAIRS, *OF_SOME_PAIRS, *WITH_ONE_EXAMPLE, "vanilla"}
    assert len(CIFAR100) == 14 * len(OF_ALL_PAIRS) + sum(OF_SOME_PAIRS.values()) + 22 + 26 + 14 == 594
    assert len(FILES) - len(CIFAR100) - len(IMAGENET) == 6
    imagenet = {folder.name: {path.stem for path in IMAGENET if path.parent == folder} for folder in imagenet_folders()}
    assert imagenet == IMAGENET_FILES


def folders() -> set[str]:
    return {path.parent.name for path in CIFAR100}


def imagenet_folders() -> set[Path]:
    return {path.parent for path in IMAGENET}


def test_every_method_has_a_folder_and_every_folder_a_base() -> None:
    assert {name for name in DISTILLERS.names() if DISTILLERS.get(name).__module__.startswith("mdistill.")} <= folders()
    bases = {path.parent for path in BASES if path.name == "_method.yaml"}
    assert {folder.name for folder in bases if folder.parent.name == "cifar100"} == folders()
    assert {folder for folder in bases if folder.parent.name == "imagenet"} == imagenet_folders()


def test_only_bases_are_longer_than_15_lines() -> None:
    assert [path for path in FILES if len(path.read_text().splitlines()) > 15] == []


@pytest.mark.parametrize("path", [*CIFAR100, *IMAGENET], ids=lambda path: str(path.relative_to(CONFIGS)))
def test_holds_something_published_or_is_an_example(path: Path) -> None:
    """A file beside a method's one example has a figure in results/published.csv or settings of its own."""
    own = set(yaml.safe_load(path.read_text())) - {"base", "sources"}
    siblings = [other for other in FILES if other.parent == path.parent]
    an_example = path == next((other for other in siblings if other.name == EXAMPLE), siblings[0])
    assert an_example or own or figures(path.parent.name, path.stem, path.parent.parent.name)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(head) <= 2
    assert len(own) <= 5


@functools.cache
def content(path: Path) -> dict[str, Any]:
    tree = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert isinstance(tree, dict)
    return tree


def own_lines(path: Path) -> dict[str, str]:
    """``sources:`` of ``path`` itself."""
    return {key: " ".join(text.split()) for key, text in content(path).get("sources", {}).items()}


def lines_of_settings(path: Path) -> dict[str, str | None]:
    """Of each key that ``path`` itself sets, the line of its own that is for it."""
    keys = [".".join(key) for key, _ in leaves(content(path)) if key[0] not in {"base", "sources"}]
    lines = sorted(own_lines(path), key=len)
    return {key: next((line for line in lines[::-1] if f"{key}.".startswith(f"{line}.")), None) for key in keys}


def test_what_a_file_sets_it_tells_the_source_of() -> None:
    """So that every setting of a configuration has one, and none of a base is taken for that of a value set later."""
    untold = []
    for path in EVERY:
        for key, line in lines_of_settings(path).items():
            section, *within = key.split(".")
            if section in {"data", "teacher", "solver", "distiller"} and within != ["name"] and line is None:
                untold.append(f"{path.relative_to(CONFIGS)}: {key}")
    assert untold == []


def test_every_line_of_sources_is_that_of_a_setting() -> None:
    """Of one that its file sets, or, where that sets none, of one of its bases or of the pair of its folder's files."""
    idle = []
    for path in EVERY:
        for line in own_lines(path).keys() - {*lines_of_settings(path).values()}:
            users = [path, *(other for other in FILES if path in BASES and other.parent == path.parent)]
            if not any(f"{key}.".startswith(f"{line}.") for user in users[:2] for key in sources(user)):
                idle.append(f"{path.relative_to(CONFIGS)}: {line}")
    assert idle == []


def test_what_is_certain_names_a_released_file_or_a_place_in_a_paper() -> None:
    lines = [(path, text) for path in EVERY for text in own_lines(path).values() if text.startswith("certain: ")]
    assert [(str(path), text) for path, text in lines if not RELEASED.match(text)] == []


@pytest.mark.parametrize("name", TOLD)
def test_what_some_configurations_tell(name: str) -> None:
    found = sources(CONFIGS / f"{name}.yaml")
    assert {key: found[key] for key in TOLD[name]} == TOLD[name]


@pytest.mark.parametrize("folder", [*WITH_SETTINGS_OF_OTHERS])
def test_settings_of_other_networks_or_tasks_are_inferred(folder: str) -> None:
    path = next(path for path in CIFAR100 if path.parent.name == folder)
    certain = {
        key for key, text in sources(path).items() if text.startswith("certain: ") and key.startswith("distiller.")
    }
    assert certain == set()


def test_lines_are_at_most_120_characters() -> None:
    """But for a command that is to be copied."""
    lines = [(path, line) for path in EVERY for line in path.read_text().splitlines() if len(line) > 120]
    assert [(str(path), line) for path, line in lines if not line.startswith("# python tools/train.py ")] == []


def test_every_base_is_used() -> None:
    named = set()
    for path in EVERY:
        bases = yaml.safe_load(path.read_text()).get("base", [])
        named |= {(path.parent / base).resolve() for base in ([bases] if isinstance(bases, str) else bases)}
    assert [path for path in BASES if path not in named] == []


@pytest.mark.parametrize("path", sorted((CONFIGS / "cifar100" / "_pairs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_pair_s_teacher_is_as_good_as_published(path: Path) -> None:
    pair = yaml.safe_load(path.read_text())
    assert path.name == pair_file_name(pair["teacher"]["name"], pair["student"]["name"])
    published = {value for value, *_ in figures("vanilla", pair["teacher"]["name"])}
    assert published == {f"{pair['teacher']['expected_top1']:.2f}"}


@pytest.mark.parametrize("path", sorted((CONFIGS / "imagenet" / "_pairs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_teacher_of_imagenet_is_torchvision_s_first(path: Path) -> None:
    """Its accuracy as torchvision states it, which the papers round up by 0.03 for one of them."""
    pair = yaml.safe_load(path.read_text())
    teacher = pair["teacher"]
    assert path.name == pair_file_name(teacher["name"], pair["student"]["name"])
    assert teacher["checkpoint"] == f"ResNet{teacher['name'][-2:]}_Weights.IMAGENET1K_V1"
    published = {value for value, *_ in figures("vanilla", teacher["name"].partition("/")[2], "imagenet")}
    assert [float(value) for value in published] == pytest.approx([teacher["expected_top1"]], abs=0.031)


@pytest.mark.parametrize("path", IMAGENET, ids=place)
def test_imagenet_recipe(path: Path) -> None:
    """512 images a step, 100 epochs, 0.2, drops after 30, 60 and 90; but for ``IMAGENET_SCHEDULES``."""
    config = load(path)
    solver = config.solver
    name = f"{path.parent.name}/{path.stem}"
    assert (config.data.batch_size, solver.epochs, solver.lr) == IMAGENET_SCHEDULES.get(name, (512, 100, 0.2))
    cosine = path.parent.name == "ckd"
    assert (solver.schedule, solver.milestones) == (("cosine", ()) if cosine else ("step", (30, 60, 90)))
    assert solver.gamma == 0.1
    sgd = {"momentum": 0.9, "weight_decay": 1e-4, "clip_grad_norm": None}
    own = {"delta": 0.09} if config.variant == "dot" else {"nesterov": False}
    assert (solver.name, solver.arguments) == ("dot" if config.variant == "dot" else "sgd", {**sgd, **own})
    assert (solver.lr_warmup_epochs, solver.decay_norms, solver.ema_decay) == (0, True, None)
    assert (config.data.name, config.data.arguments["image_size"], config.run.precision) == ("imagenet", 224, "tf32")
    assert config.distiller.arguments["standardize_logits"] == (config.variant == "lskd")
    assert config.distiller.arguments["label_smoothing"] == 0


@pytest.mark.parametrize("name", IMAGENET_SETTINGS)
def test_published_imagenet_settings(name: str) -> None:
    arguments = load(CONFIGS / "imagenet" / f"{name}.yaml").distiller.arguments
    assert {key: arguments[key] for key in IMAGENET_SETTINGS[name]} == IMAGENET_SETTINGS[name]


def test_a_value_of_one_imagenet_pair_is_not_carried_to_another() -> None:
    files, note = for_pair(CONFIGS / "imagenet" / "ctkd_lskd", "res50_mv1")
    assert "has no file for it" in note
    with pytest.raises(UserError, match=r"distiller.ce_weight: missing") as caught:
        load(files)
    assert "distiller.kd_weight: missing" in str(caught.value)
    files, _ = for_pair(CONFIGS / "imagenet" / "kd_lskd", "res50_mv1")
    config = load(files)
    assert config.teacher is not None
    assert (config.teacher.name, config.student.name) == ("torchvision/resnet50", "mobilenet_v1")


def test_a_pair_without_a_file_is_the_pair_and_the_method() -> None:
    files, note = for_pair(CONFIGS / "cifar100" / "ttm" / EXAMPLE, "wrn40_2_mv2")
    assert "has no file for it" in note
    config, example = load(files), load(CONFIGS / "cifar100" / "ttm" / EXAMPLE)
    assert config.run_folder() == Path("cifar100/ttm/wrn_40_2_mobilenet_v2/seed0")
    assert (config.solver.lr, config.distiller) == (0.01, example.distiller)


def test_a_value_of_one_pair_is_not_carried_to_another() -> None:
    files, _ = for_pair(CONFIGS / "cifar100" / "dkd_dot", "res110_res56")
    with pytest.raises(UserError, match=r"distiller.beta: missing; method 'dkd' needs it$"):
        load(files)


def test_short_names_cover_the_zoo_and_are_unique() -> None:
    assert set(SHORT_NAMES) <= set(MODELS.names())
    assert len(SHORT_NAMES) == len(set(SHORT_NAMES.values())) == 26
    assert len(set(IMAGENET_SHORT_NAMES.values())) == 4


@pytest.mark.usefixtures("shared_networks")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_loads_and_builds(path: Path) -> None:
    config = load(path)
    dataset, folder, name = path.relative_to(CONFIGS).parts
    size = INFO[config.data.name]
    labels = torch.arange(size["num_samples"]) % size["num_classes"]
    info = DataInfo(**size, batch_size=config.data.batch_size, strong_views=True, labels=labels)
    with torch.device("meta"):
        distiller = build.build_distiller(config, info, build.build_teacher(config, info))
    assert isinstance(distiller, DISTILLERS.get(config.distiller.name))
    solver = SOLVERS.build(config.solver.name, distiller.param_groups(), **config.solver.arguments)
    solver.set_lr(config.solver.lr)
    assert config.warnings() == []
    assert folder == "_".join(part for part in (config.distiller.name, config.variant) if part)
    assert config.teacher is None or (
        config.teacher.checkpoint and name == pair_file_name(config.teacher.name, config.student.name)
    )
    assert config.teacher is not None or name == student_file_name(config.student.name)
    head, *others = path.read_text().splitlines()
    assert f"tools/train.py --cfg configs/{dataset}/{folder}/{name}" in head
    assert all(len(line) <= 130 for line in others)


def test_identities_last() -> None:
    """A run is found again by its identity: another one here parts it from the table that it filled."""
    recorded = json.loads((ROOT / "tests" / "golden" / "identities.json").read_text())
    now = {name: cell_identity(load(CONFIGS / name), {}) for name in recorded}
    assert now == recorded


@pytest.mark.parametrize("path", CIFAR100, ids=place)
def test_cifar100_recipe(path: Path) -> None:
    """64 images a step, 240 epochs, drops after 150, 180 and 210; 0.01 for light students; but for ``SCHEDULES``."""
    config = load(path)
    if path.parent.name == "kd_function_matching":  # a recipe of its own
        return
    usual = (240, 0.01 if config.student.name in LIGHT else 0.05)
    assert (config.solver.epochs, config.solver.lr) == SCHEDULES.get(place(path), usual)
    size, drops, gamma = BATCHES_AND_DROPS.get(path.parent.name, (64, (150, 180, 210), 0.1))
    assert (config.data.batch_size, config.solver.gamma) == (BATCH_SIZES.get(place(path), size), gamma)
    cosine = path.parent.name == "ckd"
    assert (config.solver.schedule, config.solver.milestones) == (("cosine", ()) if cosine else ("step", drops))
    sgd = {"momentum": 0.9, "weight_decay": 5e-4, "clip_grad_norm": None}
    if config.variant == "dot":
        assert (config.solver.name, config.solver.arguments) == ("dot", {**sgd, "delta": 0.075})
    else:
        own = SOLVERS_OF_METHODS.get(config.distiller.name, {})
        name = "aligned_sgd" if config.distiller.name == "dhkd" else "sgd"
        assert (config.solver.name, config.solver.arguments) == (name, {**sgd, "nesterov": False, **own})
    assert config.distiller.arguments["standardize_logits"] == (config.variant == "lskd")
    if config.distiller.name == "mcld":
        assert config.teacher is not None
        assert config.distiller.arguments["ce_weight"] == (config.teacher.name in {"resnet56", "resnet110"})
    if "epochs" in config.distiller.arguments:
        assert config.distiller.arguments["epochs"] == config.solver.epochs


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("ab/res32x4_res8x4", 0.05),
        ("ab/vgg13_mv2", 0.01),
        ("fsp/vgg13_vgg8", 0.05),
        ("ft/res32x4_res8x4", 0.01),
        ("ft/wrn40_2_wrn16_2", 0.01),
        ("ft/res32x4_shuv2", 0.01),
        ("ft/vgg13_vgg8", 0.05),
    ],
)
def test_first_phases(name: str, rate: float) -> None:
    """30 epochs at a constant rate, by the solver of the run."""
    config = load(CONFIGS / "cifar100" / f"{name}.yaml")
    (phase,) = config.phases.values()
    assert (phase.epochs, phase.lr, phase.milestones) == (30, rate, ())
    assert (phase.name, phase.arguments) == (config.solver.name, config.solver.arguments)
    assert config.epochs == 270


@pytest.mark.parametrize("name", DISTILLER_VALUES)
def test_published_settings(name: str) -> None:
    arguments = load(CONFIGS / "cifar100" / name).distiller.arguments
    assert {key: arguments[key] for key in DISTILLER_VALUES[name]} == DISTILLER_VALUES[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    assert figures(*name.split("/")) == PUBLISHED[name]


def test_recipes_set_what_they_are_named_after() -> None:
    def recipe(folder: str) -> Config:
        return load(CONFIGS / "cifar100" / folder / "res32x4_res8x4.yaml")

    replaced, beside = Mixing("mixup", 1.0), Mixing("cutmix_pick", 1.0, candidates=2, pick="student", mode="beside")
    of_a_batch = {"share": "batch", "partner": "batch"}
    assert recipe("kd_mixup").data.mixing_settings == replaced
    assert recipe("kd_cutmix").data.mixing_settings == replace(replaced, name="cutmix")
    assert recipe("kd_cutmix_pick").data.mixing_settings == replace(beside, **of_a_batch)
    matching = recipe("kd_function_matching")
    assert matching.data.mixing_settings == replace(replaced, share="batch", partner="next", larger_share=True)
    assert (matching.distiller.arguments["ce_weight"], matching.distiller.arguments["temperature"]) == (0.0, 1.0)
    solver = matching.solver
    assert (solver.name, solver.schedule, solver.epochs, solver.lr_warmup_epochs) == ("adamw", "cosine", 1200, 15)
    assert solver.arguments["weight_decay"] * solver.lr == pytest.approx(3e-4)
    ensemble = recipe("kd_ensemble").teacher
    assert ensemble is not None
    assert [(member.name, member.expected_top1) for member in ensemble.members] == [
        ("resnet32x4", 79.42),
        ("wrn_40_2", 75.61),
    ]
    averaged = recipe("kd_averaged")
    assert (averaged.solver.ema_decay, averaged.solver.average_from) == (0.999, 25)
    assert [averaged.distiller.arguments[key] for key in ("ce_weight", "kd_weight", "temperature")] == [0.0, 1.0, 5.0]
    chain = CONFIGS / "cifar100" / "kd_assistant"
    first, second = load(chain / "res110_res56.yaml"), load(chain / "res56_res20.yaml")
    assert second.teacher is not None
    assert (second.teacher.checkpoint, second.teacher.expected_top1) == (f"runs/{first.run_folder()}", None)
    assert second.teacher.name == first.student.name
