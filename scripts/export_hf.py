"""The same as `mythos export`: python scripts/export_hf.py --help."""

import sys

from mythos.cli.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/export_hf.py"))
