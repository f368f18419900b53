"""File formats of documents: how a file is cut into shards, and how a shard is read from any row on."""

from __future__ import annotations

import json
import os
import sys
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import GzipFile
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from mythos.data.json_cache import digest, load_cached, store_cached
from mythos.data.remote import is_remote, open_remote
from mythos.data.text_files import Cuts, Part, is_text, read_parts, segments
from mythos.errors import short_reason, without_credentials
from mythos.files.local import open_regular

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
try:
    from pyarrow import ArrowException
except ModuleNotFoundError:  # training on generated tasks and `mythos gpu-check` read no files and need no pyarrow

    class ArrowException(Exception):  # type: ignore[no-redef]
        """Stands in for pyarrow's error if pyarrow is not installed."""


EXTENSIONS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".txt", ".txt.gz")

# Files of lines are cut into pieces of this many bytes, so that a resumed run skips over at most this much. Beyond
# MOST_PIECES the pieces get larger, because dealing more of them to streams would take seconds.
PIECE_BYTES = 2**20
MOST_PIECES = 100_000

# Lines are read this many bytes at a time, so that a line without an end takes no more memory than the longest allowed.
LINE_BLOCK = 2**20

# Rows decoded at once: every stream holds a batch, and together they should fit the processor's cache.
PARQUET_BATCH = 16

# Typical ratio of text to compressed text.
COMPRESSION = 3

# Footers kept per process. One of 700 row groups has megabytes, which would be downloaded again.
FOOTERS_KEPT = 16

# Bytes of decoded row groups kept per process for the streams that share them, in batches of about 2 MiB.
GROUPS_KEPT_BYTES = 32 * 2**20
SHARED_BATCH_BYTES = 2 * 2**20

# For damaged files pyarrow raises its own errors, UnicodeError for names that are not UTF-8, and OverflowError for
# counts that do not fit its integers.
READ_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    zlib.error,
    ArrowException,
    UnicodeError,
    OverflowError,
)
# pyarrow raises these for stored values that Python cannot represent: text that is not UTF-8 and dates outside of
# the years 1 to 9999 (ValueError, OverflowError), unknown time zones (KeyError), structs with two equal keys.
_VALUE_ERRORS: tuple[type[Exception], ...] = (ValueError, OverflowError, KeyError, TypeError, ArrowException)
_OTHER_ENCODINGS = (BOM_UTF16_LE, BOM_UTF16_BE, BOM_UTF32_BE)  # little-endian UTF-32's mark begins with UTF-16's


