"""The same as `mythos retrofit`: python scripts/retrofit_hf.py --help."""

import sys

from mythos.commands.retrofit_hf import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/retrofit_hf.py"))
