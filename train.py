"""Train a recurrent-depth transformer: `python train.py` is `mythos train`, without installing the package."""

import sys

from mythos import cli


def main(arguments: list[str]) -> int:
    """Run `mythos train` with these arguments and return its exit status."""
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
