"""Where checkpoints lie: a local directory, or a URL of fsspec (s3://, gs://, memory://, ...).

Both kinds keep one promise: a checkpoint `step-N` counts once the file `committed` is in it, which is written last.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO

from mythos.errors import MythosError, short_reason

logger = logging.getLogger(__name__)

MARKER = "committed"
META = "meta.json"
LATEST = "latest"
DAMAGED = "damaged"
"""What the marker is renamed to once the checkpoint was found damaged."""

BLOCK_BYTES = 1 << 20
"""Read at once for a checksum; zlib lets other threads run meanwhile."""


class Storage(ABC):
    """A folder of checkpoints. Methods raise OSError, or what the library of a remote file system raises."""

    @abstractmethod
    def address(self, name: str) -> Path | str:
        """Where the checkpoint `name` is, as people give it."""

    @abstractmethod
    def names(self) -> list[str]:
        """Every directory step-*, complete or not."""

    @abstractmethod
    def exists(self, name: str, file: str) -> bool:
        """Whether the checkpoint has that file."""

    @abstractmethod
    def open(self, name: str, file: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file of a checkpoint, to read."""

    @abstractmethod
    def prepare(self, name: str, needed: int) -> None:
        """Make room for a checkpoint of `needed` bytes in all; one process does, before any writes."""

    @abstractmethod
    def workspace(self, name: str, needed: int) -> Path:
        """The local directory in which this process writes its files of the checkpoint, `needed` bytes."""

    @abstractmethod
    def deliver(self, name: str, file: Path) -> None:
        """Bring a file of the workspace to where it outlives a loss of power."""

    @abstractmethod
    def size(self, name: str, file: str) -> int:
        """Bytes of a delivered file, as the process that commits sees them."""

    @abstractmethod
    def commit(self, name: str, meta: bytes, marker: bytes) -> None:
        """Make the delivered files a checkpoint, the marker last; one process does."""

    @abstractmethod
    def discard(self, name: str, workspace: Path) -> None:
        """Drop what :meth:`workspace` gave, whatever state it is in."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a checkpoint, if it exists; one that is interrupted here no longer counts as complete."""

    @abstractmethod
    def demote(self, name: str) -> None:
        """Let a damaged checkpoint count no more: the next one that is written takes its place."""

    @abstractmethod
    def point(self, name: str) -> None:
        """Name the newest complete checkpoint in the file `latest`."""

    def complete(self) -> list[str]:
        """Names of the committed checkpoints, oldest first."""
        steps = [name for name in self.names() if name.removeprefix("step-").isdecimal()]
        return sorted((name for name in steps if self.exists(name, MARKER)), key=step_of)

    def read(self, name: str, file: str) -> bytes:
        """A whole file of a checkpoint."""
        with self.open(name, file) as stream:
            return stream.read()

    def prune(self, keep: int, keep_every: int) -> None:
        """Remove all but the newest `keep` checkpoints and multiples of `keep_every`, and all that is not complete."""
        complete = self.complete()
        kept = {*complete[-keep:], *(name for name in complete if keep_every and step_of(name) % keep_every == 0)}
        for name in self.names():
            if name not in kept:
                self.remove(name)


