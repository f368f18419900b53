"""Measure what this machine reaches.

python scripts/benchmark.py train SIZE|CONFIG.yaml [key.path=value ...] [--against open-mythos]
python scripts/benchmark.py model SIZE|CONFIG.yaml [key.path=value ...]
python scripts/benchmark.py scaling SIZE|CONFIG.yaml [key.path=value ...]
python scripts/benchmark.py decode RUN|SIZE|CONFIG.yaml [--loops N,N] [--batch N,N] [--halting RULE]
python scripts/benchmark.py traffic SIZE|CONFIG.yaml [key.path=value ...] [--rows N] [--length N]
python scripts/benchmark.py data CONFIG.yaml [key.path=value ...]
python scripts/benchmark.py checkpoint [--preset NAME] [--vocabulary N] [--directory DIR]
python scripts/benchmark.py validations [CONFIG.yaml] [key.path=value ...] [--count N]

A SIZE is a preset, or one of those in docs/performance.md: reference, reference-64, wide. Every benchmark prints a
table and writes its figures, with a description of the machine, to benchmarks/NAME.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path contains only its own folder

from mythos.cli.common import exit_status
from scripts.benchmarks import (
    checkpoint,
    data,
    decode,
    model,
    scaling,
    timing,
    traffic,
    train,
    validations,
)

BENCHMARKS = {
    module.__name__.rpartition(".")[2]: module
    for module in (train, model, scaling, decode, data, checkpoint, traffic, validations)
}

ALL_CORES = {"data", "checkpoint"}
"""Benchmarks of work that runs in parallel with training, which a single core would not show."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        default = "all" if name in ALL_CORES else "the first"
        command.add_argument("--cores", metavar="N,N,...", help=f"cores to use, a thread on each ({default})")
        command.add_argument("--json", type=Path, metavar="FILE", help=f"where figures go (benchmarks/{name}.json)")
    if arguments and arguments[0] in BENCHMARKS:
        # Allow overrides between options, which a parser with subcommands does not support itself.
        options = commands.choices[arguments[0]].parse_intermixed_args(arguments[1:])
        return exit_status(lambda: measure(arguments[0], options, arguments[1:]))
    parser.parse_args(arguments)  # prints help or the error
    return 0


def measure(what: str, options: argparse.Namespace, arguments: list[str]) -> None:
    """Run one benchmark and write its figures. Raises MythosError for anything that cannot be measured."""
    if options.cores is not None:
        timing.pin(timing.core_numbers(options.cores))
    elif what not in ALL_CORES:
        timing.pin(timing.usable_cores()[:1])
    path = options.json or Path("benchmarks") / f"{what}.json"
    timing.check_writable(path)
    timing.write_report(path, what, arguments, BENCHMARKS[what].run(options))
    print(f"figures: {path}")


if __name__ == "__main__":
    sys.exit(main())
