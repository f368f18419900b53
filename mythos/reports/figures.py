"""The plots of a run's page, and their conversion to inline SVG in the page's colours, without external references."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib

from mythos.reports.plots import Curves, depth_panels, draw_points, loss_panels, points_of
from mythos.reports.recorded import RecordedRun
from mythos.reports.style import (
    BLUE,
    GREY,
    ORANGE,
    SKY,
    Panel,
    describe,
    fit_range,
    loop_axis,
    name_lines,
)
from mythos.training.metrics import losses_by_depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# `inline_svg` replaces black by the page's text colour. All other colours must be readable on white and on black.
SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "path.simplify_threshold": 0.5}


TRAINING: Mapping[str, Curves] = {
    "Learning rate": Curves("learning rate", {"lr": ""}, low=0),
    "Loops of a sequence": Curves("mean over the batch", {"loops": "all", "backprop_loops": "with gradient"}, low=0),
    "Norm of the gradient": Curves("before clipping", {"grad_norm": ""}, "log"),
    "Size of the state": Curves("mean log ||h||", {"state_norm": ""}),
    "Change of the state in its last loop": Curves(
        "share of its size", {"state_delta": "training", "val/state_delta": "validation"}, "log"
    ),
    "Spectral radius of the injection": Curves("rho(A), below 1", {"rho_a": ""}, low=0, high=1),
}
"""Plots over tokens by title."""
EXPERTS: Mapping[str, Curves] = {
    "Load of the busiest expert": Curves("times the mean", {"moe/load_max_over_mean": ""}, low=1),
    "Experts that no token reached": Curves("experts in a step", {"moe/dead_experts": ""}, low=0),
    "Experts kept from the loop before": Curves("share, in validation", {"moe/depth_overlap": ""}, low=0, high=1.05),
}
HALTING: Mapping[str, Curves] = {
    "Loops run where positions halt": Curves("mean over positions", {"val/auto_loops": ""}, low=0),
}
RATES: Mapping[str, tuple[Curves, float]] = {
    "Throughput": (Curves("tokens per second", {"tokens_per_second": ""}, low=0), 1),
    "Utilisation": (Curves("% of the peak FLOPs", {"mfu": ""}, low=0), 0.01),
    "Peak memory": (Curves("GiB", {"peak_memory_bytes": ""}, low=0), 2**30),
}
"""Plots over time by title, and the unit that values are divided by."""
UNITS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86_400}
"""Units of time: the largest is chosen of which a run took at least two."""
SHOWN_LOADS = 4
"""Number of the last validations whose load by loops is drawn."""


def page_style() -> AbstractContextManager[None]:
    """Settings under which figures for :func:`inline_svg` must be drawn and saved."""
    return matplotlib.rc_context(SETTINGS)


def run_loss_panels(run: RecordedRun) -> list[Panel]:
    """Training and validation loss over tokens."""
    depth = "loops = steps" if run.config.depth.follow == "difficulty" else f"at {run.depth_label}"
    return loss_panels(run.records, f"validation\n{depth}")


def panels(run: RecordedRun, kind: Mapping[str, Curves]) -> Iterator[Panel]:
    """The plots of TRAINING, EXPERTS or HALTING for which the run has two measurements, and not only zeros."""
    for title, curves in kind.items():
        points = {key: measured for key in curves.keys if (measured := points_of(run.records, key))}
        several = max(map(len, points.values()), default=0) > 1
        if several and any(value for measured in points.values() for _, value in measured):
            yield Panel(partial(draw_curves, title=title, x="tokens", curves=curves, points=points))


def draw_curves(
    axes: Axes, title: str, x: str, curves: Curves, points: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Plot metrics over tokens or time."""
    describe(axes, title, x, curves.label)
    colours = [SKY, BLUE] if "training" in curves.keys.values() else [BLUE, ORANGE]
    for colour, (key, name) in zip(colours, curves.keys.items(), strict=False):
        if key in points:
            named = {"label": name} if len(points) > 1 else {}
            draw_points(axes, points[key], color=colour, linewidth=1.2, **named)
    curves.fit(axes)
    name_lines(axes)


