"""Pictures from plain numbers, readable at the width of a phone; each function returns a figure of matplotlib.

Letters: C classes, K bins, N images.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistill.errors import UserError, suggestion
from mdistill.files import atomic_write
from mdistill.reporting.extras import extra
from mdistill.reporting.figures import Band, Bins, Cost, Taught, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b62a4", "#c1440e", "#1b7837", "#7b3294", "#8c510a", "#b5177a", "#4d4d4d", "#017a7a")
"""Of lines and bars: each has a contrast of at least 4.5 with white."""

Looks = Mapping[str, tuple[str, str]]
"""Colour and style of line of each label."""

INK, FAINT = "#222222", "#6b6b6b"
PALE = "#86b4d8"  # the first of ``COLOURS``, lighter
STYLES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
WITHOUT = "without collapsed runs"
HALO = {"facecolor": "white", "alpha": 0.75, "pad": 0.8, "linewidth": 0}
FORMATS = ("png", "svg", "pdf")
WIDTH = 4.7  # inches, of one panel; at 72 points an inch the text is then read at its size on a phone
DOTS = 200  # an inch, of PNG pictures

STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.labelsize": 10.5,
    "legend.fontsize": 9.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "mdistill",  # the same picture is the same file
}


def curves(panels: Mapping[str, Sequence[Band]], looks: Looks, *, title: str, ylabel: str) -> "Figure":
    """Lines over epochs, each with a band of one standard deviation over its seeds; the legend tells the last epoch.

    Args:
        panels: by title, of networks that compare; a single panel has no title of its own.
        looks: of every label in them.
        ylabel: what the lines show.
    """
    columns = min(3, math.ceil(len(panels) ** 0.5))
    rows = [list(panels)[start : start + columns] for start in range(0, len(panels), columns)]
    lines = [max(_legend_rows([_line_label(each) for each in panels[name]]) for name in row) for row in rows]
    with _style():
        figure = _blank(WIDTH * columns, sum(3.2 + 0.19 * line for line in lines), title)
        grid = list(figure.subplots(len(rows), columns, squeeze=False).flat)
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, (name, bands) in zip(grid, panels.items(), strict=False):
            for each in bands:
                _curve(axes, each, *looks[each.label])
            axes.set(xlabel="epoch", ylabel=ylabel, title=name if len(panels) > 1 else "")
            axes.xaxis.get_major_locator().set_params(integer=True)
            _legend_below(axes)
    return figure


def styles_of(labels: Iterable[str]) -> Looks:
    """A colour and a style of line for each label, told apart as far as there are such.

    Pictures of the same ``labels`` agree, whatever their order: give all, also those of what a picture does not show.
    """
    styles = cycle([(colour, style) for style in STYLES for colour in COLOURS])
    return dict(zip(sorted(set(labels)), styles, strict=False))


def _curve(axes: "Axes", each: Band, colour: str, style: str) -> None:
    axes.plot(
        each.epochs,
        each.mean,
        color=colour,
        linestyle=style,
        linewidth=1.6,
        marker="o" if len(each.epochs) <= 12 else "",
        markersize=3.5,
        label=_line_label(each),
    )
    if each.seeds > 1:
        low = [value - deviation for value, deviation in zip(each.mean, each.deviation, strict=True)]
        high = [value + deviation for value, deviation in zip(each.mean, each.deviation, strict=True)]
        axes.fill_between(each.epochs, low, high, color=colour, alpha=0.18, linewidth=0)


def _line_label(each: Band) -> str:
    return f"{each.label}  {each.last}"


def cost(points: Sequence[Cost], looks: Looks, *, title: str) -> "Figure":
    """Time of a batch against accuracy; the area of a circle grows with the extra parameters, a ring knows none.

    Args:
        looks: of every label.
    """
    largest = max((each.extra or 0 for each in points), default=0)
    with _style():
        figure, (axes,) = _figure(1, height=3.9, title=title)
        radii = []
        for each in points:
            area = 45.0 + (900.0 * (each.extra or 0) / largest if largest else 0.0)
            colour, _ = looks[each.label]
            face = "none" if each.extra is None else colour
            axes.scatter(each.step_ms, each.top1, s=area, facecolor=face, edgecolor=colour, alpha=0.75, linewidth=1.4)
            radii.append((area / 3.1416) ** 0.5 * figure.dpi / 72)
        axes.set(xlabel="milliseconds for a batch", ylabel="test top-1 (%)")
        axes.margins(0.22, 0.16)
        known = [each for each in points if each.extra is not None]
        words = f"the largest circle: {largest:,} extra parameters" if largest else "no extra parameters"
        if len(known) < len(points):
            beside = f"; {words}" if largest else "; disc: none" if known else ""
            words = f"ring: extra parameters not recorded{beside}"
        if any(each.left_out for each in points):
            words += f"; {WITHOUT}"
        _note(figure, words)
        _label_points(figure, axes, [(each.step_ms, each.top1, each.label) for each in points], radii)
    return figure


def teachers(lines: Mapping[str, Sequence[Taught]], *, title: str) -> "Figure":
    """A teacher's accuracy against its students', a line for each method; a dotted line marks each teacher.

    The points of several methods stand beside each other, so that their deviations are seen.
    """
    places = {(each.teacher, each.teacher_top1) for line in lines.values() for each in line}
    span = max(x for _, x in places) - min(x for _, x in places) or 1.0
    step = min(0.012, 0.06 / len(lines)) * span
    looks = styles_of(lines)
    with _style():
        figure, (axes,) = _figure(1, height=3.7 + 0.19 * _legend_rows(list(lines)), title=title)
        for number, (label, line) in enumerate(lines.items()):
            aside = (number - (len(lines) - 1) / 2) * step
            colour, style = looks[label]
            axes.errorbar(
                [each.teacher_top1 + aside for each in line],
                [each.top1 for each in line],
                [each.deviation for each in line],
                color=colour,
                linestyle=style,
                marker=MARKS[number % len(MARKS)],
                markersize=5.5,
                linewidth=1.5,
                capsize=2.5,
                label=label,
            )
        axes.set(xlabel="teacher top-1 (%)", ylabel="student top-1 (%)")
        axes.margins(0.16, 0.08)
        axes.grid(axis="x", visible=False)
        _legend_below(axes)
        if any(each.left_out for line in lines.values() for each in line):
            _note(figure, WITHOUT)
        _name_lines(figure, axes, [(x, name) for name, x in places])
    return figure


def scatter(panels: Mapping[str, tuple[Any, Any]], names: Sequence[str], *, title: str) -> "Figure":
    """Points of the plane by class, a panel for each network.

    Args:
        panels: by title: points (N, 2) and classes (N,), arrays.
        names: of the classes that are there, where they are few enough for a legend.
    """
    with _style():
        import matplotlib

        figure, rows = _figure(len(panels), height=WIDTH * 0.98, title=title)
        kinds = sorted({kind for _, classes in panels.values() for kind in classes.tolist()})
        few = 0 < len(names) <= len(COLOURS)
        rainbow = matplotlib.colormaps["gist_rainbow"]
        for axes, (label, (points, classes)) in zip(rows, panels.items(), strict=True):
            for number, kind in enumerate(kinds):
                colour = COLOURS[number] if few else rainbow(number / max(len(kinds) - 1, 1))
                x, y = points[classes == kind].T
                name = names[number] if few else None
                axes.scatter(x, y, s=160 / len(points) ** 0.5, color=colour, linewidth=0, label=name, rasterized=True)
            axes.set(title=label, xticks=[], yticks=[], aspect="equal")
            axes.set_adjustable("datalim")
            axes.spines[:].set_visible(True)
        if few:
            _legend(figure, rows[0], columns=min(len(names), 4 * len(panels)), markerscale=3.0)
        else:
            _note(figure, "one colour a class")
    return figure


def matrices(
    panels: Mapping[str, Any], *, title: str, words: str, most: float | None = None, folded: bool = False
) -> "Figure":
    """Heat maps on one scale, a panel for each network.

    Args:
        panels: by title: (rows, columns), values from 0 on; NaN is left white.
        words: what the values are, for the scale.
        most: the end of the scale; None for the largest value.
        folded: whether a field is a class, counted row by row, and not two of them.
    """
    finite = [value for matrix in panels.values() for row in matrix for value in row if not math.isnan(value)]
    with _style():
        figure, grid = _figure(len(panels), height=WIDTH * (1.02 if len(panels) > 1 else 0.92), title=title)
        figure.set_layout_engine("compressed")
        for axes, (label, matrix) in zip(grid, panels.items(), strict=True):
            image = axes.imshow(
                matrix, cmap="PuBuGn", vmin=0.0, vmax=most or max(finite) or 1.0, interpolation="nearest"
            )
            rows, columns = len(matrix), len(matrix[0])
            axes.set(title=label, xlabel="class", ylabel="class")
            if folded and columns <= 10:
                axes.set(xlabel="class: the number of its row and this one added")
                axes.set_xticks(range(columns))
                axes.set_yticks(range(rows), [str(row * columns) for row in range(rows)])
            axes.grid(visible=False)
            axes.spines[:].set_visible(True)
        figure.colorbar(image, ax=grid, label=words, shrink=0.9, pad=0.02)
    return figure


def reliability(panels: Mapping[str, Bins], *, title: str) -> "Figure":
    """Accuracy by confidence against the diagonal, with the expected calibration error, a panel for each network."""
    with _style():
        figure, rows = _figure(len(panels), height=WIDTH * 0.95, title=title)
        for axes, (label, bins) in zip(rows, panels.items(), strict=True):
            count = len(bins.images)
            middle = [(number + 0.5) / count for number in range(count)]
            filled = [number for number in range(count) if bins.images[number]]
            places = [middle[number] for number in filled]
            right, sure = ([side[number] for number in filled] for side in (bins.accuracy, bins.confidence))
            both = [min(pair) for pair in zip(right, sure, strict=True)]
            width = 0.94 / count
            above = [max(a - s, 0.0) for a, s in zip(right, sure, strict=True)]
            below = [max(s - a, 0.0) for a, s in zip(right, sure, strict=True)]
            axes.bar(places, both, width, color=COLOURS[0], label="accuracy")
            axes.bar(places, above, width, both, color=PALE, label="accuracy above confidence")
            axes.bar(
                places,
                below,
                width,
                both,
                color="none",
                edgecolor=COLOURS[1],
                hatch="////",
                linewidth=[1.0 if gap else 0.0 for gap in below],
                label="confidence above accuracy",
            )
            axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1.2, label="as sure as right")
            axes.set(title=f"{label}\nECE {100 * bins.error:.2f} %", xlabel="confidence", ylabel="accuracy")
            axes.set(xlim=(0, 1), ylim=(0, 1))
        _legend(figure, rows[0], columns=4 if len(panels) > 1 else 2)
    return figure


def bars(panels: Mapping[str, Mapping[str, tuple[float, float]]], *, title: str) -> "Figure":
    """Horizontal bars with their values, a panel for each quantity, one below the other.

    Args:
        panels: by quantity: by label, mean and deviation.
    """
    with _style():
        count = max(len(panel) for panel in panels.values())
        figure = _blank(WIDTH, len(panels) * (0.75 + 0.34 * count), title)
        rows = list(figure.subplots(len(panels), 1, squeeze=False)[:, 0])
        for axes, (quantity, panel) in zip(rows, panels.items(), strict=True):
            places, labels = range(len(panel)), list(panel)
            values, deviations = zip(*panel.values(), strict=True)
            errors = deviations if any(deviations) else None
            axes.barh(places, values, xerr=errors, height=0.62, color=COLOURS[0], capsize=2.5, ecolor=INK)
            digits = 2 if max(values) >= 10 else 3
            for place, value, deviation in zip(places, values, deviations, strict=True):
                text = f"{value:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")
                end = (value + deviation, place)
                axes.annotate(text, end, (4, 0), textcoords="offset points", va="center", fontsize=9.5)
            axes.set_yticks(places, labels)
            axes.invert_yaxis()
            axes.set(xlabel=quantity)
            axes.set_xlim(0, 1.32 * max([value + more for value, more in panel.values()] + [1e-9]))
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
    return figure


def nearest(panels: Mapping[str, Sequence[tuple[str, float]]], *, title: str) -> "Figure":
    """Classes by their logit, the highest first, a panel for each class of images, or for one image.

    A class has the colour of the first panel that it is in; those of one panel alone are told apart by it.

    Args:
        panels: by title: names of classes and their logits.
    """
    owner = {name: number for number, panel in reversed([*enumerate(panels.values())]) for name, _ in panel}
    with _style():
        count = max(len(panel) for panel in panels.values())
        figure, rows = _figure(len(panels), height=0.9 + 0.3 * count, title=title, width=3.6)
        for axes, (label, panel) in zip(rows, panels.items(), strict=True):
            names, values = zip(*panel, strict=True)
            colours = [COLOURS[owner[name] % len(COLOURS)] for name in names]
            axes.barh(range(len(names)), values, height=0.66, color=colours)
            axes.set_yticks(range(len(names)), names)
            for tick, colour in zip(axes.get_yticklabels(), colours, strict=True):
                tick.set_color(colour)
            axes.invert_yaxis()
            axes.set(title=label, xlabel="logit")
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write ``figure`` to ``path`` in the format that its ending says, all or nothing.

    Raises:
        UserError: the ending is no format.
        RunFailed: it cannot be written.
    """
    kind = picture_format(path)
    with atomic_write(path) as temporary, _style():
        _fix_layout(figure)
        figure.savefig(temporary, format=kind, dpi=DOTS, metadata=_metadata(kind))


