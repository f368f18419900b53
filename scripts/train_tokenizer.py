"""The same as `mythos tokenizer`: python scripts/train_tokenizer.py --help."""

import sys

from mythos.cli.tokenizer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python scripts/train_tokenizer.py"))
