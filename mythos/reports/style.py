"""The style of every picture: colours, sizes, axes, and names of lines.

Pictures have one width and one size of text, so that they can be read at 400 pixels. Numbers on axes have SI prefixes
instead of powers of ten. Lines differ by colour, and by marker or dashes, because colours alone are not enough for
everyone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mythos.files.local import replacing
from mythos.generation.depth_view import PALETTE, shade

if TYPE_CHECKING:  # importing matplotlib takes a second, and a run does so at its first picture
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WIDTH = 6.4
"""Width of a picture, inches."""
HEIGHT = 3.8
"""Height of a picture with one plot, inches."""
DPI = 150
TEXT, SMALL = 10.0, 9.0
"""Sizes of text, points. In a picture that is 400 pixels wide, 9 points are 7.8 pixels."""

INK = "black"
"""Text and frames. The page of a run replaces black by its text colour; nothing else may be black."""
GREY = "#808080"
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
"""The colours of Okabe and Ito (2008), which people with colour-blindness tell apart, without yellow and black."""
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER)
"""Colours of runs and other series, in this order."""
MARKERS = "osD^vP"
DASHES = ("-", "--", ":")
RULES = {"convergence": GREEN, "second_difference": PURPLE, "gate": AMBER, "act": SKY}
"""Colours of halting rules, the same in every picture."""
LOOP_LINES = ("#0072b2", "#5f86c4", "#8a93ab", "#8d857f", "#b08a62", "#c26d38", "#d55e00")
"""Colours of lines from few loops to many: from BLUE to ORANGE, as PALETTE of grounds."""
DARK, LIGHT = "#111111", "#ffffff"
"""Text on a coloured ground, the same on light and dark pages."""
PALE = "#eef4f9"
"""The lowest value of a heat map; the highest is BLUE."""

FEW = 50
"""Up to this many points of a line each get a marker."""
NAMED_BESIDE = 8
"""Up to this many lines are named beside their ends; more, or longer names, are listed below the plot."""
LONGEST_NAME = 16
WARM_UP = 0.05
"""Share of the tokens whose falling loss does not decide the range of an axis."""


class Panel(NamedTuple):
    """One plot of a picture."""

    draw: Callable[[Axes], None]
    wide: bool = True
    """Whether it takes the whole width; two narrow panels share a row."""
    height: float = HEIGHT
    """Inches."""


class Entry(NamedTuple):
    """A name in the key of a picture, with the style of its lines."""

    name: str
    style: dict[str, Any]


def series(number: int) -> dict[str, str]:
    """Style of the line of a run or another series, counted from 0: colour, marker and dashes."""
    colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "linestyle": DASHES[number // len(SERIES) % len(DASHES)]}


def rule_colour(rule: str) -> str:
    """The colour of a halting rule."""
    return RULES.get(rule, BLUE)


def loop_colour(loops: int, most: int) -> str:
    """The ground colour of a loop count from 1 to `most`: that of text which ran as many loops."""
    return PALETTE[shade(loops, most)][1]


def loop_line_colour(loops: int, most: int) -> str:
    """The colour of a line for a loop count from 1 to `most`: stronger than that of a ground, with the same hue."""
    return LOOP_LINES[shade(loops, most)]


def share_map() -> Colormap:
    """The colours of a heat map of shares."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shares", [PALE, BLUE])


# Pictures


def compose(panels: Sequence[Panel], key: Sequence[Entry] = ()) -> Figure:
    """Draw panels into one picture, wide ones in a row of their own; `key` names lines of all panels."""
    from matplotlib.figure import Figure

    rows: list[list[Panel]] = []
    for panel in panels:
        if rows and not panel.wide and len(rows[-1]) == 1 and not rows[-1][0].wide:
            rows[-1].append(panel)
        else:
            rows.append([panel])
    heights = [max(panel.height for panel in row) for row in rows]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.25 * bool(key)), layout="constrained", dpi=DPI)
    # A figure for each row, because panels of one grid would all get the widest margins of its columns.
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=True):
        for axes, panel in zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True):
            axes.grid(alpha=0.3, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=SMALL)
            panel.draw(axes)
    if key:
        draw_key(figure, key)
    return figure