def picture_format(path: Path) -> str:
    """What the ending of ``path`` says.

    Raises:
        UserError: no format that is written.
    """
    kind = path.suffix[1:].lower()
    if kind not in FORMATS:
        near = suggestion(kind, FORMATS)
        raise UserError(f"{path}: a picture ends in .{', .'.join(FORMATS)}; found {path.suffix or path.name!r}{near}")
    return kind


def as_svg(figure: "Figure") -> bytes:
    """``figure`` as an SVG file whose letters are those of the reader's machine, the same for the same figure."""
    buffer = io.BytesIO()
    with _style(**{"svg.fonttype": "none"}):
        _fix_layout(figure)
        figure.savefig(buffer, format="svg", dpi=DOTS, metadata=_metadata("svg"))
    return buffer.getvalue()


def _fix_layout(figure: "Figure") -> None:
    """Lay ``figure`` out, once and for all: as long as there is an engine, a picture is drawn twice."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def _metadata(kind: str) -> dict[str, Any]:
    return {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})


def library() -> Any:
    """matplotlib.

    Raises:
        UserError: it is not installed.
    """
    return extra("matplotlib", "matplotlib", "a picture")


def _style(**more: Any) -> AbstractContextManager[Any]:
    return library().rc_context(STYLE | more)  # type: ignore[no-any-return]


def _figure(panels: int, *, height: float, title: str, width: float = WIDTH) -> "tuple[Figure, list[Axes]]":
    """A figure with a row of ``panels`` of ``width`` x ``height`` inches."""
    figure = _blank(width * panels, height, title)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _blank(width: float, height: float, title: str) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = textwrap.wrap(title, int(11 * width))
    figure = Figure(figsize=(width, height + 0.25 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    if lines:
        figure.suptitle("\n".join(lines), fontsize=12)
    return figure


def _legend_rows(labels: Sequence[str]) -> int:
    return -(-len(labels) // _legend_columns(labels))


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=0)
    return 1 if longest > 24 or len(labels) < 5 else 2 if longest > 12 else 3


def _legend_below(axes: "Axes") -> None:
    """Under the axis labels, in as many columns as there is room for."""
    _, labels = axes.get_legend_handles_labels()
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=_legend_columns(labels),
        borderaxespad=0,
        columnspacing=1.2,
        handlelength=1.8,
        labelspacing=0.35,
    )


def _legend(figure: "Figure", axes: "Axes", *, columns: int, **options: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **options)


def _note(figure: "Figure", words: str) -> None:
    figure.supxlabel(words, fontsize=9.5, color=FAINT)


def _label_points(
    figure: "Figure",
    axes: "Axes",
    points: Sequence[tuple[float, float, str]],
    radii: Sequence[float],
) -> None:
    """Write each point's label beside it, off the others; a label that lies far from its point gets a line to it.

    All else must be in ``figure`` by then: its layout is fixed here.
    """
    canvas: Any = figure.canvas
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # as they are now
    _fix_layout(figure)  # and with it where the points are
    renderer, middles = canvas.get_renderer(), axes.transData.transform([(x, y) for x, y, _ in points])
    texts = [axes.annotate(label, (x, y), fontsize=9.5) for x, y, label in points]
    extents = [text.get_window_extent(renderer) for text in texts]
    frame = axes.get_window_extent(renderer)
    places = place_labels(
        [(x, y, radius) for (x, y), radius in zip(middles.tolist(), radii, strict=True)],
        [(extent.width + 6, extent.height) for extent in extents],  # two in a row do not read as one
        (frame.x0, frame.y0, frame.x1, frame.y1),
    )
    back = axes.transData.inverted()
    for text, (x, y, label), (left, bottom), extent in zip(texts, points, places, extents, strict=True):
        text.remove()
        middle = bottom + extent.height / 2
        near = left if left > axes.transData.transform((x, y))[0] else left + extent.width
        far = abs(middle - axes.transData.transform((x, y))[1]) > 1.2 * extent.height
        place_x, place_y = back.transform((left, middle)).tolist()
        axes.annotate(label, (x, y), xytext=(place_x, place_y), va="center", fontsize=9.5, bbox=HALO)
        if far:
            end = back.transform((near, middle))
            axes.plot([x, end[0]], [y, end[1]], color=FAINT, linewidth=0.6, zorder=1)


def _name_lines(figure: "Figure", axes: "Axes", lines: Sequence[tuple[float, str]]) -> None:
    """Draw a vertical line at each place, its name beside it above all else, below another's where it has no room.

    All else must be in ``figure`` by then: its layout is fixed here.
    """
    axes.set(xlim=axes.get_xlim())
    _fix_layout(figure)
    canvas: Any = figure.canvas
    renderer, frame, gap = canvas.get_renderer(), axes.get_window_extent(), 4.0
    rows: list[list[tuple[float, float]]] = []  # from where to where there are names
    texts = []
    height = 1.0
    for x, name in sorted(lines):
        axes.axvline(x, color=FAINT, linewidth=0.7, linestyle=":", zorder=0)
        text = axes.text(x, 0, name, fontsize=9.5, va="top", bbox=HALO)
        extent, place = text.get_window_extent(renderer), float(axes.transData.transform((x, 0))[0])
        height, width = 1.15 * extent.height, extent.width + 2 * gap
        right = place + width <= frame.x1
        start, end = (place, place + width) if right else (place - width, place)
        row = next(
            (number for number, row in enumerate(rows) if all(end <= a or start >= b for a, b in row)), len(rows)
        )
        rows += [[]] * (row == len(rows))
        rows[row] = [*rows[row], (start, end)]
        text.set_horizontalalignment("left" if right else "right")
        texts.append((text, place + (gap if right else -gap), row))
    low, high = axes.get_ylim()
    share = min(0.8, (len(rows) + 0.3) * height / frame.height)
    axes.set_ylim(low, low + (high - low) / (1 - share))
    back = axes.transData.inverted()
    for text, place, row in texts:
        text.set_position(back.transform((place, frame.y1 - row * height)).tolist())
