"""RunLock: lets only one job use a directory."""

import fcntl
import json
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from mythos.errors import MythosError
from mythos.files.text import parse_json

logger = logging.getLogger(__name__)

_held: set[Path] = set()


def is_held(path: Path) -> bool:
    """Whether this process holds the lock of this file, as opposed to another process or none."""
    return path.absolute() in _held


LOCK_FILE = ".lock"


def is_locked(directory: Path) -> bool:
    """Whether a process trains in a run directory. Writes nothing. False on file systems without locks."""
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # A shared lock, released at once: a job that starts at this moment tries again (`RunLock`'s patience).
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


class RunLock:
    """Reserves a directory for one job. A context manager; the kernel releases the lock when the process dies."""

    def __init__(
        self,
        directory: Path,
        patience: float = 5.0,
        *,
        file: str = LOCK_FILE,
        options: str = "run.name or run.dir",
        temporary: bool = False,
    ) -> None:
        """Lock `directory`, which must exist, within `patience` seconds: a killed holder takes a moment to end.

        `file` is the file in it that is locked, `options` names the fields by which a user chooses another directory,
        for messages. A `temporary` file is deleted at the end; otherwise the file keeps :attr:`run`.
        """
        self.directory, self._patience, self._path = directory, patience, directory / file
        self._options, self._temporary = options, temporary
        self._file: Any = None
        self.run: str | None = None
        """Id of the run in this directory, written by an earlier job; None if there was none."""

    def __enter__(self) -> Self:
        """Take the lock. Raises MythosError if another process has it (the message names it), or if it cannot write."""
        deadline = time.monotonic() + self._patience
        file = self._open()
        while not (self._try_lock(file) and self._is_current(file)):
            if not self._is_current(file):  # the holder has deleted this file, and another may have created a new one
                file.close()
                file = self._open()
                continue
            if time.monotonic() >= deadline:
                with file:
                    raise MythosError(self._in_use(file))
            time.sleep(0.1)
        self._file = file
        _held.add(self._path.absolute())
        run = self._holder(file).get("run")
        self.keep(run if isinstance(run, str) else None)
        return self

    def keep(self, run: str | None) -> None:
        """Write this process as the holder of the lock, and the id of the run in this directory."""
        self.run = run
        now = datetime.now().isoformat(" ", "seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "run": run}
        # Truncate last: on a full disk, bytes that a file already has can still be overwritten.
        self._file.seek(0)
        self._file.write(json.dumps(holder))
        self._file.truncate()
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            self._path.unlink(missing_ok=True)
        _held.discard(self._path.absolute())
        self._file.close()

    def _open(self) -> Any:
        try:
            # Do not follow a link: the file is written to.
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            return os.fdopen(descriptor, "r+", encoding="utf-8")
        except OSError as error:
            raise MythosError(
                f"{self._path}: cannot be written ({error.strerror}); check {self._options.split()[-1]} and its owner"
            ) from error

    def _is_current(self, file: Any) -> bool:
        """Whether the path still names the open file."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _try_lock(self, file: Any) -> bool:
        """Whether the lock was free; true with a warning if the file system has no locks."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s); start no second job here", self.directory, error)
        return True

    def _holder(self, file: Any) -> dict[str, Any]:
        """The entry of the last process that locked the file."""
        file.seek(0)
        try:
            holder = parse_json(file.read())
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _in_use(self, file: Any) -> str:
        holder = self._holder(file)
        try:
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except KeyError:
            who = "another process"
        return (
            f"{self.directory} is in use by {who}. Two jobs would overwrite each other: end that one, or give this "
            f"run another {self._options}"
        )
