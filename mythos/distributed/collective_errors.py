"""Errors of collectives, which a restart may not meet again: a process was lost, or the network failed."""

import re

import torch.distributed as dist

from mythos.errors import short_reason

_GLOO_AND_NCCL = re.compile(
    r"gloo/transport|Gloo connectFullMesh failed|Application timeout caused pair closure|Connection closed by peer"
    r"|Connection reset by peer|timed out in monitoredBarrier|Watchdog caught collective operation timeout"
    r"|NCCL error|NCCL communicator|ncclRemoteError|ncclSystemError"
)


def collective_reason(error: BaseException) -> str:
    """torch's message about a failed collective, without its source files."""
    return re.sub(r"^\[[^\]]*\] *", "", short_reason(error)).split(". This may indicate")[0]


def collective_failure(error: BaseException) -> bool:
    """Whether an error comes from a collective that timed out or lost its peer, rather than from this process."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _GLOO_AND_NCCL.search(str(error)) is not None
    )
