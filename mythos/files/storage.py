"""Storage of checkpoints: a local directory, or a folder of an object store at an fsspec URL (s3://, gs://, ...).

In both a checkpoint `step-N` counts as complete once it contains the file `committed`, which is written last.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mythos.errors import MythosError, short_reason
from mythos.files.local import fsync, open_regular, write_whole
from mythos.files.text import parse_json

MARKER = "committed"
META = "meta.json"
LATEST = "latest"
DAMAGED = "damaged"
"""New name of the marker of a checkpoint that turned out to be damaged."""
OWNER = "owner"
"""File in a directory that is being written: the id of the writing run. Later meta.json and the marker contain it."""

WRITTEN = re.compile(
    r"shard-\d{5,}-.*\.safetensors|\.tmp[A-Za-z0-9]{6}|meta\.json|committed|damaged|owner|(meta\.json|committed)\.tmp"
)
"""Names of the files that this project writes into a checkpoint's directory. Files of other names are never deleted.

safetensors writes a shard as `.tmpXXXXXX` and then renames it: a kill in between leaves that.
"""

BLOCK_BYTES = 1 << 20
"""Read at once for a checksum; zlib releases Python's lock meanwhile."""


class Origin(NamedTuple):
    """Who wrote a checkpoint, according to meta.json, the marker and the file `owner`.

    The union of what the files say, because one of them may be damaged.
    """

    runs: set[str]
    """Ids of runs; empty for checkpoints of versions without ids."""
    steps: set[int]
    meta: dict[str, Any]
    """meta.json; empty if it cannot be read."""


