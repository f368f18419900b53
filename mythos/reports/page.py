"""A run as one self-contained page of HTML: no scripts, no other files, no network."""

import statistics
from collections.abc import Iterator
from datetime import timedelta

from mythos.config.loading import dump_config
from mythos.errors import MythosError, without_credentials
from mythos.evaluation.depth_sweep import DepthSweep, fit_losses, newest_sweep, prediction
from mythos.planning.flops import count_parameters
from mythos.reports.evaluation_section import evaluations_section, reasoning_section
from mythos.reports.figures import (
    HALTING,
    TRAINING,
    expert_panels,
    page_style,
    panels,
    rate_panels,
    run_depth_panels,
    run_loss_panels,
    unreached,
)
from mythos.reports.markup import Pictures, code, document, escape, folded, paragraph, table
from mythos.reports.recorded import RecordedRun
from mythos.reports.sweep_plots import sweep_panels
from mythos.training.metrics import losses_by_depth

SHOWN_SAMPLES = 8
"""About so many steps, spread over training, whose samples are shown."""
GENERATOR = '<meta name="generator" content="mythos report">'
"""In every page about a run, so that the command replaces its own pages only."""


def run_page(run: RecordedRun, refresh: float | None = None) -> str:
    """The page's HTML. The browser loads it again every `refresh` seconds."""
    sections: list[tuple[str, str]] = []
    with page_style():
        pictures = Pictures()
        sections.append(("Training", training_section(run, pictures)))
        sections.append(("Depth", depth_section(run, pictures)))
        sections.append(("Depth sweep", sweep_section(run, pictures)))
        sections.append(("Reasoning", reasoning_section(run, pictures)))
        sections.append(("Evaluations", evaluations_section(run, pictures)))
        sections.append(("Experts", pictures.row(expert_panels(run)) + paragraph(unreached(run))))
        sections.append(("Throughput and memory", pictures.row(rate_panels(run))))
    sections.append(("Samples", samples_section(run)))
    sections.append(("Events", events_section(run)))
    config = without_credentials(dump_config(run.config))
    sections.append(("Configuration", folded("config.yaml", code(config))))
    head = GENERATOR if refresh is None else f'{GENERATOR}\n<meta http-equiv="refresh" content="{refresh:g}">'
    figures = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in headline(run))
    intro = f'<p class="dim">{escape(str(run.directory))}</p>\n<dl>\n{figures}</dl>'
    return document(run.name, intro, sections, head)


def headline(run: RecordedRun) -> Iterator[tuple[str, str]]:
    """Names and values of the most important figures that the run has."""
    last, parameters = run.records[-1], count_parameters(run.config.model)
    yield "parameters", f"{parameters.total:,}"
    yield "active per loop", f"{parameters.active:,}"
    yield "steps", f"{last['step']:,} of {run.config.train_steps:,}"
    yield "tokens", f"{last['tokens']:,}"
    yield "FLOPs needed", f"{run.flops[-1]:.3e}"
    if (loss := run.last("loss")) is not None:
        yield "last training loss", f"{loss:.4f}"
    if run.validations:
        validation = run.validations[-1]
        yield f"validation loss at {run.depth_label}", f"{validation['val/loss']:.4f}"
        if "val/bits_per_byte" in validation:
            yield "bits per byte", f"{validation['val/bits_per_byte']:.4f}"
        if "val/accuracy" in validation:
            yield "sequences answered right", f"{validation['val/accuracy']:.2%}"
        if "val/auto_loss" in validation:
            saved = f"{validation['val/auto_saved']:.0%} saved"
            yield f"loops where {run.config.model.halting} halts", f"{validation['val/auto_loops']:.2f} ({saved})"
    if rates := run.measured("tokens_per_second"):
        yield "tokens per second, median", f"{statistics.median(rates):,.0f}"
    if shares := run.measured("mfu"):
        yield "utilisation (MFU), median", f"{statistics.median(shares):.1%}"
    if peaks := run.measured("peak_memory_bytes"):
        yield "peak memory", f"{max(peaks) / 2**30:.2f} GiB"
    if len(times := run.measured("time")) > 1:
        yield "first to last record", str(timedelta(seconds=round(times[-1] - times[0])))
    yield "restarts", f"{len(run.measured('resumed_from')):,}"
    yield "skipped updates", f"{run.last('skipped_steps') or 0:,}"
    if rollbacks := run.last("rollbacks"):
        yield "rollbacks", f"{rollbacks:,}"
    for key in sorted({key for record in run.records for key in record if key.startswith("data/")}):
        if count := run.last(key):
            yield f"data: {key.removeprefix('data/').replace('_', ' ')}", f"{count:,}"


