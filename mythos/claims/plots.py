"""Plots that several claims share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isfinite, nan
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mythos.reports.style import (
    GREY,
    MARKERS,
    NAMED_BESIDE,
    SERIES,
    Panel,
    describe,
    fit_range,
    loop_axis,
    mark_training,
    name_lines,
    names_below,
    plain_numbers,
    series,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = float | Sequence[float]
"""A number, or one for each seed: drawn as their mean, with a bar from the lowest to the highest."""
Points = Sequence[tuple[float, Value]]


def lines_panel(
    title: str,
    x: str,
    y: str,
    lines: Mapping[str, Points],
    *,
    loops: bool = False,
    log_x: bool = False,
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
        fit_range(axes, None, *(y_range or ()))
        if trained is not None:
            mark_training(axes, trained)
        name_lines(axes)

    return Panel(draw, height=3.8 + 0.2 * max(0, len(lines) - NAMED_BESIDE))


def points_panel(
    title: str, x: str, y: str, points: Mapping[str, tuple[float, Value]], *, level: tuple[float, str] | None = None
) -> Panel:
    """A point for each arm, with names below; `level` is y and name of a horizontal line."""

    def draw(axes: Axes) -> None:
        describe(axes, title, x, y)
        for number, (name, (a, b)) in enumerate(points.items()):
            middle, low, high = of_seeds(b)
            if isfinite(low) and isfinite(high):
                colour, marker = SERIES[number % len(SERIES)], MARKERS[(number + number // len(SERIES)) % len(MARKERS)]
                axes.plot([a], [middle], color=colour, marker=marker, markersize=6, linestyle="", label=name)
                range_bars(axes, [(a, low, high)], colour)
        if level is not None:
            mark_level(axes, *level)
        fit_range(axes)
        names_below(axes, [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")])

    return Panel(draw, height=4.2)


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


def logarithmic(axes: Axes, places: Sequence[float]) -> None:
    """Make the x axis logarithmic, with ticks at few given places or where they fit."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    if len(places) <= 6:
        axes.set_xticks(places, [f"{place:.3g}" for place in places])
    else:
        plain_numbers(axes.xaxis)
