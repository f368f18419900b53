"""Files of documents: how each format is cut into shards, and read from any row of a shard on."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mythos.data.cache import digest, keep, kept
from mythos.data.remote import is_remote, open_remote
from mythos.errors import short_reason
from mythos.files import open_regular

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
try:
    from pyarrow import ArrowException
except ModuleNotFoundError:  # training on tasks, which are made on the way, and `mythos gpu-check` read no files

    class ArrowException(Exception):  # type: ignore[no-redef]
        """Of pyarrow, which is not installed."""


EXTENSIONS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".txt")

# Lines are cut at this many bytes, so that a resumed run passes over at most this much; or at more, where that many
# pieces would take seconds to deal.
PIECE_BYTES = 2**20
MOST_PIECES = 100_000

# Rows decoded at once: every stream keeps a batch, and together they should not outgrow the processor's cache.
PARQUET_BATCH = 16

# About what text is compressed to: a part in so many.
COMPRESSION = 3

# Footers kept per process. One of 700 row groups takes megabytes, and reading it again from a hub a request of as many.
FOOTERS_KEPT = 16

# Decoded row groups kept per process, where several streams share them.
GROUPS_KEPT_BYTES = 32 * 2**20

READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, ArrowException)


class File(NamedTuple):
    """A local path or a URL, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class Piece:
    """A shard: a row group of a parquet file or all of it (``start`` None), or what starts in a range of bytes.

    ``size`` is about its number of bytes, uncompressed.
    """

    file: File
    start: int | None
    end: int
    size: int

    def __str__(self) -> str:
        return f"{self.file.path}, {'row group' if self.file.path.endswith('.parquet') else 'byte'} {self.start}"


