"""Write a page about a run.

The page, report.html in the run directory, contains all its pictures and data, and no script. The run may still be
training; with --watch the page is written again until training ends. docs/report.md explains the page.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mythos.cli.common import command_parser
from mythos.config.model_paths import require_run
from mythos.errors import MythosError

if TYPE_CHECKING:
    from mythos.reports.recorded import RecordedRun

WATCH_SECONDS = 30.0
"""Default of --every. Drawing a page takes a few seconds of a core, which training may need."""
LONGEST_SECONDS = 86_400.0


def parser() -> argparse.ArgumentParser:
    parser = command_parser("report", __doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, or a checkpoint step-* in one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (report.html in the run directory)")
    parser.add_argument("--watch", action="store_true", help="write the page again and again while the run trains")
    parser.add_argument(
        "--every", type=float, metavar="SECONDS", help=f"time between two pages of --watch ({WATCH_SECONDS:g})"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Read the run and write its page. Raises MythosError if it has no records, or the page cannot be written."""
    if options.every is not None and not options.watch:
        raise MythosError("--every: only with --watch, which writes the page again and again")
    if options.every is not None and not 1 <= options.every <= LONGEST_SECONDS:
        raise MythosError(f"--every: got {options.every:g}; give 1 to {LONGEST_SECONDS:,.0f} seconds")
    if options.out is not None:
        check_own_page(options.out)
    if not options.watch:  # a run that has just begun has a lock and no configuration yet
        require_run(options.run)  # before torch is imported, which takes seconds
    from mythos.reports.recorded import open_run

    if options.watch:
        watch(options.run, options.out, WATCH_SECONDS if options.every is None else options.every)
    else:
        print(write(open_run(options.run), options.out))


def write(recorded: RecordedRun, out: Path | None, refresh: float | None = None) -> Path:
    """Write the page of a run; returns its path."""
    from mythos.generation.depth_view import write_page
    from mythos.reports.page import run_page

    path = out or recorded.directory / "report.html"
    write_page(path, run_page(recorded, refresh))
    return path


def watch(run: str, out: Path | None, seconds: float) -> None:
    """Write the page every `seconds` until the run's lock is free, and then once more without refreshing.

    Raises MythosError for a run that does not train and has no records.
    """
    from mythos.config.model_paths import run_directory
    from mythos.distributed.run_lock import is_locked
    from mythos.reports.recorded import open_run

    said: str | None = None
    while True:
        # Asked before the records are read, so that the last page has the last record. A run that has just begun has
        # a lock and no configuration yet.
        training = is_locked(run_directory(run) or Path(run))
        try:
            recorded = open_run(run)
        except MythosError as error:
            if not training:
                raise
            line = f"waiting: {error}"  # at first a run has no records
        else:
            path = write(recorded, out, seconds if training else None)
            line = str(path)
        if line != said:
            print(line, flush=True)
            said = line
        if not training:
            print("the run does not train (any more): this page is the last")
            return
        time.sleep(seconds)


def check_own_page(path: Path) -> None:
    """Raise MythosError if the file exists and is not a page of this command."""
    from mythos.reports.page import GENERATOR

    try:
        with path.open("rb") as file:
            begin = file.read(4096)
    except FileNotFoundError:
        return
    except OSError as error:
        raise MythosError(f"{path} cannot be written: {error}; give another file") from error
    if GENERATOR.encode() not in begin:
        raise MythosError(f"{path} exists and is no page of `mythos report`; give another --out, or delete it")
