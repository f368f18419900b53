"""Paths of runs, checkpoints and exports on the command line, checked in milliseconds: without torch."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from mythos.config.inherited import CONFIG_FILE, RUN_FILE
from mythos.errors import MythosError, short_reason
from mythos.files.storage import MARKER, is_step


def run_directory(path: str | Path) -> Path | None:
    """The path if it is a run directory, or the one two folders above it, as for a checkpoint; None without one."""
    folder = Path(os.path.abspath(path))
    candidates = [] if "://" in str(path) else [folder, folder.parent.parent]
    return next((candidate for candidate in candidates if (candidate / RUN_FILE).is_file()), None)


def require_run(path: str | Path) -> Path:
    """Return :func:`run_directory` of a path. Raises MythosError if there is no run."""
    try:
        directory = run_directory(path)
        what = f"no {RUN_FILE} in it" if Path(path).exists() else "no such file or folder"
    except OSError as error:
        raise MythosError(f"{path} cannot be read: {short_reason(error)}") from error
    if directory is None:
        raise MythosError(f"{path}: {what}. Give a run directory, e.g. runs/quickstart.{did_you_mean(path)}")
    return directory


def require_model(path: str | Path) -> None:
    """Raise MythosError unless a path is a run directory, a complete checkpoint, an export, or a URL (not opened)."""
    if "://" in str(path):
        return
    folder = Path(path)
    try:
        complete = is_step(folder.name) and (folder / MARKER).exists()
        if complete or any((folder / file).is_file() for file in (CONFIG_FILE, RUN_FILE)):
            return
        problem = "it is not a model" if folder.exists() else "no such file or folder"
    except OSError as error:
        raise MythosError(f"{path} cannot be read: {short_reason(error)}") from error
    if folder.name.startswith("step-"):
        raise incomplete_checkpoint(path)
    raise MythosError(
        f"{path}: {problem}. Give a run directory (with {RUN_FILE}), a checkpoint (checkpoints/step-XXXXXXXX in it), "
        f"or a folder written by `mythos export` (with {CONFIG_FILE}).{did_you_mean(path)}"
    )


def incomplete_checkpoint(path: str | Path) -> MythosError:
    """The error about a path that is no complete checkpoint."""
    return MythosError(
        f"{path} is no complete checkpoint: a folder step-XXXXXXXX with a file '{MARKER}', which is written last."
    )


def did_you_mean(path: str | Path) -> str:
    """A sentence that names the run that a wrong path may mean: runs/NAME, or one with a similar name; or ""."""
    path = Path(path)
    if path.name == str(path) and (Path("runs") / path / RUN_FILE).is_file():
        return f" Did you mean {Path('runs') / path}?"
    nearest = difflib.get_close_matches(path.name, _runs_in(path.parent), n=1)
    return f" Did you mean {path.with_name(nearest[0])}?" if nearest else ""


def _runs_in(folder: Path) -> Iterator[str]:
    """Names of the run directories in a folder; none if it cannot be read."""
    try:
        for entry in folder.iterdir():
            if (entry / RUN_FILE).is_file():
                yield entry.name
    except OSError:
        return
