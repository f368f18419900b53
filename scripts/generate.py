"""The same as `mythos generate`: python scripts/generate.py --help."""

import sys

from mythos.cli.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/generate.py"))
