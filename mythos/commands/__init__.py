"""The command `mythos`: a module for each of its commands, with `parser(prog)` and `main(arguments, prog)`.

These modules import torch, and whatever else takes long, only in what runs a command: help and errors come at once.
"""

import argparse
import sys
from importlib import import_module
from types import ModuleType

from mythos import __version__

COMMANDS = {
    "train": "train",
    "generate": "generate",
    "sweep": "sweep",
    "evaluate": "evaluate",
    "reasoning": "reasoning",
    "export": "export_hf",
    "import": "import_hf",
    "retrofit": "retrofit_hf",
    "estimate": "estimate",
    "report": "report",
    "compare": "compare",
    "presets": "presets",
    "configs": "configs",
    "tokenize": "tokenize",
    "tokenizer": "tokenizer",
    "completion": "completion",
}
"""Commands in the order that they are listed in, and their modules in this package."""


def command(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"{__name__}.{COMMANDS[name]}")


def parser() -> argparse.ArgumentParser:
    """The whole command line, every command with its options; commands are run by their own parsers, see `main`."""
    made = argparse.ArgumentParser(
        prog="mythos",
        usage="mythos COMMAND [arguments]",
        description="Pretraining of recurrent-depth (looped) transformers.",
        epilog="`mythos COMMAND --help` explains a command, `mythos train --help SECTION` the fields of a section.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
    )
    made.add_argument("--version", action="version", version=f"mythos {__version__}")
    commands = made.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        own = command(name).parser()
        summary = own.description.partition("\n")[0].rstrip(".")
        commands.add_parser(name, parents=[own], add_help=False, help=summary, description=own.description)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        return command(given[0]).main(given[1:])
    if given and not given[0].startswith("-"):
        from mythos.schema import suggestion

        print(
            f"error: mythos {given[0]}: there is no such command; {suggestion(given[0], list(COMMANDS))}",
            file=sys.stderr,
        )
        return 2
    made = parser()
    made.parse_args(given)
    made.print_help()
    return 0
