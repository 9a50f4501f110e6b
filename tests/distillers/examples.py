"""What the tests of methods share: tiny networks, a batch, and one set of settings for each method."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistill.data.batch import Batch, DataInfo
from mdistill.distillers import DISTILLERS, Distiller
from mdistill.models.base import Features
from mdistill.models.layers import BatchNorm1d
from mdistill.optim.solvers import SGD

from ..host_reads import NoHostReads
from . import hooks

CLASSES, SAMPLES, BATCH = 7, 40, 8

METHODS = [name for name in DISTILLERS.names() if DISTILLERS.get(name).__module__.startswith("mdistill.")]
HOOKS = list(hooks.SETTINGS)  # methods of the tests alone, which the contract holds for as well
PHASES = [f"{name}:{phase}" for name in [*METHODS, *HOOKS] for phase in DISTILLERS.get(name).phases]  # first ones


def goes_with_images_beside(name: str) -> bool:
    """Whether the method has terms that need no class and one view."""
    needs = DISTILLERS.get(name).needs
    return needs.teacher != "none" and (needs.labels, needs.views) == ("none", 1)


SETTINGS: dict[str, dict[str, Any]] = {
    **hooks.SETTINGS,
    "vanilla": {"ce_weight": 1.0},
    "kd": {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0},
    "bd_kd": {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0, "balance": 2.0},
    "taid": {
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "temperature": 4.0,
        "epochs": 5,
        "start": 0.4,
        "end": 1.0,
        "alpha": 0.1,
        "beta": 0.9,
        "variant": "released",
    },
    "dkd": {"ce_weight": 1.0, "alpha": 1.0, "beta": 8.0, "temperature": 4.0, "warmup_epochs": 20},
    "rld": {
        "ce_weight": 1.0,
        "alpha": 1.0,
        "beta": 8.0,
        "temperature": 4.0,
        "sc_temperature": None,
        "mask": "ge",
        "warmup_epochs": 20,
    },
    "mcld": {
        "ce_weight": 0.0,
        "temperature": 0.2,
        "queue_size": None,
        "queue_start": "empty",
        "category_mean": "positives",
        "category_denominator": "others",
        "instance": True,
        "sample": True,
        "category": True,
    },
    "ttm": {"ce_weight": 1.0, "ttm_weight": 2.0, "power": 0.2},
    "wttm": {"ce_weight": 1.0, "wttm_weight": 2.0, "power": 0.2},
    "dist": {"ce_weight": 1.0, "beta": 2.0, "gamma": 2.0, "temperature": 4.0},
    "luminet": {"ce_weight": 2.0, "luminet_weight": 8.0, "temperature": 4.0, "warmup_epochs": 20},
    "sinkd": {
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "kd_temperature": 3.0,
        "kd_anneal_epochs": 10,
        "sinkhorn_weight": 0.8,
        "temperature": 2.0,
        "regularization": 0.1,
        "iterations": 20,
        "variant": "released",
    },
    "nd": {
        "ce_weight": 1.0,
        "kd_weight": 1.0,
        "kd_warmup_epochs": 20,
        "temperature": 4.0,
        "nd_weight": 2.0,
        "embedding": "released",
    },
    "at": {"ce_weight": 1.0, "at_weight": 1000.0, "power": 2},
    "nst": {"ce_weight": 1.0, "nst_weight": 50.0},
    "rkd": {"ce_weight": 1.0, "distance_weight": 25.0, "angle_weight": 50.0},
    "sp": {"ce_weight": 1.0, "sp_weight": 3000.0},
    "pkt": {"ce_weight": 1.0, "pkt_weight": 30000.0},
    "cc": {"ce_weight": 1.0, "cc_weight": 0.02, "width": 3},
    "crd": {
        "ce_weight": 1.0,
        "crd_weight": 0.8,
        "negatives": 12,
        "temperature": 0.07,
        "momentum": 0.5,
        "width": 3,
        "mode": "exact",
    },
    "vid": {"ce_weight": 1.0, "vid_weight": 1.0, "initial_variance": 5.0},
    "catkd": {"ce_weight": 1.0, "catkd_weight": 15.0, "resolution": 1, "normalize": False},
    "simkd": {"ce_weight": 0.0, "simkd_weight": 1.0, "factor": 2},
    "reviewkd": {
        "ce_weight": 1.0,
        "reviewkd_weight": 5.0,
        "max_width": 4,
        "student_preacts": False,
        "warmup_epochs": 20,
    },
    "ft": {"ce_weight": 1.0, "ft_weight": 200.0, "paraphrase_rate": 0.5},
    "ab": {"ce_weight": 1.0, "margin": 1.0},
    "fsp": {"ce_weight": 1.0},
    "fitnet": {"ce_weight": 1.0, "fitnet_weight": 100.0, "hint": 1},
    "ofd": {"ce_weight": 1.0, "ofd_weight": 1e-3, "teacher_batch_statistics": True},
    "uskd": {"ce_weight": 1.0, "alpha": 0.1, "beta": 0.1, "mu": 0.1, "stage": -2, "variant": "released"},
    "ps_kd": {"ce_weight": 1.0, "alpha": 0.8, "epochs": 10},
    "pesf_kd": {
        "ce_weight": 1.0,
        "kd_weight": 1.0,
        "adapter_ce_weight": 1.0,
        "temperature": 6.0,
        "adapter_hidden": 4,
        "adapter_lr_scale": 0.1,
        "variant": "released",
    },
    "dhkd": {"ce_weight": 1.0, "kd_weight": 1.0, "temperature": 2.0, "head": "hidden"},
    "la": {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": 4.0},
    "rc": {"ce_weight": 1.0, "kd_weight": 1.0, "rc_weight": 0.1, "temperature": 4.0},
    "label_revision": {"ce_weight": 1.0, "lambda1": 4.0, "lambda2": 1.0, "eta": 0.8},
    "nkd": {"ce_weight": 1.0, "gamma": 1.5, "temperature": 1.0},
    "ctkd": {
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "module": "instance",
        "hidden": 6,
        "temperature_init": 1.0,
        "temperature_range": 20.0,
        "lambda_min": 0.0,
        "lambda_max": 1.0,
        "lambda_epochs": 10,
    },
    "mlkd": {
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "temperature": 4.0,
        "extra_temperatures": [3.0, 5.0, 2.0, 6.0],
        "variant": "published",
    },
    "wkd_l": {
        "ce_weight": 1.0,
        "wkd_weight": 10.0,
        "temperature": 4.0,
        "sharpen": 1.0,
        "regularization": 0.05,
        "iterations": 10,
        "distances": "last_map",
        "decay_epoch": 2,
        "epochs": 10,
    },
    "sdd_kd": {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0, "scales": [1, 2, 4]},
    "sdd_dkd": {
        "ce_weight": 1.0,
        "alpha": 1.0,
        "beta": 8.0,
        "temperature": 4.0,
        "scales": [1, 2, 4],
        "warmup_epochs": 20,
    },
    "sdd_nkd": {"ce_weight": 1.0, "gamma": 8.0, "temperature": 4.0, "scales": [1, 2], "warmup_epochs": 20},
    "ikl": {
        "ce_weight": 1.0,
        "alpha": 1.0,
        "beta": 8.0,
        "temperature": 4.0,
        "weight_temperature": 4.0,
        "class_prior": True,
        "warmup_epochs": 20,
    },
    "gkl": {
        "ce_weight": 1.0,
        "alpha": 1.0,
        "beta": 8.0,
        "gamma": 0.1,
        "temperature": 4.0,
        "weight_temperature": 4.0,
        "class_prior": True,
        "warmup_epochs": 20,
    },
    "mlkd_noaug": {
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "temperature": 4.0,
        "extra_temperatures": [3.0, 5.0, 2.0, 6.0],
    },
    "crld": {
        "ce_weight": 1.0,
        "within_weight": 2.0,
        "cross_weight": 0.5,
        "temperature": 4.0,
        "weak_threshold": 0.3,  # which some of the samples here reach
        "strong_threshold": 0.2,
    },
    "sld": {"ce_weight": 0.1, "kd_weight": 0.9, "temperatures": [1.0, 2.0, 3.0], "student_after": 2},
    "gdkd": {
        "ce_weight": 1.0,
        "k": 3,
        "w0": 1.0,
        "w1": 2.0,
        "w2": 8.0,
        "temperature": 4.0,
        "divergence": "forward",
        "warmup_epochs": 20,
    },
    "ckd": {"ce_weight": 1.0, "ckd_weight": 10.0, "temperature": 1.0},
    "normkd": {"ce_weight": 0.1, "kd_weight": 0.9, "temperature_norm": 2.0},
    "normkd_dkd": {"ce_weight": 1.0, "alpha": 4.0, "beta": 5.0, "temperature_norm": 2.0, "warmup_epochs": 20},
    "tekap": {
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "temperature": 4.0,
        "teachers": 3,
        "noise_weight": 0.1,
        "augmented_weight": 0.8,
    },
    "ea_kd": {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0, "entropy_temperature": 3.0, "bound": 100.0},
    "ea_dkd": {
        "ce_weight": 1.0,
        "alpha": 1.0,
        "beta": 8.0,
        "temperature": 4.0,
        "entropy_temperature": 3.0,
        "bound": 100.0,
        "warmup_epochs": 20,
    },
    "ea_mld": {
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "temperature": 4.0,
        "extra_temperatures": [3.0, 5.0, 2.0, 6.0],
        "variant": "published",
        "entropy_temperature": 3.0,
        "bound": None,
    },
}


class TinyNetwork(nn.Sequential):
    """Flatten, linear, BatchNorm, ReLU and a linear classifier; its two "stages" are maps of 1 x 1."""

    @property
    def classifier(self) -> nn.Module:
        return self[-1]

    def bn_before_relu(self) -> list[nn.Module]:
        return [self[2]]

    def forward_features(self, image: Tensor) -> Features:
        stem = self[1](self[0](image))
        preact = self[2](stem)
        pooled = self[3](preact)
        stem_map, preact_map, last_map = (x[:, :, None, None] for x in (stem, preact, pooled))
        return Features(
            logits=self.classifier(pooled),
            stages=(stem_map, last_map),
            preacts=(stem_map, preact_map),
            last_map=last_map,
            pooled=pooled,
        )


def network(seed: int, classes: int = CLASSES) -> TinyNetwork:
    """A classifier of 3 x 2 x 2 images, of one too, with a BatchNorm, so that its mode shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyNetwork(nn.Flatten(), nn.Linear(12, 5), BatchNorm1d(5), nn.ReLU(), nn.Linear(5, classes))


