"""The same as `mythos sweep`: python scripts/depth_sweep.py --help."""

import sys

from mythos.cli.sweep import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/depth_sweep.py"))
