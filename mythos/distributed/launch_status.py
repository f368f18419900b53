"""The status of a launch, through which its processes, torchrun's restarts and launch.sh agree to end.

torchrun starts all processes again after any failure, also one that would repeat, and cannot be told not to. So the
processes of a machine share a file. Its first word is the status:

    stop            launch.sh was asked to stop
    error: MESSAGE  a process met an error that a restart would meet again

Without the file, or with an empty one, the launch is running. In the other cases processes that torchrun starts again
exit at once. launch.sh writes `stop`, prints the error, and names the file in MYTHOS_STATUS_FILE. Under plain torchrun
it is in the temporary directory and has the name of torchrun's process.

Importing this module is cheap (no torch), so that processes started again exit within a second.
"""

import contextlib
import fcntl
import os
import sys
import tempfile
from enum import Enum
from pathlib import Path

STATUS_FILE = "MYTHOS_STATUS_FILE"
"""Environment variable with the path of the file; set by launch.sh."""


class LaunchStatus(Enum):
    """The first word of the file."""

    RUNNING = ""
    STOP = "stop"
    ERROR = "error:"


def launch_status() -> LaunchStatus:
    """The status of the launch that this process belongs to; RUNNING for a process that nothing restarts."""
    path = _status_file()
    if path is None:
        return LaunchStatus.RUNNING
    try:
        return _status_in(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return LaunchStatus.RUNNING


def end_launch(message: str) -> int:
    """Report an error that a restart would meet again, once for all processes of a machine, and prevent restarts.

    Returns the status to exit with; see :func:`exit_status_of_ended_launch`. Under launch.sh the error is printed by
    launch.sh, below everything else.
    """
    reported = False
    if path := _status_file():
        # Without the file (a full disk, for example) every process prints the error and torchrun restarts in vain.
        with contextlib.suppress(OSError), open(path, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            file.seek(0)
            first = _status_in(file.read()) is not LaunchStatus.ERROR
            if first:
                file.truncate(0)  # a request to stop is overtaken by the error
                file.write(f"{LaunchStatus.ERROR.value} {message}\n")
            reported = STATUS_FILE in os.environ or not first
    if not reported:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_status_of_ended_launch()


def exit_status_of_ended_launch() -> int:
    """Exit status of a process whose launch has ended by an error or a request to stop.

    Under launch.sh on one machine it is 0, so that torchrun neither restarts anything nor prints its report: launch.sh
    then prints the error, if there is one, ends the other processes and exits with 1. Otherwise it is 1.
    """
    return 0 if STATUS_FILE in os.environ and os.environ.get("GROUP_WORLD_SIZE") == "1" else 1


def _status_file() -> Path | None:
    """The file; None if nothing restarts this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    if STATUS_FILE in os.environ:
        return Path(os.environ[STATUS_FILE])
    import psutil

    # A process id may be used again, so the name has the time of torchrun's start too.
    torchrun = psutil.Process(os.getppid())
    return Path(tempfile.gettempdir()) / f"mythos-status-{os.getuid()}-{torchrun.pid}-{torchrun.create_time():.0f}"


def _status_in(text: str) -> LaunchStatus:
    first_word = (text.split() or [""])[0]
    return next((status for status in LaunchStatus if status.value == first_word), LaunchStatus.ERROR)
