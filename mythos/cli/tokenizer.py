"""Train a byte-level BPE tokenizer on a corpus and save it where tokenizer.name can point to."""

import argparse
from itertools import islice
from pathlib import Path

from mythos.cli.common import add_corpus_options, command_parser, corpus_config, exit_status
from mythos.config.sections import Config

# Documents on which bytes per token are measured.
MEASURED_DOCUMENTS = 1000


def parser() -> argparse.ArgumentParser:
    parser = command_parser("tokenizer", __doc__)
    add_corpus_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder")
    return parser


def main(arguments: list[str]) -> int:
    command = parser()
    options = command.parse_intermixed_args(arguments)
    config = corpus_config(command, options)
    return exit_status(lambda: train(config(), Path(options.out)))


def train(config: Config, out: Path) -> None:
    """Train, save, and print bytes per token, on held-out documents or, without any, on training documents."""
    from mythos.data.corpus import holdout_fraction, is_held_out, open_corpora, weighted
    from mythos.data.tokenizer import train_bpe, training_documents

    data = config.data
    corpora = weighted(data, open_corpora(data))
    held_out = holdout_fraction(data)
    tokenizer = train_bpe(training_documents(corpora, held_out), config.tokenizer.vocab_size)
    tokenizer.save(out)
    unseen = (text for text in training_documents(corpora, 0.0) if is_held_out(text, held_out))
    documents, kind = list(islice(unseen, MEASURED_DOCUMENTS)), "held-out"
    if not documents:
        documents, kind = list(islice(training_documents(corpora, held_out), MEASURED_DOCUMENTS)), "training"
    size = sum(len(text.encode()) for text in documents)
    tokens = sum(map(len, tokenizer.encode_batch(documents)))
    print(f"{out}: {tokenizer.size} tokens")
    print(f"{size / tokens:.3f} bytes per token on {len(documents)} {kind} documents")
