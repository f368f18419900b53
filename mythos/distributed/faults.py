"""What ends or stalls a run: signals, the clock, silent and dead peers, a second job on the same directory."""

import atexit
import contextlib
import faulthandler
import fcntl
import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import psutil
import torch.distributed as dist
from tqdm import tqdm

from mythos.config.loading import DURATION
from mythos.errors import MythosError, short_reason

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 2.0
"""Seconds in which several signals are one request: launchers pass on what a scheduler has sent to all processes."""

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 90s, 3h30m or 1d. Raises MythosError for anything else, and for no time at all."""
    if re.match(DURATION, text) is None or text.endswith("\n"):
        raise MythosError(f"got {text!r}; allowed: days, hours, minutes and seconds in this order, e.g. 90s, 3h30m, 1d")
    seconds = sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))
    if seconds == 0:
        raise MythosError(f"got {text!r}, which is no time at all; give a longer duration, e.g. 90s, 3h30m, 1d")
    return float(seconds)


def _duration(seconds: float) -> str:
    parts = []
    for unit, length in _UNITS.items():
        count = seconds if unit == "s" else seconds // length
        seconds -= count * length
        parts += [f"{count:g}{unit}"] if count else []
    return "".join(parts)


class StopRequests:
    """Requests that this process stop: SIGTERM, SIGINT, SIGUSR1, the end of its time, or of the launcher above it.

    A context manager. The first signal sets :attr:`reason` and says so on stderr; a second one, at least
    ``SAME_REQUEST`` seconds later, exits at once with status 128 + its number, or under launch.sh as
    :func:`exit_for_good` does. At the end of the context the previous handlers are back; but under launch.sh, where all
    has gone well, signals are received until the process ends, and a second one exits with 0: all is saved.
    """

    def __init__(self, max_time: float | None) -> None:
        """Begin the time: `max_time` seconds from now on, None = no limit."""
        self._started, self._max_time = time.monotonic(), max_time
        # torchrun's workers are in sessions of their own: killed, it would leave them training for nobody. launch.sh,
        # above it, tells its number, and ends with it.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._above = int(os.environ.get("MYTHOS_LAUNCHER", "0"))
        self._signal: signal.Signals | None = None
        self._signalled = 0.0
        self._saved = False
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup = self._wakeup_before = -1

    @property
    def reason(self) -> str | None:
        """Why this process, not the others, is to stop: ``SIGTERM``, ``train.max_time (3h30m)``; None = it is not."""
        if self._signal is not None:
            return self._signal.name
        if self._max_time is not None and time.monotonic() - self._started >= self._max_time:
            return f"train.max_time ({_duration(self._max_time)})"
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the launcher is gone"
        if self._above and not psutil.pid_exists(self._above):
            return "launch.sh is gone"
        return None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            # A handler in Python runs when the main thread is back from the collective it waits in, which takes
            # up to the timeout where a peer has died. The number of the signal arrives in the pipe at once.
            reader, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
            self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._saved = error is None
        if error is None and self._above:
            # All may be saved before the signal that asked for it has reached every process: one that then died of it
            # would be a failure to torchrun, which would start all of them again.
            atexit.register(self._end, dict.fromkeys(self._before, signal.SIG_IGN))
        else:
            self._end(self._before)

    def _end(self, handlers: dict[signal.Signals, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._wakeup)  # ends the thread
        self._before = {}

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in SIGNALS:
                    self._receive(signal.Signals(number[0]))

    def _receive(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled = received, now
            message = f"{received.name}: stopping after this step; again to exit at once"
            # Most often all processes get it, and one says so. A closed terminal must not keep the second from working.
            with contextlib.suppress(OSError):
                if os.environ.get("RANK", "0") == "0":
                    tqdm.write(message, file=sys.stderr)  # above the progress bar, not into it
        elif now - self._signalled >= SAME_REQUEST:
            if self._saved:
                os._exit(0)
            if "MYTHOS_ENDED" in os.environ:  # launch.sh is not to start this process again, and tells the loss
                os._exit(exit_for_good(f"{received.name} again: stopped at once, without saving the last steps"))
            os._exit(128 + received)


def _ignore(*_: object) -> None:
    """Let the signal pass: all is done by the thread that reads its number. SIG_IGN would give it no number."""


class Watchdog:
    """Notices that this process stands still, and where. A context manager with a thread of its own."""

    def __init__(self, directory: Path, rank: int, seconds: float) -> None:
        """Watch `rank`; after `seconds` without a :meth:`beat` its stacks go to `directory`/rank-<number>.txt."""
        self._path, self._rank, self._seconds = directory / f"rank-{rank:05}.txt", rank, seconds
        self._last = (time.monotonic(), "starting")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Say what begins now, e.g. ``step 12: backward``. Cheap."""
        self._last = (time.monotonic(), doing)  # one assignment, so that time and text belong together in the thread

    @property
    def doing(self) -> str:
        """What began last."""
        return self._last[1]

    def __enter__(self) -> Self:
        self.beat(self.doing)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        reported = None
        while not self._over.wait(min(1.0, self._seconds / 4)):
            last = self._last
            if last is not reported and time.monotonic() - last[0] >= self._seconds:
                reported = last
                self._report(*last)

    def _report(self, began: float, doing: str) -> None:
        seconds = time.monotonic() - began
        since = datetime.fromtimestamp(time.time() - seconds)
        stall = f"rank {self._rank} stands still since {since:%H:%M:%S} ({seconds:.0f} s) in: {doing}"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                print(f"\n{datetime.now().isoformat(timespec='seconds')} {stall}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            logger.warning("%s; its stacks: %s", stall, self._path)
        except OSError as error:
            logger.warning("%s; its stacks cannot be written: %s", stall, error)


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
            holder = json.loads(file.read())
        except (ValueError, RecursionError):
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


_GLOO_AND_NCCL = re.compile(
    r"gloo/transport|Gloo connectFullMesh failed|Application timeout caused pair closure|Connection closed by peer"
    r"|Connection reset by peer|timed out in monitoredBarrier|Watchdog caught collective operation timeout"
    r"|NCCL error|NCCL communicator|ncclRemoteError|ncclSystemError"
)


def collective_reason(error: BaseException) -> str:
    """What torch says of a failed collective, without its source files."""
    return re.sub(r"^\[[^\]]*\] *", "", short_reason(error)).split(". This may indicate")[0]


def collective_failure(error: BaseException) -> bool:
    """Whether an error comes from a collective that timed out or lost its peer, rather than from this process."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _GLOO_AND_NCCL.search(str(error)) is not None
    )


# --- torchrun starts all processes again, also after an error that will be the same again. Its agents have no way to be
# told, so a file does: they still start processes as often as they are set to, but these end at once.


def _ended_file() -> Path | None:
    """The file that exists once this launch must not go on; None where nothing restarts this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    if "MYTHOS_ENDED" in os.environ:  # from launch.sh, which leaves it there, empty, when it is asked to stop
        return Path(os.environ["MYTHOS_ENDED"])
    agent = psutil.Process(os.getppid())
    return Path(tempfile.gettempdir()) / f"mythos-ended-{os.getuid()}-{agent.pid}-{agent.create_time():.0f}"


def exit_for_good(message: str) -> int:
    """Tell an error that a restart would meet again, once for all processes of a machine, and rule restarts out.

    Returns the status to exit with. Under launch.sh on one machine that is 0, so that torchrun neither restarts
    anything nor prints its report: launch.sh then tells the error, ends the other processes and exits with 1.
    """
    told = False
    if ended := _ended_file():
        with contextlib.suppress(OSError), open(ended, "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            told = os.fstat(file.fileno()).st_size > 0 or "MYTHOS_ENDED" in os.environ
            if os.fstat(file.fileno()).st_size == 0:
                file.write(f"error: {message}\n")
    if not told:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 0 if "MYTHOS_ENDED" in os.environ and os.environ.get("GROUP_WORLD_SIZE") == "1" else 1


def refuse_restart() -> bool:
    """Whether this launch has ended for good: then this process, started anew by torchrun, must exit with 1 at once."""
    ended = _ended_file()
    return ended is not None and ended.exists()
