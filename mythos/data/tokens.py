"""Documents tokenized ahead of training: folders of memory-mapped token shards, and how they are read.

A folder holds ``index.json`` (see :class:`mythos.data.token_writer.TokenWriter`), ``tokenizer/`` and, for every part
(consecutive shards of the corpus), three one-dimensional arrays:

- ``00000.tokens.npy``: uint16, or uint32 where ids need it; documents back to back, each with its end-of-document
  token.
- ``00000.documents.npy``: an entry (``ENTRY``) for every row of the corpus, those without a document included.
- ``00000.bytes.npy``: uint32, how many bytes of text each token stands for, end-of-document tokens left out; of the
  documents that may be held out for validation.

Everything is little-endian and can be read by ``numpy.load(..., mmap_mode="r", allow_pickle=False)``.
"""

import json
import logging
import os
import struct
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mythos.data.corpus import Skipped, holdout_limit, in_fixed_order, source_identity
from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError, short_reason
from mythos.files.local import open_regular, read_regular

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
        ("hash", "<u8"),  # content_hash; after a break in the shard: the row that it broke at
        ("status", "u1"),  # 0 = a document, else a value of STATUS
    ]
)
STATUS = {Skipped.FILTERED: 1, Skipped.DOCUMENT: 2, Skipped.SHARD: 3}
SKIPPED = {status: skipped for skipped, status in STATUS.items()}

# What is copied out of the maps at once. They are closed after it: pages that were read through an open map count as
# memory of the process, although the system can take them back.
WINDOW_ROWS = 32
WINDOW_TOKENS = 2**16
CHECKED_ITEMS = 2**16


# NumPy parses a header as Python, and tokenizes it where that fails.
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
    """Names a file of a folder and what is wrong with it."""


class Shard(NamedTuple):
    """A shard of the corpus in a part.

    Attributes:
        name: what the corpus calls it.
        part: number of the part.
        first_row: first entry in the part's ``documents``.
        rows: number of entries.
        crc32: of the entries.
        first_size: first entry in the part's ``bytes``.
        sizes: number of entries there.
        sizes_crc32: of the entries there.
        documents: rows with a document.
        tokens: with end-of-document tokens.
        skipped: what was left out, by kind of :class:`mythos.data.corpus.Skipped`.
        size: that of the corpus, by which shards are dealt to streams.
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


class TokenSource:
    """Documents of a folder of token shards, the same in the same order as from the text that they were made of.

    A document's checksum is compared when it is read, that of a shard's entries when the shard is first opened in a
    process. Memory does not grow with the corpus: maps are open only while a window of documents is copied.

    Args:
        directory: the folder.
        tokenizer: the run's.
        holdout_fraction: share of documents left to validation, by content hash.
        on_error: ``fail`` raises at damage; ``skip`` leaves out a document whose tokens are damaged, or a shard whose
            files cannot be read.

    Raises:
        MythosError: no complete folder of this format, another tokenizer, or a fraction above what the folder keeps.
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
        self._limit = holdout_limit(holdout_fraction)
        self._share_limit = holdout_limit(share)
        self._verified: set[tuple[str, int]] = set()
        self._warned: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process verifies and warns for itself."""
        return {**self.__dict__, "_verified": set(), "_warned": set()}

    def read(self, shard: int, row: int, step: int) -> Iterator[tuple[int, np.ndarray | Skipped]]:
        """Yield rows ``row, row + step, ...`` that are not held out: int32 ids with the end-of-document token.

        A shard that broke off when it was tokenized goes on breaking off behind its last row, as most kinds of file do.

        Raises:
            MythosError: with ``on_error: fail``, damage; the message names the file and the shard.
        """
        rows = self._index[shard].rows
        told = -1  # the row of the break that was yielded last
        try:
            self._verify(shard, "documents")
            while row < rows:
                for status, key, ids in self._window(shard, row, step):
                    if status:
                        if status != STATUS[Skipped.SHARD] or key != told:
                            yield row, SKIPPED[status]
                        told = key if status == STATUS[Skipped.SHARD] else told
                    elif ids is not None:
                        yield row, ids
                    row += step
            if self._index[shard].skipped.get(Skipped.SHARD.value):
                last = self._entries(shard, rows - 1, rows)[0]
                if last["status"] == STATUS[Skipped.SHARD] and last["hash"] != told:
                    yield row, Skipped.SHARD
        except _Damaged as error:
            self._reject(shard, error)
            yield row, Skipped.SHARD

    def held_out(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the ids (without end-of-document token) and their exact bytes of text, of every held-out document.

        Raises:
            MythosError: as :meth:`read`.
        """
        if not self._limit:
            return
        for shard in in_fixed_order(len(self.shards)):
            try:
                yield from self._held_out(shard)
            except _Damaged as error:
                self._reject(shard, error)

    def _held_out(self, shard: int) -> Iterator[tuple[list[int], list[int]]]:
        self._verify(shard, "documents")
        self._verify(shard, "bytes")
        part, rows, size = self._index[shard].part, self._index[shard].rows, self._index[shard].first_size
        for first in range(0, rows, CHECKED_ITEMS):
            entries = self._entries(shard, first, min(first + CHECKED_ITEMS, rows))
            with_sizes = (entries["status"] == 0) & (entries["hash"] < self._share_limit)
            for entry in entries[with_sizes]:
                count = int(entry["tokens"]) - 1
                if entry["hash"] < self._limit:
                    ids = self._ids(shard, self._map(part, "tokens"), entry)
                    if ids is not None:
                        yield ids[:-1].tolist(), self._copy(part, "bytes", size, size + count).tolist()
                size += count

    def _window(self, shard: int, row: int, step: int) -> Iterator[tuple[int, int, np.ndarray | None]]:
        """Status, hash and ids (None: held out, or no document) of the next wanted rows."""
        part, rows = self._index[shard].part, self._index[shard].rows
        entries = self._entries(shard, row, min(rows, row + WINDOW_ROWS * step), step)
        tokens = self._map(part, "tokens")
        window: list[tuple[int, int, np.ndarray | None]] = []
        taken = 0
        for entry in entries:
            status, key = int(entry["status"]), int(entry["hash"])
            ids = None
            if not status and key >= self._limit:
                ids = self._ids(shard, tokens, entry)
                status = STATUS[Skipped.DOCUMENT] if ids is None else 0
                taken += int(entry["tokens"])
            window.append((status, key, ids))
            if taken >= WINDOW_TOKENS:
                break
        return iter(window)

    def _ids(self, shard: int, tokens: np.ndarray, entry: np.void) -> np.ndarray | None:
        """A document's int32 ids; None, after a warning, if they are damaged and documents may be left out."""
        start = int(entry["start"])
        stored = tokens[start : start + int(entry["tokens"])]
        if zlib.crc32(stored) == entry["crc32"]:
            return stored.astype(np.int32)
        self._reject(shard, _Damaged(f"{self._path(shard, 'tokens')}: checksum differs at token {start}"))
        return None

    def _verify(self, shard: int, kind: str) -> None:
        """Compare a checksum of the shard once; raises _Damaged if it differs."""
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
            crc32 = zlib.crc32(self._copy(entry.part, kind, start, min(start + CHECKED_ITEMS, first + count)), crc32)
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
            open_regular(path).close()  # NumPy would wait for a FIFO
            # Not numpy.load, which also opens archives and pickles, by their first bytes.
            array = np.lib.format.open_memmap(path, mode="r")
        except HEADER_ERRORS as error:
            raise _Damaged(f"{path}: {short_reason(error)}") from error
        if array.dtype != self._dtypes[kind] or array.ndim != 1:
            raise _Damaged(f"{path}: holds {array.ndim}-dimensional {array.dtype}")
        return array

    def _path(self, shard: int, kind: str) -> Path:
        return array_path(self.directory, self._index[shard].part, kind)

    def _reject(self, shard: int, error: _Damaged) -> None:
        where = f"data: {error} (shard {self.shards[shard]})"
        if self.on_error == "fail":
            files = self.directory / f"{self._index[shard].part:05}.*"
            raise MythosError(
                f"{where}. Remove {files} and run {TOKENIZE} as before to write these files again, or set "
                "data.on_error: skip to leave out what is damaged."
            ) from error
        if shard not in self._warned:
            self._warned.add(shard)
            logger.warning("%s; what is damaged of this shard is left out", where)


