"""Compare runs by tokens, by the FLOPs needed and by loops.

Writes compare.png (their losses) and compare.csv (a line for each run), and
prints the table. docs/report.md tells how to read them.
"""

import argparse
from pathlib import Path

from mythos.cli.common import CommandParser, exit_status, writing


def parser(prog: str = "mythos compare") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="*", metavar="RUN", help="run directories, or checkpoints step-* in them")
    made.add_argument("--out", type=Path, default=Path("compare"), metavar="DIR", help="folder to write to (compare/)")
    return made


def main(arguments: list[str], prog: str = "mythos compare") -> int:
    """Run the command line; returns the exit status."""
    options = parser(prog).parse_args(arguments)
    return exit_status(lambda: report(options))


def report(options: argparse.Namespace) -> None:
    """Read, write, print. Raises MythosError for runs that cannot be read, compared or written about."""
    from mythos.reports.comparison import compare

    comparison = compare(options.runs)
    with writing(options.out):
        written = comparison.write(options.out)
    print(comparison.table())
    for note in comparison.notes():
        print(f"note: {note}")
    print("\n" + "\n".join(map(str, written)))
