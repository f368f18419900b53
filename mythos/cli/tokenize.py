"""Tokenize the corpus of a run ahead of training, into token shards that data.kind: tokens reads.

After an interruption of any kind, the same command continues after the finished parts.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import signal
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mythos.cli.common import add_corpus_options, command_parser, corpus_config, exit_status
from mythos.config.sections import Config
from mythos.errors import MythosError

if TYPE_CHECKING:
    from tqdm import tqdm

    from mythos.data.token_writer import TokenWriter
    from mythos.progress import Lines

REFRESH = 0.5
"""Seconds between updates of the progress bar."""
VALIDATION_SHARE = 0.05
"""Share of the documents, by content hash, stored with their byte counts: the most that runs can hold out."""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command, for `parse_intermixed_args`: options may stand between the overrides."""
    parser = command_parser("tokenize", __doc__)
    add_corpus_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write or to continue")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument("--source", metavar="NAME", help="of a mixture: the source to tokenize")
    parser.add_argument(
        "--validation-share",
        type=float,
        metavar="SHARE",
        help="upper bound of data.validation.fraction in runs on these tokens (default: the configuration's "
        f"data.validation.fraction, at least {VALIDATION_SHARE})",
    )
    return parser


def main(arguments: list[str]) -> int:
    command = parser()
    options = command.parse_intermixed_args(arguments)
    if options.workers < 1:
        command.error(f"--workers: got {options.workers}; give at least 1")
    if options.validation_share is not None and not 0 <= options.validation_share <= 1:
        command.error(f"--validation-share: got {options.validation_share:g}; give 0 to 1")
    config = corpus_config(command, options)
    return exit_status(
        lambda: tokenize(config(), options),
        interrupted="stopped; the same command continues after the finished parts",
    )


def tokenize(config: Config, options: argparse.Namespace) -> None:
    """Write the missing parts of the folder and print how to use it."""
    from mythos.data.tokens import TOKENIZER
    from mythos.progress import progress_bar

    writer = open_writer(config, options)
    parts = writer.begin()
    finished_shards = sum(map(len, writer.parts)) - sum(len(writer.parts[part]) for part in parts)
    if parts:
        bar: tqdm[Any] | Lines[Any] = progress_bar(
            total=len(writer.corpus.shards), initial=finished_shards, unit="shard", desc="tokenizing"
        )
        with bar:
            write_parts(writer, parts, min(options.workers, len(parts)), bar)
    totals = writer.finish()["totals"]
    left_out = ", ".join(f"{kind} {count:,}" for kind, count in totals["skipped"].items())
    print(f"{options.out}: {totals['documents']:,} documents, {totals['tokens']:,} tokens; left out: {left_out or 0}")
    print("To read the tokens instead of the text, a configuration (or a source of a mixture) gives:\n")
    sections = {
        "data": {"kind": "tokens", "path": str(options.out.resolve())},
        "tokenizer": {"name": str(options.out.resolve() / TOKENIZER)},
    }
    print(yaml.safe_dump(sections, sort_keys=False), end="")


def open_writer(config: Config, options: argparse.Namespace) -> TokenWriter:
    """Open the source and its tokenizer.

    Raises MythosError for an unknown source, and as :func:`mythos.data.corpus.open_corpora` and
    :func:`mythos.data.tokenizer.load_tokenizer`.
    """
    from mythos.data.corpus import cache_directory, holdout_fraction, open_corpora, pin_revisions, weighted
    from mythos.data.token_writer import TokenWriter
    from mythos.data.tokenizer import load_tokenizer
    from mythos.data.tokens import TOKENIZER, read_header

    data = config.data
    names = list(data.named_sources)
    name = options.source or names[0]
    if name not in names or (len(names) > 1 and not options.source):
        raise MythosError(f"--source: got {options.source or 'none'}; give one of {', '.join(names)}")
    if data.named_sources[name].kind == "tokens":
        raise MythosError("data.kind: tokens are tokenized already. Give a configuration that reads text.")
    if data.sources and config.tokenizer.name != "bpe":
        # Open the one source only. A bpe is trained on the text of all of them.
        data = data.model_copy(update={"sources": {name: data.sources[name]}})
    pinned = (read_header(options.out) or {}).get("source", {})
    data = pin_revisions(data, {**pinned, "sources": {name: pinned}})
    corpora = open_corpora(data)
    tokenizer = load_tokenizer(
        config.tokenizer,
        weighted(data, corpora),
        # Without CONFIG there is no run whose tokenizer could be used.
        run_dir=config.run_dir if options.config and (config.run_dir / TOKENIZER).is_dir() else None,
        cache_dir=cache_directory(data),
        holdout_fraction=holdout_fraction(data),
    )
    share = options.validation_share
    if share is None:
        share = max(VALIDATION_SHARE, holdout_fraction(data))
    return TokenWriter(corpora[name], tokenizer, options.out, data.named_sources[name], share)


def write_parts(writer: TokenWriter, parts: list[int], workers: int, bar: tqdm[Any] | Lines[Any]) -> None:
    """Write parts in worker processes, all of which have ended when this returns or raises.

    Raises MythosError if a part cannot be read or written, or a worker died.
    """
    from mythos.data.processes import START_METHOD, signals_blocked

    context = multiprocessing.get_context(START_METHOD)
    counts: Any = context.Array(ctypes.c_uint64, 3)  # typeshed has c_uint64 as elements; ctypes returns int
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (writer, counts))
    start, first_shards = time.monotonic(), bar.n
    try:
        with signals_blocked(signal.SIGINT):  # Ctrl-C reaches this process only, which then ends the workers
            pending = {pool.submit(_write, part) for part in parts}
        while pending:
            done, pending = wait(pending, REFRESH, FIRST_EXCEPTION)
            # Read without the lock: a killed worker may never have released it.
            shards, documents, tokens = counts.get_obj()
            rate = tokens / (time.monotonic() - start)
            bar.set_postfix_str(f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
            bar.update(first_shards + shards - bar.n)
            bar.refresh()
            for part in done:
                part.result()
    except BaseException as error:
        for child in multiprocessing.active_children():
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise MythosError(
                "a worker process died; out of memory? Give fewer --workers; the same command continues after the "
                "finished parts."
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# State of a worker process, set by `_begin_worker`: the pool passes arguments to workers only through its initializer.
_writer: TokenWriter
_counts: Any
"""Shards, documents and tokens that all workers have written."""


def _begin_worker(writer: TokenWriter, counts: Any) -> None:
    global _writer, _counts
    _writer, _counts = writer, counts
    from mythos.data.processes import begin_worker

    begin_worker()


def _write(part: int) -> None:
    _writer.write_part(part, _report)


def _report(shards: int, documents: int, tokens: int) -> None:
    with _counts.get_lock():
        for index, count in enumerate((shards, documents, tokens)):
            _counts[index] += count
