"""What the tests of methods share: tiny networks, a batch, and one set of settings per registered method."""

from typing import Any

import torch
from torch import Tensor, nn

from mdistill.data.batch import Batch, DataInfo
from mdistill.distillers import DISTILLERS, Distiller

CLASSES, SAMPLES, BATCH = 7, 40, 8

METHODS = [name for name in DISTILLERS.names() if DISTILLERS.get(name).__module__.startswith("mdistill.")]

SETTINGS: dict[str, dict[str, Any]] = {
    "vanilla": {"ce_weight": 1.0},
    "kd": {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0},
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
        "instance": True,
        "sample": True,
        "category": True,
    },
}


def network(seed: int, classes: int = CLASSES) -> nn.Module:
    """A classifier of 3 x 2 x 2 images with a BatchNorm, so that its mode shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, classes))


def data_info(**changes: Any) -> DataInfo:
    values = {"num_classes": CLASSES, "num_samples": SAMPLES, "image_size": 2, "num_views": None, "batch_size": BATCH}
    return DataInfo(**{**values, **changes})


def build(name: str, *, data: DataInfo | None = None, **changes: Any) -> Distiller:
    """The method with its example settings, over tiny networks."""
    builder = DISTILLERS.get(name)
    teacher = None if builder.needs.teacher == "none" else network(1)  # type: ignore[attr-defined]
    return DISTILLERS.build(name, network(0), teacher, data or data_info(), **{**SETTINGS[name], **changes})


def batch(seed: int = 0, size: int = BATCH, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    values = {
        "image": torch.randn(size, 3, 2, 2, generator=generator).to(dtype),
        "target": torch.randint(CLASSES, (size,), generator=generator),
        "index": torch.randperm(SAMPLES, generator=generator)[:size],
        "view": torch.zeros(size, dtype=torch.int64),
    }
    return Batch(**{**values, **changes})


def epoch(number: int = 1) -> Tensor:
    return torch.tensor(number)


def step(distiller: Distiller, of: Batch, number: int = 1, lr: float = 0.0) -> Tensor:
    """One plain training step; the loss before it."""
    distiller.train()
    distiller.zero_grad()
    loss = distiller(of, epoch(number)).total
    loss.backward()
    with torch.no_grad():
        for group in distiller.param_groups():
            for parameter in group["params"]:
                parameter -= lr * parameter.grad
        distiller.after_step()
    return loss.detach()


def logits(seed: int, size: int, classes: int, scale: float = 3.0) -> Tensor:
    """Random logits (size, classes) in float64."""
    return scale * torch.randn(size, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(seed: int, size: int, classes: int) -> Tensor:
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))
