"""How the C library treats memory that tensors on a CPU give back."""

import ctypes
import logging
import platform

logger = logging.getLogger(__name__)

# mallopt(3), names of malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for the next tensors of a step, instead of handing it to the system.

    By default glibc hands large blocks back as soon as they are freed, and the system must provide every page of them
    again in the next step: 5 to 15% of its time (docs/performance.md). The most that was ever in use stays with the
    process. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0)):
        logger.debug("mallopt refused to keep freed memory")
