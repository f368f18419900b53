"""Where documents come from: shards that can be read from any row on."""

import glob
import gzip
import hashlib
import json
import logging
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mythos.config import DataConfig
from mythos.data import embedded
from mythos.errors import MythosError, short_reason

logger = logging.getLogger(__name__)

EXTENSIONS = (".parquet", ".jsonl", ".jsonl.gz", ".txt")

# Plain jsonl files are cut at this many bytes, so that a resumed run reads at most this much again.
JSONL_SHARD_BYTES = 8 * 2**20

# Splitting hub files into row groups reads the footer of every file; beyond this many, files are shards enough.
RESHARD_MAX_FILES = 1000

READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, pa.ArrowException)


@dataclass(frozen=True)
class Unreadable:
    """A record that is there but cannot be decoded (invalid JSON, not UTF-8)."""

    reason: str


class Corpus(ABC):
    """Documents in shards.

    Attributes:
        shards: a stable name for every shard, for messages.
        fingerprint: identifies the corpus; a saved position is meaningful in a corpus of the same fingerprint only.
        skipped: what this process has met and left out: ``documents`` (empty, not text, undecodable; counted at
            every reading) and ``shards`` (distinct unreadable ones).
    """

    shards: list[str]
    fingerprint: str
    read_errors = READ_ERRORS

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self._bad_documents = 0
        self._bad_shards: set[str] = set()
        self._warned: set[int] = set()

    @property
    def skipped(self) -> dict[str, int]:
        """Counts of documents and shards left out so far."""
        return {"documents": self._bad_documents, "shards": len(self._bad_shards)}

    def read(self, shard: int, row: int, step: int = 1) -> Iterator[str | None]:
        """Yield rows ``row, row + step, ...`` of a shard, one item per row so that positions are exact.

        A row that is empty, not text or undecodable yields None and is counted. A shard that breaks off ends early
        and is counted.

        Raises:
            MythosError: with ``on_error: fail``, an undecodable row or a shard that cannot be read.
        """
        index = row
        try:
            for document in self._rows(shard, row, step):
                yield self._check(document, shard, index)
                index += step
        except MythosError:
            raise
        except self.read_errors as error:
            self._reject_shard(self.shards[shard], error)

    @abstractmethod
    def _rows(self, shard: int, row: int, step: int) -> Iterator[Any]:
        """Yield the raw rows: text, anything else that stands where text should be, or Unreadable."""

    def _check(self, document: Any, shard: int, row: int) -> str | None:
        if isinstance(document, str) and document.strip():
            try:
                document.encode()
                return document
            except UnicodeEncodeError as error:  # a lone surrogate, written as an escape in JSON
                document = Unreadable(str(error))
        if isinstance(document, Unreadable):
            where = f"data: {self.shards[shard]}, row {row} cannot be decoded"
            if self.on_error == "fail":
                raise MythosError(
                    f"{where}: {document.reason}. Repair it, or set data.on_error: skip to leave such documents out "
                    "and count them."
                )
            if shard not in self._warned:
                self._warned.add(shard)
                logger.warning("%s and is left out, as others of this shard will be: %s", where, document.reason)
        self._bad_documents += 1
        return None

    def _reject_shard(self, name: str, error: BaseException) -> None:
        reason = short_reason(error)
        if self.on_error == "fail":
            raise MythosError(
                f"data: {name} cannot be read: {reason}. Repair or remove it, or set data.on_error: skip to leave "
                "unreadable shards out and count them."
            ) from error
        if name not in self._bad_shards:
            logger.warning("data: %s cannot be read and is left out: %s", name, reason)
        self._bad_shards.add(name)


@dataclass(frozen=True)
class _Piece:
    """A shard of a file: a parquet row group, or the lines that start in a byte range of a jsonl file."""

    path: str
    start: int = 0
    end: int = 0


