"""Everything between a configuration and the streams of tokens that it describes, put together in one place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mythos.config import Config, DataConfig
from mythos.data.corpus import cache_directory, holdout_fraction, open_corpora, pin_revisions, weighted
from mythos.data.source import Source, open_sources, open_validation_sources
from mythos.data.stream import TokenStreams
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

    def validation(self, sequences: int) -> ValidationSet:
        """Held-out sequences; raises MythosError if there is not text for one."""
        return validation_set(
            open_validation_sources(self.config, self.sources, self.tokenizer),
            sequences=sequences,
            sequence_length=self.config.sequence_length,
            eos_id=self.tokenizer.eos_id,
            mask_documents=self.config.mask_documents,
            cache_dir=cache_directory(self.config),
        )


def open_data(config: Config, run_dir: Path | None, saved: Mapping[str, Any], progress: bool = True) -> Data:
    """Open corpora, then the tokenizer (which may be trained on them), then the sources of both.

    Args:
        config: the run's configuration.
        run_dir: folder whose tokenizer is used, or that it is written to; None for neither.
        saved: the data section, as plain values, of the run that is continued, or nothing.
        progress: show bars.

    Raises:
        MythosError: data that cannot be found, read or tokenized as the configuration says.
    """
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