def training_section(run: RecordedRun, pictures: Pictures) -> str:
    """Loss and other measurements over tokens."""
    if len(run.records) == 1:
        return "<p>One record so far; curves begin with the second.</p>"
    return pictures.row([*run_loss_panels(run), *panels(run, TRAINING)])


def depth_section(run: RecordedRun, pictures: Pictures) -> str:
    """Loss by loops: figures, the last validation as a table, its fit, and all validations."""
    if not run.validations:
        return "<p>No validation yet.</p>"
    last = run.validations[-1]
    curve, is_task = losses_by_depth(last), "val/accuracy" in last
    rows = []
    for loops, loss in curve.items():
        score = f"{last[f'val/accuracy@{loops}']:.2%}" if is_task else f"{prediction(loss, 1, 0)[1]:.2f}"
        mark = "training mean" if loops == round(run.config.depth_mean) else ""
        rows.append([str(loops), f"{loss:.4f}", score, mark])
    fit = fit_losses(curve) if "val/fit_limit" in last else None
    law = f"<p>{escape(str(fit))}</p>\n" if fit else ""
    column = "right answers" if is_task else "perplexity"
    newest = f"<p>Step {last['step']:,}</p>\n" + table(["loops", "loss", column, ""], rows) + "\n" + law
    key = "val/accuracy" if is_task else "val/bits_per_byte"
    every = [
        [
            f"{record['step']:,}",
            f"{record['tokens']:,}",
            f"{record['val/loss']:.4f}",
            f"{record[key]:.4f}" if key in record else "",
        ]
        for record in run.validations
    ]
    names = ["step", "tokens", f"loss at {run.depth_label}", "right answers" if is_task else "bits per byte"]
    return (
        pictures.row([*run_depth_panels(run), *panels(run, HALTING)])
        + newest
        + folded("All validations", table(names, every))
    )


def sweep_section(run: RecordedRun, pictures: Pictures) -> str:
    """The run's newest depth sweep, written by `mythos sweep`: measurements by loops, and what halting saves."""
    newest = newest_sweep(run.directory)
    if newest is None and run.config.depth.follow == "difficulty":
        return ""
    if newest is None:
        return '<p class="dim">None yet: mythos sweep measures loss, halting and experts by depth.</p>'
    try:
        sweep, about = DepthSweep.load(newest)
        figures = pictures.row(sweep_panels(sweep))
    except MythosError as error:
        return f"<p>{escape(str(error))}</p>"
    rows = [
        [
            point.rule + (" (default)" if point.default else ""),
            f"{point.threshold:g}",
            f"{point.loops:.2f}",
            f"{point.saved:.0%}",
            f"{point.loss:.4f}",
        ]
        for point in sweep.halting
    ]
    caption = f"{newest.name}: step {about.get('step')}, {sweep.sequences} sequences of {sweep.sequence_length} tokens"
    rules = table(["rule", "threshold", "loops", "saved", "loss"], rows) if rows else ""
    return f'<p class="dim">{escape(caption)}</p>\n{figures}{rules}'


def samples_section(run: RecordedRun) -> str:
    """Text samples; the newest is unfolded."""
    samples = run.samples()
    steps = list(samples)
    shown = steps[:: -max(1, -(-len(steps) // SHOWN_SAMPLES))]
    return "\n".join(folded(f"Step {step:,}", code(samples[step]), opened=step == steps[-1]) for step in shown)


def events_section(run: RecordedRun) -> str:
    """Restarts, skipped updates, rollbacks, and existing checkpoints."""
    events, note = run.events(), ""
    try:
        events += run.saves()
    except MythosError as error:
        note = f"<p>{escape(str(error))}</p>\n"
    rows = [[f"{event.step:,}", event.moment, event.what] for event in sorted(events, key=lambda event: event.step)]
    return note + (table(["step", "time (UTC)", "event"], rows) if rows else "<p>None.</p>")
