"""From a configuration to its data: corpora, tokenizer, sources, streams and the validation set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mythos.config.data import DataConfig
from mythos.config.sections import Config
from mythos.data.corpus import (
    cache_directory,
    holdout_fraction,
    open_corpora,
    pin_revisions,
    weighted,
    with_stored_documents,
)
from mythos.data.difficulty import slot_difficulties
from mythos.data.source import Source, open_sources, open_validation_sources
from mythos.data.stream import TokenStreams
from mythos.data.tasks import TaskSet, TaskStreams, task_set
from mythos.data.tokenizer import Tokenizer, load_tokenizer
from mythos.data.validation import ValidationSet, validation_set


class Data(NamedTuple):
    """Opened training data.

    Attributes:
        config: the data section, with hub datasets pinned to commits.
        tokenizer: the run's.
        sources: sources and their weights by name.
    """

    config: DataConfig
    tokenizer: Tokenizer
    sources: dict[str, tuple[Source, float]]

    def streams(self, seed: int, rank: int = 0, world_size: int = 1) -> TokenStreams:
        """A rank's streams, at the beginning of the data."""
        return TokenStreams(
            self.sources,
            streams=self.config.streams,
            sequence_length=self.config.sequence_length,
            seed=seed,
            eos_id=self.tokenizer.eos_id if self.config.mask_documents else None,
            rank=rank,
            world_size=world_size,
        )

    def targets(self, config: Config, step: int) -> int:
        """Tokens that the loss counts in a step, over all ranks."""
        return config.tokens_per_step

    def validation(self, sequences: int, option: str | None = None) -> ValidationSet:
        """Held-out sequences; raises MythosError if there is not enough text for one.

        `option` is the command-line option that gave `data.validation.path`, for messages.
        """
        return validation_set(
            open_validation_sources(self.config, self.sources, self.tokenizer, option),
            sequences=sequences,
            sequence_length=self.config.sequence_length,
            eos_id=self.tokenizer.eos_id,
            mask_documents=self.config.mask_documents,
            cache_dir=cache_directory(self.config),
            option=option,
        )


class TaskData(NamedTuple):
    """A reasoning task instead of text.

    Attributes:
        config: the data section.
        slots: sequences of a stream in a step.
        steps: steps of the schedule.
        tokenizer: always None.
    """

    config: DataConfig
    slots: int
    steps: int
    tokenizer: None = None

    def streams(self, seed: int, rank: int = 0, world_size: int = 1) -> TaskStreams:
        """A rank's streams, at the beginning."""
        return TaskStreams(
            self.config.task,
            streams=self.config.streams,
            slots=self.slots,
            steps=self.steps,
            sequence_length=self.config.sequence_length,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    def targets(self, config: Config, step: int) -> int:
        """Tokens that the loss counts in a step, over all ranks."""
        task = self.config.task
        difficulties = slot_difficulties(task, self.slots, config.run.seed, step, self.steps)
        return self.config.streams * sum(task.targets(difficulty) for difficulty in difficulties)

    def validation(self, sequences: int) -> TaskSet:
        """Sequences that training does not see, equally many per stream, of all difficulties, the hardest first."""
        low, high = self.config.task.difficulty
        difficulties = [low + index % (high - low + 1) for index in range(sequences // self.config.streams)]
        hardest_first = sorted(difficulties, reverse=True)
        return task_set(self.config.task, hardest_first, self.config.streams, self.config.sequence_length, "validation")


def open_data(config: Config, run_dir: Path | None, saved: Mapping[str, Any], progress: bool = True) -> Data | TaskData:
    """Open the corpora, then the tokenizer, which may be trained on them, then the sources, which need both.

    Args:
        config: the run's configuration.
        run_dir: folder from which a saved tokenizer is loaded, or else to which it is saved; None for neither.
        saved: the data section of the run that is continued, as plain values; empty for a new run.
        progress: show bars.

    Raises:
        MythosError: the data cannot be found, read or tokenized as configured.
    """
    if config.data.kind == "reasoning":
        return TaskData(config.data, config.train.global_batch // config.data.streams, config.schedule_steps)
    data = with_stored_documents(pin_revisions(config.data, saved), saved)
    corpora = open_corpora(data)
    tokenizer = load_tokenizer(
        config.tokenizer,
        weighted(data, corpora),
        run_dir=run_dir,
        cache_dir=cache_directory(data),
        holdout_fraction=holdout_fraction(data),
        progress=progress,
    )
    return Data(data, tokenizer, open_sources(data, corpora, tokenizer))
