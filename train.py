"""Train a recurrent-depth transformer: `python train.py` is `mythos train`, without installing the package."""

import sys

from mythos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
