"""Put loops into a dense pretrained model.

SOURCE is a folder, or OWNER/NAME on the hub, with a LlamaForCausalLM or one like it. Layers are counted from 0; those
that are not named are left out. At one loop the result computes what its layers compute one after the other. OUT then
holds what `mythos export` writes, and train.yaml, which trains it on with growing loops: mythos train OUT/train.yaml.
Nothing of the source is run.
"""

import argparse

from mythos.cli.common import CommandParser, add_writing_options, exit_status
from mythos.errors import MythosError, log_messages


def parser(prog: str = "mythos retrofit") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("source", metavar="SOURCE", help="folder, or OWNER/NAME on the hub")
    made.add_argument("folder", metavar="OUT", help="new or empty folder to write")
    made.add_argument("--prelude", required=True, metavar="LAYERS", help="run once before the loop: 0-3, 0,1,4 or none")
    made.add_argument("--core", required=True, metavar="LAYERS", help="looped")
    made.add_argument("--coda", required=True, metavar="LAYERS", help="run once after the loop, or none")
    made.add_argument("--loops", type=int, default=4, metavar="N", help="mean loops of training (%(default)s)")
    made.add_argument(
        "--decay", type=float, metavar="A", help="share of a state that the next loop starts from (docs/finetuning.md)"
    )
    made.add_argument("--revision", metavar="NAME", help="commit, branch or tag of the repository")
    made.add_argument(
        "--tokenizer", metavar="SOURCE", help="folder or OWNER/NAME of the tokenizer (what lies with the weights)"
    )
    add_writing_options(made)
    return made


def main(arguments: list[str], prog: str = "mythos retrofit") -> int:
    """Run the command line; returns the exit status."""
    log_messages()
    options = parser(prog).parse_args(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Retrofit. Raises MythosError for bad input."""
    numbers = [layer_numbers(f"--{part}", getattr(options, part)) for part in ("prelude", "core", "coda")]
    # Only now: it takes seconds to import.
    from mythos.hf.retrofit import DECAY, TRAIN_FILE, Layers, retrofit

    made = retrofit(
        options.source,
        options.folder,
        Layers(*numbers),
        loops=options.loops,
        decay=DECAY if options.decay is None else options.decay,
        revision=options.revision,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    dropped = ", ".join(map(str, made.dropped))
    left_out = f"; left out: layer{'s' * (len(made.dropped) > 1)} {dropped}" if dropped else ""
    print(f"{options.folder}: {options.source}, {made.architecture}{left_out}")
    print(f"next: mythos train {made.exported.folder / TRAIN_FILE}")


def layer_numbers(option: str, text: str) -> list[int]:
    """Parse 0-3, 0,1,4 or none. Raises MythosError for anything else."""
    if text == "none":
        return []
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            low, high = int(first), int(last if dash else first)
            if low > high or low < 0:
                raise ValueError
            numbers += range(low, high + 1)
    except ValueError as error:
        raise MythosError(f"{option}: got {text!r}; give layers counted from 0, as in 0-3 or 0,1,4, or none") from error
    return numbers
