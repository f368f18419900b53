"""Import a published looped model.

SOURCE is a folder, or OWNER/NAME of a repository on the hub, with a config.json of a supported architecture. Writes the
same files as `mythos export` to FOLDER, which the other commands and AutoModelForCausalLM open. No code of the source
runs: weights are read from safetensors, or as plain tensors from torch files.
"""

import argparse

from mythos.cli.common import add_writing_options, command_parser
from mythos.cli.export import count_files


def parser() -> argparse.ArgumentParser:
    parser = command_parser("import", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="folder, or OWNER/NAME on the hub (SandyResearch/parcae-140m)")
    parser.add_argument("folder", metavar="FOLDER", help="new or empty output folder")
    parser.add_argument("--revision", metavar="NAME", help="commit, branch or tag of the repository")
    parser.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help="folder or OWNER/NAME of the tokenizer (default: the one beside the weights, or of the architecture)",
    )
    add_writing_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Import the model. Raises MythosError for bad input."""
    from mythos.hf.importing import import_model

    model = import_model(
        options.source,
        options.folder,
        revision=options.revision,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    print(f"{options.folder}: {options.source}, {model.architecture}, {count_files(model.exported.files)}")
    if not model.tokenizer:
        print("without a tokenizer: there is none beside the weights; give one with --tokenizer to generate text")
