"""A run as one self-contained page of HTML: no scripts, no other files, no network."""

import html
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mythos.config.loading import dump_config
from mythos.errors import MythosError, without_credentials
from mythos.evaluation.depth_sweep import DepthSweep, fit_losses, prediction
from mythos.evaluation.results import Result, load, rows_of
from mythos.generation.depth_view import harmless
from mythos.planning.flops import count_parameters
from mythos.reports.figures import (
    HALTING,
    TRAINING,
    depth_figures,
    expert_figures,
    inline_svg,
    loss_figure,
    page_style,
    panels,
    rate_figures,
)
from mythos.reports.plots import sweep_figure
from mythos.reports.recorded import RecordedRun
from mythos.training.metrics import losses_by_depth

SHOWN_SAMPLES = 8
"""About so many steps, spread over training, whose samples are shown."""
STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --dim: #5c5c5c; --line: #ccc; --back: #fff }
@media (prefers-color-scheme: dark) { :root { --text: #e4e4e4; --dim: #a5a5a5; --line: #484848; --back: #16181c } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: var(--text);
       background: var(--back) }
h1 { margin-bottom: 0 }
h2 { margin-top: 2em; border-bottom: 1px solid var(--line) }
.dim { color: var(--dim); margin-top: 0 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(13em, 1fr)); gap: .8em 1.5em }
dt { color: var(--dim); font-size: 13px }
dd { margin: 0; font-size: 18px; font-variant-numeric: tabular-nums }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30em, 100%), 1fr)); gap: 1em }
figure { margin: 0 }
svg { width: 100%; height: auto; fill: currentColor; stroke-linejoin: round; stroke-linecap: butt }
.scroll { max-height: 26em; overflow: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1em 0 }
th, td { padding: .15em 1em .15em 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
th:last-child, td:last-child { text-align: left }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px }
summary { cursor: pointer }
"""


GENERATOR = '<meta name="generator" content="mythos report">'
"""In every page about a run, so that the command replaces its own pages only."""


def run_page(run: RecordedRun, refresh: float | None = None) -> str:
    """The page's HTML. The browser loads it again every `refresh` seconds."""
    sections: list[tuple[str, str]] = []
    with page_style():
        pictures = Pictures()
        sections.append(("Training", pictures.row([loss_figure(run), *panels(run, TRAINING)])))
        sections.append(("Depth", depth_section(run, pictures)))
        sections.append(("Depth sweep", sweep_section(run, pictures)))
        sections.append(("Evaluations", evaluations_section(run)))
        sections.append(("Experts", pictures.row(expert_figures(run))))
        sections.append(("Throughput and memory", pictures.row(rate_figures(run))))
    sections.append(("Samples", samples_section(run)))
    sections.append(("Events", events_section(run)))
    config = without_credentials(dump_config(run.config))
    sections.append(("Configuration", folded("config.yaml", code(config))))
    head = GENERATOR if refresh is None else f'{GENERATOR}\n<meta http-equiv="refresh" content="{refresh:g}">'
    intro = f'<p class="dim">{escape(str(run.directory))}</p>\n{summary(run)}'
    return document(run.name, intro, sections, head)


def document(title: str, intro: str, sections: Iterable[tuple[str, str]], head: str) -> str:
    """A whole page: a heading, `intro`, and the sections that are not empty. All but the title is HTML."""
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{content}\n</section>" for name, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{head}\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{intro}\n{body}\n</body>\n</html>\n"
    )


class Pictures:
    """Converts figures to svg elements whose ids are unique in the page."""

    def __init__(self) -> None:
        self.count = 0

    def one(self, figure: Figure) -> str:
        """The figure as an svg element."""
        self.count += 1
        return inline_svg(figure, f"figure-{self.count}")

    def row(self, figures: Iterable[Figure]) -> str:
        """Figures side by side; empty for no figures."""
        elements = "\n".join(f"<figure>{self.one(figure)}</figure>" for figure in figures)
        return f'<div class="figures">\n{elements}\n</div>' if elements else ""


def summary(run: RecordedRun) -> str:
    """The most important figures of a run."""
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in headline(run))
    return f"<dl>\n{shown}</dl>"


