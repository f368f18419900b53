"""Train a byte-level BPE tokenizer on a corpus and save it where tokenizer.name can point to."""

import argparse
from itertools import islice
from pathlib import Path

from mythos.cli.common import command_parser, exit_status
from mythos.config.data import DataConfig
from mythos.config.loading import load_config

# Documents on which bytes per token are measured.
MEASURED_DOCUMENTS = 1000


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = command_parser("tokenizer", __doc__)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="train on the corpus of this run")
    parser.add_argument(
        "--path", nargs="+", metavar="GLOB", help="train on these parquet, jsonl, jsonl.gz or txt files"
    )
    parser.add_argument("--embedded", action="store_true", help="train on the documentation text on this machine")
    parser.add_argument("--text-column", default="text", help="column or key of the text in --path (text)")
    parser.add_argument(
        "--vocab-size", type=int, help="number of tokens (tokenizer.vocab_size of the config, else 4096)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder")
    return parser


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    command = parser()
    options = command.parse_args(arguments)
    if sum(map(bool, (options.config, options.path, options.embedded))) != 1:
        command.error("give exactly one of CONFIG.yaml, --path and --embedded")
    return exit_status(lambda: train(options))


def train(options: argparse.Namespace) -> None:
    """Train, save, and print bytes per token, on held-out documents or, without any, on training documents."""
    from mythos.data.corpus import holdout_fraction, is_held_out, open_corpora, weighted
    from mythos.data.tokenizer import train_bpe, training_documents

    vocab_size = 4096
    if options.config:
        config = load_config(options.config)
        data, vocab_size = config.data, config.tokenizer.vocab_size
    elif options.path:
        data = DataConfig(kind="files", path=options.path, text_column=options.text_column)
    else:
        data = DataConfig(kind="embedded")
    corpora = weighted(data, open_corpora(data))
    held_out = holdout_fraction(data)
    tokenizer = train_bpe(training_documents(corpora, held_out), options.vocab_size or vocab_size)
    tokenizer.save(Path(options.out))
    unseen = (text for text in training_documents(corpora, 0.0) if is_held_out(text, held_out))
    documents, kind = list(islice(unseen, MEASURED_DOCUMENTS)), "held-out"
    if not documents:
        documents, kind = list(islice(training_documents(corpora, held_out), MEASURED_DOCUMENTS)), "training"
    size = sum(len(text.encode()) for text in documents)
    tokens = sum(map(len, tokenizer.encode_batch(documents)))
    print(f"{options.out}: {tokenizer.size} tokens")
    print(f"{size / tokens:.3f} bytes per token on {len(documents)} {kind} documents")
