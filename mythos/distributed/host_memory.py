"""Settings of the C library's allocator for tensors on a CPU."""

import ctypes
import logging
import platform

logger = logging.getLogger(__name__)

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep freed memory for the next tensors, instead of returning it to the system.

    By default glibc returns large blocks as soon as they are freed, and the system must map every page of them again in
    the next step: 5 to 15% of its time (docs/performance.md). The process then keeps its peak memory. Does nothing with
    other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0)):
        logger.debug("mallopt refused to keep freed memory")
