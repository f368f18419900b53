"""Generated corpora: every document is distinct and says where it is from."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mythos.config.data import DataConfig
from mythos.data.corpus import open_corpus
from mythos.data.source import Source, TextSource
from mythos.data.stream import TokenStreams
from mythos.data.tokenizer import Tokenizer, train_bpe

WORDS = [
    "river",
    "stone",
    "naïve",
    "café",
    "loop",
    "depth",
    "深い",
    "garden",
    "signal",
    "the",
    "of",
    "and",
    "under",
    "between",
    "morning",
    "🙂",
    "letter",
    "number",
]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 60 words, multi-byte characters included, each beginning with its own number."""
    random = np.random.default_rng(seed)
    return [f"{index}: " + " ".join(random.choice(WORDS, random.integers(1, 60))) for index in range(count)]


def write_parquet(path: Path, documents: list, row_group: int = 10, column: str = "text") -> None:
    pq.write_table(pa.table({column: documents, "id": range(len(documents))}), path, row_group_size=row_group)


def text_source(path: str | Path, tokenizer: Tokenizer, holdout_fraction: float = 0.0, **fields) -> TextSource:
    """The documents of a glob."""
    config = DataConfig(kind="files", path=str(path), **fields)
    return TextSource(open_corpus(config, config), tokenizer, holdout_fraction)


def make_streams(source: Source | dict[str, tuple[Source, float]], **changes) -> TokenStreams:
    """Four streams of sequences of 16 tokens."""
    sources = source if isinstance(source, dict) else {"files": (source, 1.0)}
    return TokenStreams(sources, **{"streams": 4, "sequence_length": 16, "seed": 3, **changes})


def write_jsonl(path: Path, documents: list) -> None:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(make_documents(300, seed=99)), 400, progress=False)


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Callable[..., str]:
    """Write documents over a number of files and return the glob that matches them."""

    def write(documents: list[str], files: int, row_group: int = 10) -> str:
        for file in range(files):
            write_parquet(tmp_path / f"part-{file}.parquet", documents[file::files], row_group)
        return str(tmp_path / "part-*.parquet")

    return write
