"""Pre-tokenized documents: the format of folders of token shards, and their memory-mapped reader.

A folder contains ``index.json`` (see :class:`mythos.data.token_writer.TokenWriter`), ``tokenizer/`` and, for every part
(a range of consecutive shards of the corpus), three one-dimensional arrays:

- ``00000.tokens.npy``: uint16, or uint32 if an id needs it; documents back to back, each with its end-of-document
  token.
- ``00000.documents.npy``: an entry (``ENTRY``) for every row of the corpus, including rows without a document.
- ``00000.bytes.npy``: uint32, bytes of text of each token (end-of-document tokens have no entry), only for documents
  that may be held out for validation.

All arrays are little-endian and can be read by ``numpy.load(..., mmap_mode="r", allow_pickle=False)``.
"""

import json
import logging
import struct
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mythos.data.corpus import Skipped, holdout_limit, in_fixed_order, source_identity
from mythos.data.text_files import joined
from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError, short_reason
from mythos.files.local import open_regular, write_whole
from mythos.files.text import read_json

logger = logging.getLogger(__name__)

FORMAT = 1
INDEX = "index.json"
PLAN = "plan.json"
TOKENIZER = "tokenizer"
TOKENIZE = "`mythos tokenize`"

ENTRY = np.dtype(
    [
        ("start", "<u8"),  # first token in the part
        ("tokens", "<u4"),  # with the end-of-document token
        ("crc32", "<u4"),  # of the tokens as they are stored
        ("hash", "<u8"),  # content_hash; for rows lost to a break in the shard: the row of the break
        ("status", "u1"),  # 0 = a document, PART or LAST_PART = a part of one, else a value of STATUS
    ]
)
STATUS = {Skipped.FILTERED: 1, Skipped.DOCUMENT: 2, Skipped.SHARD: 3}
SKIPPED = {status: skipped for skipped, status in STATUS.items()}
PART = 4
"""Status of a part of a document that the next row continues; it has no end-of-document token."""
LAST_PART = 5
"""Status of the last part of a document, or of the last before unconnected text."""

# Rows and tokens copied out of the maps at once; then the maps are closed, because pages read through an open map count
# as memory of the process, although the system could reclaim them.
WINDOW_ROWS = 32
WINDOW_TOKENS = 2**16
# Array items per step of a checksum.
CHECKED_ITEMS = 2**16

MOST_INDEX_BYTES = 2**30
"""Largest index.json. A shard takes about 400 bytes, and a corpus may have 100,000 shards and more."""

# NumPy parses a header as Python, and tokenizes it if that fails.
HEADER_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    OverflowError,
    SyntaxError,
    RecursionError,
    MemoryError,
    struct.error,
    tokenize.TokenError,
)


class _Damaged(Exception):
    """A file of a folder is damaged; the message names the file and the damage."""


class Shard(NamedTuple):
    """A shard of the corpus, as index.json describes it.

    Attributes:
        name: its name in the corpus.
        part: number of its part.
        first_row: index of its first entry in the part's ``documents``.
        rows: number of entries there.
        crc32: checksum of these entries.
        first_size: index of its first entry in the part's ``bytes``.
        sizes: number of entries there.
        sizes_crc32: checksum of these entries.
        documents: number of rows with a document.
        tokens: number of tokens, end-of-document tokens included.
        skipped: numbers of skipped rows, by kind of :class:`mythos.data.corpus.Skipped`.
        size: the shard's size in the corpus, by which shards are dealt to streams.
        ordered: whether its rows are parts of one document.
    """

    name: str
    part: int
    first_row: int
    rows: int
    crc32: int
    first_size: int
    sizes: int
    sizes_crc32: int
    documents: int
    tokens: int
    skipped: dict[str, int]
    size: int
    ordered: bool = False


