"""Sources of tokenized documents, which streams read: text tokenized on the fly, or pre-tokenized shards."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mythos.config.data import DataConfig
from mythos.data.corpus import (
    Corpus,
    Skipped,
    content_hash,
    holdout_fraction,
    holdout_limit,
    in_fixed_order,
    open_validation,
    source_identity,
)
from mythos.data.text_files import Part, joined
from mythos.data.tokenizer import Tokenizer
from mythos.data.tokens import TokenSource

# Documents tokenized by one call: nearly as fast as more, with a short wait for the first batch.
TOKENIZE_DOCUMENTS = 16


class Source(Protocol):
    """Shards of tokenized documents.

    Attributes:
        shards: name of each shard, for messages.
        sizes: amount of text in each shard, in any unit; every stream is dealt about as much.
        ordered: for each shard, whether its rows are parts of one document, which belong in one stream.
        identity: the data in which a saved position is valid, as plain values: corpus, tokenizer, share held out.
    """

    shards: list[str]
    sizes: list[int]
    ordered: list[bool]
    identity: dict[str, Any]

    def read(self, shard: int, row: int, step: int) -> Iterator[tuple[int, np.ndarray | Skipped]]:
        """Yield rows ``row, row + step, ...`` that are not held out: int32 ids with the end-of-document token.

        A part of a document that the next row continues has no such token. A part that is held out is replaced by one,
        because the text before it and the text after it are not connected.
        """
        ...

    def held_out(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield, for every held-out document, its ids (no end-of-document token) and the exact bytes of each."""
        ...


class TextSource:
    """A corpus that is tokenized as it is read; see :class:`Source`.

    `holdout_fraction` is the share of documents reserved for validation, by content hash.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, holdout_fraction: float) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.shards = corpus.shards
        self.sizes = corpus.sizes
        self.ordered = corpus.ordered
        self.identity = source_identity(corpus.fingerprint, tokenizer.fingerprint, holdout_fraction)
        self._limit = holdout_limit(holdout_fraction)

    def read(self, shard: int, row: int, step: int) -> Iterator[tuple[int, np.ndarray | Skipped]]:
        """Yield rows ``row, row + step, ...`` that are not held out: int32 ids with the end-of-document token."""
        rows: list[tuple[int, str | Skipped]] = []
        texts = 0
        for index, document in self.corpus.read(shard, row, step):
            if isinstance(document, str):
                if self._limit and content_hash(document) < self._limit:
                    if not isinstance(document, Part):
                        continue
                    document = ""  # an end-of-document token alone
                texts += 1
            rows.append((index, document))
            if texts == TOKENIZE_DOCUMENTS:
                yield from self._tokenized(rows)
                rows, texts = [], 0
        yield from self._tokenized(rows)

    def _tokenized(self, rows: list[tuple[int, str | Skipped]]) -> Iterator[tuple[int, np.ndarray | Skipped]]:
        encoded = iter(self.tokenizer.encode_batch([text for _, text in rows if isinstance(text, str)]))
        for index, document in rows:
            if isinstance(document, Skipped):
                yield index, document
            else:
                ids = next(encoded)
                if not _continues(document):
                    ids.append(self.tokenizer.eos_id)
                yield index, np.array(ids, dtype=np.int32)

    def held_out(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield, for every held-out document, its ids (no end-of-document token) and the exact bytes of each."""
        for shard in in_fixed_order(len(self.shards)):
            yield from joined(self._held_out(shard))

    def _held_out(self, shard: int) -> Iterator[tuple[int, bool, list[int], list[int]]]:
        for row, document in self.corpus.read(shard):
            if isinstance(document, str) and content_hash(document) < self._limit:
                yield row, _continues(document), *self.tokenizer.encode_with_bytes(document)


def _continues(document: str) -> bool:
    """Whether the next row continues the document."""
    return isinstance(document, Part) and document.continues


def open_sources(
    config: DataConfig, corpora: Mapping[str, Corpus], tokenizer: Tokenizer
) -> dict[str, tuple[Source, float]]:
    """The training sources and their weights by name; `corpora` are from :func:`mythos.data.corpus.open_corpora`.

    Raises MythosError if pre-tokenized shards are missing, damaged or of another tokenizer.
    """
    holdout = holdout_fraction(config)
    sources: dict[str, tuple[Source, float]] = {}
    for name, source in config.named_sources.items():
        if source.kind == "tokens":
            opened: Source = TokenSource(Path(str(source.path)), tokenizer, holdout, on_error=config.on_error)
        else:
            opened = TextSource(corpora[name], tokenizer, holdout)
        sources[name] = (opened, getattr(source, "weight", 1.0))
    return sources


def open_validation_sources(
    config: DataConfig,
    sources: Mapping[str, tuple[Source, float]],
    tokenizer: Tokenizer,
    option: str | None = None,
) -> dict[str, tuple[Source, float]]:
    """Sources whose ``held_out`` documents form the validation set: the training sources, or separate files.

    `option` is the command-line option that named the files, for messages; None for the configuration.
    """
    corpus = open_validation(config, option)
    return dict(sources) if corpus is None else {"validation": (TextSource(corpus, tokenizer, 1.0), 1.0)}
