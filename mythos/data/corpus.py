"""Corpora: documents in shards that can be read from any row on, and the rules by which rows are skipped."""

import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from mythos.config.data import DataConfig, FilterConfig, SourceConfig, reads_text_files
from mythos.data import embedded
from mythos.data.formats import (
    EXTENSIONS,
    PIECE_BYTES,
    READ_ERRORS,
    Broken,
    File,
    Piece,
    Reader,
    Unreadable,
    local_file,
)
from mythos.data.hub import HubFiles, resolve_hub
from mythos.data.json_cache import cache_root, digest
from mythos.data.remote import Unreachable, is_remote, readings, remote_files
from mythos.data.text_files import Part, choose_cuts, is_text
from mythos.errors import MythosError, short_reason, without_credentials
from mythos.progress import progress_bar

logger = logging.getLogger(__name__)

# If every stream gets equally many shards to within one, this many per stream keep the lengths of the streams' epochs
# within a quarter of each other.
SHARDS_PER_STREAM = 4

# Shards per process for which a skipped document is logged; metrics.jsonl counts all.
MOST_WARNINGS = 3

# Most bytes read in search of records that have the requested columns.
COLUMNS_BYTES = 16 * 2**20

# The longest allowed line of jsonl has LINE_FACTOR times the bytes of the longest document, plus LINE_BYTES. Written as
# JSON escapes, text of any language takes at most three times its bytes of UTF-8; LINE_BYTES is for other keys.
LINE_FACTOR = 3
LINE_BYTES = 16 * 2**20

_COMMIT = re.compile("[0-9a-f]{40}")

S = TypeVar("S", bound=SourceConfig)

LENGTH = "length"
"""Name in data.filters that stands for the number of characters of the text, not for a column."""


class Skipped(Enum):
    """Why a row, or the rest of a shard, yields no document."""

    FILTERED = "filtered_documents"
    """A filter rejects it."""
    DOCUMENT = "skipped_documents"
    """Null, empty, not text, undecodable or too long."""
    SHARD = "skipped_shards"
    """The rest of the shard (in a whole parquet file: of the row group) cannot be read."""


