"""List run directories with their state and size, and delete them. Imports no torch."""

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mythos.config.checking import suggestion
from mythos.config.inherited import RUN_FILE
from mythos.config.loading import load_config
from mythos.config.sections import Config
from mythos.distributed.run_lock import LOCK_FILE, RunLock, is_locked
from mythos.errors import MythosError, short_reason, without_credentials
from mythos.files.storage import LocalStorage, step_of
from mythos.progress import aligned
from mythos.training.metrics import METRICS_FILE, scan_metrics

CHECKPOINTS = "checkpoints"
TITLES = ("run", "state", "step", "loss", "tokens", "size", "last record")


@dataclass(frozen=True)
class ListedRun:
    """What the files of a run directory say about the run."""

    name: str
    """Path below the folder of runs."""
    directory: Path
    training: bool
    config: Config | None
    """None if it cannot be read."""
    problem: str
    """Why the configuration or the records cannot be read; empty if they can."""
    last: dict[str, Any]
    """The newest value of each metric; empty without records."""
    size: int
    """Bytes on disk."""

    @property
    def state(self) -> str:
        """training, finished, stopped, or unreadable."""
        if self.training:
            return "training"
        if self.config is None:
            return "unreadable"
        return "finished" if self.last.get("step", 0) >= self.config.train_steps and self._is_saved() else "stopped"

    @property
    def other_checkpoints(self) -> str | None:
        """Where its checkpoints are, if outside of its directory, for people."""
        place = self.config.checkpoint.dir if self.config else None
        if place is None or Path(os.path.realpath(place)).is_relative_to(os.path.realpath(self.directory)):
            return None
        return without_credentials(str(place))

    def _is_saved(self) -> bool:
        """Whether the checkpoint of the last step exists; true for one in an object store, which is not asked."""
        assert self.config is not None
        place = str(self.config.checkpoint.dir or self.directory / CHECKPOINTS)
        try:
            complete = [] if "://" in place else LocalStorage(Path(place)).complete()
        except OSError:
            return False
        return "://" in place or any(step_of(name) >= self.config.train_steps for name in complete)

    def cells(self) -> list[str]:
        """The cells under TITLES."""
        last, steps = self.last, f"/{self.config.train_steps}" if self.config else ""
        time = ""
        with suppress(KeyError, ValueError, OverflowError, OSError):  # no time, or none that a calendar has
            time = f"{datetime.fromtimestamp(last['time']):%Y-%m-%d %H:%M}"
        return [
            # The name of a folder may contain commands to the terminal.
            "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in self.name),
            self.state,
            f"{last.get('step', 0)}{steps}",
            f"{last['loss']:.4f}" if last.get("loss") is not None else "",
            f"{last['tokens']:,}" if last.get("tokens") is not None else "",
            shown_size(self.size),
            time,
        ]


def is_run_directory(folder: Path) -> bool:
    """Whether a folder has a run's configuration, and something else that only a run writes."""
    return (folder / RUN_FILE).is_file() and any(
        os.path.lexists(folder / name) for name in (LOCK_FILE, METRICS_FILE, CHECKPOINTS)
    )


def find_runs(root: Path) -> Iterator[Path]:
    """Yield the run directories below a folder by name; links are followed at the run directory itself only.

    Raises MythosError if the folder does not exist or cannot be read.
    """
    if not root.is_dir():
        raise MythosError(f"{root} is not a folder; give the folder of your runs with --dir")

    def refuse(error: OSError) -> None:
        raise MythosError(f"{error.filename} cannot be read: {error.strerror}") from error

    for place, folders, _ in os.walk(root, onerror=refuse):
        runs = [name for name in sorted(folders) if is_run_directory(Path(place, name))]
        yield from (Path(place, name) for name in runs)
        folders[:] = sorted(set(folders) - set(runs))


def list_run(root: Path, directory: Path) -> ListedRun:
    """Read a run directory; what cannot be read is in its `problem`."""
    training = is_locked(directory)
    config, problems, last = None, [], {}
    try:
        config = load_config(directory, to_train=False)
    except MythosError as error:
        problems.append(str(error))
    try:
        records, damaged = scan_metrics(directory / METRICS_FILE)
        problems += [f"{directory / METRICS_FILE}: {line}" for line in damaged[:1]]
        last = {key: value for record in records for key, value in record.items() if value is not None}
    except OSError as error:
        problems.append(f"{directory / METRICS_FILE} cannot be read: {short_reason(error)}")
    name = directory.relative_to(root).as_posix()
    return ListedRun(name, directory, training, config, "; ".join(problems), last, size_on_disk(directory))


def size_on_disk(folder: Path) -> int:
    """Bytes that a folder takes on its disk, as `du` counts them. Files that vanish meanwhile are left out."""
    seen = {}
    for place, folders, files in os.walk(folder):
        for path in [place, *(os.path.join(place, name) for name in (*folders, *files))]:
            try:
                status = os.lstat(path)
            except OSError:
                continue
            seen[status.st_dev, status.st_ino] = 512 * status.st_blocks  # POSIX counts blocks of 512 bytes
    return sum(seen.values())


def shown_size(size: float) -> str:
    """A number of bytes for people, e.g. 12.3 MiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:,.1f} {units[0]}"


def table(runs: Sequence[ListedRun]) -> str:
    """The runs as a table for a terminal."""
    return aligned([TITLES, *(run.cells() for run in runs)], left=2)


def run_to_delete(root: Path, name: str) -> Path:
    """The run directory that a name, or a path below `root`, stands for.

    Raises MythosError for what is no run directory below `root`, for links, a run that trains, and a directory that
    contains further runs.
    """
    base = Path(os.path.abspath(root))
    path = next((p for p in (base / name, Path(name)) if os.path.lexists(p)), None)
    if path is None:
        known = [run.relative_to(root).as_posix() for run in find_runs(root)]
        advice = suggestion(name, known) if known else "there is none at all; give the folder of the runs with --dir"
        raise MythosError(f"{name}: there is no such run below {root}; {advice}")
    path = Path(os.path.abspath(path))
    if base not in path.parents:
        raise MythosError(f"{name}: it is not below {root}; give the folder of its runs with --dir")
    if Path(os.path.realpath(path)) != Path(os.path.realpath(base)) / path.relative_to(base):
        raise MythosError(f"{name}: it is or is behind a link, to {os.path.realpath(path)}; delete the link with rm")
    if not is_run_directory(path):
        raise MythosError(
            f"{name}: {path} is no run directory, with {RUN_FILE} and {METRICS_FILE} or {CHECKPOINTS}/; only runs are "
            "deleted"
        )
    if is_locked(path):
        raise MythosError(f"{name}: the run trains; end it first")
    if inner := next(find_runs(path), None):
        raise MythosError(f"{name}: it contains another run, {inner}; move or delete that first")
    return path


def delete_run(directory: Path) -> None:
    """Delete a run directory, under its lock. Links in it are deleted, and not what they point to.

    Raises MythosError if a job has begun to train there, or a file cannot be deleted.
    """
    # Renamed first, so that no half of a run keeps its name if this process is killed.
    remains = directory.with_name(f".{directory.name}.deleted-{secrets.token_hex(4)}")
    with RunLock(directory, patience=0.0):
        try:
            directory.rename(remains)
        except OSError as error:
            raise MythosError(f"{directory} cannot be deleted: {error}") from error
        try:
            shutil.rmtree(remains)
        except OSError as error:
            raise MythosError(f"{directory} is not deleted completely: {error}; the rest is in {remains}") from error
