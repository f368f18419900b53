"""Export a trained model for transformers.

Writes config.json, model.safetensors, the tokenizer's files and a model card to FOLDER, without the training state.
AutoModelForCausalLM opens the folder wherever mythos is installed and imported.
"""

import argparse

from mythos.cli.common import add_writing_options, check_model_path, command_parser


def parser() -> argparse.ArgumentParser:
    parser = command_parser("export", __doc__)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="run directory, checkpoint step-XXXXXXXX, or export")
    parser.add_argument("folder", metavar="FOLDER", help="new or empty output folder")
    add_writing_options(parser)
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="also upload to this repository of the hub; a new one is created as private",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Export the model, and upload it with --push. Raises MythosError for bad input."""
    check_model_path(options.path)
    from mythos.hf.export import export_model, push

    export = export_model(
        options.path,
        options.folder,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        name=options.push,
    )
    print(f"{options.folder}: {export.source} at step {export.step}, {count_files(export.files)}")
    if options.push:
        print(push(options.folder, options.push))


def count_files(count: int) -> str:
    """Write the number of files of weights."""
    return f"{count} file{'s' * (count > 1)} of weights"
