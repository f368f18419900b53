"""A cache of traced steps: a trace takes a second, an estimate needs ten, and the same plan is often asked twice.

Results are kept in the process, and inside of :func:`kept_on_disk` in files, by the arguments, the source code of this
package, and the versions of Python and torch. For some presets and configurations traces.json has the results. They are
used only for the source code and the release of torch that they were traced with.
"""

import hashlib
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import lru_cache, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from mythos.data.json_cache import MOST_BYTES, cache_root, digest, load_cached, store_cached
from mythos.files.text import read_json
from mythos.model.ops.device_choice import float32_by_onednn

logger = logging.getLogger(__name__)

T = TypeVar("T")
PACKAGE = Path(__file__).parents[1]
SHIPPED = Path(__file__).with_name("traces.json")
"""Results that come with the package; `scripts/trace_presets.py` writes it."""
TRACED_CODE = (
    "model",
    "distributed/layout.py",
    "distributed/parallel.py",
    "planning/expert_rows.py",
    "planning/fake_step.py",
    "planning/memory.py",
    "planning/traffic.py",
    "torch_internals.py",
)
"""Files and folders of the package that decide what a trace counts."""
_folder: Path | None = None
_recorded: dict[str, Any] | None = None


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


@contextmanager
def recorded(known: Mapping[str, Any] = MappingProxyType({})) -> Iterator[dict[str, Any]]:
    """Context that collects, by :func:`shipped_key`, the results of functions that are :func:`remembered`.

    They are computed anew, except those in `known` and those that the process has already computed.
    """
    global _recorded
    _recorded = dict(known)
    try:
        yield _recorded
    finally:
        _recorded = None


def stored(decode: Callable[[Any], T], shipped: bool = False) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Keep what a function returns on disk: a number or a dataclass, which `decode` builds from its JSON value.

    The `repr` of the arguments must name all that the result depends on. With `shipped`, results that come with the
    package are used.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @wraps(function)
        def call(*arguments: Any) -> T:
            name = f"{function.__module__}.{function.__qualname__}"
            if _recorded is not None and shipped:
                key = shipped_key(name, arguments)
                if key not in _recorded:
                    _recorded[key] = json_value(function(*arguments))
                return decode(_recorded[key])
            if _folder is None:
                return function(*arguments)
            value = shipped_values().get(shipped_key(name, arguments)) if shipped else None
            if value is not None:
                return decode(value)
            path = _folder / f"{digest([name, repr(arguments), *_versions()])}.json"
            value = load_cached(path)
            if value is not None:
                return decode(value)
            result = function(*arguments)
            store_cached(path, json_value(result), "$MYTHOS_CACHE")
            return result

        return call

    return decorate


def remembered(decode: Callable[[Any], T]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """:func:`stored`, kept in the process, and shipped for presets. The arguments must be hashable."""
    return lambda function: lru_cache(64)(stored(decode, shipped=True)(function))


def json_value(result: Any) -> Any:
    """A number, or a dataclass as a dictionary."""
    return asdict(result) if is_dataclass(result) and not isinstance(result, type) else result


def shipped_key(name: str, arguments: tuple[Any, ...]) -> str:
    """Key of a result in traces.json: the function, its arguments, and the choice that depends on the processor."""
    return digest([name, repr(arguments), float32_by_onednn(torch.device("cpu"), torch.float32)])


@lru_cache(1)
def shipped_values() -> dict[str, Any]:
    """The shipped results; none if they are of other code or of another release of torch."""
    try:
        entry = read_json(SHIPPED, MOST_BYTES)
        return dict(entry["values"]) if entry["made_with"] == made_with() else {}
    except (OSError, ValueError, TypeError, LookupError):  # damaged: steps are traced
        return {}


def made_with() -> dict[str, str]:
    """What shipped results depend on beside their arguments: the release of torch, and the code that is traced."""
    files = [file for name in TRACED_CODE for file in [PACKAGE / name, *sorted((PACKAGE / name).rglob("*.py"))]]
    return {"torch": ".".join(torch.__version__.split(".")[:2]), "code": _digest_of_files(files)}


def _digest_of_files(files: Iterable[Path]) -> str:
    """One digest of the content of all files; folders are skipped."""
    content = hashlib.blake2b(digest_size=16)
    for file in files:
        if file.is_file():
            content.update(file.read_bytes())
    return content.hexdigest()


@lru_cache(1)
def _versions() -> tuple[str, ...]:
    """All that a trace depends on beside its arguments: versions, the processor's features, and our source code."""
    features = sorted(map(str, torch.cpu.get_capabilities().items()))
    source = _digest_of_files(sorted(PACKAGE.rglob("*.py")))
    return torch.__version__, platform.python_version(), digest(features), source
