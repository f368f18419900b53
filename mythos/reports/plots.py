"""Plots of a run from its metrics.jsonl, and of a depth sweep."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos.evaluation.depth_sweep import DepthFit, fit_losses
from mythos.files.local import replacing
from mythos.training.metrics import METRICS_FILE, losses_by_depth, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mythos.evaluation.depth_sweep import DepthSweep


def draw_plots(run_dir: Path, mean_depth: float) -> list[Path]:
    """Write `plots/loss.png` and `plots/depth.png`; returns their paths, or none without matplotlib.

    The first shows training and validation loss over tokens, the second validation loss by loops. It is missing until
    the first validation.
    """
    if find_spec("matplotlib") is None:  # a run need not stop for a plot
        return []
    records = read_metrics(run_dir / METRICS_FILE)
    validations = [record for record in records if "val/loss" in record]
    directory = run_dir / "plots"
    directory.mkdir(exist_ok=True)
    written = []

    figure, axes = new_axes("Training and validation loss", "tokens", "loss (nats per token)")
    draw_training(axes, records, f"validation at {mean_depth:g} loops")
    written.append(finish(figure, directory / "loss.png"))

    if validations:
        figure, axes = new_axes("Validation loss by depth", "loops", "loss (nats per token)")
        draw_depths(axes, validations, mean_depth)
        written.append(finish(figure, directory / "depth.png"))
    # The objects of a figure form reference cycles. If Python frees them late, their memory is fragmented by tensors
    # and cannot be reused: 2 MB a validation (scripts/benchmark.py validations).
    del figure, axes
    gc.collect()
    return written


def draw_training(axes: Axes, records: Sequence[dict[str, Any]], label: str) -> None:
    """Plot training and validation loss over tokens; `label` describes the validation."""
    draw_over_tokens(axes, records, "loss", color="tab:blue", alpha=0.5, label="training")
    if any("val/loss" in record for record in records):
        draw_over_tokens(axes, records, "val/loss", color="tab:red", marker="o", markersize=3, label=label)
    axes.legend()


def draw_over_tokens(axes: Axes, records: Sequence[dict[str, Any]], key: str, **style: Any) -> None:
    """Plot a metric over tokens; records without it, or with null (a skipped update), are left out."""
    measured = [record for record in records if record.get(key) is not None and record.get("tokens") is not None]
    axes.plot([record["tokens"] for record in measured], [record[key] for record in measured], **style)


def draw_depths(axes: Axes, validations: Sequence[dict[str, Any]], mean_depth: float) -> None:
    """Plot loss by loops for up to six validations, and for the last one its fit and its halting point."""
    last = validations[-1]
    shown = validations[:: max(1, len(validations) // 5)]
    for record in [*shown, last] if shown[-1] is not last else shown:
        curve = losses_by_depth(record)
        newest = record is last
        axes.plot(
            list(curve),
            list(curve.values()),
            marker="o",
            color="tab:red" if newest else "tab:gray",
            alpha=1.0 if newest else 0.4,
            label=f"step {record['step']}",
        )
    curve = losses_by_depth(last)
    if "val/fit_limit" in last and (fit := fit_losses(curve)):
        draw_fit(axes, fit, 0.0)
    if "val/auto_loss" in last:
        axes.plot(
            last["val/auto_loops"], last["val/auto_loss"], "*", color="tab:red", markersize=12, label="with halting"
        )
    loop_axis(axes, list(curve))
    axes.axvline(mean_depth, color="black", linestyle=":", label="training mean")
    axes.legend()


def draw_fit(axes: Axes, fit: DepthFit, floor: float) -> None:
    """Plot a fitted law over the depths it was fitted to, as difference to the loss `floor`."""
    first, last = fit.loops[0], fit.loops[-1]
    depths = [first * (last / first) ** (step / 100) for step in range(101)]
    law = f"{fit.limit:.3f} {fit.amplitude:+.3f} exp(-{fit.rate:.3f} T)"
    axes.plot(depths, [fit.loss(loops) - floor for loops in depths], ":", color="black", label=law)


def loop_axis(axes: Axes, ticks: Sequence[int]) -> None:
    """Scale the x axis for numbers of loops: logarithmic to base 2."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Create a figure with one labelled plot; it needs no display."""
    from matplotlib.figure import Figure  # the import takes a second, and only rank 0 draws

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def finish(figure: Figure, path: Path) -> Path:
    """Save a figure whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=120)
    return path


def draw_sweep(sweep: DepthSweep, path: Path) -> Path:
    """Draw a depth sweep into an image file; returns the path."""
    return finish(sweep_figure(sweep), path)


def sweep_figure(sweep: DepthSweep) -> Figure:
    """Plot loss, exits, state and, for a core with routed experts, load and overlap of experts, by loops."""
    from matplotlib.figure import Figure

    routed = sweep.loops[0].load_max_over_mean is not None
    figure = Figure(figsize=(15 if routed else 10, 8), layout="constrained")
    panels = figure.subplots(2, 3 if routed else 2)
    (loss, norm), (exits, delta) = panels[:, :2].T

    draw_losses(loss, sweep)
    exits.set(title="Exits", ylabel="share of positions")
    rules = [point.rule for point in sweep.halting]
    for number, point in enumerate(sweep.halting):
        shares = [count / sum(point.exits) for count in point.exits]
        label = f"{point.rule} {point.threshold:g}" + (" (default)" if point.default else "")
        opacity = 1 - 0.8 * rules[:number].count(point.rule) / rules.count(point.rule)
        color = f"C{list(dict.fromkeys(rules)).index(point.rule)}"
        exits.plot(range(1, len(shares) + 1), shares, ".-", color=color, alpha=opacity, label=label)

    passes = [measures.loops for measures in sweep.loops]
    norm.set(title="Size of the state", ylabel="mean log ||h||")
    norm.plot(passes, [measures.state_norm for measures in sweep.loops], ".-")
    delta.set(title="Change of the state", ylabel="||h_t - h_(t-1)|| / ||h_t||", yscale="log")
    delta.plot(passes, [measures.state_delta for measures in sweep.loops], ".-")
    if routed:
        load, overlap = panels[:, 2]
        load.set(title="Load of the busiest expert", ylabel="over the mean")
        load.plot(passes, [measures.load_max_over_mean for measures in sweep.loops], ".-")
        overlap.set(title="Experts chosen in the loop before too", ylabel="share", ylim=(0, 1.05))
        overlap.plot(passes[1:], [measures.expert_overlap for measures in sweep.loops[1:]], ".-")
    ticks = [measures.loops for measures in sweep.read_out]
    for axes in panels.flat:
        axes.set_xlabel("loops")
        loop_axis(axes, ticks)
        axes.axvline(sweep.mean_loops, color="black", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    exits.set_xlim(loss.get_xlim())
    if sweep.halting:
        exits.legend(fontsize="x-small")
    return figure


def draw_losses(axes: Axes, sweep: DepthSweep) -> None:
    """Plot losses by loops as differences to the lowest, on a scale that shows 0.001 nats as well as one nat."""
    fit = sweep.fit
    curve = {measures.loops: measures.loss for measures in sweep.read_out if measures.loss is not None}
    best = min(curve.values())
    axes.set(title="Loss", ylabel=f"nats per token above {best:.4f}")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.plot(list(curve), [loss - best for loss in curve.values()], "o-", color="black", label="all alike")
    if fit is not None:
        draw_fit(axes, fit, best)
    for number, rule in enumerate(dict.fromkeys(point.rule for point in sweep.halting)):
        points = [point for point in sweep.halting if point.rule == rule]
        losses = [point.loss - best for point in points]
        axes.plot([p.loops for p in points], losses, "s--", color=f"C{number}", markersize=4, label=rule)
        for point in points:
            if point.default:
                axes.plot(point.loops, point.loss - best, "*", color=f"C{number}", markersize=14, label="default")
    axes.legend(fontsize="small")
