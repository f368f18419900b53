"""Ownership of a directory of checkpoints: only one run saves there, resumes from them and deletes them."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mythos.distributed.run_lock import LOCK_FILE, RunLock
from mythos.errors import MythosError
from mythos.files.storage import LocalStorage, Origin, RemoteStorage, Storage
from mythos.files.text import parse_json, read_json

LOCK = ".checkpoints.lock"
"""Lock file in a directory of checkpoints, while a run saves there."""


@dataclass(frozen=True)
class Run:
    """The mark of a run in its checkpoints."""

    id: str
    """Random, drawn when the run begins, and stored in the lock file of its directory."""
    name: str
    directory: str
    """The run directory, absolute and without links."""


@contextlib.contextmanager
def claimed(storage: Storage, run: Run, begun: bool) -> Iterator[Run]:
    """Reserve a directory of checkpoints for one run within a with block. Called by one process of the run.

    Yields the run with the id that its checkpoints there have. `begun` says whether the id is from an earlier start. If
    not, because the run's directory was lost or is older than ids, the id of its checkpoints is used. From then on
    `storage` deletes checkpoints of this run only.

    Raises MythosError while another job saves there, and for another run's checkpoints.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(storage, LocalStorage):
            stack.enter_context(RunLock(storage.root, file=LOCK, options="checkpoint.dir", temporary=True))
        run = _owner(storage, run, begun)
        if isinstance(storage, RemoteStorage):
            stack.enter_context(_remote_lock(storage, run))
        storage.owned = lambda origin: _is_of(origin, run, storage)
        yield run


def _owner(storage: Storage, run: Run, begun: bool) -> Run:
    """The run with the id in its checkpoints. Raises MythosError if there are checkpoints and all are another run's."""
    others = []
    for name in reversed(storage.complete()):
        origin = storage.origin(name)
        if origin is None:
            continue
        directory = _directory(origin)
        if _is_of(origin, run, storage) and not _is_copy(origin, run, storage):
            return run
        mine = directory == run.directory or (not begun and _inside(storage, run))
        if mine and len(origin.runs) == 1:
            return replace(run, id=next(iter(origin.runs)))
        # Links do not count, and unreadable checkpoints are reported as damaged when they are verified.
        if storage.is_directory(name) and (origin.runs or directory):
            others.append((name, origin))
    if others:
        raise MythosError(_refusal(storage, *others[0]))
    return run


def _is_of(origin: Origin, run: Run, storage: Storage) -> bool:
    """Whether a checkpoint is a run's: by its id, or if it is older than ids, by the directory in its configuration."""
    if origin.runs:
        return run.id in origin.runs
    return _inside(storage, run) or _directory(origin) == run.directory


def _is_copy(origin: Origin, run: Run, storage: Storage) -> bool:
    """Whether the run's directory is a copy, with the id, of one that still exists and saves to the same directory."""
    directory = _directory(origin)
    if directory is None or directory == run.directory or _inside(storage, run):
        return False
    try:
        return read_json(Path(directory) / LOCK_FILE).get("run") == run.id
    except (OSError, ValueError, AttributeError):
        return False


def _directory(origin: Origin) -> str | None:
    """The run directory in a checkpoint's meta.json, absolute; None if it has none."""
    run = origin.meta.get("run")
    if isinstance(run, dict) and isinstance(run.get("directory"), str):
        return run["directory"]
    config = origin.meta.get("config")
    section = config.get("run") if isinstance(config, dict) else None
    if not isinstance(section, dict):
        return None
    return os.path.realpath(str(section.get("dir") or f"runs/{section.get('name')}").replace("\0", ""))


def _inside(storage: Storage, run: Run) -> bool:
    """Whether the checkpoints are in the run's own directory, the default."""
    if not isinstance(storage, LocalStorage):
        return False
    return Path(os.path.realpath(storage.root)).is_relative_to(run.directory)


def _refusal(storage: Storage, name: str, origin: Origin) -> str:
    """The error about another run's checkpoint `name`, the newest there."""
    run = origin.meta.get("run")
    directory = _directory(origin)
    owner = f"the run {run['name']} in {directory}" if isinstance(run, dict) and "name" in run else f"{directory}"
    place = str(storage.address(name)).rstrip("/").rpartition("/")[0]
    newest = storage.address(name)
    return (
        f"checkpoint.dir: {place} contains the checkpoints of another run, {owner}. Set checkpoint.dir to a directory "
        f"of its own; to begin there from the other run's, set run.resume={newest} as well (its optimizer, step and "
        f"data too) or train.init_from={newest} (its weights). To continue that run, set run.dir={directory}"
    )


@contextlib.contextmanager
def _remote_lock(storage: RemoteStorage, run: Run) -> Iterator[None]:
    """Lock a directory of an object store, which has no locks, by an object that names the run.

    The object remains after a kill; the same run may then continue.
    """
    try:
        holder = parse_json(storage.read(LOCK))
    except (FileNotFoundError, ValueError):
        holder = {}
    if isinstance(holder, dict) and holder.get("id") not in (None, run.id):
        raise MythosError(
            f"{storage.url} is in use by the run {holder.get('name')} in {holder.get('directory')}, started by process "
            f"{holder.get('pid')} on {holder.get('host')}. Two runs would overwrite each other: give this run another "
            f"checkpoint.dir, or, if that job has been killed and is not to go on, delete {storage.address(LOCK)}"
        )
    storage.write(json.dumps({**asdict(run), "host": socket.gethostname(), "pid": os.getpid()}).encode(), LOCK)
    try:
        yield
    finally:
        storage.delete(LOCK)
