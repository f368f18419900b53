"""Requests to stop: signals, the time limit, and the end of the launcher."""

import atexit
import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from typing import Any, Self

import psutil

from mythos.config.sections import DURATION
from mythos.distributed.launch_status import STATUS_FILE, end_launch
from mythos.errors import MythosError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 2.0
"""Seconds in which several signals are one request: a scheduler signals all processes, and launchers pass them on."""

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 90s, 3h30m or 1d. Raises MythosError for anything else, and for zero."""
    if re.match(DURATION, text) is None or text.endswith("\n"):
        raise MythosError(f"got {text!r}; allowed: days, hours, minutes and seconds in this order, e.g. 90s, 3h30m, 1d")
    seconds = sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))
    if seconds == 0:
        raise MythosError(f"got {text!r}, which is zero; give a longer duration, e.g. 90s, 3h30m, 1d")
    return float(seconds)


def _duration_text(seconds: float) -> str:
    """Inverse of :func:`parse_duration`."""
    parts = []
    for unit, length in _UNITS.items():
        count = seconds if unit == "s" else seconds // length
        seconds -= count * length
        parts += [f"{count:g}{unit}"] if count else []
    return "".join(parts)


class StopRequests:
    """Requests that this process stop: SIGTERM, SIGINT, SIGUSR1, the time limit, or the end of its launcher.

    A context manager. The first signal sets :attr:`reason` and is reported on stderr. A second one, at least
    ``SAME_REQUEST`` seconds later, exits at once with status 128 + its number, or under launch.sh with the status of
    :func:`end_launch`. At the end of the context the previous handlers are restored. Exception: under launch.sh, after
    a context that ended without an error, signals are received until the process ends, and a second one exits with 0,
    because everything is saved.
    """

    def __init__(self, max_time: float | None) -> None:
        """Start the clock of `max_time`, in seconds; None = no limit."""
        self._started, self._max_time = time.monotonic(), max_time
        # torchrun starts workers in sessions of their own, so they outlive a killed torchrun and would train unwatched.
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._launch_script = int(os.environ.get("MYTHOS_LAUNCHER", "0"))  # process id of launch.sh, 0 without it
        self._signal: signal.Signals | None = None
        self._signalled = 0.0
        self._saved = False
        self._handlers_before: dict[signal.Signals, Any] = {}
        self._wakeup = self._wakeup_before = -1

    @property
    def reason(self) -> str | None:
        """Why this process is to stop, e.g. ``SIGTERM`` or ``train.max_time (3h30m)``; None = it is not."""
        if self._signal is not None:
            return self._signal.name
        if self._max_time is not None and time.monotonic() - self._started >= self._max_time:
            return f"train.max_time ({_duration_text(self._max_time)})"
        if self._torchrun is not None and os.getppid() != self._torchrun:
            return "the launcher is gone"
        if self._launch_script and not psutil.pid_exists(self._launch_script):
            return "launch.sh is gone"
        return None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            # A Python handler runs only once the main thread returns from the collective it waits in: after the
            # timeout, if a peer has died. The signal's number, in contrast, is written to the pipe at once.
            reader, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
            self._handlers_before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._saved = error is None
        if error is None and self._launch_script:
            # All ranks may have saved before launch.sh has signalled every process. A process killed by its late signal
            # would be a failure to torchrun, which would start all of them again.
            atexit.register(self._end, dict.fromkeys(self._handlers_before, signal.SIG_IGN))
        else:
            self._end(self._handlers_before)

    def _end(self, handlers: dict[signal.Signals, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._handlers_before:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._wakeup)  # ends the thread
        self._handlers_before = {}

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
            # Usually all processes get the signal; rank 0 reports it. A closed terminal must not disable a second one.
            with contextlib.suppress(OSError):
                if os.environ.get("RANK", "0") == "0":
                    print(message, file=sys.stderr, flush=True)
        elif now - self._signalled >= SAME_REQUEST:
            if self._saved:
                os._exit(0)
            if STATUS_FILE in os.environ:  # under launch.sh, which prints the message and must not restart anything
                os._exit(end_launch(f"{received.name} again: stopped at once, without saving the last steps"))
            os._exit(128 + received)


def _ignore(*_: object) -> None:
    """Do nothing: the thread that reads the signal's number acts. With SIG_IGN no number would be written."""
