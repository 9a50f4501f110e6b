"""The kinds of pictures: from records of runs, and for some from their networks, to a figure and what it says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mdistill.errors import UserError, plural, shown, suggestion
from mdistill.reporting import class_logits, drawing, figures
from mdistill.reporting.records import HEADLINE, Record
from mdistill.reporting.series import by_pair, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from mdistill.reporting.outputs import Networks, Outputs

MOST_PANELS = 4


@dataclass(frozen=True)
class Options:
    """What a user may choose of a picture."""

    title: str = ""
    metric: str = HEADLINE
    classes: Sequence[str] = ()  # names, or numbers from 0
    image: int | None = None  # number of an image of the split
    matrix: str = "correlation"  # or "means"
    scale: float | None = None  # the end of a scale of colours
    top: int = 10  # classes
    bins: int = 15
    temperature: float = 1.0
    perplexity: float = 30.0
    role: str = "student"  # or "teacher", whose logits
    seed: int = 0
    epochs: int | None = None  # about how many of them a curve has; None for all


@dataclass(frozen=True)
class Picture:
    """A figure, and its content in words."""

    figure: "Figure"
    lines: Sequence[str]  # what it shows, for a terminal and for those who cannot see it
    left_out: Sequence[str] = ()  # what it does not show, and why


def curves(records: Sequence[Record], options: Options, networks: "Networks | None") -> Picture:
    """Learning curves; series without the metric are left out."""
    groups_of = by_pair(records)
    found = {title: figures.learning(groups, options.metric, options.epochs) for title, groups in groups_of.items()}
    panels = {title: bands for title, bands in found.items() if bands}
    if not panels:
        known = figures.metrics_of([each for groups in groups_of.values() for each in groups])
        raise UserError(
            f"{records[0].folder}: {shown(options.metric)} is at no epoch here{suggestion(options.metric, known)}"
            f" (there is: {', '.join(known) or 'nothing yet'})"
        )
    ylabel = {"test/top1": "test top-1 (%)", "test/top5": "test top-5 (%)"}.get(options.metric, options.metric)
    lines = [
        f"{title}: {each.label}: {each.last} after epoch {each.epochs[-1]}, {plural(each.seeds, 'seed')}"
        for title, bands in panels.items()
        for each in bands
    ]
    left_out = [
        f"{title}: {each.label}: {shown(options.metric)} is at no common epoch of its runs"
        for title, groups in groups_of.items()
        for each in groups
        if each.label not in {band.label for band in found[title]}
    ]
    looks = drawing.styles_of([each.label for groups in groups_of.values() for each in groups])
    return Picture(drawing.curves(panels, looks, title=options.title, ylabel=ylabel), lines, left_out)


def time(records: Sequence[Record], options: Options, networks: "Networks | None") -> Picture:
    """Time against accuracy; extra parameters that no record tells are counted by building the run again, if it can."""
    left_out: list[str] = []
    if networks is not None:
        counts: dict[str, int | None] = {}
        for record in records:
            if record.extra_parameters is None and record.identity not in counts:
                try:
                    counts[record.identity] = networks.extra_parameters(record.folder)
                except UserError as error:
                    counts[record.identity] = None
                    left_out.append(f"extra parameters of {record.folder}: {error}")
        records = [
            each.noting("parameters", {"extra": counts[each.identity]}) if each.identity in counts else each
            for each in records
        ]
    groups = series(records)
    points = figures.costs(groups)
    if not points:
        raise UserError(f"{records[0].folder}: no finished run here whose record tells images per second")
    looks = drawing.styles_of([each.label for each in groups])
    return Picture(drawing.cost(points, looks, title=options.title), [each.text for each in points], left_out)


def teachers(records: Sequence[Record], options: Options, networks: "Networks | None") -> Picture:
    """Teacher accuracy against student accuracy."""
    lines = figures.by_teacher(series(records))
    if not lines:
        raise UserError(f"{records[0].folder}: no finished run here has a teacher of known accuracy")
    words = [
        f"{label} by {each.teacher} ({each.teacher_top1:.2f} %): {each.top1:.2f}"
        + (f" ± {each.deviation:.2f}" if each.deviation else "")
        + each.left_out
        for label, line in lines.items()
        for each in line
    ]
    return Picture(drawing.teachers(lines, title=options.title), words)


def tsne(records: Sequence[Record], options: Options, networks: "Networks | None") -> Picture:
    """t-SNE of the features before the classifier."""
    from mdistill.reporting.outputs import embed

    panels = _panels(records)
    assert networks is not None
    outputs = [networks.student(record.folder, pooled=True) for record in panels.values()]
    chosen = _numbers(options.classes, outputs[0])
    features, targets = [], []
    for each in outputs:
        assert each.pooled is not None
        keep = sum((each.target == number for number in chosen), each.target < 0) if chosen else each.target >= 0
        features.append(each.pooled[keep])
        targets.append(each.target[keep].numpy())
    points = embed(features, seed=options.seed, perplexity=options.perplexity)
    names = [_class_name(number, outputs[0]) for number in sorted(chosen)]
    figure = drawing.scatter(
        dict(zip(panels, zip(points, targets, strict=True), strict=True)), names, title=options.title
    )
    return Picture(figure, [f"{label}: {len(each)} images" for label, each in zip(panels, features, strict=True)])


def differences(
    kind: str, records: Sequence[Record], options: Options, networks: "Networks | None"
) -> "dict[str, Tensor]":
    """How far each student is from its teacher: matrices over classes, or for "logits" one number a class."""
    found: dict[str, Tensor] = {}
    assert networks is not None
    for label, record in _panels(records).items():
        student, teacher = networks.student(record.folder), networks.teacher(record.folder)
        if kind == "logits":
            found[label] = class_logits.class_difference(student.logits, teacher.logits)
        elif options.matrix == "means":
            both = [class_logits.class_means(each.logits, each.target) for each in (student, teacher)]
            found[label] = class_logits.matrix_difference(*both)
        else:
            both = [class_logits.logit_correlation(each.logits) for each in (student, teacher)]
            found[label] = class_logits.matrix_difference(*both)
    return found


def correlation(records: Sequence[Record], options: Options, networks: "Networks | None") -> Picture:
    """The absolute difference of the student's and the teacher's matrix over classes."""
    found = differences("correlation", records, options, networks)
    words = "|student - teacher|, " + ("mean logits" if options.matrix == "means" else "correlation of logits")
    return _heat(found, {label: each.tolist() for label, each in found.items()}, words, options)


def logits(records: Sequence[Record], options: Options, networks: "Networks | None") -> Picture:
    """The absolute difference of the logits of each class, as a rectangle of classes."""
    found = differences("logits", records, options, networks)
    nan = float("nan")
    rectangles = {
        label: [[nan if value is None else value for value in row] for row in figures.folded(each.tolist())]
        for label, each in found.items()
    }
    return _heat(found, rectangles, "|student - teacher|, mean over images", options, folded=True)


def _heat(
    found: "Mapping[str, Tensor]", matrices: Mapping[str, Any], words: str, options: Options, *, folded: bool = False
) -> Picture:
    """``matrices`` with what they hold on the whole in their titles."""
    lines = [
        f"{label}: mean {float(each.mean()):.4f}, largest {float(each.max()):.4f}" for label, each in found.items()
    ]
    panels = {f"{label}\nmean {float(found[label].mean()):.3f}": matrix for label, matrix in matrices.items()}
    figure = drawing.matrices(panels, title=options.title, words=words, most=options.scale, folded=folded)
    return Picture(figure, lines)


def reliability(records: Sequence[Record], options: Options, networks: "Networks | None") -> Picture:
    """Accuracy by confidence."""
    assert networks is not None
    ask = networks.teacher if options.role == "teacher" else networks.student
    panels = {}
    for label, record in _panels(records).items():
        outputs = ask(record.folder)
        panels[label] = figures.bins(outputs.logits, outputs.target, options.bins)
    lines = [f"{label}: ECE {100 * each.error:.2f} % in {options.bins} bins" for label, each in panels.items()]
    return Picture(drawing.reliability(panels, title=options.title), lines)


def agreement(records: Sequence[Record], options: Options, networks: "Networks | None") -> Picture:
    """Top-1 agreement with the teacher, and the mean KL divergence from it, over seeds."""
    from mdistill.engine import fidelity

    assert networks is not None
    panels: dict[str, dict[str, tuple[float, float]]] = {}
    lines, left_out = [], list[str]()
    for each in series(records):
        if not each.first.teacher:
            continue
        try:
            both = [(networks.student(run.folder), networks.teacher(run.folder)) for run in each.runs]
        except UserError as error:
            left_out.append(f"{each.label}: {error}")
            continue
        pairs = [(student.logits, teacher.logits) for student, teacher in both]
        same = [100.0 * float(fidelity.agreement(*pair).double().mean()) for pair in pairs]
        kl = [float(fidelity.divergence(*pair, options.temperature).mean()) for pair in pairs]
        at = "" if options.temperature == 1 else f", T = {options.temperature:g}"
        for quantity, values in (("top-1 agreement (%)", same), (f"mean KL (nats{at})", kl)):
            panels.setdefault(quantity, {})[each.label] = figures.mean_deviation(values)
        lines.append(
            f"{each.label}: agreement {fmean(same):.2f} %, KL {fmean(kl):.4f} nats{at}, {plural(len(same), 'seed')}"
        )
    if not panels and left_out:
        raise UserError(left_out[0])
    if not panels:
        raise UserError(f"{records[0].folder}: a run without a teacher; this picture compares a student with one")
    return Picture(drawing.bars(panels, title=options.title), lines, left_out)


def classes(records: Sequence[Record], options: Options, networks: "Networks | None") -> Picture:
    """The highest mean logits of the images of some classes, and the highest logits of one image."""
    assert networks is not None
    if len(records) > 1:
        raise UserError(f"this picture shows one network, found {len(records)} runs: name one")
    (record,) = records
    outputs = (networks.teacher if options.role == "teacher" else networks.student)(record.folder)
    numbers = _numbers(options.classes, outputs)
    if not numbers:
        raise UserError("--classes: name the classes to show: --classes leopard,television,dinosaur")
    panels: dict[str, list[tuple[str, float]]] = {}
    for number in numbers:
        found = class_logits.nearest_classes(outputs.logits, outputs.target, number, options.top)
        panels[f'images of "{_class_name(number, outputs)}"'] = [(_class_name(c, outputs), x) for c, x in found]
    if options.image is not None:
        if not 0 <= options.image < len(outputs.target):
            raise UserError(f"--image: found {options.image}, the images are 0 to {len(outputs.target) - 1}")
        value, index = outputs.logits[options.image].topk(min(options.top, outputs.logits.shape[1]))
        name = _class_name(int(outputs.target[options.image]), outputs)
        best = [(_class_name(int(c), outputs), float(x)) for c, x in zip(index, value, strict=True)]
        panels[f'image {options.image}, a "{name}"'] = best
    lines = [f"{label}: {', '.join(f'{name} {x:.2f}' for name, x in panel)}" for label, panel in panels.items()]
    return Picture(drawing.nearest(panels, title=options.title), lines)


@dataclass(frozen=True)
class Kind:
    """One kind of picture."""

    draw: "Callable[[Sequence[Record], Options, Networks | None], Picture]"
    line: str
    networks: bool  # whether it runs the networks of the runs


KINDS: Mapping[str, Kind] = {
    "curves": Kind(curves, "learning curves, with a band over seeds", False),
    "time": Kind(time, "time of a batch against accuracy, circles by extra parameters", True),
    "teachers": Kind(teachers, "teacher accuracy against student accuracy, a line for each method", False),
    "tsne": Kind(tsne, "t-SNE of the features before the classifier, a panel for each run", True),
    "correlation": Kind(correlation, "how far the student's correlations of logits are from the teacher's", True),
    "logits": Kind(logits, "how far the student's logits are from the teacher's, for each class", True),
    "reliability": Kind(reliability, "accuracy by confidence, and the expected calibration error", True),
    "agreement": Kind(agreement, "how often student and teacher agree, and the mean KL divergence", True),
    "classes": Kind(classes, "which classes a network takes the images of a class for", True),
}


def kind_of(name: str) -> Kind:
    """The kind called ``name``.

    Raises:
        UserError: there is none.
    """
    if name not in KINDS:
        raise UserError(f"unknown kind of picture {name!r}{suggestion(name, KINDS)} (kinds: {', '.join(KINDS)})")
    return KINDS[name]


def _panels(records: Sequence[Record]) -> dict[str, Record]:
    """Each run with a title that tells it from the others.

    Raises:
        UserError: there are more than fit.
    """
    if len(records) > MOST_PANELS:
        raise UserError(f"this picture has a panel for each run and at most {MOST_PANELS}, found {len(records)} runs")
    titled = [
        (each.label if len(each.runs) == 1 else f"{each.label}, seed {run.seed}", run)
        for each in series(records)
        for run in each.runs
    ]
    titles = [title for title, _ in titled]
    return {f"{title}, {run.folder}" if titles.count(title) > 1 else title: run for title, run in titled}


def _numbers(chosen: Sequence[str], outputs: "Outputs") -> list[int]:
    """The numbers of the classes that a user named."""
    count, names = outputs.logits.shape[1], list(outputs.class_names)
    numbers: list[int] = []
    for text in chosen:
        if text in names:
            numbers.append(names.index(text))
        elif text.isdecimal() and int(text) < count:
            numbers.append(int(text))
        else:
            known = f"the {len(names)} classes of the data set" if names else "no names are known of these classes"
            raise UserError(
                f"--classes: no class {text!r}{suggestion(text, names)} (allowed: a number from 0 to {count - 1}, or"
                f" a name; {known})"
            )
    return list(dict.fromkeys(numbers))


def _class_name(number: int, outputs: "Outputs") -> str:
    return str(outputs.class_names[number]) if outputs.class_names else str(number)


def draw(name: str, records: Sequence[Record], options: Options, networks: "Networks | None" = None) -> Picture:
    """The picture called ``name``.

    Raises:
        UserError: there is no such kind, or it cannot be made from these runs.
    """
    return kind_of(name).draw(records, options, networks)


def describe(lines: Sequence[Any]) -> str:
    """The content of a picture in one text."""
    return "; ".join(map(str, lines))
