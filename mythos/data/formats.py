"""Files of documents: how each format is cut into shards, and read from any row of a shard on."""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from mythos.data.cache import digest, keep, kept
from mythos.data.remote import is_remote, open_remote
from mythos.errors import short_reason, without_credentials
from mythos.files.local import open_regular

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

# Lines are read this many bytes at a time, so that one without an end takes no more memory than the longest allowed.
LINE_BLOCK = 2**20

# Rows decoded at once: every stream keeps a batch, and together they should not outgrow the processor's cache.
PARQUET_BATCH = 16

# About what text is compressed to: a part in so many.
COMPRESSION = 3

# Footers kept per process. One of 700 row groups takes megabytes, and reading it again from a hub a request of as many.
FOOTERS_KEPT = 16

# Decoded row groups kept per process, where several streams share them; each in batches of about 2 MiB.
GROUPS_KEPT_BYTES = 32 * 2**20
SHARED_BATCH_BYTES = 2 * 2**20

# pyarrow raises its own errors for damaged files, UnicodeError for names that are not UTF-8, and OverflowError for
# counts that do not fit its integers.
READ_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    zlib.error,
    ArrowException,
    UnicodeError,
    OverflowError,
)
# pyarrow raises these where a stored value has no counterpart in Python: text that is not UTF-8 and dates outside of
# the years 1 to 9999 (ValueError, OverflowError), time zones nobody knows (KeyError), structs with two equal keys.
_VALUE_ERRORS: tuple[type[Exception], ...] = (ValueError, OverflowError, KeyError, TypeError, ArrowException)
_OTHER_ENCODINGS = (BOM_UTF16_LE, BOM_UTF16_BE, BOM_UTF32_BE)  # that of UTF-32, little-endian, begins as UTF-16's does


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
        unit = "row group" if self.file.path.endswith(".parquet") else "byte"
        return f"{without_credentials(self.file.path)}, {unit} {self.start}"


