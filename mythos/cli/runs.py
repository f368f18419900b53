"""List the runs in a folder, or delete some.

mythos runs                 lists the runs below runs/: state, step, last loss, tokens, size on disk
mythos runs rm RUN ...      deletes run directories, after a question

A run is training (a process has its lock), finished (the checkpoint of its last step exists) or stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mythos.cli.common import command_parser
from mythos.errors import MythosError

if TYPE_CHECKING:
    from mythos.reports.listing import ListedRun


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command, for `parse_intermixed_args`."""
    parser = command_parser("runs", __doc__, usage="%(prog)s [rm RUN ...] [options]")
    parser.add_argument("action", nargs="?", choices=["list", "rm"], default="list", help="list (default) or rm")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs to delete, by name or path")
    parser.add_argument("--dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs (runs/)")
    parser.add_argument("--yes", "-y", action="store_true", help="delete without a question")
    return parser


def run(options: argparse.Namespace) -> None:
    """List or delete. Raises MythosError for wrong names, and for files that cannot be read or deleted."""
    from mythos.reports.listing import find_runs, list_run, table

    if options.action == "rm":
        return delete(options.runs, options.dir, options.yes)
    if options.runs or options.yes:
        raise MythosError(
            "mythos runs: it lists all runs and takes no names and no --yes; `mythos runs rm RUN` deletes"
        )
    runs = [list_run(options.dir, directory) for directory in find_runs(options.dir)]
    print(table(runs) if runs else f"no runs below {options.dir}")
    for each in runs:
        if each.problem:
            print(f"note: {each.problem}", file=sys.stderr)
    return None


def delete(names: list[str], root: Path, yes: bool) -> None:
    """Delete runs, all of which are checked first. Raises MythosError without a terminal, unless `yes`."""
    from mythos.reports.listing import delete_run, list_run, run_to_delete, shown_size, table

    if not names:
        raise MythosError("mythos runs rm: got no runs; give names from `mythos runs`")
    directories = list(dict.fromkeys(run_to_delete(root, name) for name in names))
    runs: list[ListedRun] = [list_run(Path(os.path.abspath(root)), directory) for directory in directories]
    print(table(runs))
    for each in runs:
        if each.other_checkpoints:
            print(f"note: {each.name}: its checkpoints in {each.other_checkpoints} stay")
    size = shown_size(sum(each.size for each in runs))
    if not yes and not answered_yes(f"Delete {'these runs' if len(runs) > 1 else 'this run'} ({size})? [y/N] "):
        print("nothing is deleted")
        return
    for each in runs:
        delete_run(each.directory)
        print(f"deleted {each.directory}")


def answered_yes(question: str) -> bool:
    """Ask at the terminal. Raises MythosError if there is none."""
    if not sys.stdin.isatty():
        raise MythosError("mythos runs rm: there is no terminal to ask at; give --yes to delete without a question")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
