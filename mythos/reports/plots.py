"""Plots of a run from its metrics.jsonl: loss over training, and loss by loops."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mythos.evaluation.depth_sweep import DepthFit, fit_losses
from mythos.generation.depth_view import in_loops
from mythos.reports.style import (
    BLUE,
    FEW,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    Panel,
    after_warm_up,
    compose,
    describe,
    fit_range,
    log_scale,
    loop_axis,
    mark_training,
    name_lines,
    save,
)
from mythos.training.metrics import METRICS_FILE, losses_by_depth, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_plots(run_dir: Path, mean_depth: float) -> list[Path]:
    """Write `plots/loss.png` and `plots/depth.png`; returns their paths, or none without matplotlib.

    The first shows training and validation loss over tokens, the second validation loss by loops. Each is missing as
    long as it would consist of single points: until the second record, and until a validation at several depths.
    """
    if find_spec("matplotlib") is None:  # a run need not stop for a plot
        return []
    records = read_metrics(run_dir / METRICS_FILE)
    directory = run_dir / "plots"
    directory.mkdir(exist_ok=True)
    depth = in_loops(int(mean_depth)) if mean_depth == int(mean_depth) else f"{mean_depth:g} loops"
    pictures = {
        "loss.png": loss_panels(records, f"validation\nat {depth}"),
        "depth.png": depth_panels([record for record in records if "val/loss" in record], mean_depth),
    }
    written = [save(compose(panels), directory / name) for name, panels in pictures.items() if panels]
    # The objects of a figure form reference cycles. If Python frees them late, their memory is fragmented by tensors
    # and cannot be reused: 2 MB a validation (scripts/benchmark.py validations).
    gc.collect()
    return written


def points_of(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """A metric as (tokens, value); records without it, or with null (a skipped update), are left out."""
    return [
        (record["tokens"], record[key])
        for record in records
        if record.get(key) is not None and record.get("tokens") is not None
    ]


class Curves(NamedTuple):
    """Metrics in one plot."""

    label: str
    """Of the y axis."""
    keys: Mapping[str, str]
    """The metrics, each with its name in the plot; no name where there is only one."""
    scale: str = "linear"
    low: float | None = None
    high: float | None = None
    """Limits of the y axis, where the metric has natural ones."""

    def fit(self, axes: Axes) -> None:
        """Fit the y axis to the lines."""
        if self.scale == "log":
            log_scale(axes)
        else:
            fit_range(axes, low=self.low, high=self.high)


def draw_points(axes: Axes, points: Sequence[tuple[float, float]], **style: Any) -> None:
    """Plot a line through points, with markers if they are few: markers would be most of a page's bytes."""
    style = {"marker": "o", **style} if len(points) <= FEW else style | {"marker": None}
    axes.plot([x for x, _ in points], [y for _, y in points], markersize=4, **style)


def loss_panels(records: Sequence[dict[str, Any]], label: str) -> list[Panel]:
    """Training and validation loss over tokens; empty before the second record. `label` names the validation."""
    if max(len(points_of(records, key)) for key in ("loss", "val/loss")) < 2:
        return []
    return [Panel(partial(draw_training, records=records, label=label))]


def draw_training(axes: Axes, records: Sequence[dict[str, Any]], label: str) -> None:
    """Plot training and validation loss over tokens."""
    describe(axes, "Training and validation loss", "tokens", "loss (nats per token)")
    training, validation = points_of(records, "loss"), points_of(records, "val/loss")
    if training:
        draw_points(axes, training, color=SKY, linewidth=1, label="training")
    if validation:
        draw_points(axes, validation, color=BLUE, label=label)
    fit_range(axes, after_warm_up(training) + after_warm_up(validation))
    name_lines(axes)


def depth_panels(validations: Sequence[dict[str, Any]], mean_depth: float) -> list[Panel]:
    """Loss by loops of the last validation and, of several, what loops gained; empty without two depths."""
    several = [record for record in validations if len(losses_by_depth(record)) > 1]
    if not several:
        return []
    panels = [Panel(partial(draw_last_validation, record=several[-1], mean_depth=mean_depth))]
    if len(several) > 1:
        panels.append(Panel(partial(draw_gains, validations=several, mean_depth=mean_depth), height=3.4))
    return panels


def draw_last_validation(axes: Axes, record: dict[str, Any], mean_depth: float) -> None:
    """Plot loss by loops of a validation, with its fitted law and its halting point."""
    curve = losses_by_depth(record)
    describe(axes, f"Validation loss by loops, step {record['step']:,}", "loops", "loss (nats per token)")
    axes.plot(list(curve), list(curve.values()), "o-", color=BLUE, label="every position alike")
    if "val/fit_limit" in record and (fit := fit_losses(curve)):
        draw_fit(axes, fit, 0.0)
    if "val/auto_loss" in record:
        label = f"with halting: {record['val/auto_loops']:.2f} loops"
        place = record["val/auto_loops"], record["val/auto_loss"]
        axes.plot(*place, "*", color=GREEN, markersize=13, label=label)
    fit_range(axes)
    loop_axis(axes, list(curve))
    mark_training(axes, mean_depth)
    name_lines(axes)


def draw_gains(axes: Axes, validations: Sequence[dict[str, Any]], mean_depth: float) -> None:
    """Plot the loss by loops below that of the fewest, for up to seven validations; the newest is blue."""
    shown = list(validations[:: max(1, len(validations) // 5)])
    shown += [] if shown[-1] is validations[-1] else [validations[-1]]
    first = min(loops for record in shown for loops in losses_by_depth(record))
    describe(axes, "What loops gain during training", "loops", f"nats below {in_loops(first)}")
    for number, record in enumerate(shown):
        curve = losses_by_depth(record)
        newest = record is shown[-1]
        style = {"color": BLUE} if newest else {"color": GREY, "alpha": 0.3 + 0.5 * number / len(shown)}
        gains = [curve[min(curve)] - loss for loss in curve.values()]
        axes.plot(list(curve), gains, "o-", markersize=4, label=f"step {record['step']:,}", **style)
    fit_range(axes)
    loop_axis(axes, [loops for record in shown for loops in losses_by_depth(record)])
    mark_training(axes, mean_depth)
    name_lines(axes)


def draw_fit(axes: Axes, fit: DepthFit, floor: float) -> None:
    """Plot a fitted law over the depths it was fitted to, as difference to the loss `floor`."""
    first, last = fit.loops[0], fit.loops[-1]
    depths = [first * (last / first) ** (step / 100) for step in range(101)]
    law = f"law {fit.limit:.3f} {fit.amplitude:+.3f} exp({-fit.rate:.2f} T)"
    losses = [fit.loss(loops) - floor for loops in depths]
    axes.plot(depths, losses, "--", color=ORANGE, linewidth=1.2, label=law)
