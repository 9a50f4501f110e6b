"""The contract of a distillation method. Letters: B batch, C classes; H, W height and width.

A method is one file with one class: it says what it ``needs`` and writes ``distillation(signals)``. The forward pass of
both networks, the task loss, logit standardisation and the loss warm-up are written here, once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import Batch, DataInfo
from mdistill.distillers.functional import standardize
from mdistill.errors import UserError
from mdistill.models.base import Features
from mdistill.optim.averaging import AveragedNetwork, Decay
from mdistill.precision import Precision, computing, widen
from mdistill.registry import NonNegative, NonNegativeInt, PositiveInt, Registry

DISTILLERS: Registry["Distiller"] = Registry("method")


@dataclass(frozen=True)
class Needs:
    """All that the engine asks about a method."""

    teacher: Literal["none", "logits", "features"] = "logits"
    student: Literal["logits", "features"] = "logits"  # its features come with the teacher's in any case
    views: Literal[1, 2] = 1  # 2: a strongly augmented one too
    labels: Literal["none", "hard", "soft"] = "hard"  # its own terms': none, a class, or also the shares of classes

    @property
    def student_features(self) -> bool:
        """Whether the student runs by ``forward_features``."""
        return "features" in (self.student, self.teacher)


@dataclass(frozen=True)
class StepOutput:
    """Named, already weighted scalars; the loss is their sum."""

    logits: Tensor  # (B, C), the headline student's, raw
    target: Tensor  # (B,) or (B, C), the labels of the images that were trained on
    task: dict[str, Tensor] = field(default_factory=dict)
    distillation: dict[str, Tensor] = field(default_factory=dict)

    @property
    def terms(self) -> dict[str, Tensor]:
        """Every term of the loss by name."""
        return {**self.task, **self.distillation}

    @property
    def total(self) -> Tensor:
        """The loss: the sum of all terms, ()."""
        return torch.stack(list(self.terms.values())).sum()


@dataclass(frozen=True)
class Signals:
    """What ``distillation`` reads. Logits and features are float32 or wider, whatever the networks ran in."""

    student_logits: Tensor  # (B, C), standardised when the method's settings ask for it
    teacher_logits: Tensor  # (B, C), the same; of zero width for a method that needs no teacher
    raw_student_logits: Tensor  # (B, C)
    raw_teacher_logits: Tensor  # (B, C)
    target: Tensor  # (B,) int64; of mixed images, where ``needs.labels`` is not "hard", (B, C)
    index: Tensor  # (B,) int64, which training sample
    epoch: Tensor  # (), counted from 1
    student_features: Features | None = None  # when needs.student or needs.teacher is "features"
    teacher_features: Features | None = None  # when needs.teacher is "features"
    strong: "Signals | None" = None  # the same for the second view, when needs.views is 2


class Distiller(nn.Module, ABC):
    """Wraps student and teacher; turns a batch into named losses.

    Args:
        student: the network that is trained, (B, 3, H, W) -> (B, C).
        teacher: the frozen network, or None for a method that needs none.
        data: what is known of the data set.
        ce_weight: weight of the cross-entropy between the raw student logits and the labels; 0 leaves it out.
        warmup_epochs: W of min(epoch / W, 1), which multiplies every distillation term; 0 for no warm-up.
        standardize_logits: z-score both networks' logits over the classes before the method sees them
            (Sun et al., "Logit Standardization in Knowledge Distillation", arXiv:2403.01427).
        ema_decay: keep an exponential moving average of the student's weights, evaluated beside it as "ema".
        average_from: keep the plain average of the student's weights from this epoch on, evaluated as "average"
            (Berezovskiy, Morozov, "Weight Averaging Improves Knowledge Distillation under Domain Shift",
            arXiv:2309.11446, which averages the whole run: 1).
    """

    needs: ClassVar[Needs] = Needs()
    student: nn.Module
    teacher: nn.Module | None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        ce_weight: NonNegative,
        warmup_epochs: NonNegativeInt = 0,
        standardize_logits: bool = False,
        ema_decay: Decay | None = None,
        average_from: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        if teacher is None and self.needs.teacher != "none":
            raise UserError(
                f"{type(self).__name__} needs a teacher and the configuration has none: add teacher: {{...}}"
            )
        if teacher is not None and self.needs.teacher == "none":
            raise UserError(f"{type(self).__name__} takes no teacher: remove teacher: from the configuration")
        self.student = student
        self.teacher = teacher
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        self.ce_weight = ce_weight
        self.warmup_epochs = warmup_epochs
        self.standardize_logits = standardize_logits
        self.averages: dict[str, AveragedNetwork] = {}
        if ema_decay is not None:
            self.ema = self.averages["ema"] = AveragedNetwork(student, decay=ema_decay)
        if average_from is not None:
            self.average = self.averages["average"] = AveragedNetwork(student, first_epoch=average_from)
        self._epoch: Tensor | None = None  # of the step under way
        self.generators: dict[str, torch.Generator] = {}  # of a method that draws within a step; checkpointed
        self.student_precision: Precision | None = None  # what the engine runs the networks in; None: as it comes
        self.teacher_precision: Precision | None = None

    def require_a_term(self, **weights: float) -> None:
        """Refuse, when a method is built, a loss without any term: ``ce_weight`` and all of ``weights`` are 0.

        Raises:
            UserError: names every weight.
        """
        if self.ce_weight == 0 and not any(weights.values()):
            raise UserError(
                f"distiller: {type(self).__name__} has nothing to train on:"
                f" {', '.join(['ce_weight', *weights])} all 0 or switched off; turn one on"
            )

    @abstractmethod
    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The method: named, weighted scalars, before the loss warm-up."""

    def task(self, signals: Signals) -> dict[str, Tensor]:
        """The supervised terms; by default ``ce_weight`` times cross-entropy on the raw student logits."""
        if self.ce_weight == 0:
            return {}
        return {"ce": self.ce_weight * F.cross_entropy(signals.raw_student_logits, signals.target)}

    def forward(self, batch: Batch, epoch: Tensor) -> StepOutput:
        """Run both networks on ``batch`` and weigh the losses; ``epoch`` is a () tensor counted from 1."""
        if batch.kept is not None:
            batch = self._least_certain(batch, batch.kept)
        signals = self._look(batch, epoch)
        if self.needs.views > 1:  # a second pass, so that BatchNorm sees one view at a time
            assert batch.strong_image is not None
            strong = self._look(replace(batch, image=batch.strong_image, teacher_logits=None), epoch)
            signals = replace(signals, strong=strong)
        with torch.autocast(batch.image.device.type, enabled=False):  # float32, also under a caller's autocast
            terms, task = self.distillation(signals), self.task(signals)
        if self.averages and self.training and torch.is_grad_enabled():
            self._epoch = epoch
        if self.warmup_epochs:
            ramp = (epoch / self.warmup_epochs).clamp(max=1.0)
            terms = {name: ramp * term for name, term in terms.items()}
        return StepOutput(signals.raw_student_logits, batch.target, task=task, distillation=terms)

    @property
    def fits_labels(self) -> bool:
        """Whether cross-entropy fixes the scale of the logits, so that losses on the labels compare."""
        return self.ce_weight > 0

    def after_step(self) -> None:
        """Write the method's own state (queues, memories); called under no_grad once the solver has stepped."""

    def finish_step(self) -> None:
        """All that follows the solver's step: the method's own state, then the averages of the student's weights."""
        self.after_step()
        if self._epoch is not None:
            for average in self.averages.values():
                average.update(self.student, self._epoch)
            self._epoch = None

    def param_groups(self) -> list[dict[str, Any]]:
        """What the solver trains: everything that needs a gradient."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def students(self) -> dict[str, nn.Module]:
        """The networks to evaluate and export; the first is the headline."""
        return {"student": self.student, **{name: average.network for name, average in self.averages.items()}}

    def training_state(self) -> dict[str, Tensor]:
        """All parameters and buffers but the teacher's."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("teacher.")}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``training_state``; the teacher stays as it is."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.startswith("teacher.")]
        if missing or unexpected:
            raise UserError(
                f"saved state does not fit {type(self).__name__}: missing {missing}, unexpected {unexpected}"
            )

    def train(self, mode: bool = True) -> "Distiller":
        """Switch the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def _look(self, batch: Batch, epoch: Tensor) -> Signals:
        """Both networks on the images of ``batch``, the student first."""
        student_logits, student_features = self._run(
            self.student, batch.image, self.student_precision, features=self.needs.student_features
        )
        with torch.no_grad():
            teacher_logits, teacher_features = self._ask_teacher(batch, student_logits)
        return Signals(
            student_logits=standardize(student_logits) if self.standardize_logits else student_logits,
            teacher_logits=standardize(teacher_logits) if self.standardize_logits else teacher_logits,
            raw_student_logits=student_logits,
            raw_teacher_logits=teacher_logits,
            target=batch.target if batch.target.ndim == 1 else batch.target.to(student_logits.dtype),
            index=batch.index,
            epoch=epoch,
            student_features=student_features,
            teacher_features=teacher_features,
        )

    @torch.no_grad()
    def _least_certain(self, batch: Batch, count: int) -> Batch:
        """The ``count`` images of ``batch`` whose prediction by the teacher has the highest entropy, in their order."""
        assert self.teacher is not None
        logits, _ = self._run(self.teacher, batch.image, self.teacher_precision, features=False)
        log_probs = F.log_softmax(logits, dim=1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=1)
        chosen = entropy.topk(count).indices.sort().values
        return batch.select(chosen, teacher_logits=logits.index_select(0, chosen))

    def _run(
        self, network: nn.Module, image: Tensor, precision: Precision | None, *, features: bool
    ) -> tuple[Tensor, Features | None]:
        with computing(precision, image.device):
            if not features:
                return widen(network(image)), None
            found = _all_wide(network.forward_features(image))  # type: ignore[operator]
        return found.logits, found

    def _ask_teacher(self, batch: Batch, student_logits: Tensor) -> tuple[Tensor, Features | None]:
        if batch.teacher_logits is not None and self.needs.teacher != "features":
            return widen(batch.teacher_logits), None
        if self.teacher is None:
            return student_logits.new_zeros(len(student_logits), 0), None
        return self._run(self.teacher, batch.image, self.teacher_precision, features=self.needs.teacher == "features")


def _all_wide(features: Features) -> Features:
    return Features(
        logits=widen(features.logits),
        stages=tuple(widen(stage) for stage in features.stages),
        preacts=None if features.preacts is None else tuple(widen(preact) for preact in features.preacts),
        last_map=widen(features.last_map),
        pooled=widen(features.pooled),
    )
