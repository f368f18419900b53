"""Put loops into a dense pretrained model: python scripts/retrofit_hf.py SOURCE OUT --prelude 0-3 --core 8-15 ..."""

import sys

from mythos.commands.retrofit_hf import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