class File(NamedTuple):
    """A local path or a URL, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class Piece:
    """A shard: one row group of a parquet file, all of them (``start`` None), or a byte range.

    A byte range stands for the lines or paragraphs that start in it, or for the parts of one document.

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
    """A row that exists but cannot be used (invalid JSON, not UTF-8, longer than the limit)."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """The rest of a shard (for a whole parquet file: of a row group) cannot be read."""

    reason: str


Row = tuple[int, list[Any] | Unreadable | Broken]
"""Row number, and the values of the requested columns."""

Lines = IO[bytes] | GzipFile


class Reader:
    """Cuts files into pieces and reads their rows.

    Args:
        patience: seconds for which a remote file may be unreachable.
        cache_dir: where the layout of remote parquet files is cached, whose footers take megabytes to read.
        longest_line: bytes of the longest line or paragraph that is read; longer ones are Unreadable.
        txt: document of a text file: ``file``, ``paragraph`` or ``line``.
        cuts: how text files are cut if they are one document each; None otherwise.

    Every method raises :class:`mythos.data.remote.Unreachable` once ``patience`` has passed, and, except :meth:`rows`,
    which yields Broken instead, ``READ_ERRORS`` for a damaged file.
    """

    def __init__(
        self,
        patience: float,
        cache_dir: Path | None = None,
        longest_line: int = 2**26,
        txt: str = "paragraph",
        cuts: Cuts | None = None,
    ) -> None:
        self.patience = patience
        self.cache_dir = cache_dir
        self.longest_line = longest_line
        self.txt = txt
        self.cuts = cuts
        self._footers: OrderedDict[File, pq.FileMetaData] = OrderedDict()
        self._groups: OrderedDict[tuple[File, int], list[pa.RecordBatch]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_footers": OrderedDict(), "_groups": OrderedDict()}

    def open(self, file: File) -> IO[bytes]:
        """Open a file for reading; it is seekable."""
        return open_remote(file.path, file.size, self.patience) if is_remote(file.path) else open_regular(file.path)

    def columns(self, file: File) -> Iterator[tuple[list[str], int]]:
        """Yield names of columns, and about how many bytes were read to learn them.

        Once for a parquet file, once for every record of a jsonl file (its keys), and ``text`` for plain text.
        """
        if file.path.endswith(".parquet"):
            yield self._layout(file)[0], PIECE_BYTES
        elif is_text(file.path):
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
        if file.path.endswith(".gz"):  # can only be read from its beginning
            return [Piece(file, None, sys.maxsize, COMPRESSION * file.size)] if file.size else []
        if self.cuts and is_text(file.path) and file.size:
            most = max(self.cuts.segment, total // MOST_PIECES)
            ranges = segments(file.size, Cuts(self.cuts.part, most))
            return [Piece(file, start, end, end - start) for start, end in ranges]
        cut = max(PIECE_BYTES, total // MOST_PIECES)
        ranges = [(start, min(start + cut, file.size)) for start in range(0, file.size, cut)]
        return [Piece(file, start, end, end - start) for start, end in ranges]

    def rows(self, piece: Piece, row: int, step: int, columns: list[str]) -> Iterator[Row]:
        """Yield rows ``row, row + step, ...`` of a piece; Broken where it cannot be read any further."""
        if piece.file.path.endswith(".parquet"):
            yield from self._parquet_rows(piece, row, step, columns)
            return
        plain = is_text(piece.file.path)
        try:
            with self._lines(piece.file) as lines:
                if plain and self.cuts:
                    for values in _part_rows(lines, piece, row, step, columns, self.cuts.part):
                        yield row, values
                        row += step
                    return
                # Skipped rows are not parsed: a resumed run skips over them at the speed of the disk.
                separate = _paragraphs if plain and self.txt == "paragraph" else _filled_lines
                for document in islice(separate(lines, piece, self.longest_line), row, None, step):
                    if isinstance(document, Unreadable):
                        yield row, document
                    elif plain:
                        text = document.rstrip(b"\r\n") if self.txt == "line" else document
                        yield row, _decode(text, columns)
                    else:
                        yield row, _record(document, columns)
                    row += step
        except READ_ERRORS as error:
            yield row, Broken(short_reason(error))

    def _layout(self, file: File) -> tuple[list[str], list[int]]:
        """Columns, and bytes of every row group (0 for one without rows), of a parquet file."""
        path = None
        if self.cache_dir and is_remote(file.path):
            path = self.cache_dir / "layouts" / f"{digest(file)}.json"
            if layout := load_cached(path):
                return layout["columns"], layout["bytes"]
        with self._parquet(file) as parquet:
            meta = parquet.metadata
            columns = parquet.schema_arrow.names
        groups = [meta.row_group(group) for group in range(meta.num_row_groups)]
        sizes = [group.total_byte_size if group.num_rows else 0 for group in groups]
        if path:
            store_cached(path, {"columns": columns, "bytes": sizes})
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
        try:
            with self._parquet(piece.file) as parquet:
                _require_columns(parquet.schema_arrow.names, columns)
                groups = range(parquet.num_row_groups) if piece.start is None else [piece.start]
                first = 0  # the group's first row
                for group in groups:
                    end = first + parquet.metadata.row_group(group).num_rows
                    try:
                        if row < end:
                            for values in self._group_rows(parquet, piece.file, group, row - first, step, columns):
                                yield row, values
                                row += step
                            if row < end:
                                raise ArrowException(f"it ends before row {row - first} of {end - first}")
                    except READ_ERRORS as error:
                        if row < end:
                            yield row, Broken(f"row group {group}: {short_reason(error)}")
                            row += -(-(end - row) // step) * step  # to the first wanted row of the next group
                    first = end
        except READ_ERRORS as error:
            yield row, Broken(short_reason(error))

    def _group_rows(
        self, parquet: pq.ParquetFile, file: File, group: int, row: int, step: int, columns: list[str]
    ) -> Iterator[list[Any] | Unreadable]:
        """Values of rows ``row, row + step, ...`` of a row group.

        Rows are picked from decoded batches as Python values. Arrow's own selection of rows has no kernel for some
        types (string_view), and it joins the selected rows into one array, which overflows at 2 GiB of text.
        """
        batches: Iterable[pa.RecordBatch]
        if step == 1:
            batches = self._batches(parquet, group, columns, PARQUET_BATCH)
        else:  # other streams share this row group: keep it decoded for those of this process
            key = (file, group)
            if key not in self._groups:
                meta = parquet.metadata.row_group(group)
                rows = SHARED_BATCH_BYTES * meta.num_rows // max(meta.total_byte_size, 1)
                rows = min(max(rows, PARQUET_BATCH), 2**12)
                self._groups[key] = list(self._batches(parquet, group, columns, rows))
            self._groups.move_to_end(key)
            batches = self._groups[key]
            kept = sum(batch.nbytes for group in self._groups.values() for batch in group)
            while len(self._groups) > 1 and kept > GROUPS_KEPT_BYTES:
                _, oldest = self._groups.popitem(last=False)
                kept -= sum(batch.nbytes for batch in oldest)
        for batch in batches:
            if row >= len(batch):
                row -= len(batch)
                continue
            by_column = [_values(batch.column(name), row, step) for name in columns]
            for values in zip(*by_column, strict=True):
                yield next((value for value in values if isinstance(value, Unreadable)), None) or list(values)
                row += step
            row -= len(batch)

    def _batches(self, parquet: pq.ParquetFile, group: int, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        """A row group in batches of about ``rows`` rows, or of more if its columns have large dictionaries.

        Every batch has a copy of the dictionaries, so batches are made at least as large as these; otherwise copying
        would take most of the time. The size of a dictionary is measured in a first batch: reading it from damaged
        column metadata in the footer can crash the process inside pyarrow.
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

    def _lines(self, file: File) -> Lines:
        handle = self.open(file)
        return GzipFile(fileobj=handle) if file.path.endswith(".gz") else handle


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
            pass  # convert one by one below, to learn which value fails
    return [_value(column, index) for index in range(row, len(column), step)]


