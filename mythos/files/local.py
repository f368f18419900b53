"""Local files: only regular ones are opened, and only a full disk is called full."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers that free space would mend: the disk is full, or the user's quota is."""

_FULL_TEXTS = tuple(os.strerror(number) for number in FULL)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes.

    Raises OSError for what is not a regular file (or a link to one): opening a FIFO waits until something writes to it,
    and a device may never end.
    """
    # Looked at before it is opened, because opening a device may do something; and after, because it may have changed.
    _require_regular(path, os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_regular(path: str | Path) -> bytes:
    """The content of a file. Raises OSError as :func:`open_regular`."""
    with open_regular(path) as file:
        return file.read()


def check_regular_files(folder: str | Path) -> None:
    """Raise OSError if a folder holds anything but regular files, links to them, and folders.

    For folders whose files another library opens.
    """
    for path in Path(folder).iterdir():
        if path.exists() and not path.is_dir():
            _require_regular(path, path.stat())


def _require_regular(path: str | Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk or an exhausted quota.

    Libraries in other languages pass the system's error on as text alone, so the text counts too.
    """
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__
    return False


def advise(error: OSError) -> str:
    """What to tell of a file that a run cannot read or write: the cause, and what to do about it."""
    todo = "Free some space" if is_full(error) else "Mend that"
    return f"{error}. {todo} and run the same command again; checkpoints are intact"
