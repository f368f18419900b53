"""Write a page about a run.

The page, report.html in the run directory, needs no other file, no script and no network. The run may still be
training. docs/report.md tells what is on it.
"""

import argparse
from pathlib import Path

from mythos.cli.common import CommandParser, exit_status


def parser(prog: str = "mythos report") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", metavar="RUN", help="run directory, or a checkpoint step-* in one")
    made.add_argument("--out", type=Path, metavar="FILE", help="page to write (report.html in the run directory)")
    return made


def main(arguments: list[str], prog: str = "mythos report") -> int:
    """Run the command line; returns the exit status."""
    options = parser(prog).parse_args(arguments)
    return exit_status(lambda: report(options))


def report(options: argparse.Namespace) -> None:
    """Read, draw, write. Raises MythosError for what is no run with records, or cannot be written."""
    from mythos.generation.depth_view import write_page
    from mythos.reports.page import run_page
    from mythos.reports.recorded import open_run

    run = open_run(options.run)
    path = options.out or run.directory / "report.html"
    write_page(path, run_page(run))
    print(path)