def separate(panels: Iterable[Panel], key: Sequence[Entry] = ()) -> Iterator[Figure]:
    """Draw each panel as a picture of its own."""
    for panel in panels:
        yield compose([panel], key)


def draw_key(figure: Figure, key: Sequence[Entry]) -> None:
    """List names above all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **entry.style) for entry in key]
    names = [literal(entry.name) for entry in key]
    columns = columns_of(names, WIDTH)
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=SMALL, borderpad=0.1)


def columns_of(names: Sequence[str], width: float) -> int:
    """The number of columns in which names fit into a width in inches."""
    room = width * 72 / (0.58 * SMALL)  # in characters, whose mean width is 0.58 of the size
    return max(1, min(len(names), int(room / (max(map(len, names), default=1) + 6))))


def save(figure: Figure, path: Path) -> Path:
    """Write a picture whole or not at all; returns its path."""
    kind = path.suffix.removeprefix(".")
    with replacing(path) as temporary:
        # Without its date, so that the same picture is the same file.
        figure.savefig(temporary, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    return path


# Axes


def describe(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the labels of the axes, with numbers in plain digits or with SI prefixes."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=TEXT, fontweight="bold", pad=16)
    axes.set_xlabel(x, fontsize=SMALL)
    axes.set_ylabel(y, fontsize=SMALL)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        plain_numbers(axis)


def plain_numbers(axis: Axis) -> None:
    """Format the numbers of an axis in plain digits, all with as many decimals, or with SI prefixes from 10,000 on."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    prefixed = EngFormatter(sep="")

    def text(value: float, _: Any) -> str:
        places = [float(place) for place in axis.get_majorticklocs()]
        if max(map(abs, axis.get_view_interval())) >= 10_000:
            return str(prefixed(value)) if value else "0"
        if axis.get_scale() != "linear":
            places = [value]
        return f"{value + 0.0:.{max(map(decimals, places), default=0)}f}"

    axis.set_major_formatter(FuncFormatter(text))


def decimals(value: float) -> int:
    """The number of decimals of a number, at most 12."""
    return len(f"{value:.12f}".rstrip("0").partition(".")[2])


def numbers_of(axes: Axes) -> list[float]:
    """The finite y values of all lines in data coordinates."""
    lines = [line for line in axes.get_lines() if line.get_transform() == axes.transData]
    values: list[float] = [value for line in lines for value in np.asarray(line.get_ydata(), dtype=float).tolist()]
    return [value for value in values if math.isfinite(value)]


def fit_range(
    axes: Axes, values: Sequence[float] | None = None, low: float | None = None, high: float | None = None
) -> None:
    """Fit the y axis to values (default: those of all lines), at least half a percent to each side of a constant.

    `low` and `high` are natural limits. The axis begins at `low` unless a value is lower, and then ends at `high`
    unless a value is higher.
    """
    values = numbers_of(axes) if values is None else [value for value in values if math.isfinite(value)]
    least, most = (min(values), max(values)) if values else (0.0, 1.0)
    if low is not None:
        least = min(low, least)
    middle = (least + most) / 2
    half = max((most - least) / 2, 0.005 * abs(middle)) or 0.5
    if low is not None and least == low:
        axes.set_ylim(low, (high if high is not None and high >= most else low + 2.1 * half))
    else:
        axes.set_ylim(middle - 1.1 * half, middle + 1.1 * half)


def after_warm_up(points: Sequence[tuple[float, float]]) -> list[float]:
    """The values of (tokens, value) points after the first share WARM_UP of the tokens; of few points, all."""
    end = max((tokens for tokens, _ in points), default=0.0)
    late = [value for tokens, value in points if tokens >= WARM_UP * end]
    return late if len(points) > 20 else [value for _, value in points]


def log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, unless its values are within a factor of 3."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = [value for value in numbers_of(axes) if value > 0]
    if not values or max(values) < 3 * min(values):
        fit_range(axes)
        return
    axes.set_yscale("log")
    few = max(values) > 1000 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(min(values) / 1.2, max(values) * 1.2)
    plain_numbers(axes.yaxis)


