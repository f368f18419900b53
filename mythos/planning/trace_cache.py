"""A cache of traced steps: a trace takes a second, an estimate needs fifteen, and the same plan is often asked twice.

Results are kept in the process, and inside of :func:`kept_on_disk` in files, by the arguments, the source code of this
package, and the versions of Python and torch.
"""

import hashlib
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from mythos.data.json_cache import cache_root, digest, load_cached, store_cached

logger = logging.getLogger(__name__)

T = TypeVar("T")
PACKAGE = Path(__file__).parents[1]
_folder: Path | None = None


@contextmanager
def kept_on_disk(folder: Path | None = None) -> Iterator[None]:
    """Context in which results are read from and written to a folder (default: traces/ in $MYTHOS_CACHE)."""
    global _folder
    folder, before = folder or cache_folder(), _folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        logger.warning("$MYTHOS_CACHE: %s cannot be written, so the next plan traces its steps again", folder)
    _folder = folder if writable else None
    try:
        yield
    finally:
        _folder = before


def cache_folder() -> Path:
    """The folder of traces in the cache of this user."""
    return cache_root() / "traces"


def stored(decode: Callable[[Any], T]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Keep what a function returns on disk: a number or a dataclass, which `decode` builds from its JSON value.

    The `repr` of the arguments must name all that the result depends on.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @wraps(function)
        def call(*arguments: Any) -> T:
            if _folder is None:
                return function(*arguments)
            name = f"{function.__module__}.{function.__qualname__}"
            path = _folder / f"{digest([name, repr(arguments), *_versions()])}.json"
            value = load_cached(path)
            if value is not None:
                return decode(value)
            result = function(*arguments)
            value = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
            store_cached(path, value, "$MYTHOS_CACHE")
            return result

        return call

    return decorate


def remembered(decode: Callable[[Any], T]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """:func:`stored`, and kept in the process. The arguments must be hashable."""
    return lambda function: lru_cache(64)(stored(decode)(function))


@lru_cache(1)
def _versions() -> tuple[str, ...]:
    """All that a trace depends on beside its arguments: versions, the processor's features, and our source code."""
    source = hashlib.blake2b(digest_size=16)
    for file in sorted(PACKAGE.rglob("*.py")):
        source.update(file.read_bytes())
    features = sorted(map(str, torch.cpu.get_capabilities().items()))
    return torch.__version__, platform.python_version(), digest(features), source.hexdigest()
