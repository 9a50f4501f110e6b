"""The contract of a distillation method. Letters: B batch, C classes; H, W height and width.

A method is one class, in a file of its paper: it says what it ``needs`` and writes ``distillation(signals)``. The
forward pass of both networks, the task loss, logit standardisation and the loss warm-up are written here, once.

A run has one phase, or several: ``phases`` names the first ones of a method, each with a loss, ``first_phase``, and a
solver of its own, and ``trained`` says what a phase trains. The last phase, called None, is that of ``distillation``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill import distributed
from mdistill.data.batch import Batch, DataInfo
from mdistill.data.mixing import least_certain
from mdistill.distillers.functional import standardize
from mdistill.errors import UserError, shown
from mdistill.models.base import Features
from mdistill.models.layers import count_batches
from mdistill.models.memory_format import to_layout
from mdistill.precision import Precision, computing, widen
from mdistill.registry import NonNegative, NonNegativeInt, Registry

DISTILLERS: Registry["Distiller"] = Registry("method")

FeatureName = Literal["stages", "preacts", "last_map", "pooled"]


@dataclass(frozen=True)
class Needs:
    """All that the engine asks about a method."""

    teacher: Literal["none", "logits", "pooled", "features"] = "logits"  # "pooled": these features and the logits
    student: Literal["logits", "features"] = "logits"  # its features come with the teacher's in any case
    features: tuple[FeatureName, ...] = ("stages", "preacts", "last_map", "pooled")  # those that are used
    views: Literal[1, 2] = 1  # 2: a strongly augmented one too
    labels: Literal["none", "hard", "soft"] = "hard"  # its own terms': none, a class, or class probabilities too
    sparse_logits: tuple[str, ...] | None = None  # settings that have to be 1 to read them; None: never
    teacher_batch_statistics: bool = False  # the teacher's BatchNorm normalises by the batch; its statistics stay
    class_distances: str | None = None  # the setting that says by what, "last_map" or "logits"; None: needs none

    @property
    def student_features(self) -> bool:
        """Whether the student runs by ``forward_features``."""
        return self.student == "features" or self.teacher_features

    @property
    def teacher_features(self) -> bool:
        """Whether a teacher that runs in the step does so by ``forward_features``."""
        return self.teacher in ("pooled", "features")


@dataclass(frozen=True)
class Signals:
    """What ``distillation`` is given: logits, and the features it needs, in float32 or wider."""

    student_logits: Tensor  # (B, C), standardised when the method's settings ask for it
    teacher_logits: Tensor  # (B, C), the same; of zero width for a method that needs no teacher
    raw_student_logits: Tensor  # (B, C)
    raw_teacher_logits: Tensor  # (B, C)
    target: Tensor  # (B,) int64; of mixed images in the place of plain ones (``needs.labels`` is not "hard") (B, C)
    index: Tensor  # (B,) int64, which training sample
    epoch: Tensor  # (), counted from 1 over all phases
    seed: int = 0  # of the run, for draws within a step: ``functional.uniform``
    student_features: Features | None = None  # when needs.student is "features", or the teacher's are needed
    teacher_features: Features | None = None  # when needs.teacher is "features"
    teacher_pooled: Tensor | None = None  # (B, D), when needs.teacher is "pooled"
    strong: "Signals | None" = None  # the same for the second view, when needs.views is 2
    computed: dict[str, Tensor] = field(default_factory=dict)  # what ``distillation`` leaves for ``after_step``


@dataclass(frozen=True)
class StepOutput:
    """Named, already weighted scalars; the loss is their sum."""

    logits: Tensor  # (B, C), the student's, raw
    target: Tensor  # (B,) or (B, C), the labels of the images that were trained on
    task: dict[str, Tensor]
    distillation: dict[str, Tensor]
    signals: Signals  # what the terms were computed from, for ``after_step``
    share: float = 1.0  # of the images of the step, over all processes that train together, that are here

    @property
    def terms(self) -> dict[str, Tensor]:
        """Every term of the loss by name."""
        return {**self.task, **self.distillation}

    @property
    def total(self) -> Tensor:
        """The loss: the sum of all terms, ()."""
        return torch.stack(list(self.terms.values())).sum()


class Distiller(nn.Module, ABC):
    """Wraps student and teacher; turns a batch into named losses.

    A method may own modules (projectors, heads), which the solver trains and checkpoints hold; ``run_module`` runs them
    in the student's precision. State that it keeps between steps lies in buffers, written in ``after_step`` alone.

    Args:
        student: the network that is trained, (B, 3, H, W) -> (B, C).
        teacher: the frozen network, or None for a method that needs none.
        data: what is known of the data set.
        ce_weight: weight of the cross-entropy between the raw student logits and the labels; 0 leaves it out.
        warmup_epochs: W of min(epoch / W, 1), which multiplies every distillation term; 0 for no warm-up.
        standardize_logits: z-score both networks' logits over the classes before the method sees them
            (Sun et al., "Logit Standardization in Knowledge Distillation", arXiv:2403.01427).
        label_smoothing: epsilon of (1 - epsilon) y + epsilon / C, which replaces the labels y, one-hot or soft, in the
            cross-entropy of ``task`` alone (Szegedy et al., arXiv:1512.00567, Section 7).
    """

    needs: Needs = Needs()  # a setting that changes them does so before ``super().__init__``, for its instance alone
    phases: ClassVar[tuple[str, ...]] = ()  # what comes before the last phase, in order
    needs_at_last: ClassVar[Needs | None] = None  # of the last phase, where that reads less than ``needs``
    smooths_labels: ClassVar[bool] = False  # whether a ``task`` of the method's own heeds label_smoothing
    student: nn.Module
    teacher: nn.Module | None
    class_distances: Tensor  # (C, C), 1 - CKA of the teacher's outputs for two classes, where ``needs`` asks for them

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        ce_weight: NonNegative,
        warmup_epochs: NonNegativeInt = 0,
        standardize_logits: bool = False,
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        if teacher is None and self.needs.teacher != "none":
            raise UserError(
                f"{type(self).__name__} needs a teacher and the configuration has none: add teacher: {{...}}"
            )
        if teacher is not None and self.needs.teacher == "none":
            raise UserError(f"{type(self).__name__} takes no teacher: remove teacher: from the configuration")
        if label_smoothing and ce_weight == 0:
            raise UserError(
                f"distiller.label_smoothing: {label_smoothing} is of the cross-entropy, which distiller.ce_weight: 0"
                " leaves out; set it to 0"
            )
        if label_smoothing and not self.smooths_labels and type(self).task is not Distiller.task:
            raise UserError(
                f"distiller.label_smoothing: {type(self).__name__} has a loss of its own on the labels, which does not"
                f" smooth them; set it to 0, found {label_smoothing}"
            )
        self.student = student
        self.teacher = teacher
        self._classes = data.num_classes
        if self.needs.class_distances is not None:  # the engine writes them before the first step
            self.register_buffer("class_distances", torch.zeros(data.num_classes, data.num_classes))
        if teacher is not None:
            teacher.requires_grad_(False)
            self._set_teacher_mode(teacher)
        self.ce_weight = ce_weight
        self.warmup_epochs = warmup_epochs
        self.standardize_logits = standardize_logits
        self.label_smoothing = label_smoothing
        self.seed = 0  # of the run; set by the engine, as what the networks run in (None: as it comes)
        self.phase: str | None = None  # the one under way
        self.epochs_before = 0  # in the phases before it
        self._fixed: frozenset[str] | None = None  # weights that no phase trains, once ``enter_phase`` was called
        self._rank_counts: tuple[int, ...] = ()  # ``Batch.rank_counts`` of the step
        self.student_precision: Precision | None = None
        self.teacher_precision: Precision | None = None

    # ---- what a method writes ----

    @abstractmethod
    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The method: named, weighted scalars, before the loss warm-up."""

    def task(self, signals: Signals) -> dict[str, Tensor]:
        """The supervised terms; by default ``ce_weight`` times cross-entropy on the raw student logits."""
        if self.ce_weight == 0:
            return {}
        smoothing = self.label_smoothing
        ce = F.cross_entropy(signals.raw_student_logits, signals.target, label_smoothing=smoothing)
        return {"ce": self.ce_weight * ce}

    def after_step(self, signals: Signals) -> None:
        """Write the method's own state (queues, memories), once the solver has stepped; called under no_grad.

        Args:
            signals: those of the step, as ``distillation`` saw them; what that computed by weights that the solver has
                changed since, it leaves in ``signals.computed``.
        """

    def first_phase(self, phase: str, signals: Signals) -> dict[str, Tensor]:
        """The loss of one of ``phases``: named, weighted scalars; no task term or warm-up joins them."""
        raise NotImplementedError

    def trained(self, phase: str | None) -> Iterable[nn.Module]:
        """The modules that ``phase`` trains, of a method with ``phases``; all others are frozen and in eval mode.

        By default all but the teacher.
        """
        return [module for name, module in self.named_children() if name != "teacher"]

    def students(self) -> dict[str, nn.Module]:
        """The networks to evaluate and export, the headline first; by default the bare student.

        Another network at inference (such as student, projector and the teacher's classifier) is returned in its place.
        """
        return {"student": self.student}

    def param_groups(self) -> list[dict[str, Any]]:
        """What the solver trains: everything that needs a gradient; ``lr_scale`` in a group multiplies its rate."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    # ---- the step ----

    def forward(self, batch: Batch, epoch: Tensor) -> StepOutput:
        """Both networks on ``batch``, then the weighted losses; ``epoch`` is a () tensor counted from 1.

        Where mixed images lie beside the plain ones, ``distillation`` is asked for both, and its terms on the mixed
        ones are named ``<term>_mixed``; ``task`` and ``after_step`` see the plain ones alone.

        Raises:
            UserError: a network or the method returned something else than it should.
        """
        self._rank_counts = batch.rank_counts
        batch = self._picked(batch)
        signals, mixed = self._signals(batch, epoch), None
        if batch.mixed is not None and self.phase is None:
            mixed = self._signals(self._picked(batch.mixed), epoch)
        task: dict[str, Tensor] = {}
        with torch.autocast(batch.image.device.type, enabled=False):  # float32, also under a caller's autocast
            if self.phase is not None:
                distillation = self._checked_terms("first_phase", self.first_phase(self.phase, signals))
            else:
                distillation = self._checked_terms("distillation", self.distillation(signals))
                if mixed is not None:
                    beside = self._checked_terms("distillation", self.distillation(mixed))
                    beside = {f"{name}_mixed": term for name, term in beside.items()}
                    distillation = {**distillation, **self._checked_terms("distillation", beside, distillation)}
                task = self._checked_terms("task", self.task(signals), distillation)
        if self.warmup_epochs and self.phase is None:
            ramp = ((epoch - self.epochs_before) / self.warmup_epochs).clamp(max=1.0)
            distillation = {name: ramp * term for name, term in distillation.items()}
        images = len(batch.target)
        share = images / sum(batch.rank_counts) if batch.rank_counts else 1.0
        return StepOutput(signals.raw_student_logits, batch.target, task, distillation, signals, share)

    # ---- what methods and the engine call ----

    @property
    def fits_labels(self) -> bool:
        """Whether cross-entropy fixes the scale of the logits, so that losses on the labels compare."""
        return self.ce_weight > 0

    def enter_phase(self, phase: str | None, *, epochs_before: int = 0) -> None:
        """Go over to one of ``phases``, or with None to the last one; gradients of the one before are dropped.

        Args:
            epochs_before: in the phases before it.
        """
        self.phase, self.epochs_before = phase, epochs_before
        if not self.phases:
            return
        own = {name: weight for name, weight in self.named_parameters() if not name.startswith("teacher.")}
        if self._fixed is None:
            self._fixed = frozenset(name for name, weight in own.items() if not weight.requires_grad)
        trained = {id(weight) for module in self.trained(phase) for weight in module.parameters()}
        for name, weight in own.items():
            weight.grad = None
            weight.requires_grad_(id(weight) in trained and name not in self._fixed)
        self.train(self.training)

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

    def run_module(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """``module(*inputs)`` in the student's precision; the result in float32 or wider."""
        with computing(self.student_precision, inputs[0].device):
            return widen(module(*inputs))

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes that train together: (B, ...) -> (G, ...); alone, ``rows`` themselves.

        A term that is no mean over images (it relates images to each other, or divides by what it sums over them) is
        computed from gathered rows; its gradient reaches this process's own.
        """
        return distributed.gather(rows, self._rank_counts)

    def whole_batch(self, signals: Signals) -> Signals:
        """``signals`` of all processes that train together, without features, which ``gather`` takes one by one."""
        if not self._rank_counts:
            return signals
        rows: dict[str, Any] = {
            name: self.gather(getattr(signals, name))
            for name in ("student_logits", "teacher_logits", "target", "index")
        }
        for name in ("student_logits", "teacher_logits"):
            plain = getattr(signals, f"raw_{name}")
            rows[f"raw_{name}"] = rows[name] if plain is getattr(signals, name) else self.gather(plain)
        strong = None if signals.strong is None else self.whole_batch(signals.strong)
        rows |= {"student_features": None, "teacher_features": None, "teacher_pooled": None}
        return replace(signals, strong=strong, **rows)

    def train(self, mode: bool = True) -> "Distiller":
        """Switch the mode of what the phase trains; the rest, such as the teacher, stays in eval mode."""
        super().train(mode)
        if mode and self.phases:
            for name, module in self.named_children():
                if name != "teacher":
                    module.eval()
            for module in self.trained(self.phase):
                module.train()
        if self.teacher is not None:
            self._set_teacher_mode(self.teacher)
        return self

    @property
    def needs_now(self) -> Needs:
        """What the phase under way reads."""
        return self.needs if self.phase is not None or self.needs_at_last is None else self.needs_at_last

    def _set_teacher_mode(self, teacher: nn.Module) -> None:
        teacher.eval()
        if self.needs.teacher_batch_statistics:
            for module in teacher.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.track_running_stats = False  # in training mode nothing is then written
                    module.train()

    def _picked(self, batch: Batch) -> Batch:
        """``batch``, or those of its images of which the teacher or the student is least certain.

        The student looks in training mode, as in the released code, so that its BatchNorm statistics move.
        """
        if batch.keep is None:
            return batch
        if batch.pick == "student":
            with torch.no_grad():
                logits, _ = self._run_student(batch.image)
            count_batches(self.student)
            return batch.select(least_certain(logits, batch.keep), teacher_logits=None)
        logits, _ = self._run_teacher(batch.image)
        rows = least_certain(logits, batch.keep)
        return batch.select(rows, teacher_logits=logits.index_select(0, rows))

    def _signals(self, batch: Batch, epoch: Tensor) -> Signals:
        """What both networks make of ``batch``."""
        views: list[Signals] = []
        for image, known in self._views(batch):  # one after the other, so that BatchNorm sees one at a time
            student_logits, student_features = self._run_student(image)
            count_batches(self.student)
            teacher_features: Features | None = None
            teacher_pooled: Tensor | None = None
            if known is not None:
                teacher_logits, teacher_pooled = known
            elif self.teacher is not None and self.needs_now.teacher != "none":
                teacher_logits, teacher_features = self._run_teacher(image)
                if teacher_features is not None and self.needs_now.teacher == "pooled":
                    teacher_pooled, teacher_features = teacher_features.pooled, None
            else:
                teacher_logits = student_logits.new_zeros(len(student_logits), 0)
            views.append(
                Signals(
                    student_logits=standardize(student_logits) if self.standardize_logits else student_logits,
                    teacher_logits=standardize(teacher_logits) if self.standardize_logits else teacher_logits,
                    raw_student_logits=student_logits,
                    raw_teacher_logits=teacher_logits,
                    target=batch.target if batch.target.ndim == 1 else batch.target.to(student_logits.dtype),
                    index=batch.index,
                    epoch=epoch,
                    seed=self.seed,
                    student_features=student_features,
                    teacher_features=teacher_features,
                    teacher_pooled=teacher_pooled,
                )
            )
        return views[0] if len(views) == 1 else replace(views[0], strong=views[1])

    def _views(self, batch: Batch) -> Iterable[tuple[Tensor, tuple[Tensor, Tensor | None] | None]]:
        """The images (B, 3, H, W) of each view that the method needs, with what it needs of the teacher where known."""
        logits, pooled, read = batch.teacher_logits, batch.teacher_pooled, self.needs_now.teacher
        if logits is None or read == "features" or (read == "pooled" and pooled is None):
            yield batch.image, None
        else:
            yield batch.image, (widen(logits), None if pooled is None else widen(pooled))
        if self.needs.views > 1:
            assert batch.strong_image is not None
            yield batch.strong_image, None

    def _run_student(self, image: Tensor) -> tuple[Tensor, Features | None]:
        """Its logits and features; a method whose network at inference is another one returns that one's."""
        return self._run(self.student, image, self.student_precision, features=self.needs_now.student_features)

    @torch.no_grad()
    def _run_teacher(self, image: Tensor) -> tuple[Tensor, Features | None]:
        assert self.teacher is not None
        return self._run(self.teacher, image, self.teacher_precision, features=self.needs_now.teacher_features)

    def _run(
        self, network: nn.Module, image: Tensor, precision: Precision | None, *, features: bool
    ) -> tuple[Tensor, Features | None]:
        image = to_layout(network, image)
        with computing(precision, image.device):
            if not features:
                return self._checked_logits(network, network(image), len(image)), None
            computed: Features = network.forward_features(image)  # type: ignore[operator]
        if not isinstance(computed, Features):
            raise UserError(
                f"{type(network).__name__}.forward_features should return Features, found {_what(computed)}"
            )
        wide: dict[str, Any] = {name: _widened(getattr(computed, name)) for name in self.needs.features}
        logits = self._checked_logits(network, computed.logits, len(image))
        return logits, replace(computed, logits=logits, **wide)

    def _checked_logits(self, network: nn.Module, logits: Any, images: int) -> Tensor:
        """``logits`` in float32 or wider, if they are a network's: (B, C)."""
        wanted = (images, self._classes)
        if not isinstance(logits, Tensor) or logits.shape != wanted or not logits.is_floating_point():
            raise UserError(
                f"{type(network).__name__} should turn {images} images into logits of shape {wanted}, found"
                f" {_what(logits)}"
            )
        return widen(logits)

    def _checked_terms(self, part: str, terms: Any, others: Iterable[str] = ()) -> dict[str, Tensor]:
        """``terms`` if they are what ``part`` of a method should return: scalars by name, none of ``others``."""
        place = f"{type(self).__name__}.{part}"
        if not isinstance(terms, dict):
            raise UserError(f"{place} should return a dictionary of scalar tensors, found {_what(terms)}")
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.ndim or not term.is_floating_point():
                raise UserError(f"{place}: the term {shown(name)} should be a scalar tensor, found {_what(term)}")
            if not isinstance(name, str) or name in others:
                raise UserError(f"{place}: {shown(name)} is no name of its own for a term")
        if part != "distillation" and not terms and not others:
            raise UserError(f"{type(self).__name__} returned no term at all, so there is no loss")
        return terms


def _what(value: object) -> str:
    """A value in words, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} in {value.dtype}"
    return f"{shown(value, 60)}, a {type(value).__name__}"


def _widened(feature: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return widen(feature) if isinstance(feature, Tensor) else tuple(widen(each) for each in feature)