class Corpus:
    """Documents of parquet, jsonl and txt files.

    A shard is a row group of a parquet file (a whole file if there are many), a piece of 1 MiB (more beyond 100 GB in
    total) of a jsonl or txt file, or a whole jsonl.gz or txt.gz file, which a resumed run has to skip through from its
    beginning. A txt file is one document, whose rows are parts of it (:mod:`mythos.data.text_files`) and whose shards
    are segments of consecutive parts, or has a document for every paragraph between blank lines, or for every line.
    Text is UTF-8, with or without a byte order mark. A key that a record lacks is null, and so are all columns but the
    text in a txt file.

    Args:
        files: local paths or URLs, with their sizes.
        text_column: column or key of the text.
        filters: conditions on columns, by name.
        on_error: ``fail`` raises at a document or shard that cannot be used, ``skip`` skips it.
        max_document_bytes: longest document, in bytes of UTF-8.
        minimum_shards: from this number of parquet files on, each file is one shard, and long text files are cut into
            segments so that there are at least as many shards; None if no streams read the corpus.
        txt: document of a text file: ``file``, ``paragraph`` or ``line``.
        patience: seconds for which a remote file may be unreachable.
        cache_dir: where the layout of remote files is cached.
        what: the configuration's field that named the files, for messages.
        revision: a hash of the files' content, if it is known.

    Attributes:
        shards: name of each shard, for messages.
        sizes: about how many bytes each shard has, uncompressed.
        ordered: for each shard, whether its rows are parts of one document, which belong in one stream.
        fingerprint: identifies the corpus; a saved position is valid only in a corpus of the same fingerprint.

    Raises:
        MythosError: an unknown extension, an empty corpus, files none of which has the requested columns, a filter by
            length for files that are read in parts, or (``on_error: fail``) a file that cannot be read.
    """

    def __init__(
        self,
        files: list[File],
        *,
        text_column: str = "text",
        filters: dict[str, FilterConfig] | None = None,
        on_error: str = "fail",
        max_document_bytes: int = 10_000_000,
        minimum_shards: int | None = None,
        txt: str = "file",
        patience: float = 600.0,
        cache_dir: Path | None = None,
        what: str = "data.path",
        revision: str | None = None,
    ) -> None:
        self.on_error = on_error
        self.max_document_bytes = max_document_bytes
        self._text_column = text_column
        self._filters = dict(filters or {})
        self._columns = [text_column, *(name for name in self._filters if name != LENGTH)]
        self._warned: set[int] = set()
        self._pieces: list[Piece] = []
        self.shards: list[str] = []
        whole = minimum_shards is not None and len(files) >= minimum_shards
        total = sum(file.size for file in files)
        texts = [file for file in files if is_text(file.path)]
        cuts = None
        if texts and txt == "file":
            cuts = choose_cuts(sum(file.size for file in texts), total, minimum_shards, PIECE_BYTES)
            if LENGTH in self._filters:
                raise MythosError(
                    f"data.filters.{LENGTH}: {texts[0].path} is one document and read in parts, so its length is not "
                    "known. Remove the filter, or set data.txt to paragraph or line."
                )
        self._reader = Reader(patience, cache_dir, LINE_FACTOR * max_document_bytes + LINE_BYTES, txt, cuts)
        # Fast on a disk; over a network this reads a footer of megabytes of every file, the first time.
        for file in progress_bar(files, desc="looking into files", unit="file", delay=3, leave=False):
            if not file.path.endswith(EXTENSIONS):
                raise MythosError(f"{what}: {file.path} has an unknown extension; allowed are {', '.join(EXTENSIONS)}.")
            try:
                pieces = self._reader.pieces(file, whole, total)
                self._pieces += pieces
                name = without_credentials(file.path)
                self.shards += [str(piece) if len(pieces) > 1 else name for piece in pieces]
            except READ_ERRORS as error:
                self._reject(f"data: {file.path}", short_reason(error))
        self.sizes = [piece.size for piece in self._pieces]
        self.ordered = [cuts is not None and is_text(piece.file.path) for piece in self._pieces]
        if not self._pieces:
            raise MythosError(
                f"{what}: the corpus is empty: none of the {len(files)} files (first: {files[0].path}) contains a "
                "readable document. Give files with text in them."
            )
        self._require_columns(list(dict.fromkeys(piece.file for piece in self._pieces)))
        rules = {name: rule.model_dump() for name, rule in self._filters.items()}
        identity = [_identity(files), text_column, rules, max_document_bytes, len(self._pieces)]
        if texts and txt != "paragraph":  # paragraphs were the only documents of text files in version 0.1
            identity += [txt, *(cuts or ())]
        if revision is not None:
            identity.append(revision)
        self.fingerprint = digest(identity)

    def read(self, shard: int, row: int = 0, step: int = 1) -> Iterator[tuple[int, str | Skipped]]:
        """Yield the numbers of rows ``row, row + step, ...`` of a shard with their text, or with why there is none.

        Raises:
            MythosError: with ``on_error: fail``, a document or shard cannot be used; the message names it.
            Unreachable: a remote file was unreachable for longer than ``data.patience``.
        """
        try:
            for index, values in self._reader.rows(self._pieces[shard], row, step, self._columns):
                yield index, self._document(shard, index, values)
        except Unreachable as error:
            raise Unreachable(f"data: shard {self.shards[shard]}: {error}") from error

    def _document(self, shard: int, row: int, values: list[Any] | Unreadable | Broken) -> str | Skipped:
        if isinstance(values, Broken):
            self._reject(f"data: {self.shards[shard]}, from row {row} on", values.reason)
            return Skipped.SHARD
        if isinstance(values, Unreadable):
            return self._reject_document(shard, row, values.reason)
        text, *others = values
        if isinstance(text, bytes):  # a binary column of parquet: some writers do not mark text as such
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                return self._reject_document(shard, row, str(error))
        if not all(map(self._passes, self._columns[1:], others)):
            return Skipped.FILTERED
        if isinstance(text, Part):
            return text
        if not isinstance(text, str):
            return self._reject_document(shard, row, f"its text is {'null' if text is None else type(text).__name__}")
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:  # a lone surrogate, written as an escape in JSON
            return self._reject_document(shard, row, str(error))
        if size > self.max_document_bytes:
            return self._reject_document(
                shard, row, f"it has {size:,} bytes, and data.max_document_bytes is {self.max_document_bytes:,}"
            )
        if LENGTH in self._filters and not self._passes(LENGTH, len(text)):
            return Skipped.FILTERED
        return text if text.strip() else Skipped.DOCUMENT

    def _passes(self, name: str, value: Any) -> bool:
        rule = self._filters[name]
        if value is None or (rule.one_of is not None and value not in rule.one_of):
            return False
        if rule.min is None and rule.max is None:
            return True
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MythosError(
                f"data.filters.{name}: min and max need numbers, and the column contains {value!r}. Use one_of instead."
            )
        return (rule.min is None or value >= rule.min) and (rule.max is None or value <= rule.max)

    def _require_columns(self, files: list[File]) -> None:
        """Raise MythosError for a requested column that no record of any file has.

        Stops with a warning after COLUMNS_BYTES: reading a whole corpus would take too long.
        """
        missing, known = dict.fromkeys(self._columns), set[str]()
        read = 0
        for file in files:
            try:
                for names, size in self._reader.columns(file):
                    known.update(names)
                    for name in names:
                        missing.pop(name, None)
                    read += size
                    if not missing:
                        return
                    if read > COLUMNS_BYTES:
                        logger.warning(
                            "data: none of the first records of %s and the files after it has %s; records without it "
                            "are skipped. Check data.text_column and data.filters.",
                            without_credentials(files[0].path),
                            ", ".join(map(repr, missing)),
                        )
                        return
            except READ_ERRORS as error:
                self._reject(f"data: {file.path}", short_reason(error))
        for name in missing if known else ():  # without any record, reading reports what is wrong with the files
            field = "data.text_column" if name == self._text_column else f"data.filters.{name}"
            where = files[0].path + (f" (like the {len(files) - 1} other files)" if len(files) > 1 else "")
            raise MythosError(
                f"{field}: {where} has no column {name!r}; it has {', '.join(sorted(known))}. Give the name of "
                "one of these."
            )

    def _reject_document(self, shard: int, row: int, reason: str) -> Skipped:
        where = f"data: {self.shards[shard]}, row {row} cannot be used"
        if self.on_error == "fail":
            raise MythosError(
                f"{where}: {reason}. Repair it, or set data.on_error: skip to skip and count such documents."
            )
        if shard not in self._warned and len(self._warned) < MOST_WARNINGS:
            self._warned.add(shard)
            last = len(self._warned) == MOST_WARNINGS
            others = "Others from now on" if last else "Others of this shard"
            logger.warning(
                "%s and is skipped: %s. %s will be skipped without a message; metrics.jsonl counts them",
                where,
                reason,
                others,
            )
        return Skipped.DOCUMENT

    def _reject(self, where: str, reason: str) -> None:
        if self.on_error == "fail":
            raise MythosError(
                f"{where} cannot be read: {reason}. Repair or remove it, or set data.on_error: skip to skip and count "
                "unreadable shards."
            )
        logger.warning("%s cannot be read and is skipped: %s", without_credentials(where), reason)


