"""Read a run directory without opening the model: configuration, records, samples, checkpoints, events."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import accumulate, chain, count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mythos.checkpoints.stored_checkpoint import complete_checkpoints, read_meta
from mythos.config.inherited import TOKENIZER_FILE
from mythos.config.loading import load_config
from mythos.config.model_paths import require_run, run_directory
from mythos.config.sections import Config
from mythos.errors import MythosError, short_reason, without_credentials
from mythos.files.storage import step_of
from mythos.planning.flops import forward_flops
from mythos.training.metrics import METRICS_FILE, damaged_lines, losses_by_depth, scan_metrics

logger = logging.getLogger(__name__)

NEEDED = ("step", "tokens", "loops", "backprop_loops")
"""Fields of every record of a training step."""
LATEST_TIME = 253_402_300_799
"""End of the year 9999 in seconds since 1970; Python has no later dates."""


class Event(NamedTuple):
    """An event of a run."""

    step: int
    what: str
    time: float | None
    """Seconds since 1970; None if no record contains it."""

    @property
    def moment(self) -> str:
        """The time in UTC as text; empty if unknown."""
        return "" if self.time is None else f"{datetime.fromtimestamp(self.time, UTC):%Y-%m-%d %H:%M:%S}"


@dataclass(frozen=True)
class RecordedRun:
    """A run with at least one record; it may still be training."""

    directory: Path
    config: Config
    records: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The run's name in its configuration."""
        return self.config.run.name

    @property
    def is_text(self) -> bool:
        """Whether the run trains on text and not on a task."""
        return self.config.data.kind != "reasoning"

    @property
    def depth_label(self) -> str:
        """The number of loops at which `val/loss` is measured, in words."""
        follows = self.config.depth.follow == "difficulty"
        return "as many loops as steps" if follows else f"{round(self.config.depth_mean)} loops"

    @cached_property
    def validations(self) -> list[dict[str, Any]]:
        """The records that contain a validation."""
        return [record for record in self.records if "val/loss" in record]

    @cached_property
    def flops(self) -> list[float]:
        """FLOPs needed up to each record; steps between two records are counted at the later one's depths."""
        costs = forward_flops(self.config.model, self.config.data.sequence_length)
        earlier = chain([0], (record["tokens"] for record in self.records))
        return list(
            accumulate(
                (record["tokens"] - before) * costs.training_at(record["loops"], record["backprop_loops"])
                if "loops" in record
                else 0.0  # a validation before the first step
                for record, before in zip(self.records, earlier, strict=False)
            )
        )

    def last(self, key: str) -> Any:
        """The newest value of a metric that is not null; None if there is none."""
        return next((record[key] for record in reversed(self.records) if record.get(key) is not None), None)

    def measured(self, key: str) -> list[Any]:
        """All values of a metric that are not null."""
        return [record[key] for record in self.records if record.get(key) is not None]

    def samples(self) -> dict[int, str]:
        """Text samples by step."""
        samples = {}
        for path in (self.directory / "samples").glob("step-*.txt"):
            if path.stem.removeprefix("step-").isdecimal():
                samples[step_of(path.stem)] = path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
        return dict(sorted(samples.items()))

    def vocabulary(self) -> str:
        """A string that identifies the vocabulary; losses of runs with different vocabularies cannot be compared."""
        file = self.directory / "tokenizer" / TOKENIZER_FILE
        if file.is_file():
            return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        about = self.config.tokenizer.name if self.is_text else self.config.data.task.name
        return f"{about}, {self.config.model.vocab_size}"

    def events(self) -> list[Event]:
        """Restarts, skipped updates and rollbacks in the records, in the order of steps.

        A restart stays in the records only if the run then reached another checkpoint: a further start from the same
        checkpoint overwrites its records.
        """
        events = []
        for before, record in pairwise([{}, *self.records]):
            if "resumed_from" in record:
                events.append(("continued from step {:,}", record["resumed_from"], record))
            skipped = record.get("skipped_steps", 0) - before.get("skipped_steps", 0)
            if skipped > 0:
                since = f" since step {before['step']:,}" if before else ""
                events.append((f"{{:,}} update{'s' * (skipped > 1)} skipped{since}: not finite", skipped, record))
            rollbacks = record.get("rollbacks", 0) - before.get("rollbacks", 0)
            if rollbacks > 0:
                events.append(("{:,} x back to the weights of the newest checkpoint", rollbacks, record))
        return [Event(record["step"], text.format(number), record.get("time")) for text, number, record in events]

    def saves(self) -> list[Event]:
        """The complete checkpoints. Raises MythosError if their directory cannot be read."""
        place = self.config.checkpoint.dir or self.directory / "checkpoints"
        times = {record["step"]: record.get("time") for record in self.records}
        events = []
        try:
            for path in complete_checkpoints(place):
                try:
                    size = sum(file["bytes"] for file in read_meta(path).get("files", {}).values())
                except MythosError as error:  # damaged, or removed meanwhile by the running run
                    what = without_credentials(str(error))
                else:
                    what = f"checkpoint, {size / 2**20:,.1f} MiB"
                events.append(Event(step_of(path), what, times.get(step_of(path))))
        except Exception as error:  # libraries of remote file systems share no base class
            raise MythosError(without_credentials(f"{place} cannot be read: {short_reason(error)}")) from error
        return events


def open_run(path: str | Path) -> RecordedRun:
    """Read a run directory, or the run directory of a checkpoint.

    Raises MythosError if there is no run, if it has no records yet, or if no record is one that a run writes.
    """
    directory = require_run(path)
    file = directory / METRICS_FILE
    if not file.is_file():
        raise MythosError(f"{file} is missing: the run has not begun to train, or the file was moved")
    try:
        records, damaged = scan_metrics(file, needed_fields)
    except OSError as error:
        raise MythosError(f"{file} cannot be read: {short_reason(error)}") from error
    if damaged and not records:
        raise MythosError(f"{file}: {damaged_lines(damaged)}; give a directory that training wrote")
    if damaged:
        logger.warning("%s: %s. The report is of the sound records", file, damaged_lines(damaged))
    if not records:
        raise MythosError(f"{file} has no records yet; the run writes one every log.every steps")
    records = [{key: value for key, value in record.items() if value is not None} for record in records]
    for record in records:
        if not 0 <= record.get("time", 0) <= LATEST_TIME:  # NaN neither
            del record["time"]
    return RecordedRun(directory, load_config(directory, to_train=False), records)


def needed_fields(record: dict[str, Any]) -> Sequence[str]:
    """Fields that a report needs of a record."""
    # A record before the first step describes the model that the run starts from (train.init_from).
    keys = ["step", "tokens"] if record.get("step") == 0 else list(NEEDED)
    if record.get("val/auto_loss") is not None:
        keys += ["val/auto_loops", "val/auto_saved"]
    if record.get("val/accuracy") is not None:
        keys += [f"val/accuracy@{loops}" for loops in losses_by_depth(record)]
    return keys


def run_names(paths: Sequence[str]) -> list[str]:
    """A unique name for each run: the name of its directory, with a number if another run has that name."""
    names: list[str] = []
    for path in paths:
        absolute = Path(os.path.abspath(path))
        fallback = absolute.parent.parent if absolute.name.startswith("step-") else absolute
        name = (run_directory(path) or fallback).name
        numbered = (f"{name}-{number}" for number in count(2))
        names.append(next(free for free in chain([name], numbered) if free not in names))
    return names
