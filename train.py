"""Train a recurrent-depth transformer: python train.py CONFIG [key.path=value ...]; the same as `mythos train`."""

import sys

from mythos.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python train.py"))
