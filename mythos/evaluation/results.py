"""Scores of a model by task and depth, as a table and as files."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mythos.evaluation.choices import ChoiceScores, ChoiceTask
from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.depth_sweep import finite
from mythos.evaluation.text import TextScores


@dataclass(frozen=True)
class Result:
    """One score of one task."""

    task: str
    metric: str
    setting: DepthSetting
    mean_loops: float
    """Mean loops of a position, over the samples of the task."""
    value: float
    stderr: float | None
    """Standard error; None if the metric has none."""
    samples: int | None
    """Number of questions, documents or sequences."""


def choice_results(task: ChoiceTask, scores: ChoiceScores, setting: DepthSetting) -> list[Result]:
    """Both accuracies of a task."""
    count = len(task.questions)
    results = []
    for metric, share in (("acc", scores.acc), ("acc_norm", scores.acc_norm)):
        error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
        results.append(Result(task.name, metric, setting, scores.loops, share, error, count))
    return results


def text_results(name: str, scores: TextScores, setting: DepthSetting, sequences: int) -> list[Result]:
    """Bits per byte and perplexity of a text."""
    return [
        Result(name, "bits_per_byte", setting, scores.loops, scores.bits_per_byte, None, sequences),
        Result(name, "perplexity", setting, scores.loops, scores.perplexity, None, sequences),
    ]


def rows_of(results: Sequence[Result]) -> dict[tuple[str, str], dict[DepthSetting, Result]]:
    """The results by (task, metric) and then by setting, in the order of the input."""
    rows: dict[tuple[str, str], dict[DepthSetting, Result]] = {}
    for result in results:
        rows.setdefault((result.task, result.metric), {})[result.setting] = result
    return rows


def table(results: Sequence[Result]) -> str:
    """One line per task and metric, one column per setting; with a halting rule also the mean loops per task."""
    settings = list(dict.fromkeys(result.setting for result in results))
    widths = [max(9, len(str(setting)) + 2) for setting in settings]
    lines = [["task", "metric"]]
    numbers = [[str(setting) for setting in settings]]
    before = None
    for (task, metric), by_setting in rows_of(results).items():
        if task != before and any(setting.rule for setting in settings):
            lines.append([task, "mean loops"])
            numbers.append([f"{by_setting[setting].mean_loops:.2f}" for setting in settings])
            before = task
        lines.append(["" if task == before else task, metric])
        numbers.append([f"{by_setting[setting].value:.4f}" for setting in settings])
        before = task
    first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
    return "\n".join(
        f"  {line[0]:{first}}  {line[1]:{second}}"
        + "".join(f"{number:>{width}}" for number, width in zip(row, widths, strict=True))
        for line, row in zip(lines, numbers, strict=True)
    )


def save(results: Sequence[Result], stem: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write STEM.json, with `about` before the results, and STEM.csv, one line per result; returns both paths."""
    flat = []
    for result in results:
        values = finite(asdict(result))
        setting = values.pop("setting")
        flat.append({"task": values.pop("task"), "metric": values.pop("metric"), **setting, **values})
    document, sheet = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".csv")
    content = {**about, "results": flat}
    document.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with sheet.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return [document, sheet]