def open_corpora(config: DataConfig) -> dict[str, Corpus]:
    """Open the training corpora, by the names of their sources; pre-tokenized sources have none.

    Files that ``data.validation.path`` names too are excluded. Raises MythosError if no file matches, or a matching
    file cannot be used; the message names it.
    """
    named = config.named_sources.items()
    return {name: open_corpus(config, source) for name, source in named if source.kind != "tokens"}


def pin_revisions(config: DataConfig, saved: Mapping[str, Any]) -> DataConfig:
    """Replace the revision of every hub source by a commit: the one that ``saved`` names, else the revision's newest.

    That of embedded text becomes the hash of the text that is installed.

    Args:
        config: the data section; a revision that is a commit already stays.
        saved: the data section of the run that is continued, as plain values; empty for a new run.

    Raises:
        MythosError: a dataset cannot be found or reached, or a new run asks for another embedded text.
    """

    def pinned(source: S, before: Mapping[str, Any]) -> S:
        if source.kind == "embedded":
            here = embedded.revision()
            # A run that is continued has its own rules for other data: data.on_mismatch.
            if source.revision not in (None, here, before.get("revision")):
                raise MythosError(
                    f"data.revision: got {source.revision}, and the embedded text that is installed is {here}. Install "
                    f"the version of mythos that had the other text, or leave data.revision out to read this one."
                )
            return source.model_copy(update={"revision": here})
        if source.kind != "hub" or _COMMIT.fullmatch(source.revision or ""):
            return source
        revision = before.get("revision") if before.get("dataset") == source.dataset else None
        if revision is None:
            revision = _resolved(config, source).revision
        return source.model_copy(update={"revision": revision})

    before = saved.get("sources", {})
    sources = {name: pinned(source, before.get(name, {})) for name, source in config.sources.items()}
    return pinned(config, saved).model_copy(update={"sources": sources})


