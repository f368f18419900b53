"""Watchdog: reports where a process makes no progress."""

import faulthandler
import logging
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Self

logger = logging.getLogger(__name__)


class Watchdog:
    """Reports when this process makes no progress, and where. A context manager with a thread of its own."""

    def __init__(self, directory: Path, rank: int, seconds: float) -> None:
        """After `seconds` without a :meth:`beat`, write the stacks of all threads to `directory`/rank-<number>.txt."""
        self._path, self._rank, self._seconds = directory / f"rank-{rank:05}.txt", rank, seconds
        self._last = (time.monotonic(), "starting")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Record progress and the activity that begins now, e.g. ``step 12: backward``. Cheap."""
        # One assignment, so that the thread never reads the time of one activity with the text of another.
        self._last = (time.monotonic(), doing)

    @property
    def doing(self) -> str:
        """The activity that began last."""
        return self._last[1]

    def __enter__(self) -> Self:
        self.beat(self.doing)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        reported = None
        while not self._over.wait(min(1.0, self._seconds / 4)):
            last = self._last
            if last is not reported and time.monotonic() - last[0] >= self._seconds:
                reported = last
                self._report(*last)

    def _report(self, began: float, doing: str) -> None:
        seconds = time.monotonic() - began
        since = datetime.fromtimestamp(time.time() - seconds)
        stall = f"rank {self._rank} has made no progress since {since:%H:%M:%S} ({seconds:.0f} s) in: {doing}"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                print(f"\n{datetime.now().isoformat(timespec='seconds')} {stall}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            logger.warning("%s; its stacks: %s", stall, self._path)
        except OSError as error:
            logger.warning("%s; its stacks cannot be written: %s", stall, error)
