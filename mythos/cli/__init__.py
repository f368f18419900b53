"""The command `mythos`: a module for each of its commands, with `parser(prog)` and `main(arguments, prog)`.

These modules import torch, and whatever else takes long, only in what runs a command: help and errors come at once.
"""

import argparse
import sys
from importlib import import_module
from types import ModuleType

from mythos import __version__
from mythos.cli.common import CommandParser

COMMANDS = {
    "train": "train",
    "generate": "generate",
    "sweep": "sweep",
    "evaluate": "evaluate",
    "reasoning": "reasoning",
    "export": "export",
    "import": "import_model",
    "retrofit": "retrofit",
    "estimate": "estimate",
    "gpu-check": "gpu_check",
    "report": "report",
    "compare": "compare",
    "presets": "presets",
    "configs": "configs",
    "tokenize": "tokenize",
    "tokenizer": "tokenizer",
    "completion": "completion",
}
"""Commands in the order that they are listed in, and their modules in this package."""

USAGE = "mythos COMMAND [arguments]"
ABOUT = "Pretraining of recurrent-depth (looped) transformers."
MORE = """`mythos COMMAND --help` explains a command, `mythos train --help SECTION` a section of the configuration, and
`mythos --version` tells the version."""


def command(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"{__name__}.{COMMANDS[name]}")


def parser() -> argparse.ArgumentParser:
    """The whole command line, every command with its options; commands are run by their own parsers, see `main`."""
    made = CommandParser(prog="mythos", usage=USAGE)
    made.add_argument("--version", action="version", version=f"mythos {__version__}", help="the version")
    commands = made.add_subparsers(metavar="COMMAND")
    for name in COMMANDS:
        own = command(name).parser()
        commands.add_parser(name, parents=[own], add_help=False, help=summary(own), description=own.description)
    return made


def summary(parser: argparse.ArgumentParser) -> str:
    """What a command does, in a line."""
    return (parser.description or "").partition("\n")[0].rstrip(".")


def overview() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary(command(name).parser())}" for name in COMMANDS]
    return f"usage: {USAGE}\n\n{ABOUT}\n\ncommands:\n" + "\n".join(lines) + f"\n\n{MORE}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for a command that there is not, as for wrong options."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("--help", "-h"):
        print(overview())
        return 0
    if given[0] in COMMANDS:
        return command(given[0]).main(given[1:])
    if given[0].startswith("-"):
        parser().parse_args(given)  # --version, or an option that there is not
    from mythos.config.checking import suggestion

    told = suggestion(given[0], list(COMMANDS))
    print(f"error: mythos {given[0]}: there is no such command; {told}", file=sys.stderr)
    return 2