def headline(run: RecordedRun) -> Iterator[tuple[str, str]]:
    """Names and values of :func:`summary` that the run has."""
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
    every = [
        [f"{record['step']:,}", f"{record['tokens']:,}", f"{record['val/loss']:.4f}"]
        + [f"{record[key]:.4f}" for key in ("val/bits_per_byte", "val/accuracy") if key in record]
        for record in run.validations
    ]
    names = ["step", "tokens", f"loss at {run.depth_label}", "right answers" if is_task else "bits per byte"]
    return (
        pictures.row([*depth_figures(run), *panels(run, HALTING)])
        + newest
        + folded("All validations", table(names, every))
    )


def sweep_section(run: RecordedRun, pictures: Pictures) -> str:
    """The run's newest depth sweep, written by `mythos sweep`: measurements by loops, and what halting saves."""
    files = sorted((run.directory / "sweep").glob("step-*.json"), key=sweep_step)
    if not files and run.config.depth.follow == "difficulty":
        return ""
    if not files:
        return '<p class="dim">None yet: mythos sweep measures loss, halting and experts by depth.</p>'
    try:
        sweep, about = DepthSweep.load(files[-1])
        figure = pictures.one(sweep_figure(sweep))
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
    caption = (
        f"{files[-1].name}: step {about.get('step')}, {sweep.sequences} sequences of {sweep.sequence_length} tokens"
    )
    rules = table(["rule", "threshold", "loops", "saved", "loss"], rows) if rows else ""
    return f'<p class="dim">{escape(caption)}</p>\n<figure>{figure}</figure>\n{rules}'


def sweep_step(path: Path) -> tuple[int, int]:
    """The step in a sweep's file name, and the number of the sweep at that step; (-1, 0) for other names."""
    match = re.fullmatch(r"step-([0-9]+)(?:-([0-9]+))?", path.stem)
    return (int(match[1]), int(match[2] or 1)) if match else (-1, 0)


def evaluations_section(run: RecordedRun) -> str:
    """The scores of every call of `mythos evaluate`, newest checkpoint first; those of the newest are unfolded."""
    if not run.is_text:
        return ""
    files = sorted((run.directory / "evaluation").glob("step-*.json"), key=evaluation_order, reverse=True)
    if not files:
        return '<p class="dim">None yet: mythos evaluate scores the model on tasks and texts by depth.</p>'
    return "\n".join(
        folded(file.name, evaluation(file), opened=evaluation_order(file)[0] == evaluation_order(files[0])[0])
        for file in files
    )


def evaluation_order(path: Path) -> tuple[int, float]:
    """The step in the name of a file of results, and when it was written."""
    step = path.name.removeprefix("step-").partition("_")[0].removesuffix(".json")
    try:
        return int(step) if step.isdecimal() else -1, path.stat().st_mtime
    except OSError:  # deleted meanwhile
        return -1, 0.0


def evaluation(file: Path) -> str:
    """The scores in a file of results: a line for each task and metric, a column for each depth."""
    try:
        results, about = load(file)
    except MythosError as error:
        return f"<p>{escape(str(error))}</p>"
    settings = list(dict.fromkeys(result.setting for result in results))
    rows = []
    for (task, metric), by_setting in rows_of(results).items():
        samples = {result.samples for result in by_setting.values()} - {None}
        scores = [score(by_setting[setting]) if setting in by_setting else "" for setting in settings]
        rows.append([task, metric, *scores, ", ".join(f"{number:,}" for number in samples if number is not None)])
    limits = [f", {key} {about[key]}" for key in ("limit", "fewshot") if about.get(key) is not None]
    caption = f"{about.get('source')}, {about.get('dtype')}{''.join(limits)}"
    columns = [f"{setting} loops" if setting.rule is None else str(setting) for setting in settings]
    return f'<p class="dim">{escape(caption)}</p>\n{table(["task", "metric", *columns, "samples"], rows)}'


def score(result: Result) -> str:
    """A value with its standard error and, with a halting rule, the mean loops."""
    error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
    loops = "" if result.setting.rule is None else f" ({result.mean_loops:.2f} loops)"
    return f"{result.value:.4f}{error}{loops}"


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


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text cells that scrolls if it is long."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def folded(title: str, content: str, opened: bool = False) -> str:
    """An element that unfolds on a click."""
    return f"<details{' open' * opened}><summary>{escape(title)}</summary>\n{content}\n</details>"


def code(text: str) -> str:
    """Preformatted text."""
    return f"<pre>{escape(text)}</pre>"


def escape(text: Any) -> str:
    """Escape text for HTML; control characters are shown as symbols."""
    return html.escape(harmless(str(text)))