class Storage(ABC):
    """A folder of checkpoints. Methods raise OSError, or the errors of a remote file system's library.

    Paths are given as parts below the folder: `("step-00000001", "meta.json")`, or `("latest",)`.

    A run deletes only its own checkpoints: a directory (not a link) named exactly `step-NNNNNNNN` whose files say that
    :attr:`owned` run wrote them and, if it is complete, name that step. In it, only files with the names of a
    checkpoint's are deleted.
    """

    def __init__(self) -> None:
        self.owned: Callable[[Origin], bool] = lambda origin: not origin.runs
        """Whether an origin is this run. Until it is set, any checkpoint without a run's id counts as this run's."""
        self._own: set[str] = set()  # names known to be this run's: a remote one need not be read at every save

    # What the two kinds of storage do differently

    @abstractmethod
    def address(self, name: str) -> Path | str:
        """The path or URL of a checkpoint."""

    @abstractmethod
    def names(self) -> list[str]:
        """Every name of the form step-NNNNNNNN, complete or not."""

    @abstractmethod
    def is_directory(self, name: str) -> bool:
        """Whether a name is a directory of this storage, not a link or a file."""

    @abstractmethod
    def files(self, name: str) -> list[str]:
        """Names of the entries of a checkpoint's directory; empty if there is no directory."""

    @abstractmethod
    def exists(self, *path: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def open(self, *path: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open a file for reading; raises FileNotFoundError, and OSError for what is not a regular file."""

    @abstractmethod
    def write(self, content: bytes, *path: str) -> None:
        """Write a small file, atomically and durably; creates the storage's folder if necessary."""

    @abstractmethod
    def delete(self, *path: str) -> None:
        """Delete a file, if it exists."""

    @abstractmethod
    def delete_folder(self, name: str) -> None:
        """Delete the empty directory of a checkpoint, if the file system has directories and allows it."""

    @abstractmethod
    def require_space(self, needed: int) -> None:
        """Raise OSError if there is known to be room for fewer than `needed` bytes."""

    @abstractmethod
    def prepare(self, name: str, needed: int, run: str | None) -> None:
        """Prepare a checkpoint of `needed` bytes in total by the run of this id: delete remains of killed saves.

        One process calls it before any process writes. Raises OSError if there is too little room, or if the place is
        taken by what another run wrote.
        """

    @abstractmethod
    def workspace(self, name: str, needed: int) -> Path:
        """The local directory to which this process writes its files of the checkpoint, `needed` bytes."""

    @abstractmethod
    def deliver(self, name: str, file: Path) -> None:
        """Move a file from the workspace to durable storage."""

    @abstractmethod
    def size(self, name: str, file: str) -> int:
        """Bytes of a delivered file, as the committing process sees it."""

    @abstractmethod
    def commit(self, name: str, meta: bytes, marker: bytes) -> None:
        """Turn the delivered files into a checkpoint, writing the marker last. One process calls it."""

    @abstractmethod
    def demote(self, name: str) -> None:
        """Rename the marker of a damaged checkpoint: it no longer counts, and the next save takes its place."""

    # What follows from it

    def probe(self, file: str) -> None:
        """Write a file of this name, to find out before training whether saves will be possible."""
        self.write(b"-", file)

    def point(self, name: str) -> None:
        """Name the newest complete checkpoint in the file `latest`."""
        self.write(name.encode(), LATEST)

    def read(self, *path: str) -> bytes:
        """Read a whole file. Raises as :meth:`open`."""
        with self.open(*path) as stream:
            return stream.read()

    def complete(self) -> list[str]:
        """Names of the committed checkpoints, oldest first."""
        return sorted((name for name in self.names() if self.exists(name, MARKER)), key=step_of)

    def origin(self, name: str) -> Origin | None:
        """Who wrote a checkpoint; None for a directory without any of the files that say so."""
        runs: set[str] = set()
        steps: set[int] = set()
        meta: dict[str, Any] = {}
        documented = False
        for file in (META, OWNER, DAMAGED, MARKER):
            try:
                content = self.read(name, file)
                values = {"run": content.decode()} if file == OWNER else parse_json(content)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                values = None
            documented = True
            if isinstance(values, dict):
                meta = values if file == META else meta
                runs |= {run} if (run := run_id(values)) else set()
                steps |= {step} if isinstance(step := values.get("step"), int) else set()
        return Origin(runs, steps, meta) if documented else None

    def is_own(self, name: str) -> bool:
        """Whether this run may delete a checkpoint; see the class. Anybody may delete an empty directory."""
        if not self.is_directory(name):
            return False
        origin = self.origin(name)
        if origin is None:  # nothing but shards: a save that was killed, by a version without ids
            files = self.files(name)
            return not files or (self.owned(Origin(set(), set(), {})) and all(map(WRITTEN.fullmatch, files)))
        # A complete checkpoint under the name of another step is a copy that somebody made.
        copied = bool(origin.steps) and step_of(name) not in origin.steps
        return self.owned(origin) and not (copied and is_step(name) and self.exists(name, MARKER))

    def remove(self, name: str) -> None:
        """Delete a checkpoint if it is this run's; interrupted, it leaves one that no longer counts as complete."""
        if not self.is_own(name):
            return
        for file in deletion_order(self.files(name)):
            self.delete(name, file)
        if not self.files(name):  # files that somebody else has put there stay
            self.delete_folder(name)

    def prune(self, keep: int, keep_every: int) -> None:
        """Delete this run's checkpoints except the newest `keep` complete ones and the multiples of `keep_every`.

        Checkpoints of other runs are neither counted nor deleted.
        """
        names = self.names()
        self._own = {name for name in names if name in self._own or self.is_own(name)}
        complete = sorted((name for name in self._own if self.exists(name, MARKER)), key=step_of)
        kept = {*complete[-keep:], *(name for name in complete if keep_every and step_of(name) % keep_every == 0)}
        for name in names:
            if name not in kept:
                self.remove(name)


class LocalStorage(Storage):
    """A directory that all processes share. A checkpoint is written to `step-N.tmp`, fsynced, renamed, marked."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def _path(self, *path: str) -> Path:
        return self.root.joinpath(*path)

    def address(self, name: str) -> Path:
        """The checkpoint's directory."""
        return self._path(name)

    def names(self) -> list[str]:
        """Every directory entry named step-NNNNNNNN."""
        return [path.name for path in self.root.glob("step-*") if is_step(path.name)]

    def is_directory(self, name: str) -> bool:
        """Whether a name is a directory, not a link or a file."""
        return self._path(name).is_dir() and not self._path(name).is_symlink()

    def files(self, name: str) -> list[str]:
        """Names of the entries of a checkpoint's directory."""
        return os.listdir(self._path(name)) if self._path(name).is_dir() else []

    def exists(self, *path: str) -> bool:
        """Whether there is such a file."""
        return self._path(*path).exists()

    def open(self, *path: str) -> BinaryIO:
        """Open a regular file for reading."""
        return open_regular(self._path(*path))

    def write(self, content: bytes, *path: str) -> None:
        """Write a small file, then fsync it and its directory."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_whole(self._path(*path), content, durable=True)

    def delete(self, *path: str) -> None:
        """Unlink a file."""
        self._path(*path).unlink(missing_ok=True)

    def delete_folder(self, name: str) -> None:
        """Remove an empty directory."""
        with contextlib.suppress(OSError):  # somebody has put a file into it in the meantime
            self._path(name).rmdir()

    def probe(self, file: str) -> None:
        """Write the probe; raises OSError too where `latest`, which every save writes, is anything but a file."""
        for path in (self._path(LATEST), self._path(f"{LATEST}.tmp")):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "Is a directory, where a file is to be written", str(path))
        if self._path(LATEST).exists() and not self._path(LATEST).is_file():
            raise OSError(errno.EINVAL, "Is not a regular file", str(self._path(LATEST)))
        super().probe(file)

    def require_space(self, needed: int) -> None:
        """Raise OSError if the disk has fewer bytes free."""
        require_space(self.root, needed)

    def prepare(self, name: str, needed: int, run: str | None) -> None:
        """Delete this run's `step-*.tmp`, check the free space, and create the workspace with its owner's id."""
        self.root.mkdir(parents=True, exist_ok=True)
        for path in self.root.glob("step-*.tmp"):
            if is_step(path.name.removesuffix(".tmp")):
                self.remove(path.name)
        require_space(self.root, needed)
        workspace = self._path(f"{name}.tmp")
        workspace.mkdir()
        if run is not None:
            (workspace / OWNER).write_text(run)

    def workspace(self, name: str, needed: int) -> Path:
        """A directory beside the checkpoint's, the same for all processes."""
        return self._path(f"{name}.tmp")

    def deliver(self, name: str, file: Path) -> None:
        """Fsync the file, which is on the shared disk already."""
        fsync(file)

    def size(self, name: str, file: str) -> int:
        """Bytes of a file in the workspace."""
        return self._path(f"{name}.tmp", file).stat().st_size

    def commit(self, name: str, meta: bytes, marker: bytes) -> None:
        """Write meta.json, rename the workspace, write the marker; each is fsynced before the next."""
        workspace, final = self._path(f"{name}.tmp"), self._path(name)
        self.write(meta, workspace.name, META)
        self.delete(workspace.name, OWNER)  # meta.json contains the id now
        self.remove(name)  # only now that its replacement is whole
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, "In the way, and not written by this run: move it away", str(final))
        workspace.rename(final)
        fsync(self.root)
        self.write(marker, name, MARKER)
        self.point(name)

    def demote(self, name: str) -> None:
        """Rename the marker."""
        self._path(name, MARKER).rename(self._path(name, DAMAGED))


class RemoteStorage(Storage):
    """A folder of an object store. Files are written locally, checked, then uploaded; nothing can be renamed."""

    def __init__(self, url: str) -> None:
        import fsspec

        super().__init__()
        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise MythosError(
                f"{url} cannot be opened: {short_reason(error)}. Install the package that this names (pip install "
                "s3fs for s3://, gcsfs for gs://, adlfs for abfs://), or use a directory"
            ) from error

    def _path(self, *path: str) -> str:
        return "/".join((self.root.rstrip("/"), *path))

    def address(self, name: str) -> str:
        """The checkpoint's URL."""
        return f"{self.url.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """Every folder named step-NNNNNNNN."""
        self.fs.invalidate_cache()
        return sorted(filter(is_step, map(_last_part, self.fs.glob(self._path("step-*")))))

    def is_directory(self, name: str) -> bool:
        """Whether a name is a folder, not a link or an object; some file systems of fsspec have links."""
        try:
            info = self.fs.info(self._path(name))
        except FileNotFoundError:
            return False
        return info["type"] == "directory" and not info.get("islink")

    def files(self, name: str) -> list[str]:
        """Names of the objects in a checkpoint's folder."""
        self.fs.invalidate_cache()
        try:
            return list(map(_last_part, self.fs.ls(self._path(name), detail=False)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, *path: str) -> bool:
        """Whether there is such an object."""
        self.fs.invalidate_cache()
        return self.fs.exists(self._path(*path))

    def open(self, *path: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open an object for reading."""
        self.fs.invalidate_cache()
        return self.fs.open(self._path(*path), "rb")

    def write(self, content: bytes, *path: str) -> None:
        """Put a small object."""
        self.fs.makedirs(self._path(*path[:-1]), exist_ok=True)
        self.fs.pipe_file(self._path(*path), content)

    def delete(self, *path: str) -> None:
        """Delete an object."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(*path))

    def delete_folder(self, name: str) -> None:
        """Delete an empty folder; object stores have none."""
        with contextlib.suppress(OSError, NotImplementedError):
            self.fs.rmdir(self._path(name))

    def require_space(self, needed: int) -> None:
        """Check nothing: the room in an object store is not known."""

    def prepare(self, name: str, needed: int, run: str | None) -> None:
        """Delete an earlier or interrupted checkpoint of this name, whose files would be read with the new ones."""
        self.remove(name)
        if self.files(name):
            raise FileExistsError(errno.EEXIST, "In the way, and not written by this run", self.address(name))
        if run is not None:
            self.write(run.encode(), name, OWNER)

    def workspace(self, name: str, needed: int) -> Path:
        """A temporary directory of this process (in TMPDIR); raises OSError if there is too little room."""
        require_space(Path(tempfile.gettempdir()), needed)
        return Path(tempfile.mkdtemp(prefix=f"mythos-{name}-"))

    def deliver(self, name: str, file: Path) -> None:
        """Upload the file and delete the local one."""
        self.fs.makedirs(self._path(name), exist_ok=True)
        self.fs.put_file(str(file), self._path(name, file.name))
        file.unlink()

    def size(self, name: str, file: str) -> int:
        """Bytes of an uploaded object."""
        self.fs.invalidate_cache()
        return self.fs.size(self._path(name, file))

    def commit(self, name: str, meta: bytes, marker: bytes) -> None:
        """Put meta.json, then the marker."""
        self.write(meta, name, META)
        self.delete(name, OWNER)  # meta.json contains the id now
        self.write(marker, name, MARKER)
        self.point(name)

    def demote(self, name: str) -> None:
        """Rename the marker."""
        self.fs.mv(self._path(name, MARKER), self._path(name, DAMAGED))


def open_storage(directory: str | Path) -> Storage:
    """The storage of a directory, a file:// URL, or another URL.

    Raises MythosError for a kind of URL that is unknown or whose package is not installed.
    """
    scheme, separator, rest = str(directory).partition("://")
    if not separator:
        return LocalStorage(Path(directory))
    return LocalStorage(Path(rest)) if scheme in ("file", "local") else RemoteStorage(str(directory))


def locate(path: str | Path) -> tuple[Storage, str]:
    """The storage that contains a checkpoint, and the checkpoint's name in it."""
    text = str(path).rstrip("/")
    if "://" not in text:
        return LocalStorage(Path(text).parent), Path(text).name
    root, _, name = text.rpartition("/")
    return open_storage(root), name


def is_step(name: str) -> bool:
    """Whether a name is exactly that of a step's checkpoint, step-NNNNNNNN."""
    number = re.fullmatch(r"step-([0-9]{8,18})", name)
    return number is not None and name == step_name(int(number[1]))


def step_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def run_id(values: dict[str, Any]) -> str | None:
    """The id of the run in meta.json (`run.id`) or in a marker (`run`); None if there is none."""
    run = values.get("run")
    run = run.get("id") if isinstance(run, dict) else run
    return run if isinstance(run, str) else None


def deletion_order(files: Iterable[str]) -> list[str]:
    """The files of a checkpoint that this project wrote: its marker first, the files that name its run last.

    An interrupted deletion then leaves a checkpoint that does not count as complete and is still known to be this
    run's.
    """
    order = (MARKER, "", OWNER, META)
    written = [file for file in files if WRITTEN.fullmatch(file)]
    return sorted(written, key=lambda file: order.index(file if file in order else ""))


def step_of(path: str | Path) -> int:
    """The step in the name of a checkpoint or of its workspace."""
    return int(_last_part(str(path)).removeprefix("step-").removesuffix(".tmp"))


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def checksum(stream: BinaryIO) -> dict[str, int]:
    """Size and CRC-32 of the rest of a stream: `{"bytes": ..., "crc32": ...}`."""
    size = value = 0
    while block := stream.read(BLOCK_BYTES):
        size, value = size + len(block), zlib.crc32(block, value)
    return {"bytes": size, "crc32": value}


def require_space(directory: Path, needed: int) -> None:
    """Raise OSError if a disk has fewer bytes free than needed."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free in {directory}")
