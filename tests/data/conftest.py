"""Generated corpora: every document is distinct and says where it is from."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
