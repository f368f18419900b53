"""The same as `mythos report`: python scripts/report.py --help."""

import sys

from mythos.cli.report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/report.py"))
