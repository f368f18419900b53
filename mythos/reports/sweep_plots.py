"""Pictures of a depth sweep: loss, exits, state and experts by loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos.evaluation.depth_sweep import DepthSweep, HaltingPoint
from mythos.reports.plots import Curves, draw_fit
from mythos.reports.style import (
    BLUE,
    DARK,
    SMALL,
    Panel,
    compose,
    describe,
    loop_axis,
    loop_colour,
    mark_training,
    name_lines,
    plain_numbers,
    rule_colour,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES: Mapping[str, Curves] = {
    "Size of the state": Curves("mean log ||h||", {"state_norm": ""}),
    "Change of the state": Curves("share of its size", {"state_delta": ""}, "log"),
    "Load of the busiest expert": Curves("times the mean", {"load_max_over_mean": ""}, low=1.0),
    "Experts kept from the loop before": Curves("share", {"expert_overlap": ""}, low=0.0, high=1.05),
}
"""Plots of fields of `LoopMeasures` by title."""
NUMBERED_SHARE = 0.06
"""Smallest share of a bar that has room for a number."""


def draw_sweep(sweep: DepthSweep, path: Path) -> Path:
    """Draw a depth sweep into an image file; returns the path."""
    return save(sweep_figure(sweep), path)


def sweep_figure(sweep: DepthSweep) -> Figure:
    """Draw loss, exits, state and, for a core with routed experts, load and overlap of experts, by loops."""
    return compose(sweep_panels(sweep))


def sweep_panels(sweep: DepthSweep) -> list[Panel]:
    """The plots of a sweep; of a single loop, which is no curve, only what halting did."""
    if len(sweep.loops) == 1:
        return [Panel(partial(say_single, sweep=sweep), height=1.5)]
    panels = []
    if len(sweep.read_out) > 1 or sweep.halting:
        panels.append(Panel(partial(draw_losses, sweep=sweep), height=4.4))
    if sweep.halting:
        panels.append(Panel(partial(draw_exits, points=sweep.halting), height=1.2 + 0.22 * len(sweep.halting)))
    for title, curves in MEASURES.items():
        [name] = curves.keys
        points = [(loop.loops, number) for loop in sweep.loops if (number := getattr(loop, name)) is not None]
        if len(points) > 1:
            draw = partial(draw_measure, title=title, curves=curves, points=points, mean_loops=sweep.mean_loops)
            panels.append(Panel(draw, wide=False, height=2.9))
    return panels


def say_single(axes: Axes, sweep: DepthSweep) -> None:
    """Write the loss of a model that was run for one loop only."""
    axes.axis("off")
    axes.set_title("Depth sweep", loc="left", fontweight="bold")
    loss = sweep.loops[0].loss
    text = "One loop was measured" + ("" if loss is None else f": {loss:.4f} nats per token") + "; no curve to draw."
    axes.text(0, 0.5, text, transform=axes.transAxes, fontsize=SMALL)


def draw_measure(axes: Axes, title: str, curves: Curves, points: Sequence[tuple[int, float]], mean_loops: int) -> None:
    """Plot a measurement after every loop."""
    describe(axes, title, "loops", curves.label)
    axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=BLUE, markersize=3)
    curves.fit(axes)
    loop_axis(axes, [1, *(x for x, _ in points if x & (x - 1) == 0), points[-1][0]])
    mark_training(axes, mean_loops)


def draw_losses(axes: Axes, sweep: DepthSweep) -> None:
    """Plot losses by loops as differences to the lowest, on a scale that shows 0.001 nats as well as one nat."""
    curve = {measures.loops: measures.loss for measures in sweep.read_out if measures.loss is not None}
    best = min(curve.values())
    describe(axes, "Loss by loops", "loops", f"nats per token above {best:.4f}")
    axes.set_yscale("symlog", linthresh=1e-3)
    losses = [loss - best for loss in curve.values()]
    axes.plot(list(curve), losses, "o-", color=BLUE, label="every position alike")
    if sweep.fit is not None:
        draw_fit(axes, sweep.fit, best)
    for number, rule in enumerate(dict.fromkeys(point.rule for point in sweep.halting)):
        points = [point for point in sweep.halting if point.rule == rule]
        style: dict[str, Any] = {"color": rule_colour(rule), "marker": "sD^v"[number % 4], "markersize": 4.5}
        axes.plot(
            [p.loops for p in points],
            [p.loss - best for p in points],
            label=rule.replace("_", " "),
            linewidth=1,
            **style,
        )
        for point in points:
            if point.default:
                place = [point.loops], [point.loss - best]
                axes.plot(*place, "*", color=rule_colour(rule), markersize=13, label="default threshold")
    most = max(losses + [point.loss - best for point in sweep.halting])
    least = min([0.0, *(point.loss - best for point in sweep.halting)])
    axes.set_ylim(1.5 * least - 0.0004, max(1.5 * most, 0.002))
    plain_numbers(axes.yaxis)
    loop_axis(axes, curve, unnamed=[point.loops for point in sweep.halting])
    mark_training(axes, sweep.mean_loops)
    name_lines(axes)


def draw_exits(axes: Axes, points: Sequence[HaltingPoint]) -> None:
    """Draw a bar for each threshold of a rule: the shares of the positions that stopped after 1, 2, ... loops."""
    most = max(len(point.exits) for point in points)
    describe(axes, "Loops after which positions stop", "share of the positions (%)", "rule and threshold (★ default)")
    for row, point in enumerate(points):
        left, total = 0.0, max(1, sum(point.exits))
        for loops, count in enumerate(point.exits, 1):
            share = count / total
            colour = loop_colour(loops, most)
            axes.barh(row, 100 * share, left=100 * left, color=colour, edgecolor="white", linewidth=0.5, height=0.85)
            if share >= NUMBERED_SHARE:
                place = 100 * (left + share / 2), row
                axes.text(*place, str(loops), ha="center", va="center_baseline", fontsize=SMALL, color=DARK)
            left += share
    names = [point.rule.replace("_", " ") + f" {point.threshold:g}" + " ★" * point.default for point in points]
    axes.set_yticks(range(len(points)), names)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.grid(visible=False)
