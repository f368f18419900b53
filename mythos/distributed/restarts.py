"""Errors that torchrun's restarts would meet again, and failed collectives, which they would not."""

import contextlib
import fcntl
import os
import re
import sys
import tempfile
from pathlib import Path

import psutil
import torch.distributed as dist

from mythos.errors import short_reason

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
