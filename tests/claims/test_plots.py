"""Plots that several claims share: what they draw of values over seeds, levels and names."""

from math import inf

import numpy as np

from mythos.claims.plots import Points, lines_panel, points_panel
from mythos.reports.style import compose
from tests.reports.drawn import faults, labelled, points


def test_a_line_goes_through_the_means_and_shows_the_range_over_seeds() -> None:
    lines: dict[str, Points] = {
        "a": [(1, [2.0, 4.0]), (2, [3.0, 7.0]), (3, [1.0, inf]), (4, [])],
        "b": [(1, 5.0), (2, 6.0)],
    }
    axes = compose([lines_panel("Title", "x", "y", lines, level=(8.0, "limit"), scattered=["b"])]).axes[0]
    assert points(axes)["a"] == [(1, 3), (2, 5)], "places with a value that is not finite, or none, are left out"
    assert [np.asarray(line.get_ydata()).tolist() for line in labelled(axes, "_range")] == [[2, 4], [3, 7]]
    assert [y for _, y in points(axes)["limit"]] == [8, 8] and axes.get_ylim()[1] > 8
    styles = {line.get_label(): line.get_linestyle() for line in axes.get_lines()}
    assert styles["a"] == "-" and styles["b"] == "None"


def test_markers_are_hollow_outside_of_the_places_that_are_filled() -> None:
    lines = {"a": [(1, 2.0), (2, 3.0), (3, 4.0)]}
    axes = compose([lines_panel("Title", "x", "y", lines, filled={"a": [1, 3]})]).axes[0]
    assert points(axes)["_hollow"] == [(2, 3)]


def test_points_are_named_below_and_look_different() -> None:
    close = {
        "first-name": (1.00, [2.0, 2.2]),
        "second-name": (1.03, [2.1, 2.5]),
        "third-name": (1.15, [2.0, 2.3]),
        "fourth-name": (1.20, [2.0, 2.3]),
        "far": (2.0, [2.2]),
        "diverged": (1.1, [2.0, inf]),
    }
    figure = compose([points_panel("Title", "x", "y", close, level=(2.35, "limit"))])
    assert faults(figure) == []
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {*close, "limit"} - {"diverged"}
    styles = {
        (line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines() if line.get_marker() != "None"
    }
    assert len(styles) == 5, "each point looks different"