@dataclass(frozen=True)
class Unreadable:
    """A row that is there but cannot be decoded (invalid JSON, not UTF-8)."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """The rest of a shard (of a whole parquet file: of a row group) cannot be read."""

    reason: str


Row = tuple[int, list[Any] | Unreadable | Broken]
"""Row number, and the values of the columns asked for."""


class Reader:
    """Cuts files into pieces and reads their rows.

    Args:
        patience: seconds that a remote file may be unreachable.
        cache_dir: where the layout of remote parquet files is kept, which their footers of megabytes tell.

    Every method raises :class:`mythos.data.remote.Unreachable` when that has passed, and ``READ_ERRORS`` (except
    :meth:`rows`, which yields Broken instead) for a file that is damaged.
    """

    def __init__(self, patience: float, cache_dir: Path | None = None) -> None:
        self.patience = patience
        self.cache_dir = cache_dir
        self._footers: OrderedDict[File, pq.FileMetaData] = OrderedDict()
        self._groups: OrderedDict[tuple[File, int], pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_footers": OrderedDict(), "_groups": OrderedDict()}

    def open(self, file: File) -> IO[bytes]:
        """Open for reading from any position."""
        return open_remote(file.path, file.size, self.patience) if is_remote(file.path) else open_regular(file.path)

    def columns(self, file: File) -> list[str]:
        """Names of the columns or keys: those of the first record of a jsonl file, ``text`` for plain text."""
        if file.path.endswith(".parquet"):
            return self._layout(file)[0]
        if file.path.endswith(".txt"):
            return ["text"]
        with self._lines(file) as lines:
            record = _parse_json(next((line for line in lines if line.strip()), b"{}"))
        return list(record) if isinstance(record, dict) else []

    def pieces(self, file: File, whole: bool, total: int) -> list[Piece]:
        """Cut a file of a corpus of ``total`` bytes; with ``whole`` a parquet file is one shard, and not opened yet."""
        if file.path.endswith(".parquet"):
            if whole:
                return [Piece(file, None, 0, COMPRESSION * file.size)]
            return [Piece(file, group, 0, size) for group, size in enumerate(self._layout(file)[1]) if size]
        if file.path.endswith(".gz"):  # cannot be entered in the middle
            return [Piece(file, None, 0, COMPRESSION * file.size)] if file.size else []
        cut = max(PIECE_BYTES, total // MOST_PIECES)
        ends = [(start, min(start + cut, file.size)) for start in range(0, file.size, cut)]
        return [Piece(file, start, end, end - start) for start, end in ends]

    def rows(self, piece: Piece, row: int, step: int, columns: list[str]) -> Iterator[Row]:
        """Yield rows ``row, row + step, ...`` of a piece; Broken where it cannot be read on."""
        if piece.file.path.endswith(".parquet"):
            yield from self._parquet_rows(piece, row, step, columns)
            return
        done = row
        text = piece.file.path.endswith(".txt")
        try:
            with self._lines(piece.file) as lines:
                # Skipped rows are not parsed: a resumed run passes over them at the speed of the disk.
                documents = _paragraphs(lines, piece) if text else _filled_lines(lines, piece)
                for document in islice(documents, row, None, step):
                    yield done, _decode(document) if text else _record(document, columns)
                    done += step
        except READ_ERRORS as error:
            yield done, Broken(short_reason(error))

    def _layout(self, file: File) -> tuple[list[str], list[int]]:
        """Columns, and bytes of every row group (0 for one without rows), of a parquet file."""
        path = None
        if self.cache_dir and is_remote(file.path):
            path = self.cache_dir / "layouts" / f"{digest(file)}.json"
            if layout := kept(path):
                return layout["columns"], layout["bytes"]
        with self._parquet(file) as parquet:
            meta = parquet.metadata
            columns = parquet.schema_arrow.names
        groups = [meta.row_group(group) for group in range(meta.num_row_groups)]
        sizes = [group.total_byte_size if group.num_rows else 0 for group in groups]
        if path:
            keep(path, {"columns": columns, "bytes": sizes})
        return columns, sizes

    @contextmanager
    def _parquet(self, file: File) -> Iterator[pq.ParquetFile]:
        import pyarrow.parquet as pq

        with self.open(file) as handle:
            parquet = pq.ParquetFile(handle, metadata=self._footers.get(file))
            self._footers[file] = parquet.metadata
            self._footers.move_to_end(file)
            if len(self._footers) > FOOTERS_KEPT:
                self._footers.popitem(last=False)
            yield parquet

    def _parquet_rows(self, piece: Piece, row: int, step: int, columns: list[str]) -> Iterator[Row]:
        done = row
        try:
            with self._parquet(piece.file) as parquet:
                missing = [name for name in columns if name not in parquet.schema_arrow.names]
                if missing:
                    raise ArrowException(f"it has no column {', '.join(missing)}")
                groups = range(parquet.num_row_groups) if piece.start is None else [piece.start]
                first = 0
                for group in groups:
                    end = first + parquet.metadata.row_group(group).num_rows
                    try:
                        if done < end:
                            for batch in self._batches(parquet, piece.file, group, done - first, step, columns):
                                for values in _decoded(batch, columns):
                                    yield done, values
                                    done += step
                    except READ_ERRORS as error:
                        if done < end:
                            yield done, Broken(f"row group {group}: {short_reason(error)}")
                            done += -(-(end - done) // step) * step  # on to the first wanted row of the next group
                    first = end
        except READ_ERRORS as error:
            yield done, Broken(short_reason(error))

    def _batches(
        self, parquet: pq.ParquetFile, file: File, group: int, row: int, step: int, columns: list[str]
    ) -> Iterator[pa.RecordBatch]:
        """Rows ``row, row + step, ...`` of a row group."""
        if step == 1:
            for batch in parquet.iter_batches(PARQUET_BATCH, row_groups=[group], columns=columns, use_threads=False):
                if row < len(batch):
                    yield batch.slice(row)
                row = max(0, row - len(batch))
            return
        # Other streams share this row group: those of this process find it decoded.
        import pyarrow as pa

        key = (file, group)
        if key not in self._groups:
            self._groups[key] = parquet.read_row_group(group, columns=columns, use_threads=False)
        self._groups.move_to_end(key)
        table = self._groups[key]
        while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > GROUPS_KEPT_BYTES:
            self._groups.popitem(last=False)
        yield from table.take(pa.array(np.arange(row, len(table), step))).to_batches(PARQUET_BATCH)

    def _lines(self, file: File) -> IO[bytes]:
        handle = self.open(file)
        return gzip.GzipFile(fileobj=handle) if file.path.endswith(".gz") else handle  # type: ignore[return-value]


def _decoded(batch: pa.RecordBatch, columns: list[str]) -> Iterator[list[Any] | Unreadable]:
    """The values of each row."""
    for values in zip(*(_values(batch.column(name)) for name in columns), strict=True):
        yield next((value for value in values if isinstance(value, Unreadable)), None) or list(values)


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(str(error))


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError covers JSONDecodeError and UnicodeDecodeError
        return Unreadable(f"invalid JSON: {error}")


def _record(line: bytes, columns: list[str]) -> list[Any] | Unreadable:
    record = _parse_json(line)
    if isinstance(record, Unreadable):
        return record
    return [record.get(name) if isinstance(record, dict) else None for name in columns]


def _decode(document: bytes) -> list[Any] | Unreadable:
    try:
        return [document.decode()]
    except UnicodeDecodeError as error:
        return Unreadable(str(error))


def _filled_lines(lines: IO[bytes], piece: Piece) -> Iterator[bytes]:
    """The non-blank lines that start inside the piece (of a whole file: all)."""
    for position, line in _lines_from(lines, piece.start or 0):
        if piece.start is not None and position >= piece.end:
            return
        if line.strip():
            yield line


def _paragraphs(lines: IO[bytes], piece: Piece) -> Iterator[bytes]:
    """Runs of non-blank lines whose first starts inside the piece; the last may go on behind it."""
    start = piece.start or 0
    document: list[bytes] = []
    outside = _in_paragraph(lines, start)  # the first lines may belong to a document that starts before the piece
    for position, line in _lines_from(lines, start):
        if not line.strip():
            if document:
                yield b"".join(document)
                document = []
            outside = False
        elif not outside and (document or position < piece.end):
            document.append(line)
        if not document and position >= piece.end:
            return
    if document:
        yield b"".join(document)


def _in_paragraph(lines: IO[bytes], position: int) -> bool:
    """Whether the line that holds the byte before ``position`` has text."""
    if not position:
        return False
    lines.seek(position - 1)
    if lines.readline().strip():
        return True
    size = 1
    while True:
        start = max(position - 1 - size, 0)
        lines.seek(start)
        _, newline, head = lines.read(position - 1 - start).rpartition(b"\n")
        if head.strip() or newline or not start:
            return bool(head.strip())
        size *= 2


def _lines_from(lines: IO[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    """Position and content of every line that starts at ``start`` or later."""
    position = start
    if start:  # the line that runs into the start belongs to what is before
        lines.seek(start - 1)
        position += len(lines.readline()) - 1
    else:
        lines.seek(0)
    while line := lines.readline():
        yield position, line
        position += len(line)


def local_file(path: str) -> File:
    """A file on disk with its size; raises OSError if there is none."""
    return File(path, os.path.getsize(path))