def rate_panels(run: RecordedRun) -> Iterator[Panel]:
    """Throughput, utilisation and memory over the time since the first record, pauses of the run included."""
    times = run.measured("time")
    begin, span = (times[0], times[-1] - times[0]) if times else (0.0, 0.0)
    unit = next((name for name, seconds in reversed(UNITS.items()) if span >= 2 * seconds), "seconds")
    for title, (curves, divisor) in RATES.items():
        [key] = curves.keys
        points = [
            ((record["time"] - begin) / UNITS[unit], record[key] / divisor)
            for record in run.records
            if record.get(key) is not None and record.get("time") is not None
        ]
        if len(points) > 1:
            over = f"{unit} since the first record"
            yield Panel(partial(draw_curves, title=title, x=over, curves=curves, points={key: points}))


def run_depth_panels(run: RecordedRun) -> list[Panel]:
    """Loss by loops of the validations and, for a task, the share of right answers."""
    drawn = depth_panels(run.validations, run.config.depth_mean)
    if not run.validations or "val/accuracy" not in run.validations[-1]:
        return drawn
    last = run.validations[-1]
    by_loops = [(loops, 100 * last[f"val/accuracy@{loops}"]) for loops in losses_by_depth(last)]
    if len(by_loops) > 1:
        title = f"Right answers by loops, step {last['step']:,}"
        drawn.append(Panel(partial(draw_answers, title=title, x="loops", points=by_loops)))
    over_tokens = [(tokens, 100 * share) for tokens, share in points_of(run.records, "val/accuracy")]
    if len(over_tokens) > 1:
        title = f"Right answers at {run.depth_label}"
        drawn.append(Panel(partial(draw_answers, title=title, x="tokens", points=over_tokens)))
    return drawn


def draw_answers(axes: Axes, title: str, x: str, points: Sequence[tuple[float, float]]) -> None:
    """Plot the share of sequences that are answered right, in percent."""
    describe(axes, title, x, "% of the sequences")
    draw_points(axes, points, color=BLUE)
    axes.set_ylim(-2, 102)
    if x == "loops":
        loop_axis(axes, [loops for loops, _ in points])


def expert_panels(run: RecordedRun) -> Iterator[Panel]:
    """Load of experts by loops at the last validations, and the plots of EXPERTS."""
    prefix = "moe/load_max_over_mean@"
    measured = [record for record in run.records if f"{prefix}1" in record]
    if measured and f"{prefix}2" in measured[-1]:
        yield Panel(partial(draw_loads, records=measured[-SHOWN_LOADS:], prefix=prefix))
    yield from panels(run, EXPERTS)


def draw_loads(axes: Axes, records: Sequence[Mapping[str, Any]], prefix: str) -> None:
    """Plot the load of the busiest expert by loops; the newest validation is blue."""
    describe(axes, "Load of the busiest expert by loop", "loop (the last counts all deeper)", "times the mean")
    for record in records:
        loads = {int(key.removeprefix(prefix)): load for key, load in record.items() if key.startswith(prefix)}
        style = {"color": BLUE} if record is records[-1] else {"color": GREY, "alpha": 0.5}
        axes.plot(list(loads), list(loads.values()), "o-", markersize=4, label=f"step {record['step']:,}", **style)
    fit_range(axes, low=1)
    axes.set_xticks(sorted({int(key.removeprefix(prefix)) for r in records for key in r if key.startswith(prefix)}))
    name_lines(axes)


def unreached(run: RecordedRun) -> str:
    """A sentence that every expert received tokens; empty if that was not measured or is not so."""
    counts = run.measured("moe/dead_experts")
    if not counts or any(counts):
        return ""
    return "Every expert received tokens in " + ("the recorded step." if len(counts) == 1 else "every recorded step.")


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
    titles = ", ".join(axes.get_title("left") for axes in figure.axes)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes the size of every figure"
    text = re.sub(r"<svg [^>]*>", f'<svg role="img" aria-label="{html.escape(titles)}" {box[0]}>', text, count=1)
    return text.replace("xlink:href", "href").replace("#000000", "currentColor")
