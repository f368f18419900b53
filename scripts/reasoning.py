"""The same as `mythos reasoning`: python scripts/reasoning.py --help."""

import sys

from mythos.cli.reasoning import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/reasoning.py"))
