"""The same as `mythos retrofit`: python scripts/retrofit_hf.py --help."""

import sys

from mythos.cli.retrofit import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/retrofit_hf.py"))
