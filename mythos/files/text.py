"""Read small text and JSON files that anybody may have written or damaged, within limits of size and depth."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mythos.files.local import open_regular

T = TypeVar("T")

MOST_BYTES = 64 * 2**20
"""Largest file that is read whole. The largest that this project writes, an index of all tensors, has a few MB."""
MOST_NESTED = 64
"""Deepest nesting of lists and mappings. Ours have 6 levels; functions that walk through values recurse."""


def read_bytes(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """Read a whole regular file.

    Raises:
        OSError: as `open_regular`.
        ValueError: the file has more than `most` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def read_text(path: Path | str, most: int = MOST_BYTES) -> str:
    """Read a file of UTF-8, without the byte order mark that some editors write. Raises as `read_bytes`."""
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: Path | str, most: int = MOST_BYTES) -> Any:
    """Read the value in a JSON file. Raises as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, most))


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text; bytes are UTF-8 with or without a byte order mark.

    Raises ValueError if it is not JSON, or is nested more than 64 levels deep.
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


def from_plain(kind: type[T], values: Any) -> T:
    """Build a dataclass, which may contain others, from plain values that were read as JSON.

    Raises ValueError that names the first value of another type than its field's, and for numbers that are not finite
    or exceed 64 bits.
    """
    if any(type(value) is int and abs(value) >= 2**63 for value in _leaves(values)):
        raise ValueError("a whole number has more than 64 bits")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values, allow_nan=False), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _leaves(value: Any) -> Iterator[Any]:
    """The values in lists and mappings."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def unusable_text(value: Any) -> bool:
    """Whether a string in a value, or in its lists and mappings, has a NUL or a surrogate.

    Such strings can neither name a file nor be written as UTF-8.
    """
    if isinstance(value, str):
        return "\0" in value or any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(unusable_text(part) for item in value.items() for part in item)
    return isinstance(value, list | tuple) and any(map(unusable_text, value))
