"""List the named model sizes, from 1M to 1T parameters."""

import argparse

from mythos.cli.common import CommandParser, exit_status


def parser(prog: str = "mythos presets") -> argparse.ArgumentParser:
    """The command line."""
    return CommandParser(
        prog=prog,
        description=f"{__doc__}\n\nmodel.preset takes one of them, and `mythos estimate` tells what it costs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(arguments: list[str], prog: str = "mythos presets") -> int:
    """Run the command line; returns the exit status."""
    parser(prog).parse_args(arguments)
    return exit_status(list_presets)


def list_presets() -> None:
    """Print the table."""
    from mythos.config.presets import preset_table  # which builds them all, with torch

    print(preset_table())
