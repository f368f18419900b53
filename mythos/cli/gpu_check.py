"""Check on this machine's GPUs what only a GPU can show, and write a report.

Kernels against references, waits and recompiles, training against the CPU, memory against the plan, speed, decoding,
several GPUs. Each check has an expected and a measured value and a verdict (ok, off, failed, not run). Needs no network
and no data, and continues after a failure. Without a GPU the same checks run on the CPU at tiny size. The exit status
is 1 if a check is off or failed.
"""

import argparse
from pathlib import Path

from mythos.cli.common import command_parser, exit_status
from mythos.errors import MythosError

MINUTES = 8.0


def parser() -> argparse.ArgumentParser:
    parser = command_parser("gpu-check", __doc__)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("gpu-check"), help="folder of the report (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, metavar="N", default=MINUTES, help="time for all checks (%(default)g)")
    parser.add_argument("--list", action="store_true", help="print the checks with their expected values; run none")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    unexpected = False

    def run() -> None:
        nonlocal unexpected
        unexpected = check(options)

    return exit_status(run) or int(unexpected)


def check(options: argparse.Namespace) -> bool:
    """Run or list the checks; return whether one is off or failed.

    Raises MythosError if the minutes are not above 0, or the folder cannot be written.
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
