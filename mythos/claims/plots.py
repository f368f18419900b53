"""Plots that several claims share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isfinite, nan
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mythos.reports.style import (
    BLUE,
    GREY,
    NAMED_BESIDE,
    SMALL,
    Panel,
    describe,
    fit_range,
    log_scale,
    loop_axis,
    mark_training,
    name_lines,
    plain_numbers,
    series,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = float | Sequence[float]
"""A number, or one for each seed: drawn as their mean, with a bar from the lowest to the highest."""
Points = Sequence[tuple[float, Value]]
Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in points."""
FAR = 1e4
"""More points than any picture has."""
SHIFT = {"left": 0.0, "center": 0.5, "right": 1.0, "bottom": 0.0, "top": 1.0}
"""Share of a text's width or height that lies before its anchor, by alignment."""


def lines_panel(
    title: str,
    x: str,
    y: str,
    lines: Mapping[str, Points],
    *,
    loops: bool = False,
    log_x: bool = False,
    log_y: bool = False,
    trained: float | None = None,
    level: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
    filled: Mapping[str, Collection[float]] | None = None,
    scattered: Collection[str] = (),
) -> Panel:
    """A line for each arm through its points.

    Points that are not finite are left out, as are arms without two points.

    Args:
        title: title of the plot.
        x: label of the x axis.
        y: label of the y axis.
        lines: points by the name of the arm.
        loops: the x axis is one of loop counts, on which `trained` is marked.
        log_x: the x axis is logarithmic.
        log_y: the y axis is logarithmic, if the values differ enough.
        trained: mean loops in training.
        level: y and name of a horizontal line.
        y_range: natural limits of y, which values may exceed.
        filled: places on x where an arm's marker is filled, by arm; elsewhere it is hollow. Default: all.
        scattered: arms whose points are not joined, where a line would suggest values that were not measured.
    """

    def draw(axes: Axes) -> None:
        describe(axes, title, x, y)
        for number, (name, points) in enumerate(lines.items()):
            finite = sorted((float(a), *of_seeds(b)) for a, b in points if all(map(isfinite, (a, *of_seeds(b)))))
            if len(finite) > 1:
                style: dict[str, Any] = series(number) | ({"linestyle": ""} if name in scattered else {})
                axes.plot([a for a, *_ in finite], [b for _, b, *_ in finite], label=name, markersize=4, **style)
                range_bars(axes, [(a, low, high) for a, _, low, high in finite], style["color"])
                if filled is not None:
                    hollow = [(a, b) for a, b, *_ in finite if a not in filled[name]]
                    style |= {"linestyle": "", "markerfacecolor": "white", "label": "_hollow"}
                    axes.plot([a for a, _ in hollow], [b for _, b in hollow], markersize=5, **style)
        places = sorted({float(a) for points in lines.values() for a, _ in points})
        if loops:
            loop_axis(axes, places)
        elif log_x:
            logarithmic(axes, places)
        if level is not None:
            mark_level(axes, *level)
        if log_y:
            log_scale(axes)
        else:
            fit_range(axes, None, *(y_range or ()))
        if trained is not None:
            mark_training(axes, trained)
        name_lines(axes)

    return Panel(draw, height=3.8 + 0.2 * max(0, len(lines) - NAMED_BESIDE))


def points_panel(
    title: str, x: str, y: str, points: Mapping[str, tuple[float, Value]], *, level: tuple[float, str] | None = None
) -> Panel:
    """A point for each arm, with its name beside it; `level` is y and name of a horizontal line."""

    def draw(axes: Axes) -> None:
        describe(axes, title, x, y)
        finite = {name: (a, *of_seeds(b)) for name, (a, b) in points.items() if all(map(isfinite, of_seeds(b)))}
        for a, b, *_ in finite.values():
            axes.plot([a], [b], color=BLUE, marker="o", markersize=5, label="_point")
        range_bars(axes, [(a, low, high) for a, _, low, high in finite.values()], BLUE)
        axes.margins(x=0.27)  # room for a name on each side
        if level is not None:
            mark_level(axes, *level)
        fit_range(axes)
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))  # room for names above and below
        name_points(axes, dict(sorted(finite.items(), key=lambda one: one[1])), [] if level is None else [level[0]])
        name_lines(axes)

    return Panel(draw)


def of_seeds(value: Value) -> tuple[float, float, float]:
    """Mean, lowest and highest of a point's value or values; NaN of none."""
    values = value if isinstance(value, Sequence) else [value]
    return (fmean(values), min(values), max(values)) if values else (nan, nan, nan)


def range_bars(axes: Axes, bars: Iterable[tuple[float, float, float]], colour: str) -> None:
    """Draw vertical lines, each at an x from the lowest to the highest value of the seeds."""
    for place, low, high in bars:
        if high > low:
            axes.plot([place, place], [low, high], color=colour, linewidth=1, alpha=0.6, label="_range")


def mark_level(axes: Axes, value: float, name: str) -> None:
    """Draw a horizontal line across the plot's present width. Its name is placed like those of other lines."""
    left, right = axes.get_xlim()
    axes.plot([left, right], [value, value], color=GREY, linewidth=1, linestyle="--", label=name)
    axes.set_xlim(left, right)


def name_points(axes: Axes, points: Mapping[str, tuple[float, float, float, float]], levels: Sequence[float]) -> None:
    """Name points (x, mean, lowest, highest) above, below or beside their ranges, where names cover least.

    `levels` are horizontal lines that names keep off too.
    """

    def at(x: float, y: float) -> tuple[float, float]:
        """A place of the data in points of text; the layout leaves about 0.9 of the plot's present size."""
        place = axes.transData.transform((x, y)) * 0.9 * 72 / axes.figure.dpi
        return float(place[0]), float(place[1])

    ends = axes.get_xlim()
    lines = [(at(x, low), at(x, high)) for x, _, low, high in points.values()]
    lines += [(at(ends[0], level), at(ends[1], level)) for level in levels]
    taken = [(left - 3, bottom - 2, right + 3, top + 2) for (left, bottom), (right, top) in lines]
    left, right = (at(end, levels[0] if levels else 0.0)[0] for end in ends)
    taken += [(left - FAR, -FAR, left, FAR), (right, -FAR, right + FAR, FAR)]  # outside of the plot
    height = 1.2 * SMALL
    for name, (x, middle, low, high) in points.items():
        width = 0.58 * SMALL * len(name)
        places = [
            (y, (0, up), side, part)
            for side in ("center", "left", "right")
            for y, up, part in ((high, 4, "bottom"), (low, -4, "top"))
        ]
        places += [(middle, (6, 0), "left", "center"), (middle, (-6, 0), "right", "center")]
        boxes = []
        for y, (across, up), side, part in places:
            left = at(x, y)[0] + across - SHIFT[side] * width
            bottom = at(x, y)[1] + up - SHIFT[part] * height
            boxes.append((left, bottom, left + width, bottom + height))
        covered = [sum(overlap(box, other) for other in taken) for box in boxes]
        best = covered.index(min(covered))
        taken.append(boxes[best])
        y, offset, side, part = places[best]
        options: dict[str, Any] = {"ha": side, "va": part, "textcoords": "offset points", "fontsize": SMALL}
        axes.annotate(name, (x, y), xytext=offset, **options)


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def logarithmic(axes: Axes, places: Sequence[float]) -> None:
    """Make the x axis logarithmic, with ticks at few given places or where they fit."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    if len(places) <= 6:
        axes.set_xticks(places, [f"{place:.3g}" for place in places])
    else:
        plain_numbers(axes.xaxis)
