"""Plain text files read as one document each, in parts of bounded size; any part can be read without those before it.

A file of S bytes has ``max(1, S // part)`` parts. Part k begins at the first suitable place at or after byte
``k * part``: after a blank line, else at the beginning of a line, else at a space, else at any character. This place is
at most half a part away, so no part is empty and none has more than two and a half times ``part`` bytes.
"""

import re
from collections.abc import Iterable, Iterator
from gzip import GzipFile
from typing import IO, NamedTuple

TEXT_EXTENSIONS = (".txt", ".txt.gz")

# A share of the parts is held out for validation. About 1,000 parts make this share close to the requested one in a
# corpus of one book, too. A part has at least a few sentences, and is tokenized by one call.
WANTED_PARTS = 1024
LEAST_PART = 512
MOST_PART = 2**16

# The longest run of consecutive text in a stream, about 4 million tokens.
MOST_SEGMENT = 2**24

_BREAKS = [re.compile(pattern) for pattern in (rb"\n[ \t\r]*\n(?=\S)", rb"\n(?=\S)", rb"\n", rb"(?=[ \t])")]


class Part(str):
    """The text of a part of a document that has several.

    Attributes:
        continues: whether the next row of the shard continues it.
    """

    continues: bool

    def __new__(cls, text: str, continues: bool) -> "Part":
        """A part with this text."""
        part = super().__new__(cls, text)
        part.continues = continues
        return part


class Cuts(NamedTuple):
    """How long files are cut: bytes of a part (a row) and of a segment (a shard: consecutive parts)."""

    part: int
    segment: int


def is_text(path: str) -> bool:
    """Whether a file is plain text, packed or not."""
    return path.endswith(TEXT_EXTENSIONS)


def choose_cuts(text_bytes: int, total_bytes: int, shards: int | None, piece: int) -> Cuts:
    """Choose how the text files of a corpus are cut.

    Args:
        text_bytes: size of its plain text files.
        total_bytes: size of all of its files.
        shards: shards needed to balance the streams; None if no streams read it.
        piece: bytes of a segment if no streams read it.
    """
    part = min(max(text_bytes // max(WANTED_PARTS, 4 * (shards or 0)), LEAST_PART), MOST_PART)
    # Half the largest shard with which streams can be balanced, because the last segment of a file may be longer.
    segment = piece if shards is None else min(total_bytes // (2 * shards), MOST_SEGMENT)
    return Cuts(part, max(segment, part))


def segments(size: int, cuts: Cuts) -> list[tuple[int, int]]:
    """Nominal byte ranges of a file's segments, equally long to within a part; all but the last end are part bounds."""
    parts = max(1, size // cuts.part)
    count = -(-parts // max(1, cuts.segment // cuts.part))
    starts = [index * parts // count * cuts.part for index in range(count)]
    return list(zip(starts, [*starts[1:], size], strict=True))


def read_parts(file: IO[bytes] | GzipFile, row: int, end: int | None, part: int) -> Iterator[tuple[bytes, bool]]:
    """Yield parts ``row`` to ``end - 1`` (None: to the last) of a file, and whether it has more after each."""
    begin = max(row * part - 1, 0)  # one byte before, which may be the end of a line
    file.seek(begin)
    text = _Buffer(file, begin)
    if not text.reaches(max(row, 1) * part + part * (row > 0)) and (row or not text.data):
        return
    text.drop(text.cut(row * part, part) if row else 0)
    while end is None or row < end:
        row += 1
        more = text.reaches((row + 1) * part)
        stop = text.cut(row * part, part) if more else len(text.data)
        yield text.data[:stop], more
        if not more:
            return
        text.drop(stop)


class _Buffer:
    """The bytes of a file from a position on that have been read so far."""

    def __init__(self, file: IO[bytes] | GzipFile, position: int) -> None:
        self.file = file
        self.position = position
        self.data = b""

    def reaches(self, end: int) -> bool:
        """Read up to a position of the file; False if it ends before."""
        blocks, missing = [self.data], end - self.position - len(self.data)
        while missing > 0 and (block := self.file.read(missing)):
            blocks.append(block)
            missing -= len(block)
        self.data = b"".join(blocks)
        return missing <= 0

    def drop(self, count: int) -> None:
        self.data = self.data[count:]
        self.position += count

    def cut(self, start: int, part: int) -> int:
        """Where in the data the part begins whose nominal first byte is ``start``."""
        start -= self.position
        window = self.data[start - 1 : start + part // 2]
        for pattern in _BREAKS:
            if match := pattern.search(window, 0 if pattern.pattern.startswith(b"\\n") else 1):
                return start - 1 + match.end()
        # The first byte that does not continue a character of UTF-8.
        return start + next((place for place, byte in enumerate(window[1:]) if byte & 0xC0 != 0x80), 0)


Tokens = tuple[list[int], list[int]]
"""Ids, and the bytes of each."""


def joined(parts: Iterable[tuple[int, bool, list[int], list[int]]]) -> Iterator[Tokens]:
    """Join tokens of consecutive rows that are parts of one document.

    `parts` have row number, whether the next row continues the document, ids, and the bytes of each.
    """
    ids: list[int] = []
    sizes: list[int] = []
    following: int | None = None  # the row that would continue what is collected
    for row, continues, more_ids, more_sizes in parts:
        if following is not None and row != following:
            yield ids, sizes
            ids, sizes = [], []
        ids, sizes = [*ids, *more_ids], [*sizes, *more_sizes]
        following = row + 1 if continues else None
        if not continues:
            yield ids, sizes
            ids, sizes = [], []
    if following is not None:
        yield ids, sizes