def with_stored_documents(config: DataConfig, saved: Mapping[str, Any]) -> DataConfig:
    """Keep paragraphs as the documents of text files in a run of version 0.1, unless the configuration sets data.txt.

    `saved` is the data section of the run that is continued, as plain values; empty for a new run.
    """

    def kept(source: S, before: Mapping[str, Any]) -> S:
        if not before or "txt" in before or "txt" in source.model_fields_set or not reads_text_files(source):
            return source
        return source.model_copy(update={"txt": "paragraph"})

    before = saved.get("sources", {})
    sources = {name: kept(source, before.get(name, {})) for name, source in config.sources.items()}
    return kept(config, saved).model_copy(update={"sources": sources})


def weighted(config: DataConfig, corpora: Mapping[str, Corpus]) -> list[tuple[Corpus, float]]:
    """The corpora with the weights of their sources."""
    return [(corpus, getattr(config.named_sources[name], "weight", 1.0)) for name, corpus in corpora.items()]


def open_corpus(config: DataConfig, source: SourceConfig) -> Corpus:
    """Open one source of text.

    Raises MythosError if no file matches, or a matching file cannot be used; the message names it.
    """
    what = {"hub": "data.dataset", "embedded": "data.kind"}.get(source.kind, "data.path")
    txt, revision = source.txt, None
    if source.kind == "embedded":
        files = [local_file(str(path)) for path in embedded.files()]
        txt, revision = "file", embedded.revision()  # a txt that is set is for files of data.validation.path
    elif source.kind == "hub":
        files = [File(*file) for file in _resolved(config, source).files]
    else:
        files = _without_validation(_matching_files(source.path, what, config.patience), config)
    return Corpus(
        files,
        text_column=source.text_column,
        filters=source.filters,
        on_error=config.on_error,
        max_document_bytes=config.max_document_bytes,
        minimum_shards=SHARDS_PER_STREAM * config.streams,
        txt=txt,
        patience=config.patience,
        cache_dir=cache_directory(config),
        what=what,
        revision=revision,
    )


def _resolved(config: DataConfig, source: SourceConfig) -> HubFiles:
    assert source.dataset is not None
    place = source.dataset, source.subset, source.split, source.revision
    return resolve_hub(*place, cache_directory(config), config.patience)


def open_validation(config: DataConfig, option: str | None = None) -> Corpus | None:
    """Open the files of ``data.validation.path``; None if validation is a held-out share of the corpus itself.

    `option` is the command-line option that gave the path, for messages; None for the configuration. Raises MythosError
    if no file matches, or a matching file cannot be used; the message names it.
    """
    if not config.validation.path:
        return None
    option = option or "data.validation.path"
    return Corpus(
        _matching_files(config.validation.path, option, config.patience),
        text_column=config.text_column,
        txt=config.txt,
        on_error=config.on_error,
        max_document_bytes=config.max_document_bytes,
        patience=config.patience,
        cache_dir=cache_directory(config),
        what=option,
    )


def holdout_fraction(config: DataConfig) -> float:
    """Share of the training corpus that is held out by content hash: 0 if validation has files of its own."""
    return 0.0 if config.validation.path else config.validation.fraction


def cache_directory(config: DataConfig) -> Path:
    """The folder for file lists, validation sets and trained tokenizers."""
    return cache_root(config.cache_dir)