@dataclass(frozen=True)
class Unreadable:
    """A row that is there but cannot be used (invalid JSON, not UTF-8, longer than a line may be)."""

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
        longest_line: bytes of the longest line (of txt: document) that is read; longer ones are Unreadable.

    Every method raises :class:`mythos.data.remote.Unreachable` when that has passed, and ``READ_ERRORS`` (except
    :meth:`rows`, which yields Broken instead) for a file that is damaged.
    """

    def __init__(self, patience: float, cache_dir: Path | None = None, longest_line: int = 2**26) -> None:
        self.patience = patience
        self.cache_dir = cache_dir
        self.longest_line = longest_line
        self._footers: OrderedDict[File, pq.FileMetaData] = OrderedDict()
        self._groups: OrderedDict[tuple[File, int], list[pa.RecordBatch]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_footers": OrderedDict(), "_groups": OrderedDict()}

    def open(self, file: File) -> IO[bytes]:
        """Open for reading from any position."""
        return open_remote(file.path, file.size, self.patience) if is_remote(file.path) else open_regular(file.path)

    def columns(self, file: File) -> Iterator[tuple[list[str], int]]:
        """Yield names of columns, and about how many bytes were read to learn them.

        Once for a parquet file, once for every record of a jsonl file (its keys), and ``text`` for plain text.
        """
        if file.path.endswith(".parquet"):
            yield self._layout(file)[0], PIECE_BYTES
        elif file.path.endswith(".txt"):
            yield ["text"], 0
        else:
            with self._lines(file) as lines:
                for line in _filled_lines(lines, Piece(file, None, 0, 0), self.longest_line):
                    record = line if isinstance(line, Unreadable) else _parse_json(line)
                    names = list(record) if isinstance(record, dict) else []
                    yield names, self.longest_line if isinstance(line, Unreadable) else len(line)

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
                documents = (_paragraphs if text else _filled_lines)(lines, piece, self.longest_line)
                for document in islice(documents, row, None, step):
                    if isinstance(document, Unreadable):
                        yield done, document
                    else:
                        yield done, _decode(document, columns) if text else _record(document, columns)
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
                _require_columns(parquet.schema_arrow.names, columns)
                groups = range(parquet.num_row_groups) if piece.start is None else [piece.start]
                first = 0
                for group in groups:
                    end = first + parquet.metadata.row_group(group).num_rows
                    try:
                        if done < end:
                            for values in self._group_rows(parquet, piece.file, group, done - first, step, columns):
                                yield done, values
                                done += step
                            if done < end:
                                raise ArrowException(f"it ends before row {done - first} of {end - first}")
                    except READ_ERRORS as error:
                        if done < end:
                            yield done, Broken(f"row group {group}: {short_reason(error)}")
                            done += -(-(end - done) // step) * step  # on to the first wanted row of the next group
                    first = end
        except READ_ERRORS as error:
            yield done, Broken(short_reason(error))

    def _group_rows(
        self, parquet: pq.ParquetFile, file: File, group: int, row: int, step: int, columns: list[str]
    ) -> Iterator[list[Any] | Unreadable]:
        """Values of rows ``row, row + step, ...`` of a row group.

        Both ways decode in batches and pick rows as Python values. Arrow's own selection of rows has no kernel for
        some types (string_view) and joins what it selects into one array, which more than 2 GiB of text do not fit.
        """
        batches: Iterable[pa.RecordBatch]
        if step == 1:
            batches = self._batches(parquet, group, columns, PARQUET_BATCH)
        else:  # other streams share this row group: those of this process find it decoded
            key = (file, group)
            if key not in self._groups:
                meta = parquet.metadata.row_group(group)
                rows = SHARED_BATCH_BYTES * meta.num_rows // max(meta.total_byte_size, 1)
                rows = min(max(rows, PARQUET_BATCH), 2**12)
                self._groups[key] = list(self._batches(parquet, group, columns, rows))
            self._groups.move_to_end(key)
            batches = self._groups[key]
            while len(self._groups) > 1 and sum(map(_bytes, self._groups.values())) > GROUPS_KEPT_BYTES:
                self._groups.popitem(last=False)
        for batch in batches:
            if row >= len(batch):
                row -= len(batch)
                continue
            taken = [_values(batch.column(name), row, step) for name in columns]
            for values in zip(*taken, strict=True):
                yield next((value for value in values if isinstance(value, Unreadable)), None) or list(values)
                row += step
            row -= len(batch)

    def _batches(self, parquet: pq.ParquetFile, group: int, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        """A row group in batches of about so many rows.

        Each batch has a copy of the dictionaries of its columns: with a large one, batches are as large, or copying
        would take most of the time. Its size is that in a first batch, because pyarrow ends the process at damage in
        what the footer says of columns.
        """

        def batches(rows: int) -> Iterator[pa.RecordBatch]:
            return parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)

        if any(hasattr(parquet.schema_arrow.field(name).type, "value_type") for name in columns):
            first = next(batches(rows), None)
            arrays = [] if first is None else [first.column(name) for name in columns]
            dictionary = sum(array.dictionary.nbytes for array in arrays if hasattr(array, "dictionary"))
            meta = parquet.metadata.row_group(group)
            rows = max(rows, min(meta.num_rows, meta.num_rows * dictionary // max(meta.total_byte_size, 1)))
        return batches(rows)

    def _lines(self, file: File) -> IO[bytes]:
        handle = self.open(file)
        return gzip.GzipFile(fileobj=handle) if file.path.endswith(".gz") else handle  # type: ignore[return-value]


def _bytes(batches: list[pa.RecordBatch]) -> int:
    return sum(batch.nbytes for batch in batches)


def _require_columns(names: list[str], columns: list[str]) -> None:
    for name in columns:
        if (count := names.count(name)) != 1:
            raise ArrowException(f"it has {count or 'no'} column{'s' if count else ''} {name}")


def _values(column: pa.Array, row: int, step: int) -> list[Any]:
    """Python values of rows ``row, row + step, ...``."""
    if step == 1:
        try:
            return column.slice(row).to_pylist()
        except _VALUE_ERRORS:
            pass  # one by one below, to find which
    return [_value(column, index) for index in range(row, len(column), step)]


def _value(column: pa.Array, index: int) -> Any:
    try:
        return column[index].as_py()
    except _VALUE_ERRORS as error:
        return Unreadable(short_reason(error))


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


def _decode(document: bytes, columns: list[str]) -> list[Any] | Unreadable:
    """The text, and null for the columns that plain text does not have."""
    if b"\0" in document:
        return Unreadable("it holds NUL bytes, so it is no text, or text in UTF-16; text must be UTF-8")
    try:
        return [document.decode(), *[None] * (len(columns) - 1)]
    except UnicodeDecodeError as error:
        return Unreadable(str(error))


def _filled_lines(lines: IO[bytes], piece: Piece, longest: int) -> Iterator[bytes | Unreadable]:
    """The non-blank lines that start inside the piece (of a whole file: all)."""
    for position, line in _lines_from(lines, piece, longest):
        if piece.start is not None and position >= piece.end:
            return
        if isinstance(line, Unreadable) or line.strip():
            yield line


def _paragraphs(lines: IO[bytes], piece: Piece, longest: int) -> Iterator[bytes | Unreadable]:
    """Runs of non-blank lines whose first starts inside the piece; the last may go on behind it."""
    document: list[bytes] = []
    size = 0
    # The first lines may belong to a document that starts before the piece.
    outside = _in_paragraph(lines, piece.start or 0)
    for position, line in _lines_from(lines, piece, longest):
        if isinstance(line, bytes) and not line.strip():
            if document:
                yield b"".join(document)
                document, size = [], 0
            outside = False
        elif not outside and (document or position < piece.end):
            size += longest + 1 if isinstance(line, Unreadable) else len(line)
            if size > longest:
                yield _too_long(longest)
                document, size, outside = [], 0, True  # what is left of it is passed over
            elif isinstance(line, bytes):
                document.append(line)
        if not document and position >= piece.end:
            return
    if document:
        yield b"".join(document)


def _in_paragraph(lines: IO[bytes], position: int) -> bool:
    """Whether the line that holds the byte before ``position`` has text."""
    if not position:
        return False
    begin = end = position - 1
    if begin < len(BOM_UTF8):
        lines.seek(0)
        if lines.read(len(BOM_UTF8)) == BOM_UTF8:
            begin, end = len(BOM_UTF8), 0
    lines.seek(begin)
    while part := lines.readline(LINE_BLOCK):
        if part.strip():
            return True
        if part.endswith(b"\n"):
            break
    size = 64
    while end:
        start = max(end - size, 0)
        lines.seek(start)
        _, newline, head = lines.read(end - start).rpartition(b"\n")
        if not start:
            head = head.removeprefix(BOM_UTF8)
        if head.strip() or newline:
            return bool(head.strip())
        end, size = start, min(2 * size, LINE_BLOCK)
    return False


def _lines_from(lines: IO[bytes], piece: Piece, longest: int) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Position and content of every line from the piece's start on, a byte order mark of UTF-8 left out.

    It goes on behind the piece's end, except after a line that was passed over: no document can be under way there.

    Raises UnicodeError for a file that begins with the byte order mark of another encoding.
    """
    position = piece.start or 0
    end = sys.maxsize if piece.start is None else piece.end
    if position:  # the line that runs into the start belongs to what is before
        lines.seek(position - 1)
        position += _pass_line(lines, end - position + 1) - 1
        if position >= end:
            return
    else:
        lines.seek(0)
    while line := lines.readline(LINE_BLOCK):
        size = len(line)
        ended = line.endswith(b"\n")
        if size == LINE_BLOCK and not ended:
            parts = [line]
            while not ended and size <= longest and (part := lines.readline(LINE_BLOCK)):
                parts.append(part)
                size += len(part)
                ended = part.endswith(b"\n")
            line = b"".join(parts) if size <= longest else b""
            del parts
        if size > longest:
            yield position, _too_long(longest)
            size += 0 if ended else _pass_line(lines, end - position - size)
            if position + size >= end:
                return
        else:
            yield position, line if position else _without_mark(line)
        position += size


def _pass_line(lines: IO[bytes], most: int) -> int:
    """Read on to the next line, or ``most`` bytes and more where it is farther; return the number of bytes passed.

    Behind the end of its piece nobody asks where the next line is: each piece of a file that is one line would read all
    that follows it.
    """
    size = 0
    while size < most and (part := lines.readline(LINE_BLOCK)):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _without_mark(line: bytes) -> bytes:
    """The first line of a file without the byte order mark of UTF-8; raises UnicodeError for another encoding's."""
    if line.startswith(_OTHER_ENCODINGS):
        raise UnicodeError("it begins with a byte order mark of UTF-16 or UTF-32; convert it to UTF-8 (iconv -t UTF-8)")
    return line.removeprefix(BOM_UTF8)


def _too_long(longest: int) -> Unreadable:
    return Unreadable(
        f"it has more than {longest:,} bytes without an end; raise data.max_document_bytes if these are one document"
    )


def local_file(path: str) -> File:
    """A file on disk with its size; raises OSError if there is none."""
    return File(path, os.path.getsize(path))
