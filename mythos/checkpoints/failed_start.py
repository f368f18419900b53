"""Clean-up after a run that could not start, so that its directory is not taken for a run."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mythos.checkpoints.ownership import LOCK
from mythos.config.inherited import RUN_FILE
from mythos.config.sections import Config
from mythos.distributed.run_lock import LOCK_FILE, is_held


@contextlib.contextmanager
def removed_if_it_fails(config: Config) -> Iterator[None]:
    """Remove the lock files and empty folders that the block created if it raises: the start of a run, on rank 0.

    Nothing else is removed: no lock of another process, no folder or lock file that was there before, and no lock of a
    run that has begun (with a config.yaml), which stores the run's id.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    run_dir = config.run_dir
    place = str(config.checkpoints_dir)
    folders = [run_dir] if "://" in place else [Path(place), run_dir]
    lock = run_dir / LOCK_FILE
    had_lock = lock.exists()
    created = [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the error of the start is the one to report
            for folder in folders:
                if is_held(folder / LOCK):
                    (folder / LOCK).unlink(missing_ok=True)
            if is_held(lock) and not had_lock and not (run_dir / RUN_FILE).exists():
                lock.unlink()
        for folder in created:  # inner folders come first
            with contextlib.suppress(OSError):  # not empty, or not created after all
                folder.rmdir()
        raise
