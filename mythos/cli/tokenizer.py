"""Train a byte-level BPE tokenizer on a corpus and save it where tokenizer.name can point to."""

import argparse
import sys
from itertools import islice
from pathlib import Path

from mythos.cli.common import CommandParser
from mythos.config.data import DataConfig
from mythos.config.loading import load_config
from mythos.errors import MythosError

# Documents that bytes per token is measured on.
MEASURED_DOCUMENTS = 1000


def parser(prog: str = "mythos tokenizer") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__)
    made.add_argument("config", nargs="?", metavar="CONFIG", help="train on the corpus of this run")
    made.add_argument("--path", nargs="+", metavar="GLOB", help="train on these parquet, jsonl, jsonl.gz or txt files")
    made.add_argument("--embedded", action="store_true", help="train on the documentation text found on this machine")
    made.add_argument("--text-column", default="text", help="column or key that holds the text of --path (text)")
    made.add_argument("--vocab-size", type=int, help="number of tokens (tokenizer.vocab_size of the config, else 4096)")
    made.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    return made


def main(arguments: list[str], prog: str = "mythos tokenizer") -> int:
    """Run the command line; returns the exit status."""
    made = parser(prog)
    options = made.parse_args(arguments)
    if sum(map(bool, (options.config, options.path, options.embedded))) != 1:
        made.error("give exactly one of CONFIG.yaml, --path and --embedded")
    try:
        train(options)
    except MythosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train(options: argparse.Namespace) -> None:
    """Train, save and print bytes per token on held-out documents if there are any, else on training documents."""
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
    measured, what = list(islice(unseen, MEASURED_DOCUMENTS)), "held-out"
    if not measured:
        measured, what = list(islice(training_documents(corpora, held_out), MEASURED_DOCUMENTS)), "training"
    size = sum(len(text.encode()) for text in measured)
    tokens = sum(map(len, tokenizer.encode_batch(measured)))
    print(f"{options.out}: {tokenizer.size} tokens")
    print(f"{size / tokens:.3f} bytes per token on {len(measured)} {what} documents")
