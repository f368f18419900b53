"""Export a trained model for transformers.

FOLDER then holds config.json, model.safetensors, the tokenizer's files and a model card, and nothing of the training;
AutoModelForCausalLM loads it wherever mythos is installed and imported.
"""

import argparse

from mythos.cli.common import CommandParser, add_writing_options, exit_status
from mythos.errors import log_messages


def parser(prog: str = "mythos export") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="run directory, checkpoint step-XXXXXXXX, or export")
    made.add_argument("folder", metavar="FOLDER", help="new or empty folder to write")
    add_writing_options(made)
    made.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="then upload to this repository of the hub, made private if it is not there",
    )
    return made


def main(arguments: list[str], prog: str = "mythos export") -> int:
    """Run the command line; returns the exit status."""
    log_messages()
    options = parser(prog).parse_args(arguments)
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
