"""Pictures of evaluation results: scores by loops, and accuracy by difficulty and loops."""

from collections.abc import Sequence
from pathlib import Path

from mythos.evaluation.reasoning import AccuracyMap
from mythos.evaluation.results import Result, rows_of
from mythos.reports.plots import finish, loop_axis

MOST_PANELS = 12
"""Most panels of a picture; the files and the table have all scores."""
WIDTH = 3
"""Panels side by side."""


def draw_scores(results: Sequence[Result], path: Path) -> Path:
    """Draw scores over loops, one panel per task and metric; returns the path.

    Settings without a halting rule form a line. Settings with a rule are stars at their mean loops. Bars are standard
    errors.
    """
    from matplotlib.figure import Figure  # takes a second to import

    rows = list(rows_of(results).items())[:MOST_PANELS]
    columns = min(WIDTH, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, ((task, metric), by_setting) in zip(panels, rows, strict=False):
        line = sorted(
            (result for result in by_setting.values() if result.setting.rule is None),
            key=lambda result: result.mean_loops,
        )
        axes.set(title=task, xlabel="loops", ylabel=metric)
        axes.grid(alpha=0.3)
        if line:
            loops, errors = [result.mean_loops for result in line], [result.stderr or 0.0 for result in line]
            axes.errorbar(loops, [result.value for result in line], errors, fmt="o-", color="black", label="all alike")
        for number, result in enumerate(result for result in by_setting.values() if result.setting.rule is not None):
            point = [result.mean_loops], [result.value], [result.stderr or 0.0]
            axes.errorbar(*point, fmt="*", color=f"C{number}", markersize=12, label=str(result.setting))
        loop_axis(axes, [result.setting.loops for result in line])
        axes.legend(fontsize="x-small")
    for axes in panels[len(rows) :]:
        axes.remove()
    return finish(figure, path)


def draw_accuracy_maps(maps: Sequence[AccuracyMap], path: Path) -> Path:
    """Draw maps side by side as a PNG; a red line separates the difficulties of training from harder ones."""
    from matplotlib.figure import Figure  # takes a second to import

    widths = [1.2 + 0.45 * len(one.loops) for one in maps]
    tallest = max(len(one.difficulties) for one in maps)
    figure = Figure(figsize=(sum(widths) + 1.5, 1.5 + 0.4 * tallest), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0]
    for axes, one in zip(panels, maps, strict=True):
        image = axes.imshow(one.accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        axes.set(title=one.name, xlabel="loops", ylabel="difficulty")
        axes.set_xticks(range(len(one.loops)), list(map(str, one.loops)))
        axes.set_yticks(range(len(one.difficulties)), list(map(str, one.difficulties)))
        axes.axhline(sum(d <= one.trained[1] for d in one.difficulties) - 0.5, color="red", linewidth=1)
        for y, row in enumerate(one.accuracy):
            for x, value in enumerate(row):
                color = "black" if value > 0.6 else "white"
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=list(panels), label="accuracy")
    return finish(figure, path)
