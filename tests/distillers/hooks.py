"""Methods that exist for the tests alone: together they use every hook of the contract.

Importing this module registers them. Their settings are ``SETTINGS``; both networks may be any of the zoo.
Letters: B batch, N training samples, D and E the students' and the teacher's width, H and W height and width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mdistill.data.batch import DataInfo
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.functional import uniform
from mdistill.distillers.kd import kd_loss
from mdistill.models import trunk
from mdistill.models.base import Features
from mdistill.registry import Fraction, NonNegative, Positive

SETTINGS: dict[str, dict[str, Any]] = {
    "hooks_projector": {"ce_weight": 1.0, "map_weight": 1.0, "projector_lr_scale": 0.5},
    "hooks_memory": {"ce_weight": 1.0, "memory_weight": 1.0, "drop": 0.25},
    "hooks_phases": {"ce_weight": 1.0, "map_weight": 1.0, "warmup_epochs": 2},
    "hooks_batch_statistics": {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0},
}


def last_map_shape(network: nn.Module, image_size: int) -> torch.Size:
    """(D, H, W) of the network's last map, from a pass over an empty image that changes nothing in it."""
    training, like = network.training, next(network.parameters())
    with torch.no_grad():
        features: Features = network.eval().forward_features(like.new_zeros(1, 3, image_size, image_size))
    network.train(training)
    return features.last_map.shape[1:]


class Projected(nn.Module):
    """The student's last map through a projector into another network's classifier: (B, 3, H, W) -> (B, C)."""

    def __init__(self, network: nn.Module, projector: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.network, self.projector, self.classifier = network, projector, classifier

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.projector(self.network.forward_features(image).last_map).mean(dim=(2, 3)))


@DISTILLERS.register("hooks_projector")
class HooksProjector(Distiller):
    """A module, rates and a buffer of its own, and another network at inference than the bare student.

    Args:
        map_weight: weight of the projected map's distance to the teacher's, each less the teacher's running mean.
        projector_lr_scale: learning rate of the projector over that of the student.
    """

    needs = Needs(teacher="features", features=("last_map", "pooled"), labels="none")
    center: Tensor  # (E,), running mean of the teacher's pooled features

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        map_weight: Positive,
        projector_lr_scale: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        self.map_weight, self.projector_lr_scale = map_weight, projector_lr_scale
        (width, *_), (teacher_width, *_) = (last_map_shape(network, data.image_size) for network in (student, teacher))
        self.projector = nn.Conv2d(width, teacher_width, 1)
        self.register_buffer("center", torch.zeros(teacher_width))

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        assert signals.student_features is not None
        assert signals.teacher_features is not None
        projected = self.run_module(self.projector, signals.student_features.last_map.to(self.projector.weight.dtype))
        weight = (1 + self.center.square())[:, None, None]  # so that what a step writes shows in the next one's loss
        return {"map": self.map_weight * (weight * (projected - signals.teacher_features.last_map).square()).mean()}

    def after_step(self, signals: Signals) -> None:
        assert signals.teacher_features is not None
        pooled = self.gather(signals.teacher_features.pooled).mean(dim=0)
        self.center.lerp_(pooled.to(self.center.dtype), 0.1)

    def students(self) -> dict[str, nn.Module]:
        assert self.teacher is not None
        return {"student": Projected(self.student, self.projector, self.teacher.classifier), "bare": self.student}

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.student.parameters())},
            {"params": list(self.projector.parameters()), "lr_scale": self.projector_lr_scale},
        ]


@DISTILLERS.register("hooks_memory")
class HooksMemory(Distiller):
    """Draws within a step by counter, and a memory of all training samples.

    Args:
        memory_weight: weight of the student's distance to the mean of the teacher and the sample's memory.
        drop: fraction of the classes that a step leaves out, drawn for each sample.
    """

    needs = Needs(teacher="features", features=("pooled",), labels="none")
    memory: Tensor  # (N, C), the student's probabilities when it last saw the sample

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        memory_weight: NonNegative,
        drop: Fraction,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.memory_weight, self.drop = memory_weight, drop
        self.register_buffer("memory", torch.zeros(data.num_samples, data.num_classes))

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        keep = uniform(signals.seed, signals.epoch, signals.index, self.memory.shape[1]) >= self.drop  # (B, C)
        target = signals.teacher_logits.softmax(dim=1) + self.memory.index_select(0, signals.index)
        gap = signals.student_logits.softmax(dim=1) - target / 2
        return {"memory": self.memory_weight * (keep * gap.square()).sum(dim=1).mean()}

    def after_step(self, signals: Signals) -> None:
        probs = self.gather(signals.student_logits.softmax(dim=1))
        self.memory.index_copy_(0, self.gather(signals.index), probs.to(self.memory.dtype))


@DISTILLERS.register("hooks_phases")
class HooksPhases(Distiller):
    """Two first phases, which train other modules each; draws and a buffer of its own in all of them.

    Args:
        map_weight: weight of the projected features' distance to the teacher's, less their running mean.
    """

    needs = Needs(teacher="features", features=("pooled",), labels="none")
    phases = ("projector", "student")
    seen: Tensor  # (E,), running mean of the teacher's pooled features

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, data: DataInfo, *, map_weight: Positive, **shared: Any
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        self.map_weight = map_weight
        width, teacher_width = (last_map_shape(network, data.image_size)[0] for network in (student, teacher))
        self.projector = nn.Sequential(nn.Linear(width, teacher_width), nn.BatchNorm1d(teacher_width))
        self.trunk = trunk(student, data.image_size)
        self.register_buffer("seen", torch.zeros(teacher_width))

    def trained(self, phase: str | None) -> list[nn.Module]:
        first = {"projector": [self.projector], "student": self.trunk}
        return [self.student, self.projector] if phase is None else first[phase]

    def first_phase(self, phase: str, signals: Signals) -> dict[str, Tensor]:
        return {phase: self.distance(signals)}

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        return {"map": self.map_weight * self.distance(signals)}

    def distance(self, signals: Signals) -> Tensor:
        assert signals.student_features is not None
        assert signals.teacher_features is not None
        projected = self.run_module(self.projector, signals.student_features.pooled.to(self.projector[0].weight.dtype))
        gap = projected - signals.teacher_features.pooled + self.seen
        return (gap.square() * uniform(signals.seed, signals.epoch, signals.index, gap.shape[1])).mean()

    def after_step(self, signals: Signals) -> None:
        assert signals.teacher_features is not None
        self.seen.lerp_(self.gather(signals.teacher_features.pooled).mean(dim=0).to(self.seen.dtype), 0.1)


@DISTILLERS.register("hooks_batch_statistics")
class HooksBatchStatistics(Distiller):
    """KD from a teacher whose BatchNorm normalises by the batch.

    Args:
        kd_weight: weight of the distillation term.
        temperature: T, which softens both networks.
    """

    needs = Needs(teacher="features", features=("pooled",), labels="none", teacher_batch_statistics=True)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        kd_weight: Positive,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.kd_weight, self.temperature = kd_weight, temperature

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        loss = kd_loss(signals.student_logits, signals.teacher_logits, temperature=self.temperature)
        return {"kd": self.kd_weight * loss}
