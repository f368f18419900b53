"""Scores of a model by task and depth, as a table and as files."""

import csv
import fcntl
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mythos.errors import MythosError, short_reason
from mythos.evaluation.choices import ChoiceScores, ChoiceTask
from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.depth_sweep import finite
from mythos.evaluation.text import TextScores
from mythos.files.local import numbered
from mythos.files.text import read_json

TABLE = "results"
"""Name of the table of a folder, a .csv with one line per score of every evaluation."""
SCORES = ("task", "metric", "loops", "rule", "threshold", "mean_loops", "value", "stderr", "samples")
"""Columns of the table for a score, and keys of a score in a file of results."""
COLUMNS = ("time", "file", "source", "step", "dtype", "limit", "fewshot", *SCORES)
LONGEST_NAME = 120
"""Maximum characters of tasks and of settings in a file name; most file systems allow 255 bytes for the whole."""


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


def file_name(
    step: int, tasks: Sequence[str], settings: Sequence[DepthSetting], limit: int | None, fewshot: int | None
) -> str:
    """Name the files of an evaluation, without suffix: step, tasks, depths, and the limits that were set.

    For example `step-00000200_science+arc_easy_loops-1+8+convergence-0.1_limit-50`. Different evaluations may have one
    name, if tasks differ only in their folders; `mythos.files.local.unused_stem` then adds a number.
    """
    parts = ["+".join(map(plain, tasks)), "loops-" + "+".join(plain(str(setting)) for setting in settings)]
    parts += [f"{key}-{value}" for key, value in (("limit", limit), ("fewshot", fewshot)) if value is not None]
    return "_".join([f"step-{step:08d}", *map(shortened, parts)])


def plain(name: str) -> str:
    """Replace what is not safe in a file name by hyphens; of a path only the last two parts are kept."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", "/".join(Path(name).parts[-2:])).strip("-.") or "text"


def shortened(part: str) -> str:
    """Cut a long part of a file name; a checksum keeps names apart that begin alike."""
    digest = hashlib.blake2b(part.encode(), digest_size=4).hexdigest()
    return part if len(part) <= LONGEST_NAME else f"{part[: LONGEST_NAME - 9]}-{digest}"


def scores_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as plain values, with the keys SCORES; null for what is not finite."""
    flat = []
    for result in results:
        values = finite(asdict(result))
        values |= values.pop("setting")
        flat.append({key: values[key] for key in SCORES})
    return flat


def save(results: Sequence[Result], stem: Path, about: Mapping[str, Any]) -> Path:
    """Write STEM.json, with `about` before the results; returns its path."""
    document = stem.with_name(stem.name + ".json")
    content = {**about, "results": scores_of(results)}
    document.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return document


def load(document: Path) -> tuple[list[Result], dict[str, Any]]:
    """Read a file of :func:`save`: the results, NaN where it has null, and what it says about them.

    Raises MythosError if it cannot be read or is not such a file.
    """
    try:
        about = read_json(document)
        for name in ("source", "dtype", "limit", "fewshot"):  # reports compare these
            if isinstance(about.get(name), list | dict):
                raise TypeError(f"{name}: got a {type(about[name]).__name__}; allowed: a name, a number or null")
        return [_result(**score) for score in about.pop("results")], about
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise MythosError(f"{document} cannot be read as results of an evaluation: {short_reason(error)}") from error


def _result(
    task: str,
    metric: str,
    loops: int,
    rule: str | None,
    threshold: float | None,
    mean_loops: float | None,
    value: float | None,
    stderr: float | None,
    samples: int | None,
) -> Result:
    """Inverse of :func:`scores_of` for one result, with the keys SCORES."""
    setting = DepthSetting(
        int(loops), None if rule is None else str(rule), None if threshold is None else float(threshold)
    )
    mean_loops, value = (math.nan if number is None else float(number) for number in (mean_loops, value))
    stderr = None if stderr is None else float(stderr)
    return Result(str(task), str(metric), setting, mean_loops, value, stderr, None if samples is None else int(samples))


def append_to_table(results: Sequence[Result], document: Path, about: Mapping[str, Any]) -> Path:
    """Append the results of a file to the table of its folder, one line per score; returns the table's path.

    A table with other columns, such as another version's, stays as it is: the lines go to results-2.csv and so on.
    Processes may append at the same time. Raises OSError if the table cannot be written.
    """
    time = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    rows = [{"time": time, "file": document.name, **about, **scores} for scores in scores_of(results)]
    for stem in numbered(document.with_name(TABLE)):
        path = stem.with_suffix(".csv")
        with path.open("a+b") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            header = file.readline()
            if header.rstrip(b"\r\n") not in (b"", ",".join(COLUMNS).encode()):
                continue
            file.seek(0)
            content = file.read()
            text = io.StringIO()
            # After a kill the last line may lack its end.
            text.write("\n" if content and not content.endswith(b"\n") else "")
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            if not content:
                writer.writeheader()
            writer.writerows(rows)
            file.write(text.getvalue().encode())
        break
    return path
