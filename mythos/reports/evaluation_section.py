"""The parts of a run's page about evaluations and reasoning maps that are stored in the run directory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mythos.errors import MythosError
from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.reasoning import AccuracyMap
from mythos.evaluation.results import Result, load, rows_of
from mythos.generation.depth_view import in_loops
from mythos.reports.evaluation_plots import draw_over_training, map_panels, score_key, score_panels
from mythos.reports.markup import Pictures, escape, folded, paragraph, table
from mythos.reports.recorded import RecordedRun
from mythos.reports.style import Panel

MOST_PANELS = 12
"""Most plots over training; the table has all scores."""
QUESTIONS = re.compile(r"val/(?P<task>.+)_(?P<metric>acc_norm|acc)@(?P<loops>[0-9]+)")
"""Metrics of the question files of `eval.tasks`."""


class Stored(NamedTuple):
    """One call of `mythos evaluate`."""

    step: int
    conditions: tuple[Any, ...]
    """What else decides the scores: limit, fewshot, dtype."""
    results: list[Result]


def evaluations_section(run: RecordedRun, pictures: Pictures) -> str:
    """Scores by loops and over training as plots, and those of every call of `mythos evaluate` as tables.

    The newest checkpoint is first, and its tables are unfolded.
    """
    if not run.is_text:
        return ""
    files = sorted((run.directory / "evaluation").glob("step-*.json"), key=evaluation_order, reverse=True)
    stored = stored_evaluations(files)
    plots = newest_scores(stored, pictures)
    plots += pictures.row([*panels_over_steps(stored), *panels_over_tokens(run)][:MOST_PANELS])
    if not files:
        return plots + paragraph("None yet: mythos evaluate scores the model on tasks and texts by depth.", "dim")
    newest = evaluation_order(files[0])[0]
    return plots + "\n".join(
        folded(file.name, evaluation(file), opened=evaluation_order(file)[0] == newest) for file in files
    )


def stored_evaluations(files: Sequence[Path]) -> list[Stored]:
    """The contents of the files that can be read, oldest first; `files` are in the opposite order."""
    stored = []
    for file in reversed(files):
        with suppress(MythosError):  # the tables tell why
            results, about = load(file)
            conditions = tuple(about.get(name) for name in ("limit", "fewshot", "dtype"))
            stored.append(Stored(evaluation_order(file)[0], conditions, results))
    return stored


def newest_scores(stored: Sequence[Stored], pictures: Pictures) -> str:
    """Plots of the scores of the newest step, of all calls under the conditions of its last one."""
    if not stored:
        return ""
    last = stored[-1]
    calls = [one for one in stored if (one.step, one.conditions) == (last.step, last.conditions)]
    results = list({(r.task, r.metric, r.setting): r for one in calls for r in one.results}.values())
    panels = score_panels(results)
    return paragraph(f"Step {last.step:,}") + pictures.row(panels, score_key(results)) if panels else ""


def evaluation_order(path: Path) -> tuple[int, float]:
    """The step in the name of a file of results, and when it was written."""
    step = path.name.removeprefix("step-").partition("_")[0].partition("-")[0].removesuffix(".json")
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
    columns = [in_loops(setting.loops) if setting.rule is None else str(setting) for setting in settings]
    return f'<p class="dim">{escape(caption)}</p>\n{table(["task", "metric", *columns, "samples"], rows)}'


def score(result: Result) -> str:
    """A value with its standard error and, with a halting rule, the mean loops."""
    error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
    loops = "" if result.setting.rule is None else f" ({result.mean_loops:.2f} loops)"
    return f"{result.value:.4f}{error}{loops}"


def panels_over_steps(stored: Sequence[Stored]) -> Iterator[Panel]:
    """One plot for each score that was measured at several steps under the same conditions."""
    lines: dict[tuple[Any, ...], dict[DepthSetting, dict[int, float]]] = {}
    for one in stored:
        for result in one.results:
            by_setting = lines.setdefault((result.task, result.metric, one.conditions), {})
            by_setting.setdefault(result.setting, {})[one.step] = result.value
    for (task, metric, _), by_setting in lines.items():
        several = {setting: list(points.items()) for setting, points in by_setting.items() if len(points) > 1}
        if several:
            yield Panel(partial(draw_over_training, title=task, metric=metric, x="step", lines=several))


def panels_over_tokens(run: RecordedRun) -> Iterator[Panel]:
    """One plot for each question file and metric of `eval.tasks`, from the records of the run."""
    lines: dict[tuple[str, str], dict[DepthSetting, list[tuple[float, float]]]] = {}
    for record in run.validations:
        for key, value in record.items():
            if (match := QUESTIONS.fullmatch(key)) and value is not None:
                by_setting = lines.setdefault((match["task"], match["metric"]), {})
                by_setting.setdefault(DepthSetting(int(match["loops"])), []).append((record["tokens"], value))
    for (task, metric), by_setting in lines.items():
        if max(map(len, by_setting.values())) > 1:
            yield Panel(partial(draw_over_training, title=task, metric=metric, x="tokens", lines=by_setting))


def reasoning_section(run: RecordedRun, pictures: Pictures) -> str:
    """The newest map of a task run: right answers by difficulty and loops."""
    if run.is_text:
        return ""
    maps, parts = [], []
    for path in sorted((run.directory / "reasoning").glob("step-*.json"), key=evaluation_order):
        try:
            maps.append((path, AccuracyMap.load(path)))
        except MythosError as error:
            parts.append(paragraph(str(error)))
    if maps:
        path, newest = maps[-1]
        about = f"{path.name}: step {newest.step:,}, {newest.sequences:,} sequences of each difficulty"
        parts += [paragraph(about, "dim"), pictures.row(map_panels([newest]))]
    elif not parts:
        parts.append(paragraph("None yet: mythos reasoning measures right answers by difficulty and loops.", "dim"))
    return "".join(parts)
