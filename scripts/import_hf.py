"""The same as `mythos import`: python scripts/import_hf.py --help."""

import sys

from mythos.cli.import_model import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/import_hf.py"))
