"""Local files: open regular files only, write files whole, tell a full disk from other faults."""

import errno
import os
import random
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from mythos.errors import DiskFullError, MythosError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers that free space would cure: the disk is full, or the user's quota is used up."""

_FULL_TEXTS = tuple(os.strerror(number) for number in FULL)

# Not the global generator: writing a file must not change what a seeded run draws.
_random = random.SystemRandom()


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes.

    Raises OSError for anything else: opening a FIFO blocks until something writes to it, and a device may never end.
    """
    # Checked before opening, because opening a device can have side effects, and after, because the path may have
    # changed in between.
    _require_regular(path, os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_regular(path: str | Path) -> bytes:
    """Read a whole file. Raises OSError as :func:`open_regular`."""
    with open_regular(path) as file:
        return file.read()


def check_regular_files(folder: str | Path) -> None:
    """Raise OSError if a folder contains anything but regular files, links to them, and folders.

    Call it before another library opens the folder's files.
    """
    for path in Path(folder).iterdir():
        if path.exists() and not path.is_dir():
            _require_regular(path, path.stat())


def _require_regular(path: str | Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


@contextmanager
def writing(path: Path, advice: str = ". Give another folder with --out.") -> Iterator[None]:
    """Raise MythosError with the advice for an OSError while a file or a folder is written."""
    try:
        yield
    except OSError as error:
        raise MythosError(f"{path} cannot be written: {error}{advice}") from error


@contextmanager
def replacing(path: Path, *, unique: bool = False, durable: bool = False) -> Iterator[Path]:
    """Replace a file atomically: yield a temporary path beside it, and rename that to `path` at the end of the block.

    Readers see the old file or the new one, never half of it. If the block raises, the temporary file is deleted.

    Args:
        path: the file to write.
        unique: draw a name for the temporary file (`NAME.1234.tmp` instead of `NAME.tmp`), because other processes may
            write the same file at the same time.
        durable: fsync the file before the rename and its folder after it, so that it survives a loss of power.

    A link to a file is replaced itself; the file that it points to stays.

    Raises:
        OSError: the file cannot be written, or `path` is something else: a folder, or a device such as /dev/null, in
            whose place root could put a file.
    """
    with suppress(FileNotFoundError):
        _require_regular(path, os.stat(path))
    number = f".{_random.getrandbits(32)}" if unique else ""
    temporary = path.with_name(f"{path.name}{number}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()  # left by a killed process; or a link, which would be followed, or a FIFO, which blocks
    try:
        yield temporary
        if durable:
            fsync(temporary)
        temporary.replace(path)
        if durable:
            fsync(path.parent)
    finally:
        with suppress(OSError):  # after the rename there is no such file
            temporary.unlink()


def write_whole(path: Path, content: bytes | str, *, unique: bool = False, durable: bool = False) -> None:
    """Write a file atomically, text as UTF-8; see :func:`replacing` for the options. Raises OSError."""
    with replacing(path, unique=unique, durable=durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder beside `path`, and rename it at the end of the block.

    At the end `path` must be absent or empty. If the block raises, the temporary folder is deleted. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{_random.getrandbits(32)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def numbered(path: Path) -> Iterator[Path]:
    """PATH, PATH-2, PATH-3, and so on, without end."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in count(2))


@contextmanager
def unused_stem(stem: Path, *suffixes: str) -> Iterator[Path]:
    """Reserve the first of STEM, STEM-2, STEM-3, ... for which there is no file STEM.SUFFIX, so nothing is overwritten.

    The stem is reserved by creating its file with the first suffix, so two processes never get the same one. If the
    block raises, the files of the stem are deleted. Raises OSError if the folder cannot be written.
    """
    for chosen in numbered(stem):
        # Not with_suffix, which would replace the part of a name after a dot.
        files = [chosen.with_name(f"{chosen.name}.{suffix}") for suffix in suffixes]
        if any(map(os.path.lexists, files)):
            continue
        with suppress(FileExistsError):  # another process was faster
            files[0].open("x").close()
            break
    try:
        yield chosen
    except BaseException:
        for file in files:
            with suppress(OSError):
                file.unlink()
        raise


def fsync(path: Path) -> None:
    """Force a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or an error that caused it, is a full disk or an exhausted quota.

    Libraries written in other languages pass on the system's error as text only, so the text is searched too.
    """
    while error is not None:
        if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in FULL):
            return True
        if any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__
    return False


def remedy(error: BaseException) -> str:
    """The advice for a file that cannot be written, to begin a sentence: "Free some space", or "Fix that"."""
    return "Free some space" if is_full(error) else "Fix that"


def advise(error: OSError) -> str:
    """The message for a file that a run cannot read or write: the cause and the advice."""
    return f"{error}. {remedy(error)} and run the same command again; checkpoints are intact"