class LocalStorage(Storage):
    """A directory that all processes share: written aside, forced to disk, renamed, marked."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def address(self, name: str) -> Path:
        """The checkpoint's directory."""
        return self.root / name

    def names(self) -> list[str]:
        """Every directory step-*, complete or not."""
        return [path.name for path in self.root.glob("step-*")]

    def exists(self, name: str, file: str) -> bool:
        """Whether the checkpoint has that file."""
        return (self.root / name / file).exists()

    def open(self, name: str, file: str) -> BinaryIO:
        """A file of a checkpoint, to read."""
        return open(self.root / name / file, "rb")

    def prepare(self, name: str, needed: int) -> None:
        """Remove what killed saves left; raises OSError where the disk has too little room."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob("step-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        require_space(self.root, needed)
        self._aside(name).mkdir()

    def workspace(self, name: str, needed: int) -> Path:
        """A directory beside the checkpoint's own, the same for all processes."""
        return self._aside(name)

    def _aside(self, name: str) -> Path:
        return self.root / f"{name}.tmp"

    def deliver(self, name: str, file: Path) -> None:
        """Force the file to disk."""
        _sync(file)

    def size(self, name: str, file: str) -> int:
        """Bytes of a delivered file."""
        return (self._aside(name) / file).stat().st_size

    def commit(self, name: str, meta: bytes, marker: bytes) -> None:
        """Write meta.json, rename, mark; each forced to disk before the next."""
        aside, final = self._aside(name), self.root / name
        _replace(aside / META, meta)
        self.remove(name)  # only now that its replacement is whole
        aside.rename(final)
        _sync(self.root)
        _replace(final / MARKER, marker)
        self.point(name)

    def discard(self, name: str, workspace: Path) -> None:
        """Delete the directory that all processes wrote to."""
        shutil.rmtree(workspace, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Delete a checkpoint, if it exists, its marker first."""
        (self.root / name / MARKER).unlink(missing_ok=True)
        shutil.rmtree(self.root / name, ignore_errors=True)

    def demote(self, name: str) -> None:
        """Rename the marker."""
        (self.root / name / MARKER).rename(self.root / name / DAMAGED)

    def point(self, name: str) -> None:
        """Replace the file `latest` as a whole."""
        _replace(self.root / LATEST, name.encode())


class RemoteStorage(Storage):
    """A folder of an object store: files are written locally, checked, then put there; nothing can be renamed."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise MythosError(
                f"{url} cannot be opened: {short_reason(error)}. Install the package that this names (pip install "
                "s3fs for s3://, gcsfs for gs://, adlfs for abfs://), or use a directory"
            ) from error

    def _path(self, *parts: str) -> str:
        return "/".join((self.root.rstrip("/"), *parts))

    def address(self, name: str) -> str:
        """The checkpoint's URL."""
        return f"{self.url.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """Every folder step-*, complete or not."""
        self.fs.invalidate_cache()
        return sorted(path.rstrip("/").rpartition("/")[2] for path in self.fs.glob(self._path("step-*")))

    def exists(self, name: str, file: str) -> bool:
        """Whether the checkpoint has that file."""
        return self.fs.exists(self._path(name, file))

    def open(self, name: str, file: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file of a checkpoint, to read."""
        return self.fs.open(self._path(name, file), "rb")

    def prepare(self, name: str, needed: int) -> None:
        """Remove what an earlier or interrupted checkpoint of this name left; its files would be read with the new."""
        self.remove(name)

    def workspace(self, name: str, needed: int) -> Path:
        """A temporary directory of this process (in TMPDIR); raises OSError where there is too little room."""
        require_space(Path(tempfile.gettempdir()), needed)
        return Path(tempfile.mkdtemp(prefix=f"mythos-{name}-"))

    def deliver(self, name: str, file: Path) -> None:
        """Put the file into the store."""
        self.fs.makedirs(self._path(name), exist_ok=True)
        self.fs.put_file(str(file), self._path(name, file.name))
        file.unlink()

    def size(self, name: str, file: str) -> int:
        """Bytes of a delivered file."""
        self.fs.invalidate_cache()
        return self.fs.size(self._path(name, file))

    def commit(self, name: str, meta: bytes, marker: bytes) -> None:
        """Put meta.json, then the marker."""
        self.fs.pipe_file(self._path(name, META), meta)
        self.fs.pipe_file(self._path(name, MARKER), marker)
        self.point(name)

    def discard(self, name: str, workspace: Path) -> None:
        """Delete the temporary directory; files that reached the store are removed with the next checkpoint."""
        shutil.rmtree(workspace, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Delete a checkpoint, if it exists, its marker first."""
        for path in (self._path(name, MARKER), self._path(name)):
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)

    def demote(self, name: str) -> None:
        """Rename the marker."""
        self.fs.mv(self._path(name, MARKER), self._path(name, DAMAGED))

    def point(self, name: str) -> None:
        """Replace the object `latest`."""
        self.fs.pipe_file(self._path(LATEST), name.encode())


def open_storage(directory: str | Path) -> Storage:
    """The storage of a directory or a URL. Raises MythosError for a URL of a kind that is not known or not installed.

    `file://` is a directory.
    """
    scheme, separator, rest = str(directory).partition("://")
    if not separator:
        return LocalStorage(Path(directory))
    return LocalStorage(Path(rest)) if scheme in ("file", "local") else RemoteStorage(str(directory))


def locate(path: str | Path) -> tuple[Storage, str]:
    """The storage that a checkpoint lies in, and its name there."""
    text = str(path).rstrip("/")
    if "://" not in text:
        return LocalStorage(Path(text).parent), Path(text).name
    root, _, name = text.rpartition("/")
    return open_storage(root), name


def step_of(path: str | Path) -> int:
    """The step in a checkpoint's name."""
    return int(str(path).rstrip("/").rpartition("/")[2].removeprefix("step-"))


def checksum(stream: BinaryIO) -> dict[str, int]:
    """Size and CRC-32 of what can be read from a stream: `{"bytes": ..., "crc32": ...}`."""
    size = value = 0
    while block := stream.read(BLOCK_BYTES):
        size, value = size + len(block), zlib.crc32(block, value)
    return {"bytes": size, "crc32": value}


def require_space(directory: Path, needed: int) -> None:
    """Raise OSError if a disk has fewer bytes free than needed."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"{needed:,} bytes are needed and {free:,} are free")


def _replace(path: Path, content: bytes) -> None:
    """Write a small file that is there as a whole or not at all, and force it to disk with its directory."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    _sync(aside)
    aside.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
