"""Write a page about a run: python scripts/report.py RUN [--out FILE].

The page, report.html in the run directory, needs no other file, no script and no network. The run may still be
training. docs/report.md tells what is on it.
"""

import argparse
import sys
from pathlib import Path

from mythos.command_line import exit_status
from mythos.depth_view import write_page
from mythos.reports.page import run_page
from mythos.reports.recorded import open_run


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run directory, or a checkpoint step-* in one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (report.html in the run directory)")
    return exit_status(lambda: report(parser.parse_args(arguments)))


def report(options: argparse.Namespace) -> None:
    """Read, draw, write. Raises MythosError for what is no run with records, or cannot be written."""
    run = open_run(options.run)
    path = options.out or run.directory / "report.html"
    write_page(path, run_page(run))
    print(path)


if __name__ == "__main__":
    sys.exit(main())
