"""The same as `mythos evaluate`: python scripts/evaluate.py --help."""

import sys

from mythos.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/evaluate.py"))
