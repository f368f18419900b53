"""Write a page about a run.

The page, report.html in the run directory, contains all its pictures and data, and no script. The run may still be
training. docs/report.md explains the page.
"""

import argparse
from pathlib import Path

from mythos.cli.common import command_parser, exit_status
from mythos.config.model_paths import require_run


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = command_parser("report", __doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, or a checkpoint step-* in one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (report.html in the run directory)")
    return parser


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    return exit_status(lambda: run(parser().parse_args(arguments)))


def run(options: argparse.Namespace) -> None:
    """Read the run and write its page. Raises MythosError if it has no records, or the page cannot be written."""
    require_run(options.run)  # before torch is imported, which takes seconds
    from mythos.generation.depth_view import write_page
    from mythos.reports.page import run_page
    from mythos.reports.recorded import open_run

    recorded = open_run(options.run)
    path = options.out or recorded.directory / "report.html"
    write_page(path, run_page(recorded))
    print(path)
