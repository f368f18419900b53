"""The same as `mythos import`: python scripts/import_hf.py --help."""

import sys

from mythos.commands.import_hf import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/import_hf.py"))
