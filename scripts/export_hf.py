"""Export a trained model for transformers: python scripts/export_hf.py RUN_OR_CHECKPOINT FOLDER.

FOLDER then holds config.json, model.safetensors, the tokenizer's files and a model card, and nothing of the training;
AutoModelForCausalLM loads it wherever mythos is installed and imported.
"""

import argparse
import logging
import sys

from mythos.command_line import exit_status


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="run directory, checkpoint step-XXXXXXXX, or export")
    parser.add_argument("folder", metavar="FOLDER", help="new or empty folder to write")
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="float32 (default) or bfloat16")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="most bytes of a file of weights (%(default)s)"
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="then upload to this repository of the hub, made private if it is not there",
    )
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Export, and upload if that is asked for. Raises MythosError for bad input."""
    # Only now: they take seconds to import.
    from mythos.hf.export import export_model, push

    made = export_model(
        options.path,
        options.folder,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        name=options.push,
    )
    print(f"{options.folder}: {made.source} at step {made.step}, {made.files} file{'s' * (made.files > 1)} of weights")
    if options.push:
        print(push(options.folder, options.push))


if __name__ == "__main__":
    sys.exit(main())
