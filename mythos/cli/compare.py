"""Compare runs by tokens, FLOPs and loops.

Writes compare.html (a page), compare.png (losses) and compare.csv (one line per run), and prints the table. Files of
the same runs are replaced; beside files of other runs they are called compare-2 and so on. docs/report.md explains
them.
"""

import argparse
from pathlib import Path

from mythos.cli.common import command_parser
from mythos.config.model_paths import require_run
from mythos.files.local import writing


def parser() -> argparse.ArgumentParser:
    parser = command_parser("compare", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run directories, or checkpoints step-* in them")
    parser.add_argument("--out", type=Path, default=Path("compare"), metavar="DIR", help="output folder (compare/)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Read, compare, write and print. Raises MythosError for runs that cannot be read or compared, and for `--out`."""
    for path in options.runs:
        require_run(path)  # before torch is imported, which takes seconds
    from mythos.generation.depth_view import write_page
    from mythos.reports.comparison import compare
    from mythos.reports.comparison_page import comparison_page

    comparison = compare(options.runs)
    with writing(options.out):
        paths = comparison.write(options.out)
    page = paths[0].with_suffix(".html")
    write_page(page, comparison_page(comparison))
    print(comparison.table())
    for note in comparison.notes():
        print(f"note: {note}")
    print("\n" + "\n".join(map(str, [page, *paths])))
