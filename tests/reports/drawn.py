"""Judge pictures by their parts, not by pixels: names, numbers, colours, sizes, and whether texts overlap."""

import re
from collections.abc import Iterator
from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from mythos.generation.depth_view import PALETTE
from mythos.reports import style

ALLOWED = {*style.SERIES, *style.RULES.values(), *style.LOOP_LINES, *(ground for _, ground in PALETTE)}
ALLOWED |= {style.GREY, style.DARK, style.LIGHT, to_hex(style.INK)}
POWERS = re.compile(r"[0-9][eE][-+]?[0-9]|10\^|\\times|\u00d7")
SMALLEST = 7
"""Smallest text of a picture 400 pixels wide, in pixels."""


def titles(figure: Figure) -> list[str]:
    """The titles of the plots of a picture."""
    return [axes.get_title("left") for axes in figure.axes if axes.axison and not is_bar(axes)]


def is_bar(axes: Axes) -> bool:
    """Whether it is the scale of colours beside a heat map."""
    return axes.get_label() == "<colorbar>"


def points(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line, by its label."""
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.get_lines()}


def labelled(axes: Axes, label: str) -> list[Line2D]:
    """The lines with a label."""
    return [line for line in axes.get_lines() if line.get_label() == label]


def faults(figure: Figure) -> list[str]:
    """What is wrong with a picture; empty for a good one."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    found = [fault for axes in figure.axes for fault in [*unnamed(axes), *powers(axes), *foreign_colours(axes)]]
    texts = list(shown_texts(figure))
    scale = 400 / figure.get_figwidth() / 72
    found += [f"{t.get_text()!r} is too small" for t in texts if t.get_fontsize() * scale < SMALLEST]
    boxes = {text: Text.get_window_extent(text) for text in texts}  # without the line to what an annotation names
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes.items():
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
            found.append(f"{text.get_text()!r} leaves the picture")
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1:
            found.append(f"{one.get_text()!r} overlaps {other.get_text()!r}")
    return found


def unnamed(axes: Axes) -> Iterator[str]:
    if axes.axison and not is_bar(axes):
        names = {"title": axes.get_title("left"), "x": axes.get_xlabel(), "y": axes.get_ylabel()}
        yield from (f"{axes.get_title('left')!r} has no {name}" for name, text in names.items() if not text)
        if not axes.has_data():
            yield f"{axes.get_title('left')!r} is empty"
    several = [line for line in axes.get_lines() if len(line.get_xdata()) > 1]
    if axes.get_lines() and not several and not axes.containers:
        yield f"{axes.get_title('left')!r} has single points only"


def powers(axes: Axes) -> Iterator[str]:
    for axis in (axes.xaxis, axes.yaxis):
        numbers = [axis.get_offset_text().get_text(), *(label.get_text() for label in axis.get_ticklabels())]
        yield from (f"number {number}" for number in numbers if POWERS.search(number))


def foreign_colours(axes: Axes) -> Iterator[str]:
    if is_bar(axes):
        return
    colours = [line.get_color() for line in axes.get_lines()]
    colours += [patch.get_facecolor() for patch in axes.patches]
    colours += [text.get_color() for text in [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]]
    yield from (f"colour {hexed}" for hexed in sorted({to_hex(colour) for colour in colours} - ALLOWED))


def shown_texts(figure: Figure) -> Iterator[Text]:
    """Every text that is drawn."""
    legends = [*figure.legends]
    for axes in figure.axes:
        if axes.get_legend():
            legends.append(axes.get_legend())
        candidates = [*axes.texts, axes._left_title]
        if axes.axison:
            candidates += [axes.xaxis.label, axes.yaxis.label]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                room = (high - low) * 1e-9
                ticks = axis.get_major_ticks()
                candidates += [t.label1 for t in ticks if low - room <= t.get_loc() <= high + room]
        yield from (text for text in candidates if text.get_visible() and text.get_text())
    yield from (text for legend in legends for text in legend.get_texts())
