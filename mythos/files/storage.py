"""Where checkpoints lie: a local directory, or a URL of fsspec (s3://, gs://, memory://, ...).

Both kinds keep one promise: a checkpoint `step-N` counts once the file `committed` is in it, which is written last.
"""

import contextlib
import errno
import json
import logging
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
from mythos.files.local import open_regular

logger = logging.getLogger(__name__)

MARKER = "committed"
META = "meta.json"
LATEST = "latest"
DAMAGED = "damaged"
"""What the marker is renamed to once the checkpoint was found damaged."""
OWNER = "owner"
"""File of a directory that is being written: the id of the run that does. Later meta.json and the marker name it."""

WRITTEN = re.compile(r"shard-\d{5,}-.*\.safetensors|meta\.json|committed|damaged|owner|(meta\.json|committed)\.tmp")
"""Names of the files that this project writes into the directory of a checkpoint; no others are ever deleted."""

BLOCK_BYTES = 1 << 20
"""Read at once for a checksum; zlib lets other threads run meanwhile."""


class Origin(NamedTuple):
    """Who wrote a checkpoint, as its files tell: meta.json, the marker, and while it is written the file `owner`.

    One of them may be damaged, so what each tells counts.
    """

    runs: set[str]
    """Ids of runs; none in checkpoints of versions that knew no ids."""
    steps: set[int]
    meta: dict[str, Any]
    """meta.json; empty where it cannot be read."""


