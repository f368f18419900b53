"""List the configurations that come with mythos, or print one to edit it.

`%(prog)s quickstart > my.yaml` copies one. Commands that take a configuration take these names as well.
"""

import argparse
import itertools
import re

from mythos.cli.common import CommandParser, exit_status
from mythos.config.checking import suggestion
from mythos.config.loading import packaged_configs
from mythos.errors import MythosError


def parser(prog: str = "mythos configs") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", nargs="?", metavar="NAME", help="the configuration to print (without: list all)")
    return made


def main(arguments: list[str], prog: str = "mythos configs") -> int:
    """Run the command line; returns the exit status."""
    options = parser(prog).parse_args(arguments)
    return exit_status(lambda: show(options.config))


def show(name: str | None) -> None:
    """Print one as it stands, or all names with what each begins with. Raises MythosError for a name there is not."""
    known = packaged_configs()
    if name is None:
        width = max(map(len, known))
        for title, path in known.items():
            print(f"{title:<{width}}  {first_sentence(path.read_text(encoding='utf-8'))}")
    elif name in known:
        print(known[name].read_text(encoding="utf-8"), end="")
    else:
        raise MythosError(f"{name}: no configuration of this name; {suggestion(name, list(known))}")


def first_sentence(text: str) -> str:
    """Of the comment that a configuration opens with."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return re.split(r"\. |: mythos |\.$", " ".join(line.removeprefix("#").strip() for line in comment))[0]
