"""Export a trained model: python scripts/export_hf.py RUN_OR_CHECKPOINT FOLDER.

FOLDER then holds config.json, model.safetensors and the tokenizer's files, and nothing of the training.
"""

import argparse
import logging
import sys

from mythos.errors import MythosError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="run directory, or checkpoint step-XXXXXXXX in it")
    parser.add_argument("folder", metavar="FOLDER", help="new or empty folder to write")
    options = parser.parse_args(arguments)
    # Only now: torch takes seconds to import.
    from mythos.model_files import export_model, open_model

    try:
        opened = open_model(options.path)
        export_model(opened, options.folder)
    except MythosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.folder}: {opened.source} at step {opened.step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
