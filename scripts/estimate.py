"""The same as `mythos estimate`: python scripts/estimate.py --help."""

import sys

from mythos.cli.estimate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/estimate.py"))
