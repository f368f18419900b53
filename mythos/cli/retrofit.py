"""Put loops into a dense pretrained model.

SOURCE is a folder, or OWNER/NAME on the hub, with a LlamaForCausalLM or a similar model. Layers are counted from 0;
layers in none of the three parts are dropped. At one loop the result computes the chosen layers in sequence. Writes the
same files as `mythos export` to OUT, and train.yaml to continue training with a growing number of loops:
mythos train OUT/train.yaml. No code of the source runs.
"""

import argparse

from mythos.cli.common import add_writing_options, command_parser
from mythos.errors import MythosError


def parser() -> argparse.ArgumentParser:
    parser = command_parser("retrofit", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="folder, or OWNER/NAME on the hub")
    parser.add_argument("folder", metavar="OUT", help="new or empty output folder")
    parser.add_argument("--prelude", required=True, metavar="LAYERS", help="layers before the loop: 0-3, 0,1,4 or none")
    parser.add_argument("--core", required=True, metavar="LAYERS", help="looped layers")
    parser.add_argument("--coda", required=True, metavar="LAYERS", help="layers after the loop, or none")
    parser.add_argument("--loops", type=int, default=4, metavar="N", help="mean loops of training (%(default)s)")
    parser.add_argument(
        "--decay",
        type=float,
        metavar="A",
        help="share of the previous state that enters each loop (docs/finetuning.md)",
    )
    parser.add_argument("--revision", metavar="NAME", help="commit, branch or tag of the repository")
    parser.add_argument(
        "--tokenizer", metavar="SOURCE", help="folder or OWNER/NAME of the tokenizer (the one beside the weights)"
    )
    add_writing_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Retrofit the model. Raises MythosError for bad input."""
    # Checked before transformers is imported, which takes seconds.
    parts = [layer_numbers(f"--{part}", getattr(options, part)) for part in ("prelude", "core", "coda")]
    from mythos.hf.retrofit import DECAY, TRAIN_FILE, Layers, retrofit

    model = retrofit(
        options.source,
        options.folder,
        Layers(*parts),
        loops=options.loops,
        decay=DECAY if options.decay is None else options.decay,
        revision=options.revision,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    dropped = ", ".join(map(str, model.dropped))
    left_out = f"; left out: layer{'s' * (len(model.dropped) > 1)} {dropped}" if dropped else ""
    print(f"{options.folder}: {options.source}, {model.architecture}{left_out}")
    print(f"next: mythos train {model.exported.folder / TRAIN_FILE}")


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
