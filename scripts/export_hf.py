"""The same as `mythos export`: python scripts/export_hf.py --help."""

import sys

from mythos.commands.export_hf import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/export_hf.py"))
