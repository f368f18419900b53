"""Scores of a model by task and depth: as a table, as files, as a picture."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mythos.evaluation.choices import ChoiceScores, ChoiceTask
from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.text import TextScores
from mythos.reports.plots import finish, loop_axis

MOST_PANELS = 12
"""Panels of a picture; files and table hold all scores."""
WIDTH = 3
"""Panels side by side."""


@dataclass(frozen=True)
class Result:
    """One score of one task."""

    task: str
    metric: str
    setting: DepthSetting
    mean_loops: float
    """Loops of a position, on average over what the task was measured on."""
    value: float
    stderr: float | None
    """Standard error, where the metric has one."""
    samples: int | None
    """Questions, documents or sequences."""


def choice_results(task: ChoiceTask, found: ChoiceScores, setting: DepthSetting) -> list[Result]:
    """Both accuracies."""
    count = len(task.questions)
    results = []
    for metric in ("acc", "acc_norm"):
        share = getattr(found, metric)
        error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
        results.append(Result(task.name, metric, setting, found.loops, share, error, count))
    return results


def text_results(name: str, found: TextScores, setting: DepthSetting, sequences: int) -> list[Result]:
    """Bits per byte and perplexity."""
    return [
        Result(name, metric, setting, found.loops, getattr(found, metric), None, sequences)
        for metric in ("bits_per_byte", "perplexity")
    ]


def rows_of(results: Sequence[Result]) -> dict[tuple[str, str], dict[DepthSetting, Result]]:
    """The results by task and metric, and then by setting, in the order that they come in."""
    rows: dict[tuple[str, str], dict[DepthSetting, Result]] = {}
    for result in results:
        rows.setdefault((result.task, result.metric), {})[result.setting] = result
    return rows


def table(results: Sequence[Result]) -> str:
    """A line for each task and metric, a column for each setting; where positions halt, their mean loops as well."""
    settings = list(dict.fromkeys(result.setting for result in results))
    widths = [max(9, len(str(setting)) + 2) for setting in settings]
    lines = [["task", "metric"]]
    numbers = [[str(setting) for setting in settings]]
    before = None
    for (task, metric), found in rows_of(results).items():
        if task != before and any(setting.rule for setting in settings):
            lines.append([task, "mean loops"])
            numbers.append([f"{found[setting].mean_loops:.2f}" for setting in settings])
            before = task
        lines.append(["" if task == before else task, metric])
        numbers.append([f"{found[setting].value:.4f}" for setting in settings])
        before = task
    first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
    return "\n".join(
        f"  {line[0]:{first}}  {line[1]:{second}}"
        + "".join(f"{number:>{width}}" for number, width in zip(row, widths, strict=True))
        for line, row in zip(lines, numbers, strict=True)
    )


def save(results: Sequence[Result], stem: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write STEM.json, with `about` before the results, and STEM.csv, a line a result."""
    flat = []
    for result in results:
        values = asdict(result)
        setting = values.pop("setting")
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        flat.append({"task": finite.pop("task"), "metric": finite.pop("metric"), **setting, **finite})
    document, sheet = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".csv")
    content = {**about, "results": flat}
    document.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with sheet.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return [document, sheet]


def draw(results: Sequence[Result], path: Path) -> Path:
    """Draw score against loops, a panel for each task and metric; returns the path.

    Equal loops are a line, rules of halting are stars at their mean loops; bars are standard errors.
    """
    from matplotlib.figure import Figure  # takes a second, and only scripts draw

    rows = list(rows_of(results).items())[:MOST_PANELS]
    columns = min(WIDTH, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, ((task, metric), found) in zip(panels, rows, strict=False):
        alike = sorted(
            (result for result in found.values() if result.setting.rule is None), key=lambda one: one.mean_loops
        )
        axes.set(title=task, xlabel="loops", ylabel=metric)
        axes.grid(alpha=0.3)
        if alike:
            places, errors = [result.mean_loops for result in alike], [result.stderr or 0.0 for result in alike]
            axes.errorbar(
                places, [result.value for result in alike], errors, fmt="o-", color="black", label="all alike"
            )
        for number, result in enumerate(result for result in found.values() if result.setting.rule is not None):
            place = [result.mean_loops], [result.value], [result.stderr or 0.0]
            axes.errorbar(*place, fmt="*", color=f"C{number}", markersize=12, label=str(result.setting))
        loop_axis(axes, [result.setting.loops for result in alike])
        axes.legend(fontsize="x-small")
    for axes in panels[len(rows) :]:
        axes.remove()
    return finish(figure, path)
