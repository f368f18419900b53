"""`python -m mythos` is the command `mythos`, also under torchrun: `torchrun ... -m mythos train CONFIG`."""

import sys

from mythos.cli import main

if __name__ == "__main__":
    sys.exit(main())
