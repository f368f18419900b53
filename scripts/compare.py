"""The same as `mythos compare`: python scripts/compare.py --help."""

import sys

from mythos.cli.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/compare.py"))
