"""A cache of plain JSON values in files. They can be computed again, so neither damage nor a full disk ends a run."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from mythos.files.local import write_whole
from mythos.files.text import read_json

logger = logging.getLogger(__name__)

MOST_BYTES = 2**30
"""Largest entry: the list of a dataset's files takes about 100 bytes a file."""


def cache_root(chosen: str | None = None) -> Path:
    """The folder of this user's caches: `chosen` (data.cache_dir), $MYTHOS_CACHE, or ~/.cache/mythos."""
    return Path(chosen or os.environ.get("MYTHOS_CACHE") or "~/.cache/mythos").expanduser()


def digest(value: Any) -> str:
    """A hash of plain JSON data: 128 bits, hexadecimal."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def load_cached(path: Path) -> Any | None:
    """The value stored at a path; None if there is nothing, or anything but an entry of :func:`store_cached`."""
    try:
        entry = read_json(path, MOST_BYTES)
        return entry["value"] if entry["digest"] == digest(entry["value"]) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def store_cached(path: Path, value: Any, setting: str = "data.cache_dir") -> None:
    """Store plain JSON data with its digest, atomically. Warns if the file cannot be written.

    `setting` names what chose the folder, for the warning.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"digest": digest(value), "value": value}), unique=True)
    except OSError as error:
        logger.warning("%s: %s cannot be written and will be computed again: %s", setting, path, error)
