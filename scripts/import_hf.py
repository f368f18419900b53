"""Import a published looped model: python scripts/import_hf.py SOURCE FOLDER."""

import sys

from mythos.commands.import_hf import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
