"""The figures of a run's page, as inline SVG in the page's colours without external references."""

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mythos.reports.plots import draw_depths, draw_over_tokens, draw_training, loop_axis, new_axes
from mythos.reports.recorded import RecordedRun
from mythos.training.metrics import losses_by_depth

# `inline_svg` replaces black by the page's text colour. All other colours must be readable on white and on black.
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": "0.5",
    "path.simplify_threshold": 0.5,
}

Panels = Mapping[str, tuple[str, str, Mapping[str, str]]]
"""Panels over tokens by title: label of the y axis, its scale, and the metrics with their labels."""
TRAINING: Panels = {
    "Learning rate": ("", "linear", {"lr": ""}),
    "Loops of a sequence": ("mean over the batch", "linear", {"loops": "all", "backprop_loops": "with gradient"}),
    "Norm of the gradient": ("before clipping", "log", {"grad_norm": ""}),
    "Size of the state": ("mean log ||h||", "linear", {"state_norm": ""}),
    "Change of the state in its last loop": (
        "||h_t - h_(t-1)|| / ||h_t||",
        "log",
        {"state_delta": "training", "val/state_delta": "validation"},
    ),
    "Spectral radius of the injection": ("rho(A)", "linear", {"rho_a": ""}),
}
EXPERTS: Panels = {
    "Load of the busiest expert": ("over the mean", "linear", {"moe/load_max_over_mean": ""}),
    "Experts that no token reached": ("in a step", "linear", {"moe/dead_experts": ""}),
    "Experts chosen in the loop before too": ("share, in validation", "linear", {"moe/depth_overlap": ""}),
}
HALTING: Panels = {
    "Loops run where positions halt": ("mean over positions", "linear", {"val/auto_loops": ""}),
}
RATES: dict[str, tuple[str, str, float]] = {
    "Throughput": ("tokens_per_second", "tokens/s", 1),
    "Utilisation": ("mfu", "share of the peak", 1),
    "Peak memory": ("peak_memory_bytes", "GiB", 2**30),
}
"""Panels over hours by title: metric, label of the y axis, and the unit that values are divided by."""
FEW = 50
"""Up to this many measurements each get a marker."""
SHOWN_LOADS = 4
"""Number of the last validations whose load by loops is drawn."""


def page_style() -> AbstractContextManager[None]:
    """Settings under which figures for :func:`inline_svg` must be drawn and saved."""
    return matplotlib.rc_context(SETTINGS)


def marker(measured: Sequence[Any]) -> str | None:
    """The marker of a curve; None for many points, because markers would be most of a page's bytes."""
    return "o" if len(measured) <= FEW else None


def loss_figure(run: RecordedRun) -> Figure:
    """Plot training and validation loss over tokens."""
    figure, axes = new_axes("Training and validation loss", "tokens", "loss (nats per token)")
    draw_training(axes, run.records, f"validation at {run.depth_label}")
    return figure


def panels(run: RecordedRun, kind: Panels) -> Iterator[Figure]:
    """Plot the panels of TRAINING, EXPERTS or HALTING for which the run has measurements."""
    for title, (label, scale, keys) in kind.items():
        labels = {key: name for key, name in keys.items() if run.measured(key)}
        if not labels:
            continue
        figure, axes = new_axes(title, "tokens", label)
        for key, name in labels.items():
            draw_over_tokens(axes, run.records, key, marker=marker(run.measured(key)), markersize=4, label=name)
        axes.set_yscale(scale)
        if len(labels) > 1:
            axes.legend()
        yield figure


def rate_figures(run: RecordedRun) -> Iterator[Figure]:
    """Plot throughput, utilisation and memory over hours since the first record, pauses of the run included."""
    begin = next(iter(run.measured("time")), 0.0)
    for title, (key, label, unit) in RATES.items():
        points = [record for record in run.records if record.get(key) is not None and record.get("time") is not None]
        if points:
            figure, axes = new_axes(title, "hours since the first record", label)
            hours = [(record["time"] - begin) / 3600 for record in points]
            axes.plot(hours, [record[key] / unit for record in points], marker=marker(points), markersize=4)
            axes.set_ylim(bottom=0)
            yield figure


def depth_figures(run: RecordedRun) -> Iterator[Figure]:
    """Plot loss by loops of the validations and, for a task, the share of right answers."""
    if not run.validations:
        return
    figure, axes = new_axes("Validation loss by depth", "loops", "loss (nats per token)")
    draw_depths(axes, run.validations, run.config.depth_mean)
    yield figure
    last = run.validations[-1]
    if "val/accuracy" in last:
        loops = list(losses_by_depth(last))
        figure, axes = new_axes("Right answers by depth", "loops", f"share of the sequences, step {last['step']}")
        axes.plot(loops, [last[f"val/accuracy@{depth}"] for depth in loops], "o-", color="tab:red")
        loop_axis(axes, loops)
        axes.set_ylim(-0.02, 1.02)
        yield figure
        figure, axes = new_axes("Right answers over training", "tokens", f"at {run.depth_label}")
        draw_over_tokens(axes, run.records, "val/accuracy", marker="o", markersize=3, color="tab:red")
        axes.set_ylim(-0.02, 1.02)
        yield figure


def expert_figures(run: RecordedRun) -> Iterator[Figure]:
    """Plot the load of experts by loops at the last validations, and the panels of EXPERTS."""
    prefix = "moe/load_max_over_mean@"
    measured = [record for record in run.records if f"{prefix}1" in record]
    if measured:
        figure, axes = new_axes(
            "Load of the busiest expert by loop", "loop; the last counts all deeper", "over the mean"
        )
        for record in measured[-SHOWN_LOADS:]:
            loads = {int(key.removeprefix(prefix)): load for key, load in record.items() if key.startswith(prefix)}
            newest = record is measured[-1]
            style = {"color": "tab:red"} if newest else {"color": "tab:gray", "alpha": 0.4}
            axes.plot(list(loads), list(loads.values()), "o-", label=f"step {record['step']}", **style)
        axes.legend()
        yield figure
    yield from panels(run, EXPERTS)


def inline_svg(figure: Figure, name: str) -> str:
    """Convert a figure to an svg element; `name` must be unique in the page and makes the element's ids unique."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # these ids repeat in every figure and are not referenced
    text = re.sub(r'font-family: [^;"]*(; )?', "", text)
    titles = ", ".join(axes.get_title() for axes in figure.axes)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes the size of every figure"
    text = re.sub(r"<svg [^>]*>", f'<svg role="img" aria-label="{html.escape(titles)}" {box[0]}>', text, count=1)
    return text.replace("xlink:href", "href").replace("#000000", "currentColor")