def content_hash(text: str) -> int:
    """A hash of a document's stripped text, 64 bits. It decides whether the document is held out, so copies agree."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big")


def holdout_limit(fraction: float) -> int:
    """The bound of :func:`content_hash` below which documents are held out."""
    return int(fraction * 2**64)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a function of its stripped text alone."""
    return content_hash(text) < holdout_limit(fraction)


def source_identity(corpus: str, tokenizer: str, holdout_fraction: float) -> dict[str, Any]:
    """Identifies the data in which a saved position is valid; the same for text and for its pre-tokenized form."""
    return {"corpus": corpus, "tokenizer": tokenizer, "holdout_fraction": holdout_fraction}


def in_fixed_order(shards: int) -> list[int]:
    """The shards in a pseudo-random order that depends on neither names nor a seed.

    For readers of a part of the corpus (tokenizer, validation), for which the first files may not be typical.
    """
    return sorted(range(shards), key=lambda shard: hashlib.blake2b(str(shard).encode()).digest())


def _identity(files: list[File]) -> list[list[Any]]:
    """Names and sizes; names of local files are relative, so that a corpus may be moved to another folder."""
    if any(is_remote(file.path) for file in files):
        return [list(file) for file in files]
    base = os.path.commonpath([os.path.dirname(os.path.abspath(file.path)) for file in files])
    return [[os.path.relpath(os.path.abspath(file.path), base), file.size] for file in files]


def _without_validation(files: list[File], config: DataConfig) -> list[File]:
    if not config.validation.path:
        return files
    held_out = {
        os.path.realpath(file.path)
        for file in _matching_files(config.validation.path, "data.validation.path", config.patience)
    }
    training = [file for file in files if os.path.realpath(file.path) not in held_out]
    if not training:
        raise MythosError("data.path: every file is also matched by data.validation.path; none is left to train on.")
    if len(training) < len(files):
        logger.warning("data.path: skipping %d files of data.validation.path", len(files) - len(training))
    return training


def _matching_files(patterns: str | list[str] | None, key: str, patience: float) -> list[File]:
    patterns = [patterns] if isinstance(patterns, str) else patterns or []
    files: dict[str, File] = {}
    for pattern in patterns:
        if is_remote(pattern):
            matches = [File(*file) for file in remote_files(pattern, patience, EXTENSIONS)]
        else:
            paths = _local_paths(os.path.expanduser(pattern))
            matches = [local_file(path) for path in paths if os.path.isfile(path)]
            if not matches and len(paths) == 1 and os.path.isdir(paths[0]):
                matches = _files_in(paths[0], key)
        if not matches:
            raise MythosError(
                f"{key}: {pattern} matches no file (looked from {os.getcwd()}). Give a glob such as data/*.parquet; "
                f"allowed extensions are {', '.join(EXTENSIONS)}."
            )
        files |= {file.path: file for file in matches}
    if not files:
        raise MythosError(f"{key}: no files are given. Give a glob such as data/*.parquet.")
    return [files[path] for path in sorted(files)]


def _files_in(folder: str, key: str) -> list[File]:
    """The readable files in a folder and the folders below it, without hidden ones."""
    readable: list[str] = []
    others: list[str] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(place, name) for name in names if not name.startswith(".")):
            if os.path.isfile(path):
                (readable if path.endswith(EXTENSIONS) else others).append(path)
    if not readable:
        raise MythosError(
            f"{key}: the folder {folder} contains no file to read ({len(others)} with other extensions). Allowed "
            f"extensions are {', '.join(EXTENSIONS)}."
        )
    if others:
        logger.warning(
            "%s: %s: reading %d files, leaving out %d with other extensions (first: %s)",
            key,
            folder,
            len(readable),
            len(others),
            min(others),
        )
    return [local_file(path) for path in readable]


def _local_paths(pattern: str) -> list[str]:
    """Paths that match a glob. A name that exists matches itself even if it contains a glob's characters."""
    if os.path.lexists(pattern):
        return [pattern]
    return [path for reading in readings(pattern, os.path.lexists) for path in glob.glob(reading, recursive=True)]