def data_info(**changes: Any) -> DataInfo:
    values = {
        "num_classes": CLASSES,
        "num_samples": SAMPLES,
        "image_size": 2,
        "num_views": None,
        "batch_size": BATCH,
        "strong_views": True,
        "labels": torch.arange(SAMPLES) % CLASSES,
    }
    return DataInfo(**{**values, **changes})


def build(name: str, *, data: DataInfo | None = None, **changes: Any) -> Distiller:
    """The method with its example settings, over tiny networks; ``name:phase`` is in one of its first phases."""
    name, _, phase = name.partition(":")
    builder = DISTILLERS.get(name)
    teacher = None if builder.needs.teacher == "none" else network(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        built = DISTILLERS.build(name, network(0), teacher, data or data_info(), **{**SETTINGS[name], **changes})
    if built.needs.class_distances is not None:
        built.class_distances.copy_(class_distances())
    built.enter_phase(phase or None)
    return built


def class_distances(classes: int = CLASSES) -> Tensor:
    """Symmetric, 0 for a class and itself, from 0 to 1 for two of them: (classes, classes)."""
    distances = torch.rand(classes, classes, generator=torch.Generator().manual_seed(3))
    return ((distances + distances.T) / 2).fill_diagonal_(0.0)


def batch(seed: int = 0, size: int = BATCH, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    values = {
        "image": torch.randn(size, 3, 2, 2, generator=generator).to(dtype),
        "target": torch.randint(CLASSES, (size,), generator=generator),
        "index": torch.randperm(SAMPLES, generator=generator)[:size],
        "view": torch.zeros(size, dtype=torch.int64),
        "strong_image": torch.randn(size, 3, 2, 2, generator=generator).to(dtype),
        "strong_view": torch.ones(size, dtype=torch.int64),
    }
    return Batch(**{**values, **changes})


def epoch(number: int = 1) -> Tensor:
    return torch.tensor(number)


def step(distiller: Distiller, batch: Batch, number: int = 1, lr: float = 0.0) -> Tensor:
    """One plain training step in epoch ``number``; the loss before it."""
    distiller.train()
    distiller.zero_grad()
    output = distiller(batch, epoch(number))
    output.total.backward()
    with torch.no_grad():
        for group in distiller.param_groups():
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= lr * group.get("lr_scale", 1.0) * parameter.grad
        distiller.after_step(output.signals)
    return output.total.detach()


def steps_without_host_reads(distiller: Distiller, sizes: Sequence[int], number: int = 2) -> None:
    """Training steps by a real solver that fail where the host would read a value of the device."""
    solver = SGD(distiller.train().param_groups(), momentum=0.9, nesterov=False, weight_decay=5e-4)
    solver.set_lr(0.05)
    batches = [batch(seed, size) for seed, size in enumerate(sizes)]
    now = epoch(number)
    with NoHostReads():
        for each in batches:
            output = distiller(each, now)
            solver.step(output)
            with torch.no_grad():
                distiller.after_step(output.signals)


def logits(seed: int, size: int, classes: int, scale: float = 3.0) -> Tensor:
    """Random logits (size, classes) in float64."""
    return scale * torch.randn(size, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(seed: int, size: int, classes: int) -> Tensor:
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))
