"""The command `mythos`: one module per subcommand, with `parser()` and `run(options)`, or `main(arguments)`.

The modules import torch and other slow packages only while a command runs, so that help and errors appear at once.
"""

import argparse
import sys
from importlib import import_module
from types import ModuleType

from mythos import __version__
from mythos.cli.common import CommandParser, exit_status, quiet_without_reader
from mythos.config.checking import suggestion

GROUPS = {
    "train a model": ("train", "tokenizer", "tokenize", "configs", "presets"),
    "use a model": ("generate", "chat", "export", "import", "retrofit"),
    "measure": ("sweep", "evaluate", "reasoning", "claims", "estimate", "gpu-check"),
    "look at runs": ("runs", "report", "compare"),
    "set up the shell": ("completion",),
}
"""The commands, by what they are for, in the order of the help text."""
COMMANDS = tuple(name for names in GROUPS.values() for name in names)

HINTS = dict.fromkeys(("resume", "continue", "restart"), "`mythos train runs/NAME` continues a run")
"""What to do instead of commands that people expect."""

USAGE = "mythos COMMAND [arguments]"
HELP_FOOTER = """`mythos COMMAND --help` explains a command, `mythos train --help SECTION` a section of the
configuration; `mythos --version` prints the version."""


def command(name: str) -> ModuleType:
    """Import the module of a command."""
    module = "import_model" if name == "import" else name.replace("-", "_")  # `import` is a keyword
    return import_module(f"{__name__}.{module}")


def parser() -> argparse.ArgumentParser:
    """Build one parser with all commands and options, for shell completion; `main` uses each command's own."""
    root = CommandParser(prog="mythos", usage=USAGE)
    root.add_argument("--version", action="version", version=f"mythos {__version__}", help="print the version")
    commands = root.add_subparsers(metavar="COMMAND")
    for name in COMMANDS:
        own = command(name).parser()
        commands.add_parser(name, parents=[own], add_help=False, help=summary(own), description=own.description)
    return root


def summary(parser: argparse.ArgumentParser) -> str:
    """Return the first line of a command's description."""
    return (parser.description or "").partition("\n")[0].rstrip(".")


def overview() -> str:
    """List all commands by group, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"usage: {USAGE}", "", "Pretraining of recurrent-depth (looped) transformers.", ""]
    for group, names in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:<{width}}  {summary(command(name).parser())}" for name in names), ""]
    return "\n".join([*lines, HELP_FOOTER])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for an unknown command, as for unknown options."""
    return quiet_without_reader(lambda: run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Do the work of :func:`main`."""
    if not arguments or arguments[0] in ("--help", "-h"):
        return exit_status(lambda: print(overview()))
    name, *rest = arguments
    if name in COMMANDS:
        module = command(name)
        if hasattr(module, "main"):  # a command with messages or exit statuses of its own
            return module.main(rest)
        reader = module.parser()
        # Options may stand between positional arguments. Mixed so, Python 3.11 forgets that what follows "--" is none.
        parse = reader.parse_args if "--" in rest else reader.parse_intermixed_args
        return exit_status(lambda: module.run(parse(rest)))
    if name.startswith("-"):
        parser().parse_args(arguments)  # prints the version, or reports an unknown option
    hint = HINTS.get(name) or suggestion(name, list(COMMANDS))
    print(f"error: mythos {name}: no such command; {hint}", file=sys.stderr)
    return 2
