"""What a run directory tells without opening the model: configuration, records, samples, checkpoints, events."""

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

from mythos.checkpoints.checkpoint import complete_checkpoints, read_meta, step_of
from mythos.checkpoints.stored_model import run_directory
from mythos.config.inherited import RUN_FILE, TOKENIZER_FILE
from mythos.config.loading import load_config
from mythos.config.sections import Config
from mythos.errors import MythosError, short_reason, without_credentials
from mythos.planning.flops import forward_flops
from mythos.training.metrics import damaged_lines, scan_metrics

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
NEEDED = ("step", "tokens", "loops", "backprop_loops")
"""What every record of a training step has."""


class Event(NamedTuple):
    """Something that happened to a run."""

    step: int
    what: str
    time: float | None
    """Seconds since 1970; None where no record tells it."""

    @property
    def moment(self) -> str:
        """The time for people, in UTC."""
        return "" if self.time is None else f"{datetime.fromtimestamp(self.time, UTC):%Y-%m-%d %H:%M:%S}"


@dataclass(frozen=True)
class RecordedRun:
    """A run that has logged at least once; it may still be training."""

    directory: Path
    config: Config
    records: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """That of the configuration."""
        return self.config.run.name

    @property
    def is_text(self) -> bool:
        """Whether it learns text, not a task."""
        return self.config.data.kind != "reasoning"

    @property
    def depth_label(self) -> str:
        """The loops that `val/loss` is measured at, in words."""
        follows = self.config.depth.follow == "difficulty"
        return "as many loops as steps" if follows else f"{round(self.config.depth_mean)} loops"

    @cached_property
    def validations(self) -> list[dict[str, Any]]:
        """The records that hold a validation."""
        return [record for record in self.records if "val/loss" in record]

    @cached_property
    def flops(self) -> list[float]:
        """FLOPs needed up to each record: what lies between two is taken to have run at the later one's depths."""
        costs = forward_flops(self.config.model, self.config.data.sequence_length)
        earlier = chain([0], (record["tokens"] for record in self.records))
        return list(
            accumulate(
                (record["tokens"] - before) * costs.training([record["loops"]], record["backprop_loops"])
                if "loops" in record
                else 0.0  # a validation before the first step
                for record, before in zip(self.records, earlier, strict=False)
            )
        )

    def last(self, key: str) -> Any:
        """The newest value of a measurement that is not null; None where there is none."""
        return next((record[key] for record in reversed(self.records) if record.get(key) is not None), None)

    def measured(self, key: str) -> list[Any]:
        """All values of a measurement that are not null."""
        return [record[key] for record in self.records if record.get(key) is not None]

    def samples(self) -> dict[int, str]:
        """Text samples by step."""
        found = {}
        for path in (self.directory / "samples").glob("step-*.txt"):
            if path.stem.removeprefix("step-").isdecimal():
                found[step_of(path.stem)] = path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
        return dict(sorted(found.items()))

    def vocabulary(self) -> str:
        """What its tokens are: runs that differ in it have losses that cannot be compared."""
        file = self.directory / "tokenizer" / TOKENIZER_FILE
        if file.is_file():
            return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        about = self.config.tokenizer.name if self.is_text else self.config.data.task.name
        return f"{about}, {self.config.model.vocab_size}"

    def events(self) -> list[Event]:
        """Restarts, skipped updates and rollbacks, as far as records tell, in the order of steps.

        A restart is in the records only if the run went on to a checkpoint after it: another start from the same
        checkpoint writes its lines anew.
        """
        found = []
        for before, record in pairwise([{}, *self.records]):
            if "resumed_from" in record:
                found.append(("continued from step {:,}", record["resumed_from"], record))
            skipped = record.get("skipped_steps", 0) - before.get("skipped_steps", 0)
            if skipped > 0:
                since = f" since step {before['step']:,}" if before else ""
                found.append((f"{{:,}} update{'s' * (skipped > 1)} skipped{since}: not finite", skipped, record))
            gone_back = record.get("rollbacks", 0) - before.get("rollbacks", 0)
            if gone_back > 0:
                found.append(("{:,} x back to the weights of the newest checkpoint", gone_back, record))
        return [Event(record["step"], form.format(number), record.get("time")) for form, number, record in found]

    def saves(self) -> list[Event]:
        """The complete checkpoints that are there. Raises MythosError where the place cannot be looked at."""
        place = self.config.checkpoint.dir or self.directory / "checkpoints"
        times = {record["step"]: record.get("time") for record in self.records}
        found = []
        try:
            for path in complete_checkpoints(place):
                try:
                    size = sum(file["bytes"] for file in read_meta(path).get("files", {}).values())
                except MythosError as error:  # removed since, by a run that goes on, or damaged
                    what = without_credentials(str(error))
                else:
                    what = f"checkpoint, {size / 2**20:,.1f} MiB"
                found.append(Event(step_of(path), what, times.get(step_of(path))))
        except Exception as error:  # libraries of remote file systems share no base class
            raise MythosError(without_credentials(f"{place} cannot be read: {short_reason(error)}")) from error
        return found


def open_run(path: str | Path) -> RecordedRun:
    """Read a run directory, or that of a checkpoint in one.

    Raises MythosError if it is none, has logged nothing yet, or holds other records than a run writes.
    """
    directory = run_directory(path)
    if directory is None:
        what = f"no {RUN_FILE} in it" if Path(path).exists() else "there is nothing"
        raise MythosError(f"{path}: {what}. Give a run directory, e.g. runs/quickstart.")
    file = directory / METRICS_FILE
    if not file.is_file():
        raise MythosError(f"{file} is missing: the run has not begun to train, or the file was moved")
    try:
        records, damaged = scan_metrics(file, needed_in)
    except OSError as error:
        raise MythosError(f"{file} cannot be read: {short_reason(error)}") from error
    if damaged and not records:
        raise MythosError(f"{file}: {damaged_lines(damaged)}; give a directory that training wrote")
    if damaged:
        logger.warning("%s: %s. The report is of the sound records", file, damaged_lines(damaged))
    if not records:
        raise MythosError(f"{file} has no records yet; the run writes one every log.every steps")
    return RecordedRun(directory, load_config(directory / RUN_FILE, to_train=False), records)


def needed_in(record: dict[str, Any]) -> Sequence[str]:
    """What a report needs of a record."""
    # Before the first step there is only what the run starts from (train.init_from).
    return ("step", "tokens") if record.get("step") == 0 else NEEDED


def run_names(paths: Sequence[str]) -> list[str]:
    """What each run is called: as its directory, with a number added where another one is called so."""
    made: list[str] = []
    for path in paths:
        given = Path(os.path.abspath(path))
        shown = given.parent.parent if given.name.startswith("step-") else given
        name = (run_directory(path) or shown).name
        numbered = (f"{name}-{number}" for number in count(2))
        made.append(next(free for free in chain([name], numbered) if free not in made))
    return made
