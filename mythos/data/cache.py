"""What was found once and is kept as JSON: it can be made again, so neither damage nor a full disk ends a run."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def digest(value: Any) -> str:
    """128 bits of plain JSON data, hexadecimal."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def kept(path: Path) -> Any | None:
    """What was kept at a path; None where there is nothing, or something else than :func:`keep` wrote."""
    try:
        entry = json.loads(path.read_bytes())
        return entry["value"] if entry["digest"] == digest(entry["value"]) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def keep(path: Path, value: Any) -> None:
    """Keep plain JSON data with its digest, under its name only when it is whole."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({"digest": digest(value), "value": value}))
        aside.replace(path)
    except OSError as error:
        logger.warning("data.cache_dir: %s cannot be written and will be made again: %s", path, error)
        aside.unlink(missing_ok=True)
