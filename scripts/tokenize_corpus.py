"""The same as `mythos tokenize`: python scripts/tokenize_corpus.py --help."""

import sys

from mythos.cli.tokenize import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/tokenize_corpus.py"))
