"""List the configurations that come with mythos, or print one to edit it.

`%(prog)s quickstart > my.yaml` copies one. Commands that take a configuration also accept these names.
"""

import argparse
import itertools
import re

from mythos.cli.common import command_parser
from mythos.config.checking import suggestion
from mythos.config.loading import packaged_configs
from mythos.errors import MythosError


def parser() -> argparse.ArgumentParser:
    parser = command_parser("configs", __doc__)
    parser.add_argument("config", nargs="?", metavar="NAME", help="configuration to print (default: list all)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the file of one configuration, or all names with their first sentences.

    Raises MythosError for an unknown name.
    """
    known, name = packaged_configs(), options.config
    if name is None:
        width = max(map(len, known))
        for title, path in known.items():
            print(f"{title:<{width}}  {first_sentence(path.read_text(encoding='utf-8'))}")
    elif name in known:
        print(known[name].read_text(encoding="utf-8"), end="")
    else:
        raise MythosError(f"{name}: no configuration of this name; {suggestion(name, list(known))}")


def first_sentence(text: str) -> str:
    """Return the first sentence of the comment at the top of a configuration."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return re.split(r"\. |: mythos |\.$", " ".join(line.removeprefix("#").strip() for line in comment))[0]