class FilesCorpus(Corpus):
    """Parquet (a shard is a row group), jsonl (8 MiB of lines), jsonl.gz and txt (a file) on disk.

    In a txt file documents are separated by blank lines. Text is UTF-8.

    Raises:
        MythosError: an unknown extension, an empty corpus, a file without the text column, or (``on_error: fail``) a
            file that cannot be opened.
    """

    def __init__(self, files: list[str], text_column: str = "text", on_error: str = "fail") -> None:
        super().__init__(on_error)
        self.text_column = text_column
        self._pieces: list[_Piece] = []
        self.shards = []
        base = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        identity: list[Any] = [text_column]
        for file in files:
            if not file.endswith(EXTENSIONS):
                raise MythosError(f"data.path: {file} has an unknown extension; allowed are {', '.join(EXTENSIONS)}.")
            identity.append([os.path.relpath(os.path.abspath(file), base), os.path.getsize(file)])
            try:
                pieces = list(self._cut(file))
            except READ_ERRORS as error:
                self._reject_shard(file, error)
                continue
            self._pieces += pieces
            kind = "row group" if file.endswith(".parquet") else "byte"
            self.shards += [f"{file}, {kind} {piece.start}" if len(pieces) > 1 else file for piece in pieces]
        if not self._pieces:
            raise MythosError(
                f"data.path: the corpus is empty: none of the {len(files)} files (first: {files[0]}) holds a readable "
                "document. Give files with text in them."
            )
        self.fingerprint = _digest([*identity, len(self._pieces)])

    def _cut(self, file: str) -> Iterator[_Piece]:
        size = os.path.getsize(file)
        if file.endswith(".parquet"):
            with pq.ParquetFile(file) as parquet:
                self._require_column(file, parquet.schema_arrow.names)
                groups = parquet.metadata.num_row_groups
                yield from (_Piece(file, g) for g in range(groups) if parquet.metadata.row_group(g).num_rows)
        elif size == 0:
            return
        elif file.endswith(".txt"):
            yield _Piece(file)
        else:
            self._look_at_first_line(file)
            cut = JSONL_SHARD_BYTES if file.endswith(".jsonl") else size
            yield from (_Piece(file, start, min(start + cut, size)) for start in range(0, size, cut))

    def _require_column(self, where: str, names: list[str]) -> None:
        if self.text_column not in names:
            raise MythosError(
                f"data.text_column: {where} has no column {self.text_column!r}; it has {', '.join(sorted(names))}. "
                "Set data.text_column to the one that holds the text."
            )

    def _look_at_first_line(self, file: str) -> None:
        with _open_lines(file) as lines:
            first = next((line for line in lines if line.strip()), b"{}")
        record = _parse_json(first)
        if isinstance(record, dict) and record:
            self._require_column(file, list(record))

    def _rows(self, shard: int, row: int, step: int) -> Iterator[Any]:
        piece = self._pieces[shard]
        if piece.path.endswith(".parquet"):
            return self._parquet_rows(piece, row, step)
        if piece.path.endswith(".txt"):
            return islice(_txt_documents(piece.path), row, None, step)
        return (self._jsonl_document(line) for line in islice(_jsonl_lines(piece), row, None, step))

    def _parquet_rows(self, piece: _Piece, row: int, step: int) -> Iterator[Any]:
        with pq.ParquetFile(piece.path) as parquet:
            first = 0
            for batch in parquet.iter_batches(256, row_groups=[piece.start], columns=[self.text_column]):
                column = batch.column(0)
                while row < first + len(column):
                    yield _parquet_value(column[row - first])
                    row += step
                first += len(column)

    def _jsonl_document(self, line: bytes) -> Any:
        record = _parse_json(line)
        return record.get(self.text_column) if isinstance(record, dict) else record


class HubCorpus(Corpus):
    """A Hugging Face dataset, streamed; a shard is a row group where the format allows it, else a file.

    ``dataset`` is a hub id, ``id@revision`` to pin one, or a local folder. The revision is resolved when the corpus
    is opened and is part of the fingerprint.

    Raises:
        MythosError: the dataset, subset or split cannot be opened, or has no such text column.
    """

    # Bad content alone: were an outage a bad shard, shards would be left out by chance and no resume were exact.
    read_errors = (EOFError, zlib.error, pa.ArrowException)

    def __init__(self, dataset: str, subset: str | None, split: str, text_column: str, on_error: str) -> None:
        super().__init__(on_error)
        # Imported here because it costs a second that runs on local files need not pay.
        import datasets
        from huggingface_hub import HfApi

        name, _, revision = dataset.partition("@")
        described = f"{dataset}" + (f", subset {subset}" if subset else "") + f", split {split}"
        try:
            if os.path.isdir(name):
                identity = [
                    [path.name, path.stat().st_size] for path in sorted(Path(name).rglob("*")) if path.is_file()
                ]
            else:
                revision = HfApi().dataset_info(name, revision=revision or None).sha or revision
                identity = [[name, revision]]
            stream = datasets.load_dataset(name, subset, split=split, streaming=True, revision=revision or None)
            if stream.num_shards <= RESHARD_MAX_FILES:
                stream = stream.reshard()
            columns = stream.column_names or list(next(iter(stream), {}))
        except Exception as error:  # hub, network and format errors share no base class
            reason = short_reason(error)
            raise MythosError(
                f"data.dataset: {described} cannot be opened: {reason}. Check the names and the network, or use "
                "data.kind: files or embedded."
            ) from error
        if text_column not in columns:
            raise MythosError(
                f"data.text_column: {described} has no column {text_column!r}; it has {', '.join(sorted(columns))}. "
                "Set data.text_column to the one that holds the text."
            )
        self._stream = stream.select_columns([text_column])
        self._column = text_column
        self.shards = [f"{described}, shard {index}" for index in range(stream.num_shards)]
        self.fingerprint = _digest([*identity, subset, split, text_column, len(self.shards)])

    def _rows(self, shard: int, row: int, step: int) -> Iterator[Any]:
        rows = self._stream.shard(num_shards=len(self.shards), index=shard).skip(row)
        try:
            for record in islice(rows, 0, None, step):
                yield record[self._column]
        except self.read_errors:
            raise
        except Exception as error:  # those of the hub, the network and the file system share no base class
            reason = short_reason(error)
            raise MythosError(
                f"data: {self.shards[shard]} cannot be reached: {reason}. When the network and the hub answer again, "
                "run the same command: it continues from the newest checkpoint."
            ) from error


