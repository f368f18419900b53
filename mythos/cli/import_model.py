"""Import a published looped model.

SOURCE is a folder, or OWNER/NAME of a repository on the hub, with a config.json of an architecture that is known.
FOLDER then holds what `mythos export` writes: the other commands and AutoModelForCausalLM open it. Nothing of the
source is run: weights are safetensors, or files of torch's from which tensors alone are taken.
"""

import argparse

from mythos.cli.common import CommandParser, add_writing_options, exit_status


def parser(prog: str = "mythos import") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("source", metavar="SOURCE", help="folder, or OWNER/NAME on the hub (SandyResearch/parcae-140m)")
    made.add_argument("folder", metavar="FOLDER", help="new or empty folder to write")
    made.add_argument("--revision", metavar="NAME", help="commit, branch or tag of the repository")
    made.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help="folder or OWNER/NAME of the tokenizer (default: what lies with the weights, or the architecture's own)",
    )
    add_writing_options(made)
    return made


def main(arguments: list[str], prog: str = "mythos import") -> int:
    """Run the command line; returns the exit status."""
    options = parser(prog).parse_args(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Import. Raises MythosError for bad input."""
    # Only now: it takes seconds to import.
    from mythos.hf.importing import import_model

    made = import_model(
        options.source,
        options.folder,
        revision=options.revision,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    files = made.exported.files
    print(f"{options.folder}: {options.source}, {made.architecture}, {files} file{'s' * (files > 1)} of weights")
    if not made.tokenizer:
        print("without a tokenizer: none lies with the weights; give one by --tokenizer to generate text")
