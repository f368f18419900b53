"""RunLock: one job at a time in a directory."""

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


class RunLock:
    """Keeps a directory to one job. A context manager; the kernel releases it with the process, however it dies."""

    def __init__(
        self,
        directory: Path,
        patience: float = 5.0,
        *,
        file: str = ".lock",
        options: str = "run.name or run.dir",
        temporary: bool = False,
    ) -> None:
        """Lock `directory`, which must exist, within `patience` seconds: a killed holder needs a moment to be gone.

        `file` is what is locked in it, `options` the fields that name another directory. At the end a `temporary` file
        is deleted; another one keeps :attr:`run`.
        """
        self.directory, self._patience, self._path = directory, patience, directory / file
        self._options, self._temporary = options, temporary
        self._file: Any = None
        self.run: str | None = None
        """Id of the run that this directory is, from the last job that had one; None before there was one."""

    def __enter__(self) -> Self:
        """Take the lock. Raises MythosError if another process has it, naming that, or if it cannot be written."""
        deadline = time.monotonic() + self._patience
        file = self._open()
        while not (self._locked(file) and self._is_there(file)):
            if not self._is_there(file):  # its holder has deleted it: there may be a new one
                file.close()
                file = self._open()
                continue
            if time.monotonic() >= deadline:
                with file:
                    raise MythosError(self._taken(file))
            time.sleep(0.1)
        self._file = file
        run = self._holder(file).get("run")
        self.keep(run if isinstance(run, str) else None)
        return self

    def keep(self, run: str | None) -> None:
        """Write who holds the lock, and the id of the run that this directory is from now on."""
        self.run = run
        now = datetime.now().isoformat(" ", "seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "run": run}
        # Shortened last: on a full disk, what the file has already can be overwritten.
        self._file.seek(0)
        self._file.write(json.dumps(holder))
        self._file.truncate()
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _open(self) -> Any:
        try:
            # Without following a link: what is locked is written to.
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            return os.fdopen(descriptor, "r+", encoding="utf-8")
        except OSError as error:
            raise MythosError(
                f"{self._path}: cannot be written ({error.strerror}); check {self._options.split()[-1]} and its owner"
            ) from error

    def _is_there(self, file: Any) -> bool:
        """Whether the open file is still the one of that name."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _locked(self, file: Any) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s); start no second job here", self.directory, error)
        return True

    def _holder(self, file: Any) -> dict[str, Any]:
        """What the last one to lock the file has written."""
        file.seek(0)
        try:
            holder = parse_json(file.read())
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _taken(self, file: Any) -> str:
        holder = self._holder(file)
        try:
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except KeyError:
            who = "another process"
        return (
            f"{self.directory} is in use by {who}. Two jobs would overwrite each other: end that one, or give this "
            f"run another {self._options}"
        )
