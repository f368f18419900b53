"""metrics.jsonl: written while training goes on, read and repaired when a run continues."""

import codecs
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos.config.sections import Config
from mythos.errors import MythosError
from mythos.files.local import read_regular, write_whole
from mythos.training.trackers import start_trackers, tracker_error, wandb_depth_chart

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

NO_AT_SIGN = {"mlflow", "swanlab"}
"""Trackers that refuse a key such as `val/loss@8`; they get `val/loss_at_8`."""


class MetricsLog:
    """Appends JSON objects to `metrics.jsonl`, and sends them to the trackers of `log.wandb` and `log.trackers`.

    Continuing at `start_step` drops the lines of later steps, left by a killed run, because these steps are trained
    again. (W&B keeps the first record of a step and ignores later ones.) The next record has `resumed_from`, the step.
    A tracker that fails while training goes on is dropped with a warning. With `main` false, as on all ranks but 0,
    nothing is checked, started or written.

    A file with damaged lines is renamed to `metrics.jsonl.damaged-N`, and its sound records are kept. `unfinished` is
    the record of `start_step` without its validation, from a checkpoint; it becomes :attr:`unfinished` unless the file
    has the validation.

    Raises MythosError for trackers that are unknown, not installed or cannot be started, before it changes any file.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        start_step: int,
        main: bool = True,
        unfinished: dict[str, Any] | None = None,
    ) -> None:
        self.path = run_dir / METRICS_FILE
        self.main = main
        self.first = {"resumed_from": start_step} if start_step else {}
        self.trackers: list[GeneralTracker] = []
        self.unfinished: dict[str, Any] | None = None
        """The record, not in the file, that is written once its validation is repeated."""
        if not main:
            return
        self.trackers = start_trackers(run_dir, config, start_step)
        kept = [record for record in sound_records(self.path) if record["step"] <= start_step] if start_step else []
        if unfinished is not None and not any(r["step"] == start_step and "val/loss" in r for r in kept):
            self.unfinished = unfinished
            kept = [record for record in kept if record["step"] < start_step]
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = self.path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must have `step`."""
        if not self.main:
            return
        self.file.write(json.dumps(record | self.first) + "\n")
        self.first = {}
        self.file.flush()
        values = {key: value for key, value in record.items() if key != "step" and value is not None}
        without_at = {key.replace("@", "_at_"): value for key, value in values.items()}

        def log(tracker: "GeneralTracker") -> None:
            charts = wandb_depth_chart(losses_by_depth(record)) if tracker.name == "wandb" else {}
            tracker.log((without_at if tracker.name in NO_AT_SIGN else values) | charts, step=record["step"])

        self._each(log)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self.main:
            self.file.close()
            self._each(lambda tracker: tracker.finish())
            self.trackers = []

    def _each(self, act: Callable[["GeneralTracker"], None]) -> None:
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:  # an unreachable service must not end a run of weeks
                self.trackers.remove(tracker)
                logger.warning(
                    "%s failed (%s: %s) and is left out until the run is continued; metrics.jsonl has everything",
                    tracker.name,
                    type(error).__name__,
                    tracker_error(error),
                )


def losses_by_depth(record: dict[str, float]) -> dict[int, float]:
    """The `val/loss@<loops>` of a record, by number of loops, shallowest first."""
    prefix = "val/loss@"
    losses = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
    # A key that no run writes, of a file that was edited, is left out.
    return dict(sorted((int(loops), value) for loops, value in losses.items() if re.fullmatch("[0-9]{1,9}", loops)))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The sound records of a metrics.jsonl; none if there is no file. Warns of damaged lines, which are skipped.

    Raises OSError if it is not a file or cannot be read.
    """
    records, damaged = scan_metrics(path)
    if damaged:
        logger.warning("%s: %s", path, damaged_lines(damaged))
    return records


def scan_metrics(
    path: Path, needed: Callable[[dict[str, Any]], Sequence[str]] = lambda _: ("step",)
) -> tuple[list[dict[str, Any]], list[str]]:
    """The sound records of a metrics.jsonl, and a description of the problem in each damaged line.

    A sound record is a JSON object whose `step` is a whole number, whose other values are numbers or null, and that has
    the keys that `needed` returns for it. A last line cut short by a kill is not damage. Raises OSError as
    :func:`read_metrics`.
    """
    try:
        content = read_regular(path)
    except FileNotFoundError:
        return [], []
    records, damaged = [], []
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        # After a power loss, a file system may leave zeros in place of the newest data.
        text = line.strip(b"\0 \t\r")
        problem = "zeros" if text != line.strip() else None
        if text:
            try:
                record = json.loads(text)  # raises UnicodeDecodeError, a ValueError, too
            except (ValueError, RecursionError):
                problem = None if number == len(lines) and not problem else "not JSON"
            else:
                wrong = _unsound(record, needed)
                problem = f"no number for {', '.join(wrong)}" if wrong else problem
                if not wrong:
                    records.append(record)
        if problem:
            damaged.append(f"line {number} has {problem}")
    return records, damaged


def _unsound(record: Any, needed: Callable[[dict[str, Any]], Sequence[str]]) -> list[str]:
    """Keys without a number: `step`, other needed keys, and those whose values are neither numbers nor null."""
    fields = record if isinstance(record, dict) else {}
    wrong = [key for key in needed(fields) if fields.get(key) is None]
    wrong += [key for key, value in fields.items() if not (value is None or _is_number(value))]
    step = fields.get("step", 0)
    return wrong if "step" in wrong or (type(step) is int and step >= 0) else ["step", *wrong]


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that fits in a float, as plots and tables need; NaN and infinity do."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def sound_records(path: Path) -> list[dict[str, Any]]:
    """The sound records of a metrics.jsonl that is about to be rewritten; a damaged file is renamed first."""
    try:
        records, damaged = scan_metrics(path)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise MythosError(f"{path} cannot be read ({error.strerror}): check its owner") from error
        records, damaged = [], [f"it cannot be read ({error.strerror})"]
    if damaged:
        renamed = next(free for number in count(1) if not os.path.lexists(free := Path(f"{path}.damaged-{number}")))
        path.rename(renamed)
        logger.warning("%s: %s. It is renamed to %s; the sound records are kept", path, damaged_lines(damaged), renamed)
    return records


def damaged_lines(damaged: list[str]) -> str:
    """A summary of the problems from :func:`scan_metrics`: the first, and the number of others."""
    others = f", and {len(damaged) - 1:,} others are damaged too" if len(damaged) > 1 else ""
    return f"{damaged[0]}{others}"