def _value(column: pa.Array, index: int) -> Any:
    try:
        return column[index].as_py()
    except _VALUE_ERRORS as error:
        return Unreadable(short_reason(error))


def _parse_json(line: bytes) -> Any:
    # Not files.text.parse_json, which also walks through the value: this runs for every document.
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
    """The text of a plain text document, and null for all other columns."""
    if b"\0" in document:
        return Unreadable("it contains NUL bytes: it is binary, or text in UTF-16; text must be UTF-8")
    try:
        return [document.decode(), *[None] * (len(columns) - 1)]
    except UnicodeDecodeError as error:
        return Unreadable(str(error))


def _part_rows(
    lines: Lines, piece: Piece, row: int, step: int, columns: list[str], part: int
) -> Iterator[list[Any] | Unreadable]:
    """Values of rows ``row, row + step, ...`` of a segment of a text file that is one document."""
    first = (piece.start or 0) // part + row
    end = None if piece.end >= piece.file.size else piece.end // part
    for number, (content, more) in enumerate(read_parts(lines, first, end, part), first):
        if (number - first) % step:
            continue
        values = _decode(content if number else _without_mark(content), columns)
        if isinstance(values, list) and (number or more):
            # What follows in the stream after the last part of a segment is other text.
            values[0] = Part(values[0], more and number + 1 != end)
        yield values


def _filled_lines(lines: Lines, piece: Piece, longest: int) -> Iterator[bytes | Unreadable]:
    """The non-blank lines that start inside the piece (for a whole file: all)."""
    for position, line in _lines_from(lines, piece, longest):
        if piece.start is not None and position >= piece.end:
            return
        if isinstance(line, Unreadable) or line.strip():
            yield line


def _paragraphs(lines: Lines, piece: Piece, longest: int) -> Iterator[bytes | Unreadable]:
    """Runs of non-blank lines that start inside the piece; the last may continue beyond its end."""
    document: list[bytes] = []
    size = 0
    # Whether the lines are to be skipped: the first may belong to a document that starts before the piece.
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
                document, size, outside = [], 0, True  # skip its remaining lines
            elif isinstance(line, bytes):
                document.append(line)
        if not document and position >= piece.end:
            return
    if document:
        yield b"".join(document)


def _in_paragraph(lines: Lines, position: int) -> bool:
    """Whether the line that contains the byte before ``position`` has text."""
    if not position:
        return False
    begin = end = position - 1
    if begin < len(BOM_UTF8):
        lines.seek(0)
        if lines.read(len(BOM_UTF8)) == BOM_UTF8:
            begin, end = len(BOM_UTF8), 0
    # Forwards to the end of the line.
    lines.seek(begin)
    while part := lines.readline(LINE_BLOCK):
        if part.strip():
            return True
        if part.endswith(b"\n"):
            break
    # Backwards to its beginning, in blocks that double in size.
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


def _lines_from(lines: Lines, piece: Piece, longest: int) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Position and content of every line from the piece's start on, without a byte order mark of UTF-8.

    It continues beyond the piece's end, except after a line that was too long: no document can continue after it.

    Raises UnicodeError for a file that begins with the byte order mark of another encoding.
    """
    position = piece.start or 0
    end = sys.maxsize if piece.start is None else piece.end
    if position:  # a line that crosses the start belongs to the piece before
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
            del parts  # as large as the line
        if size > longest:
            yield position, _too_long(longest)
            size += 0 if ended else _pass_line(lines, end - position - size)
            if position + size >= end:
                return
        else:
            yield position, line if position else _without_mark(line)
        position += size


def _pass_line(lines: Lines, most: int) -> int:
    """Skip to the next line, or ``most`` bytes and a little more if it is farther away; return the bytes skipped.

    The limit is the end of the piece. Without it, each piece of a file that is one long line would read the rest of
    the file.
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
        f"it has more than {longest:,} bytes without an end; raise data.max_document_bytes if this is one document"
    )


def local_file(path: str) -> File:
    """A file on disk with its size; raises OSError if there is none."""
    return File(path, os.path.getsize(path))
