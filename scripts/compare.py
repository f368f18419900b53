"""Compare runs: python scripts/compare.py RUN RUN ... [--out DIR].

Writes compare.png (losses by tokens, by the FLOPs needed and by loops) and compare.csv (a line for each run), and
prints the table. docs/report.md tells how to read them.
"""

import argparse
import sys
from pathlib import Path

from mythos.command_line import exit_status, writing
from mythos.reports.comparison import compare


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run directories, or checkpoints step-* in them")
    parser.add_argument(
        "--out", type=Path, default=Path("compare"), metavar="DIR", help="folder to write to (compare/)"
    )
    return exit_status(lambda: report(parser.parse_args(arguments)))


def report(options: argparse.Namespace) -> None:
    """Read, write, print. Raises MythosError for runs that cannot be read, compared or written about."""
    comparison = compare(options.runs)
    with writing(options.out):
        written = comparison.write(options.out)
    print(comparison.table())
    for note in comparison.notes():
        print(f"note: {note}")
    print("\n" + "\n".join(map(str, written)))


if __name__ == "__main__":
    sys.exit(main())
