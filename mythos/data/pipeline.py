"""Everything between a configuration and the streams of tokens that it describes, put together in one place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mythos.config.data import DataConfig
from mythos.config.sections import Config
from mythos.data.corpus import cache_directory, holdout_fraction, open_corpora, pin_revisions, weighted
from mythos.data.source import Source, open_sources, open_validation_sources
from mythos.data.stream import TokenStreams
from mythos.data.tasks import TaskSet, TaskStreams, slot_difficulties, task_set
from mythos.data.tokenizer import Tokenizer, load_tokenizer
from mythos.data.validation import ValidationSet, validation_set


class Data(NamedTuple):
    """Opened training data.

    Attributes:
        config: the data section, hub datasets pinned to commits.
        tokenizer: the run's.
        sources: sources and their weights by name.
    """

    config: DataConfig
    tokenizer: Tokenizer
    sources: dict[str, tuple[Source, float]]

    def streams(self, seed: int, rank: int = 0, world_size: int = 1) -> TokenStreams:
        """The streams of a rank, at the beginning of the data."""
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
        """Held-out sequences; raises MythosError if there is not text for one.

        `option` is what messages call `data.validation.path` where a script's option gave it.
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
    """A reasoning task in the place of text.

    Attributes:
        config: the data section.
        slots: sequences of a stream in a step.
        steps: steps of the schedule.
        tokenizer: there is none.
    """

    config: DataConfig
    slots: int
    steps: int
    tokenizer: None = None

    def streams(self, seed: int, rank: int = 0, world_size: int = 1) -> TaskStreams:
        """The streams of a rank, at the beginning."""
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
        """Sequences that training does not see, as many for every stream: of each difficulty in turn, hardest first."""
        low, high = self.config.task.difficulty
        difficulties = [low + index % (high - low + 1) for index in range(sequences // self.config.streams)]
        hardest_first = sorted(difficulties, reverse=True)
        return task_set(self.config.task, hardest_first, self.config.streams, self.config.sequence_length, "validation")


def open_data(config: Config, run_dir: Path | None, saved: Mapping[str, Any], progress: bool = True) -> Data | TaskData:
    """Open corpora, then the tokenizer (which may be trained on them), then the sources of both.

    Args:
        config: the run's configuration.
        run_dir: folder whose tokenizer is used, or that it is written to; None for neither.
        saved: the data section, as plain values, of the run that is continued, or nothing.
        progress: show bars.

    Raises:
        MythosError: data that cannot be found, read or tokenized as the configuration says.
    """
    if config.data.kind == "reasoning":
        return TaskData(config.data, config.train.global_batch // config.data.streams, config.schedule_steps)
    data = pin_revisions(config.data, saved)
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