def read_header(directory: Path) -> dict[str, Any] | None:
    """What a folder is, or will be when it is complete; None for one that is not begun.

    Raises:
        MythosError: it is damaged, or of another format.
    """
    for name in (INDEX, PLAN):
        if (directory / name).exists():
            return read_json(directory / name)
    return None


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a complete folder.

    Raises:
        MythosError: there is none, or it is damaged or of another format.
    """
    if not directory.is_dir():
        raise MythosError(f"data.path: there is no folder {directory}. Give one that {TOKENIZE} wrote.")
    header = read_header(directory)
    if header is None:
        raise MythosError(f"data.path: {directory} has no {INDEX}. Give a folder that {TOKENIZE} wrote.")
    if not (directory / INDEX).exists():
        raise MythosError(
            f"data.path: {directory} is not complete: it has no {INDEX}. Run {TOKENIZE} as before; it goes on where it "
            "was interrupted."
        )
    return header


def read_json(path: Path) -> dict[str, Any]:
    """A mapping that :func:`write_json` wrote; raises MythosError if it is another, or of another format."""
    try:
        value = json.loads(read_regular(path))
        if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
            raise MythosError(
                f"{path} has format {value['format']}, this version reads {FORMAT}. Tokenize the corpus again with "
                f"{TOKENIZE}."
            )
        if not isinstance(value, dict) or value.pop("crc32", None) != _checksum(value):
            raise ValueError("checksum differs")
    except (OSError, ValueError, RecursionError) as error:
        raise MythosError(
            f"{path} cannot be read: {short_reason(error)}. Restore it, or tokenize the corpus again with {TOKENIZE}."
        ) from error
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a mapping with its checksum, under its name only when it is whole; raises OSError."""
    temporary = aside(path)
    try:
        temporary.write_text(json.dumps({**value, "crc32": _checksum(value)}, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(value: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(value).encode())


def array_path(directory: Path, part: int, kind: str) -> Path:
    """The file of a part's ``tokens``, ``documents`` or ``bytes``."""
    return directory / f"{part:05}.{kind}.npy"


def aside(path: Path) -> Path:
    """Where this process writes what will be ``path``."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
