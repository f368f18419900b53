"""Small files of text and JSON that anybody may have written or damaged: read whole, within limits."""

import json
from pathlib import Path
from typing import Any

from mythos.files.local import open_regular

MOST_BYTES = 64 * 2**20
"""Of a file that is read whole. The largest that this project writes, an index of all tensors, takes some MB."""
MOST_NESTED = 64
"""Levels of lists and mappings in each other. Ours have 6; what walks through them recurses."""


def read_bytes(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """A regular file whole.

    Raises OSError as `open_regular`, ValueError for a file of more than `most` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def read_text(path: Path | str, most: int = MOST_BYTES) -> str:
    """A file of UTF-8 without its byte order mark, which some editors put in front. Raises as `read_bytes`."""
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: Path | str) -> Any:
    """The value in a JSON file. Raises as `read_bytes`, and ValueError for anything else than JSON."""
    return parse_json(read_bytes(path))


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text, in UTF-8 with or without a byte order mark.

    Raises ValueError for anything else, and for values nested in each other more than 64 deep.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_NESTED:
            raise ValueError("it is nested too deeply")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return value


def unusable_text(value: Any) -> bool:
    """Whether a text in a value, or in the lists and mappings in it, can be neither a name nor written as UTF-8."""
    if isinstance(value, str):
        return "\0" in value or any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(unusable_text(part) for item in value.items() for part in item)
    return isinstance(value, list | tuple) and any(map(unusable_text, value))
