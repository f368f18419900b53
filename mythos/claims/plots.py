"""Plots that several claims share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mythos.reports.style import (
    BLUE,
    NAMED_BESIDE,
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

Points = Sequence[tuple[float, float]]


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
) -> Panel:
    """A line for each arm through its points; `loops` is an axis of loop counts, on which `trained` is marked.

    Points that are not finite are left out, as are arms without two points.
    """

    def draw(axes: Axes) -> None:
        describe(axes, title, x, y)
        for number, (name, points) in enumerate(lines.items()):
            finite = sorted((float(a), float(b)) for a, b in points if abs(a) + abs(b) < float("inf"))
            if len(finite) > 1:
                style: dict[str, Any] = series(number)
                axes.plot([a for a, _ in finite], [b for _, b in finite], label=name, markersize=4, **style)
        if log_y:
            log_scale(axes)
        else:
            fit_range(axes)
        if loops:
            loop_axis(axes, sorted({a for points in lines.values() for a, _ in points}))
        elif log_x:
            logarithmic(axes, sorted({float(a) for points in lines.values() for a, _ in points}))
        if trained is not None:
            mark_training(axes, trained)
        name_lines(axes)

    return Panel(draw, height=3.8 + 0.2 * max(0, len(lines) - NAMED_BESIDE))


def logarithmic(axes: Axes, places: Sequence[float]) -> None:
    """Make the x axis logarithmic, with ticks at few given places or where they fit."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    if len(places) <= 6:
        axes.set_xticks(places, [f"{place:.3g}" for place in places])
    else:
        plain_numbers(axes.xaxis)


def bars_panel(title: str, x: str, y: str, values: Mapping[str, float]) -> Panel:
    """A horizontal bar for each arm."""

    def draw(axes: Axes) -> None:
        describe(axes, title, x, y)
        axes.barh(range(len(values)), list(values.values()), color=BLUE, height=0.7)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()

    return Panel(draw, height=1.2 + 0.3 * len(values))