class TokenSource:
    """Documents of a folder of token shards: the same, in the same order, as when the text is tokenized on the fly.

    A document's checksum is verified when it is read, that of a shard's entries when the shard is first opened in a
    process. Memory does not grow with the corpus: maps are open only while a window of documents is copied.

    Args:
        directory: the folder.
        tokenizer: the run's.
        holdout_fraction: share of documents reserved for validation, by content hash.
        on_error: ``fail`` raises at damage; ``skip`` skips a document whose tokens are damaged, or a shard whose files
            cannot be read.

    Raises:
        MythosError: the folder is incomplete, of another format or another tokenizer, or the fraction exceeds the
            share for which the folder stores bytes.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, holdout_fraction: float, on_error: str) -> None:
        self.directory = Path(directory)
        self.on_error = on_error
        index = read_index(self.directory)
        if index["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            raise MythosError(
                f"tokenizer.name: {tokenizer.request['name']} is not what {self.directory} was tokenized with. "
                f"Set tokenizer.name: {self.directory / TOKENIZER}."
            )
        share = index["validation_share"]
        if holdout_fraction > share:
            raise MythosError(
                f"data.validation.fraction: {holdout_fraction:g} is more than {share:g}, the most that "
                f"{self.directory} can hold out. Set it to {share:g} or less, or tokenize the corpus into another "
                f"folder with --validation-share {holdout_fraction:g}."
            )
        self.identity = source_identity(index["corpus"], tokenizer.fingerprint, holdout_fraction)
        self._dtypes = {"tokens": np.dtype(index["dtype"]), "documents": ENTRY, "bytes": np.dtype("<u4")}
        self._index = [Shard(**shard) for shard in index["shards"]]
        self.shards = [shard.name for shard in self._index]
        self.sizes = [shard.size for shard in self._index]
        self.ordered = [shard.ordered for shard in self._index]
        self._eos = np.array([tokenizer.eos_id], np.int32)
        self._limit = holdout_limit(holdout_fraction)
        self._share_limit = holdout_limit(share)
        self._verified: set[tuple[str, int]] = set()
        self._warned: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process verifies and warns for itself."""
        return {**self.__dict__, "_verified": set(), "_warned": set()}

    def read(self, shard: int, row: int, step: int) -> Iterator[tuple[int, np.ndarray | Skipped]]:
        """Yield rows ``row, row + step, ...`` that are not held out: int32 ids with the end-of-document token.

        If the shard could not be read to its end when it was tokenized, a read beyond the last row reports the break
        too, as readers of most file formats do. Raises MythosError for damage with ``on_error: fail``; the message
        names the file and the shard.
        """
        rows = self._index[shard].rows
        reported = -1  # row of the last reported break: a break is reported once, however many rows it costs
        try:
            self._verify(shard, "documents")
            while row < rows:
                for status, key, ids in self._window(shard, row, step):
                    if status:
                        if status != STATUS[Skipped.SHARD] or key != reported:
                            yield row, SKIPPED[status]
                        reported = key if status == STATUS[Skipped.SHARD] else reported
                    elif ids is not None:
                        yield row, ids
                    row += step
            if self._index[shard].skipped.get(Skipped.SHARD.value):
                last = self._entries(shard, rows - 1, rows)[0]
                if last["status"] == STATUS[Skipped.SHARD] and last["hash"] != reported:
                    yield row, Skipped.SHARD
        except _Damaged as error:
            self._reject(shard, error)
            yield row, Skipped.SHARD

    def held_out(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield, for every held-out document, its ids (no end-of-document token) and the exact bytes of each.

        Raises MythosError as :meth:`read`.
        """
        if not self._limit:
            return
        for shard in in_fixed_order(len(self.shards)):
            try:
                yield from joined(self._held_out(shard))
            except _Damaged as error:
                self._reject(shard, error)

    def _held_out(self, shard: int) -> Iterator[tuple[int, bool, list[int], list[int]]]:
        """Row, whether the next row continues it, ids, and the bytes of each."""
        self._verify(shard, "documents")
        self._verify(shard, "bytes")
        part, rows, size = self._index[shard].part, self._index[shard].rows, self._index[shard].first_size
        for first in range(0, rows, CHECKED_ITEMS):
            entries = self._entries(shard, first, min(first + CHECKED_ITEMS, rows))
            with_sizes = np.isin(entries["status"], (0, PART, LAST_PART)) & (entries["hash"] < self._share_limit)
            for row in np.flatnonzero(with_sizes).tolist():
                entry = entries[row]
                continues = entry["status"] == PART
                count = int(entry["tokens"]) - (not continues)
                if entry["hash"] < self._limit:
                    ids = self._ids(shard, self._map(part, "tokens"), entry)
                    if ids is not None:
                        sizes = self._copy(part, "bytes", size, size + count).tolist()
                        yield first + row, bool(continues), ids[:count].tolist(), sizes
                size += count

    def _window(self, shard: int, row: int, step: int) -> Iterator[tuple[int, int, np.ndarray | None]]:
        """Status, hash and ids (None: held out, or no document) of the next rows of the walk."""
        part, rows = self._index[shard].part, self._index[shard].rows
        entries = self._entries(shard, row, min(rows, row + WINDOW_ROWS * step), step)
        tokens = self._map(part, "tokens")
        window: list[tuple[int, int, np.ndarray | None]] = []
        taken = 0
        for entry in entries:
            status, key = int(entry["status"]), int(entry["hash"])
            ids = None
            if status in (PART, LAST_PART):
                status, ids = 0, self._eos if key < self._limit else None
            if not status and key >= self._limit:
                ids = self._ids(shard, tokens, entry)
                status = STATUS[Skipped.DOCUMENT] if ids is None else 0
                taken += int(entry["tokens"])
            window.append((status, key, ids))
            if taken >= WINDOW_TOKENS:
                break
        return iter(window)

    def _ids(self, shard: int, tokens: np.ndarray, entry: np.void) -> np.ndarray | None:
        """A document's int32 ids; None, after a warning, if they are damaged and ``on_error`` is ``skip``."""
        start = int(entry["start"])
        stored = tokens[start : start + int(entry["tokens"])]
        if zlib.crc32(stored.data) == entry["crc32"]:
            return stored.astype(np.int32)
        self._reject(shard, _Damaged(f"{self._path(shard, 'tokens')}: checksum differs at token {start}"))
        return None

    def _verify(self, shard: int, kind: str) -> None:
        """Verify a checksum of the shard, once per process; raises _Damaged if it differs."""
        if (kind, shard) in self._verified:
            return
        entry = self._index[shard]
        first, count, expected = (
            (entry.first_row, entry.rows, entry.crc32)
            if kind == "documents"
            else (entry.first_size, entry.sizes, entry.sizes_crc32)
        )
        crc32 = 0
        for start in range(first, first + count, CHECKED_ITEMS):
            items = self._copy(entry.part, kind, start, min(start + CHECKED_ITEMS, first + count))
            crc32 = zlib.crc32(items.data, crc32)
        if crc32 != expected:
            raise _Damaged(f"{self._path(shard, kind)}: checksum differs")
        self._verified.add((kind, shard))

    def _entries(self, shard: int, first: int, stop: int, step: int = 1) -> np.ndarray:
        offset = self._index[shard].first_row
        return self._copy(self._index[shard].part, "documents", offset + first, offset + stop, step)

    def _copy(self, part: int, kind: str, first: int, stop: int, step: int = 1) -> np.ndarray:
        return np.array(self._map(part, kind)[first:stop:step])

    def _map(self, part: int, kind: str) -> np.ndarray:
        path = array_path(self.directory, part, kind)
        try:
            open_regular(path).close()  # refuses a FIFO, for which NumPy would wait
            # Not numpy.load, which also opens archives and pickles, recognized by their first bytes.
            array = np.lib.format.open_memmap(path, mode="r")
        except HEADER_ERRORS as error:
            raise _Damaged(f"{path}: {short_reason(error)}") from error
        if array.dtype != self._dtypes[kind] or array.ndim != 1:
            raise _Damaged(f"{path}: contains {array.ndim}-dimensional {array.dtype}")
        return array

    def _path(self, shard: int, kind: str) -> Path:
        return array_path(self.directory, self._index[shard].part, kind)

    def _reject(self, shard: int, error: _Damaged) -> None:
        where = f"data: {error} (shard {self.shards[shard]})"
        if self.on_error == "fail":
            files = self.directory / f"{self._index[shard].part:05}.*"
            raise MythosError(
                f"{where}. Remove {files} and run {TOKENIZE} as before to write these files again, or set "
                "data.on_error: skip to skip damaged documents."
            ) from error
        if shard not in self._warned:
            self._warned.add(shard)
            logger.warning("%s; damaged documents of this shard are skipped", where)


def read_header(directory: Path) -> dict[str, Any] | None:
    """The index of a complete folder, or the plan of an incomplete one; None for a folder with neither.

    Raises MythosError if it is damaged, or of another format.
    """
    for name in (INDEX, PLAN):
        if (directory / name).exists():
            return read_checked(directory / name)
    return None


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a complete folder. Raises MythosError if there is none, or it is damaged or of another format."""
    if not directory.is_dir():
        raise MythosError(f"data.path: there is no folder {directory}. Give one that {TOKENIZE} wrote.")
    header = read_header(directory)
    if header is None:
        raise MythosError(f"data.path: {directory} has no {INDEX}. Give a folder that {TOKENIZE} wrote.")
    if not (directory / INDEX).exists():
        raise MythosError(
            f"data.path: {directory} is not complete: it has no {INDEX}. Run {TOKENIZE} as before; it continues where "
            "it was interrupted."
        )
    return header


def read_checked(path: Path) -> dict[str, Any]:
    """Read a mapping that :func:`write_checked` wrote; raises MythosError if it is damaged, or of another format."""
    try:
        value = read_json(path, MOST_INDEX_BYTES)
        if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
            raise MythosError(
                f"{path} has format {value['format']}, this version reads {FORMAT}. Tokenize the corpus again with "
                f"{TOKENIZE}."
            )
        if not isinstance(value, dict) or value.pop("crc32", None) != _checksum(value):
            raise ValueError("checksum differs")
    except (OSError, ValueError) as error:
        raise MythosError(
            f"{path} cannot be read: {short_reason(error)}. Restore it, or tokenize the corpus again with {TOKENIZE}."
        ) from error
    return value


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """Write a mapping with its checksum, atomically; raises OSError."""
    write_whole(path, json.dumps({**value, "crc32": _checksum(value)}, indent=1) + "\n", unique=True)


def _checksum(value: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(value).encode())


def array_path(directory: Path, part: int, kind: str) -> Path:
    """The file of a part's ``tokens``, ``documents`` or ``bytes``."""
    return directory / f"{part:05}.{kind}.npy"