def open_corpus(config: DataConfig) -> Corpus:
    """Open the training corpus; validation files named by ``data.validation.path`` are left out of it.

    Raises:
        MythosError: nothing matches, or what matches cannot be used; the message names it.
    """
    if config.kind == "hub":
        if not config.dataset:
            raise MythosError("data.dataset: data.kind: hub needs the id of a dataset, e.g. HuggingFaceFW/fineweb-edu.")
        return HubCorpus(config.dataset, config.subset, config.split, config.text_column, config.on_error)
    if config.kind == "embedded":
        files = [str(path) for path in embedded.gather(cache_directory(config))]
        return FilesCorpus(files, "text", config.on_error)
    files = _matching_files(config.path, "data.path")
    if config.validation.path:
        held_out = {os.path.realpath(file) for file in _matching_files(config.validation.path, "data.validation.path")}
        training = [file for file in files if os.path.realpath(file) not in held_out]
        if not training:
            raise MythosError(
                "data.path: every file is also matched by data.validation.path; none is left to train on."
            )
        if len(training) < len(files):
            logger.warning("data.path: %d files of data.validation.path are left out", len(files) - len(training))
        files = training
    return FilesCorpus(files, config.text_column, config.on_error)


def open_validation(config: DataConfig) -> Corpus | None:
    """Open the files of ``data.validation.path``, or return None where validation is held out of the corpus itself.

    Raises:
        MythosError: nothing matches, or what matches cannot be used; the message names it.
    """
    if not config.validation.path:
        return None
    return FilesCorpus(
        _matching_files(config.validation.path, "data.validation.path"), config.text_column, config.on_error
    )


def holdout_fraction(config: DataConfig) -> float:
    """Share of the training corpus that is held out by content hash: 0 where validation has files of its own."""
    return 0.0 if config.validation.path else config.validation.fraction


def cache_directory(config: DataConfig) -> Path:
    """Where gathered corpora and trained tokenizers are kept."""
    return Path(config.cache_dir or os.environ.get("MYTHOS_CACHE") or "~/.cache/mythos").expanduser()


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a function of its stripped text alone, so duplicates stay together."""
    digest = hashlib.blake2b(text.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _matching_files(patterns: str | list[str] | None, key: str) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else patterns or []
    files: set[str] = set()
    for pattern in patterns:
        matches = [file for file in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(file)]
        if not matches:
            raise MythosError(
                f"{key}: {pattern} matches no file (looked from {os.getcwd()}). Give a glob such as data/*.parquet; "
                f"allowed extensions are {', '.join(EXTENSIONS)}."
            )
        files.update(matches)
    if not files:
        raise MythosError(f"{key}: no files are given. Give a glob such as data/*.parquet.")
    return sorted(files)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _parquet_value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(str(error))


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
        return Unreadable(f"invalid JSON: {error}")


def _open_lines(path: str) -> IO[bytes]:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _jsonl_lines(piece: _Piece) -> Iterator[bytes]:
    """Non-blank lines that start inside the piece."""
    with _open_lines(piece.path) as lines:
        if piece.path.endswith(".gz"):
            yield from (line for line in lines if line.strip())
            return
        position = piece.start
        if position:  # the line that runs into this piece belongs to the one before
            lines.seek(position - 1)
            position += len(lines.readline()) - 1
        while position < piece.end and (line := lines.readline()):
            position += len(line)
            if line.strip():
                yield line


def _txt_documents(path: str) -> Iterator[str | Unreadable]:
    with open(path, "rb") as lines:
        document: list[bytes] = []
        for line in lines:
            if line.strip():
                document.append(line)
            elif document:
                yield _decode(b"".join(document))
                document = []
        if document:
            yield _decode(b"".join(document))


def _decode(data: bytes) -> str | Unreadable:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return Unreadable(str(error))
