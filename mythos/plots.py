"""The pictures of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mythos.evaluation.validation import losses_by_depth
from mythos.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_plots(run_dir: Path, mean_depth: float) -> list[Path]:
    """Write `plots/loss.png` and `plots/depth.png`; returns what was written.

    The first shows training and validation loss over tokens, the second validation loss by loops over the validations.
    """
    records = read_metrics(run_dir / "metrics.jsonl")
    validations = [record for record in records if "val/loss" in record]
    directory = run_dir / "plots"
    directory.mkdir(exist_ok=True)
    written = []

    figure, axes = new_axes("Training and validation loss", "tokens", "loss (nats per token)")
    trained = [record for record in records if record.get("loss") is not None]  # null: the update was skipped
    axes.plot(
        [r["tokens"] for r in trained], [r["loss"] for r in trained], color="tab:blue", alpha=0.5, label="training"
    )
    if validations:
        tokens, losses = [r["tokens"] for r in validations], [r["val/loss"] for r in validations]
        axes.plot(
            tokens, losses, color="tab:red", marker="o", markersize=3, label=f"validation at {mean_depth:g} loops"
        )
    axes.legend()
    written.append(finish(figure, directory / "loss.png"))

    if validations:
        figure, axes = new_axes("Validation loss by depth", "loops", "loss (nats per token)")
        shown = validations[:: max(1, len(validations) // 5)]
        for record in [*shown, validations[-1]] if shown[-1] is not validations[-1] else shown:
            curve = losses_by_depth(record)
            newest = record is validations[-1]
            axes.plot(
                list(curve),
                list(curve.values()),
                marker="o",
                color="tab:red" if newest else "tab:gray",
                alpha=1.0 if newest else 0.4,
                label=f"step {record['step']}",
            )
        axes.set_xscale("log", base=2)
        ticks = list(losses_by_depth(validations[-1]))
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.axvline(mean_depth, color="black", linestyle=":", label="training mean")
        axes.legend()
        written.append(finish(figure, directory / "depth.png"))
    return written


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure that needs no display, with one labelled plot."""
    from matplotlib.figure import Figure  # takes a second, and only rank 0 draws

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def finish(figure: Figure, path: Path) -> Path:
    """Save a figure whole or not at all."""
    aside = path.with_name("tmp." + path.name)
    figure.savefig(aside, dpi=120)
    return aside.replace(path)