class Storage(ABC):
    """A folder of checkpoints. Methods raise OSError, or what the library of a remote file system raises.

    What is deleted is this run's own: a directory (no link to one) whose name is exactly `step-NNNNNNNN`, whose files
    are :attr:`owned` and, where it is complete, name that step; and in it, files of the names that checkpoints have.
    """

    def __init__(self) -> None:
        self.owned: Callable[[Origin], bool] = lambda origin: not origin.runs
        """Whether what :meth:`origin` tells is this run; at first, what tells of no run."""
        self._known: set[str] = set()  # this run's, as pruning found: a remote one need not be read at every save

    @abstractmethod
    def address(self, name: str) -> Path | str:
        """Where the checkpoint `name` is, as people give it."""

    @abstractmethod
    def names(self) -> list[str]:
        """Every name that is exactly step-NNNNNNNN, complete or not."""

    @abstractmethod
    def is_directory(self, name: str) -> bool:
        """Whether a name is a directory of this storage itself, not a link or a file."""

    @abstractmethod
    def files(self, name: str) -> list[str]:
        """Names of what is in a checkpoint's directory; empty where there is none."""

    @abstractmethod
    def probe(self, key: str) -> None:
        """Write the file `.probe-<key>`, so that what forbids writing is known before it costs anything."""

    @abstractmethod
    def probed(self, key: str) -> bool:
        """Whether this process sees the file that :meth:`probe` wrote, maybe on another machine."""

    @abstractmethod
    def end_probe(self, key: str) -> None:
        """Delete the file that :meth:`probe` wrote."""

    @abstractmethod
    def require_space(self, needed: int) -> None:
        """Raise OSError if it is known that so many bytes do not fit."""

    @abstractmethod
    def exists(self, name: str, file: str) -> bool:
        """Whether the checkpoint has that file."""

    @abstractmethod
    def open(self, name: str, file: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file of a checkpoint, to read."""

    @abstractmethod
    def prepare(self, name: str, needed: int, run: str | None) -> None:
        """Make room for a checkpoint of `needed` bytes in all; one process does, before any writes.

        `run` is the id of the run that writes it.
        """

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
        """Delete a checkpoint of this run, if it exists; one that is interrupted here no longer counts as complete.

        What is not this run's stays as it is.
        """

    @abstractmethod
    def demote(self, name: str) -> None:
        """Let a damaged checkpoint count no more: the next one that is written takes its place."""

    @abstractmethod
    def point(self, name: str) -> None:
        """Name the newest complete checkpoint in the file `latest`."""

    def complete(self) -> list[str]:
        """Names of the committed checkpoints, oldest first."""
        return sorted((name for name in self.names() if self.exists(name, MARKER)), key=step_of)

    def read(self, name: str, file: str) -> bytes:
        """A whole file of a checkpoint."""
        with self.open(name, file) as stream:
            return stream.read()

    def origin(self, name: str) -> Origin | None:
        """Who wrote a checkpoint; None for a directory without any file that could tell."""
        runs: set[str] = set()
        steps: set[Any] = set()
        meta: dict[str, Any] = {}
        told = False
        for file in (META, OWNER, DAMAGED, MARKER):
            try:
                content = self.read(name, file)
                values = {"run": content.decode()} if file == OWNER else json.loads(content)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, RecursionError):
                values = None
            told = True
            if isinstance(values, dict):
                meta = values if file == META else meta
                runs |= {run} if (run := run_id(values)) else set()
                steps |= {step} if isinstance(step := values.get("step"), int) else set()
        return Origin(runs, steps, meta) if told else None

    def is_own(self, name: str) -> bool:
        """Whether a checkpoint may be deleted by this run; see the class."""
        if not self.is_directory(name):
            return False
        origin = self.origin(name)
        if origin is None:  # of a killed save by a version that knew no ids: shards alone
            return self.owned(Origin(set(), set(), {})) and all(map(WRITTEN.fullmatch, self.files(name)))
        # A complete one under another step's name is somebody's copy.
        copied = bool(origin.steps) and step_of(name) not in origin.steps
        return self.owned(origin) and not (copied and is_step(name) and self.exists(name, MARKER))

    def prune(self, keep: int, keep_every: int) -> None:
        """Remove all but the newest `keep` checkpoints and multiples of `keep_every`, and all that is not complete.

        Of those that are this run's; others do not count.
        """
        names = self.names()
        self._known = {name for name in names if name in self._known or self.is_own(name)}
        complete = sorted((name for name in self._known if self.exists(name, MARKER)), key=step_of)
        kept = {*complete[-keep:], *(name for name in complete if keep_every and step_of(name) % keep_every == 0)}
        for name in names:
            if name not in kept:
                self.remove(name)


class LocalStorage(Storage):
    """A directory that all processes share: written aside, forced to disk, renamed, marked."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def address(self, name: str) -> Path:
        """The checkpoint's directory."""
        return self.root / name

    def names(self) -> list[str]:
        """Every name that is exactly step-NNNNNNNN, complete or not."""
        return [path.name for path in self.root.glob("step-*") if is_step(path.name)]

    def is_directory(self, name: str) -> bool:
        """Whether a name is a directory, not a link or a file."""
        path = self.root / name
        return path.is_dir() and not path.is_symlink()

    def files(self, name: str) -> list[str]:
        """Names of what is in a checkpoint's directory; empty where there is none."""
        path = self.root / name
        return [entry.name for entry in path.iterdir()] if path.is_dir() else []

    def exists(self, name: str, file: str) -> bool:
        """Whether the checkpoint has that file."""
        return (self.root / name / file).exists()

    def open(self, name: str, file: str) -> BinaryIO:
        """A file of a checkpoint, to read; raises OSError for what is not a regular file."""
        return open_regular(self.root / name / file)

    def probe(self, key: str) -> None:
        """Make the directory, and write a file into it as saves will."""
        self.root.mkdir(parents=True, exist_ok=True)
        for path in (self.root / LATEST, self.root / f"{LATEST}.tmp"):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "Is a directory, where a file is to be written", str(path))
        _replace(self.root / f".probe-{key}", b"")

    def probed(self, key: str) -> bool:
        """Whether this process sees the file that a probe wrote."""
        return (self.root / f".probe-{key}").exists()

    def end_probe(self, key: str) -> None:
        """Delete the file that a probe wrote."""
        (self.root / f".probe-{key}").unlink(missing_ok=True)

    def require_space(self, needed: int) -> None:
        """Raise OSError if the disk has too little room."""
        require_space(self.root, needed)

    def prepare(self, name: str, needed: int, run: str | None) -> None:
        """Remove what killed saves of this run left; raises OSError where the disk has too little room."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob("step-*.tmp"):
            if is_step(left.name.removesuffix(".tmp")):
                self.remove(left.name)
        require_space(self.root, needed)
        aside = self._aside(name)
        aside.mkdir()
        if run is not None:
            (aside / OWNER).write_text(run)

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
        (aside / OWNER).unlink(missing_ok=True)  # meta.json tells it now
        self.remove(name)  # only now that its replacement is whole
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, "In the way, and not written by this run: move it away", str(final))
        aside.rename(final)
        _sync(self.root)
        _replace(final / MARKER, marker)
        self.point(name)

    def discard(self, name: str, workspace: Path) -> None:
        """Delete the directory that all processes wrote to."""
        shutil.rmtree(workspace, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Delete a checkpoint of this run, its marker first and what tells whose it is last."""
        if not self.is_directory(name):
            return
        for file in deletion_order(self.files(name)) if self.is_own(name) else []:
            (self.root / name / file).unlink()
        with contextlib.suppress(OSError):  # it is not empty: what somebody else has put there stays
            (self.root / name).rmdir()

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

        super().__init__()
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
        """Every name that is exactly step-NNNNNNNN, complete or not."""
        self.fs.invalidate_cache()
        found = (path.rstrip("/").rpartition("/")[2] for path in self.fs.glob(self._path("step-*")))
        return sorted(name for name in found if is_step(name))

    def is_directory(self, name: str) -> bool:
        """Whether a name is a folder, not a link or an object; some file systems of fsspec have links."""
        try:
            about = self.fs.info(self._path(name))
        except FileNotFoundError:
            return False
        return about["type"] == "directory" and not about.get("islink")

    def files(self, name: str) -> list[str]:
        """Names of what is in a checkpoint's folder; empty where there is none."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self._path(name), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def probe(self, key: str) -> None:
        """Put an object, as saves will."""
        self.write_root(f".probe-{key}", b"-")

    def probed(self, key: str) -> bool:
        """Whether this process sees the object that a probe put."""
        self.fs.invalidate_cache()
        return self.fs.exists(self._path(f".probe-{key}"))

    def end_probe(self, key: str) -> None:
        """Delete the object that a probe put."""
        self.remove_root(f".probe-{key}")

    def require_space(self, needed: int) -> None:
        """Nothing is known of the room in an object store."""

    def exists(self, name: str, file: str) -> bool:
        """Whether the checkpoint has that file."""
        return self.fs.exists(self._path(name, file))

    def open(self, name: str, file: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file of a checkpoint, to read."""
        return self.fs.open(self._path(name, file), "rb")

    def prepare(self, name: str, needed: int, run: str | None) -> None:
        """Remove what an earlier or interrupted checkpoint of this name left; its files would be read with the new.

        Raises FileExistsError where another run's checkpoint has the name.
        """
        self.remove(name)
        if self.files(name):
            raise FileExistsError(errno.EEXIST, "In the way, and not written by this run", self.address(name))
        if run is not None:
            self.fs.makedirs(self._path(name), exist_ok=True)
            self.fs.pipe_file(self._path(name, OWNER), run.encode())

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
        if self.exists(name, OWNER):
            self.fs.rm_file(self._path(name, OWNER))
        self.fs.pipe_file(self._path(name, MARKER), marker)
        self.point(name)

    def discard(self, name: str, workspace: Path) -> None:
        """Delete the temporary directory; files that reached the store are removed with the next checkpoint."""
        shutil.rmtree(workspace, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Delete a checkpoint of this run, its marker first and what tells whose it is last."""
        if not self.is_own(name):
            return
        for file in deletion_order(self.files(name)):
            self.fs.rm_file(self._path(name, file))
        # Object stores have no folders, and others refuse to delete one that is not empty.
        with contextlib.suppress(OSError, NotImplementedError):
            self.fs.rmdir(self._path(name))

    def demote(self, name: str) -> None:
        """Rename the marker."""
        self.fs.mv(self._path(name, MARKER), self._path(name, DAMAGED))

    def point(self, name: str) -> None:
        """Replace the object `latest`."""
        self.write_root(LATEST, name.encode())

    def read_root(self, file: str) -> bytes:
        """An object beside the checkpoints. Raises FileNotFoundError where there is none."""
        self.fs.invalidate_cache()
        return self.fs.cat_file(self._path(file))

    def write_root(self, file: str, content: bytes) -> None:
        """Put an object beside the checkpoints."""
        self.fs.makedirs(self.root, exist_ok=True)
        self.fs.pipe_file(self._path(file), content)

    def remove_root(self, file: str) -> None:
        """Delete an object beside the checkpoints, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(file))


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


def is_step(name: str) -> bool:
    """Whether a name is exactly that of a step's checkpoint, step-NNNNNNNN."""
    number = re.fullmatch(r"step-([0-9]{8,18})", name)
    return number is not None and name == step_name(int(number[1]))


def step_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def run_id(values: dict[str, Any]) -> str | None:
    """The id of the run in meta.json, which tells more of it, or in the marker; None where there is none."""
    run = values.get("run")
    run = run.get("id") if isinstance(run, dict) else run
    return run if isinstance(run, str) else None


def deletion_order(files: Iterable[str]) -> list[str]:
    """The files of a checkpoint that this project wrote, its marker first, what tells whose it is last.

    A deletion that is interrupted then leaves what does not count and is still known to be this run's.
    """
    last = (MARKER, "", OWNER, META)
    written = [file for file in files if WRITTEN.fullmatch(file)]
    return sorted(written, key=lambda file: last.index(file if file in last else ""))


def step_of(path: str | Path) -> int:
    """The step in the name of a checkpoint, or of the directory that it is written to."""
    return int(str(path).rstrip("/").rpartition("/")[2].removeprefix("step-").removesuffix(".tmp"))


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
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free in {directory}")


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