def loop_axis(axes: Axes, loops: Iterable[float], unnamed: Iterable[float] = ()) -> None:
    """Make the x axis one of loop counts, logarithmic to base 2, with as many of `loops` named as there is room.

    `unnamed` are further places that the axis includes.
    """
    from matplotlib.ticker import NullLocator

    named = {float(count) for count in loops if count > 0}
    places = sorted(named | {float(count) for count in unnamed if count > 0})
    if not places:
        return
    first, last = places[0], places[-1]
    edge = max((last / first) ** 0.04, 1.1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(first / edge, last * edge)
    room = 0.3 * axes.figure.dpi / axes.get_window_extent().width * math.log(last * edge**2 / first)
    shown: list[float] = []
    for place in sorted(named or places[:1]):
        if not shown or math.log(place / shown[-1]) >= room:
            shown.append(place)
        elif place == max(named) and len(shown) > 1:
            shown[-1] = place
    axes.set_xticks(shown, [f"{place:g}" for place in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def mark_training(axes: Axes, loops: float) -> None:
    """Mark the mean number of loops in training, with its name above the plot, if the axis includes it."""
    if not axes.get_xlim()[0] <= loops <= axes.get_xlim()[1]:
        return
    axes.axvline(loops, color=GREY, linewidth=1, linestyle=":", label="_training mean")
    place = axes.transAxes.inverted().transform(axes.transData.transform((loops, axes.get_ylim()[0])))[0]
    side = "left" if place < 0.15 else "right" if place > 0.85 else "center"
    axes.annotate(
        "training mean",
        (loops, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 2),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=SMALL,
        color=GREY,
    )


# Names of lines


def name_lines(axes: Axes) -> None:
    """Name the lines with a label: beside their ends, or below the plot if there they would not fit or not be clear.

    Call it last, because names are placed for the present limits of the axes.
    """
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    if not lines:
        return
    ends = [end for line in lines if (end := end_of(axes, line)) is not None]
    longest = max(len(part) for line in lines for part in str(line.get_label()).split("\n"))
    beside = len(lines) <= NAMED_BESIDE and longest <= LONGEST_NAME
    if not beside or len(ends) < len(lines) or any(x < 0.85 for x, _ in ends):
        names_below(axes, lines)
        return
    height = axes.get_window_extent().height / axes.figure.dpi * 72 * 0.9  # the layout leaves about so much of it
    sizes = [1.25 * SMALL * (1 + str(line.get_label()).count("\n")) / height for line in lines]
    places = spread([y for _, y in ends], sizes)
    for line, end, place in zip(lines, ends, places, strict=True):
        axes.annotate(
            str(line.get_label()),
            end,
            xycoords="axes fraction",
            xytext=(1.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)},
        )


def names_below(axes: Axes, lines: Sequence[Line2D]) -> None:
    """List the lines' names below the plot."""
    names = [str(line.get_label()) for line in lines]
    columns = columns_of(names, 1.1 * axes.get_window_extent().width / axes.figure.dpi)
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -40 / height), "borderaxespad": 0}
    axes.legend(lines, names, ncols=columns, frameon=False, fontsize=SMALL, borderpad=0, **place)


def end_of(axes: Axes, line: Line2D) -> tuple[float, float] | None:
    """The last finite point of a line in fractions of the axes, with y inside; None if there is none."""
    points = np.asarray(line.get_xydata(), dtype=float)
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        return None
    x, y = axes.transAxes.inverted().transform(axes.transData.transform(points[-1]))
    return (float(x), min(1.0, max(0.0, float(y))))


def spread(places: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Move places apart along a line from 0 to 1 so that things of these sizes do not overlap; the order stays."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [places[index] for index in order]
    gaps = [(sizes[below] + sizes[above]) / 2 for below, above in pairwise(order)]
    for index, gap in enumerate(gaps):
        moved[index + 1] = max(moved[index + 1], moved[index] + gap)
    moved[-1] = min(moved[-1], 1.0)
    for index in reversed(range(len(gaps))):
        moved[index] = min(moved[index], moved[index + 1] - gaps[index])
    by_line = dict(zip(order, moved, strict=True))
    return [by_line[index] for index in range(len(places))]


def literal(text: str) -> str:
    """Escape a name for matplotlib, which reads $ as mathematics and hides labels that start with _."""
    return text.replace("$", r"\$").replace("_", "\u200b_", text.startswith("_"))


def shortened(text: str, most: int = 36) -> str:
    """A name of at most `most` characters: of a longer one the end, which tells paths apart."""
    return text if len(text) <= most else "..." + text[3 - most :]
