"""Check on this machine's GPUs what only a GPU can show, and write a report.

Kernels against references, waits and recompiles, training against the CPU, memory against the plan, speed, decoding,
several GPUs: each check as expected, measured, verdict (ok, off, failed, not run). Needs no network and no data, and
goes on after each failure. Without a GPU the same checks run on the CPU at tiny size. Exit status 1 if a check is off
or failed.
"""

import argparse
from pathlib import Path

from mythos.cli.common import CommandParser, exit_status
from mythos.errors import MythosError

MINUTES = 8.0


def parser(prog: str = "mythos gpu-check") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, metavar="DIR", default=Path("gpu-check"), help="for the report (%(default)s)")
    made.add_argument("--minutes", type=float, metavar="N", default=MINUTES, help="for all checks (%(default)g)")
    made.add_argument("--list", action="store_true", help="print the checks and what is expected, and run none")
    return made


def main(arguments: list[str], prog: str = "mythos gpu-check") -> int:
    """Run the command line; returns the exit status."""
    options = parser(prog).parse_args(arguments)
    unexpected = False

    def run() -> None:
        nonlocal unexpected
        unexpected = check(options)

    return exit_status(run) or int(unexpected)


def check(options: argparse.Namespace) -> bool:
    """Run or list the checks; returns whether one is off or failed.

    Raises MythosError for minutes that are not above 0, and for a folder that cannot be written.
    """
    from mythos.gpu_check.catalog import table
    from mythos.gpu_check.report import Report
    from mythos.gpu_check.runner import Runner

    if options.list:
        print(table())
        return False
    if not 0 < options.minutes < float("inf"):
        raise MythosError(f"--minutes: got {options.minutes:g}; give a number above 0, e.g. {MINUTES:g}")
    try:
        report = Report(options.out)
        runner = Runner(report, options.minutes)
    except OSError as error:
        raise MythosError(f"--out: {options.out} cannot be written: {error.strerror}. Give another folder.") from error
    runner.run()
    print(f"\n{report.summary()}\nreport      {options.out / 'report.md'}, {options.out / 'report.json'}")
    return report.unexpected
