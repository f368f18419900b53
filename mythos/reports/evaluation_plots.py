"""Pictures of evaluation results: scores by loops or by task, and accuracy by difficulty and loops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.reasoning import AccuracyMap
from mythos.evaluation.results import Result, rows_of
from mythos.generation.depth_view import in_loops
from mythos.reports.style import (
    BLUE,
    DARK,
    LIGHT,
    ORANGE,
    SMALL,
    Entry,
    Panel,
    compose,
    describe,
    fit_range,
    literal,
    loop_axis,
    loop_line_colour,
    name_lines,
    rule_colour,
    save,
    share_map,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS, MOST_TASKS = 12, 40
"""Most plots in a picture, and most tasks in a plot; the files and the table have all scores."""
MARKERS = "*PXDv^"
"""Of halting rules at several thresholds."""
FEWEST_COLUMNS, MOST_COLUMNS = 6, 14
"""A map has room for at least so many columns, and numbers in the cells of at most so many."""


def draw_scores(results: Sequence[Result], path: Path) -> Path | None:
    """Draw scores into an image file; returns the path, or None for single scores, which are no picture."""
    panels = score_panels(results)
    return save(compose(panels, score_key(results)), path) if panels else None


def score_panels(results: Sequence[Result]) -> list[Panel]:
    """One plot over loops per task and metric or, at one depth, one plot over tasks per metric."""
    rows = rows_of(results)
    if any(len(by_setting) > 1 for by_setting in rows.values()):
        return [
            Panel(partial(draw_score, task=task, metric=metric, scores=by_setting), wide=len(rows) == 1, height=3)
            for (task, metric), by_setting in list(rows.items())[:MOST_PANELS]
        ]
    by_metric: dict[str, list[Result]] = {}
    for result in results:
        by_metric.setdefault(result.metric, []).append(result)
    return [
        Panel(
            partial(draw_tasks, metric=metric, results=scores[:MOST_TASKS]),
            height=1.2 + 0.3 * min(len(scores), MOST_TASKS),
        )
        for metric, scores in by_metric.items()
        if len(scores) > 1
    ]


def score_key(results: Sequence[Result]) -> list[Entry]:
    """What the marks of plots over loops mean, if some positions halt."""
    rules = halting_settings(results)
    if not rules or all(len(by_setting) == 1 for by_setting in rows_of(results).values()):
        return []
    alike = Entry("every position alike", {"color": BLUE, "marker": "o"})
    return [alike, *(Entry(str(setting).replace("_", " "), halting_style(results, setting)) for setting in rules)]


def halting_settings(results: Sequence[Result]) -> list[DepthSetting]:
    """The settings with a halting rule."""
    return [setting for setting in dict.fromkeys(result.setting for result in results) if setting.rule is not None]


def halting_style(results: Sequence[Result], setting: DepthSetting) -> dict[str, Any]:
    """The mark of a halting rule: its colour, and a marker for each threshold."""
    number = halting_settings(results).index(setting)
    colour = rule_colour(setting.rule or "")
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "linestyle": "", "markersize": 9}


def draw_score(axes: Axes, task: str, metric: str, scores: Mapping[DepthSetting, Result]) -> None:
    """Plot a score over loops: a line for settings without a halting rule, marks at the mean loops for those with one.

    Bars are standard errors.
    """
    score = metric.replace("_", " ")
    describe(axes, f"{literal(shortened(task, 30 - len(score)))}: {score}", "loops", score)
    results = list(scores.values())
    line = sorted((one for one in results if one.setting.rule is None), key=lambda one: one.mean_loops)
    if line:
        loops, errors = [result.mean_loops for result in line], [result.stderr or 0.0 for result in line]
        style: dict[str, Any] = {"fmt": "o-", "color": BLUE, "markersize": 4, "capsize": 2}
        axes.errorbar(loops, [result.value for result in line], errors, **style)
    for result in results:
        if result.setting.rule is not None:
            point = [result.mean_loops], [result.value], [result.stderr or 0.0]
            axes.errorbar(*point, **halting_style(results, result.setting), capsize=2)
    spans = [result.value + sign * (result.stderr or 0.0) for result in results for sign in (-1, 1)]
    fit_range(axes, spans)
    loop_axis(axes, [result.mean_loops for result in line], unnamed=[result.mean_loops for result in results])


def draw_tasks(axes: Axes, metric: str, results: Sequence[Result]) -> None:
    """Plot one score of several tasks at one depth, with its standard error."""
    setting = str(results[0].setting).replace("_", " ")
    describe(axes, f"{metric.replace('_', ' ')}, loops: {setting}", metric.replace("_", " "), "task")
    for row, result in enumerate(results):
        axes.errorbar([result.value], [row], xerr=[result.stderr or 0.0], fmt="o", color=BLUE, capsize=2)
        axes.annotate(
            f"{result.value:.4g}", (1.02, row), xycoords=axes.get_yaxis_transform(), va="center", fontsize=SMALL
        )
    axes.set_yticks(range(len(results)), [literal(shortened(result.task, 24)) for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    spans = [result.value + sign * (result.stderr or 0.0) for result in results for sign in (-1, 1)]
    finite = [value for value in spans if math.isfinite(value)]
    least, most = min(finite, default=0.0), max(finite, default=1.0)
    margin = max(0.08 * (most - least), 0.02 * abs(most), 1e-9)
    axes.set_xlim(least - margin, most + margin)


def draw_over_training(
    axes: Axes, title: str, metric: str, x: str, lines: Mapping[DepthSetting, Sequence[tuple[float, float]]]
) -> None:
    """Plot a score over steps or tokens, one line for each setting; settings are coloured by their loops."""
    score = metric.replace("_", " ")
    describe(axes, f"{literal(shortened(title, 36))}: {score} over training", x, score)
    most = max(setting.loops for setting in lines)
    for setting, points in lines.items():
        style: dict[str, Any] = {"marker": "o"}
        if setting.rule is None:
            style |= {"color": loop_line_colour(setting.loops, most), "label": in_loops(setting.loops)}
        else:
            style |= {"color": rule_colour(setting.rule), "linestyle": "--", "label": str(setting).replace("_", " ")}
        axes.plot([place for place, _ in points], [value for _, value in points], **style)
    fit_range(axes)
    name_lines(axes)


def draw_accuracy_maps(maps: Sequence[AccuracyMap], path: Path) -> Path:
    """Draw maps into an image file; a line separates the difficulties of training from harder ones."""
    return save(compose(map_panels(maps)), path)


def map_panels(maps: Sequence[AccuracyMap]) -> list[Panel]:
    """One heat map for each."""
    return [Panel(partial(draw_map, one=one), height=1.3 + 0.28 * len(one.difficulties)) for one in maps]


def draw_map(axes: Axes, one: AccuracyMap) -> None:
    """Draw accuracy in percent by difficulty and loops, with numbers in the cells if they are large enough."""
    describe(axes, f"{literal(shortened(one.name, 30))}: right answers (%)", "loops", "difficulty (steps)")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    # Not imshow: the page of a run has no images.
    mesh = axes.pcolormesh(one.accuracy, vmin=0, vmax=1, cmap=share_map(), edgecolors=LIGHT, linewidth=0.5)
    columns = max(FEWEST_COLUMNS, len(one.loops))
    axes.set_xlim(0, columns)
    every = -(-columns // MOST_COLUMNS)
    axes.set_xticks([x + 0.5 for x in range(len(one.loops))][::every], [str(loops) for loops in one.loops][::every])
    axes.set_yticks([y + 0.5 for y in range(len(one.difficulties))], list(map(str, one.difficulties)))
    axes.tick_params(length=0)
    if every == 1:
        for y, row in enumerate(one.accuracy):
            for x, share in enumerate(row):
                style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": SMALL}
                axes.text(x + 0.5, y + 0.5, f"{100 * share:.0f}", color=LIGHT if share > 0.55 else DARK, **style)
    else:
        bar = axes.figure.colorbar(mesh, ax=axes, label="accuracy")
        bar.ax.tick_params(labelsize=SMALL)
    border = sum(difficulty <= one.trained[1] for difficulty in one.difficulties)
    if 0 < border < len(one.difficulties):
        axes.plot([0, len(one.loops)], [border, border], color=ORANGE, linewidth=1.5, label="_hardest in training")
        for text, place, side in (("harder", 2, "bottom"), ("in training", -2, "top")):
            axes.annotate(
                text,
                (len(one.loops), border),
                xytext=(4, place),
                textcoords="offset points",
                va=side,
                fontsize=SMALL,
                color=ORANGE,
                annotation_clip=False,
            )
