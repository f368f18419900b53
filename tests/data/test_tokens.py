"""Token shards yield the same documents as their text, and report damage."""

import gzip
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mythos.config.data import DataConfig
from mythos.data.corpus import Corpus, Skipped, open_corpus
from mythos.data.source import TextSource
from mythos.data.token_writer import TokenWriter
from mythos.data.tokenizer import Tokenizer
from mythos.data.tokens import TokenSource
from mythos.errors import MythosError

from .conftest import make_documents, write_jsonl, write_parquet

SHARE = 0.4
FRACTION = 0.25


def opened(path: Path | list[str], **fields: Any) -> tuple[Corpus, DataConfig]:
    paths = [str(p) for p in path] if isinstance(path, list) else str(path)
    config = DataConfig(**{"kind": "files", "path": paths, "on_error": "skip"} | fields)
    return open_corpus(config, config), config


def write_tokens(corpus: Corpus, tokenizer: Tokenizer, directory: Path, share: float = SHARE) -> dict[str, Any]:
    writer = TokenWriter(corpus, tokenizer, directory, DataConfig(kind="files", path="x"), share)
    for part in writer.begin():
        writer.write_part(part)
    return writer.finish()


def plain(items: Iterator[tuple[int, np.ndarray | Skipped]]) -> list[tuple[int, list[int] | Skipped]]:
    """Items as plain values that can be compared; checks the dtype."""
    listed = []
    for row, item in items:
        assert isinstance(item, Skipped) or item.dtype == np.int32
        listed.append((row, item if isinstance(item, Skipped) else item.tolist()))
    return listed


# --- corpora with every kind of fault


def parquet_with_nulls(folder: Path) -> tuple[Corpus, DataConfig]:
    texts: list[str | None] = [*make_documents(130)]
    texts[3] = texts[64] = None
    texts[5] = " \n"
    scores = [None if row == 7 else row % 5 for row in range(130)]
    pq.write_table(pa.table({"text": texts, "score": scores}), folder / "a.parquet", row_group_size=50)
    return opened(folder / "a.parquet", filters={"score": {"min": 1}, "length": {"max": 200}})


def jsonl_with_bad_lines(folder: Path) -> tuple[Corpus, DataConfig]:
    lines = [json.dumps({"text": text}).encode() for text in make_documents(60, seed=1)]
    lines[2:2] = [b"{broken", b'{"text": "\xff\xfe"}', b'{"text": 7}', b'{"text": "\\ud800"}', b"[1]", b"  "]
    (folder / "b.jsonl").write_bytes(b"\n".join(lines))
    return opened(folder / "b.jsonl", max_document_bytes=300)


def text_files(folder: Path) -> tuple[Corpus, DataConfig]:
    for file in range(3):
        (folder / f"c{file}.txt").write_text("\n\n".join(make_documents(20, seed=file)))
    return opened(folder / "*.txt", txt="paragraph")


def one_book(folder: Path) -> tuple[Corpus, DataConfig]:
    """Rows are parts of one document."""
    (folder / "f.txt").write_text("\n\n".join(make_documents(400, seed=5)))
    return opened(folder / "f.txt", streams=2)


def truncated_gzip(folder: Path) -> tuple[Corpus, DataConfig]:
    write_jsonl(folder / "d.jsonl", make_documents(500, seed=3))
    packed = gzip.compress((folder / "d.jsonl").read_bytes())
    (folder / "d.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    return opened([folder / "d.jsonl", folder / "d.jsonl.gz"])


def broken_row_groups(folder: Path) -> tuple[Corpus, DataConfig]:
    """A whole file is a shard; two row groups in the middle, side by side, cannot be read."""
    for file in range(2):
        path = folder / f"e{file}.parquet"
        pq.write_table(
            pa.table({"text": make_documents(60, seed=file)}), path, row_group_size=10, write_page_checksum=True
        )
        content = bytearray(path.read_bytes())
        meta = pq.ParquetFile(path).metadata
        for group in (2, 3):
            column = meta.row_group(group).column(0)
            start = column.dictionary_page_offset or column.data_page_offset
            content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
        path.write_bytes(content)
    corpus, config = opened(folder / "e*.parquet", streams=1)
    corpus = Corpus(corpus_files(folder / "e0.parquet", folder / "e1.parquet"), on_error="skip", minimum_shards=1)
    return corpus, config


def corpus_files(*paths: Path) -> list[Any]:
    from mythos.data.formats import local_file

    return [local_file(str(path)) for path in paths]


CORPORA = [parquet_with_nulls, jsonl_with_bad_lines, text_files, one_book, truncated_gzip, broken_row_groups]


@pytest.fixture(params=CORPORA, ids=lambda corpus: corpus.__name__)
def text_and_tokens(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> tuple[TextSource, Path]:
    """A text source and the folder of its tokens."""
    (tmp_path / "text").mkdir()
    corpus, _ = request.param(tmp_path / "text")
    write_tokens(corpus, tokenizer, tmp_path / "tokens")
    return TextSource(corpus, tokenizer, FRACTION), tmp_path / "tokens"


@pytest.mark.parametrize("fraction", [0.0, FRACTION, SHARE])
def test_the_same_items_as_from_text(text_and_tokens: tuple[TextSource, Path], fraction: float) -> None:
    source, directory = text_and_tokens
    text = TextSource(source.corpus, source.tokenizer, fraction)
    tokens = TokenSource(directory, source.tokenizer, fraction, "fail")
    assert tokens.shards == text.shards
    assert tokens.identity == text.identity
    documents = 0
    for shard in range(len(text.shards)):
        whole = plain(text.read(shard, 0, 1))
        documents += sum(isinstance(item, list) for _, item in whole)
        assert plain(tokens.read(shard, 0, 1)) == whole
        for row, step in [(0, 2), (1, 2), (3, 1), (17, 3), (26, 1), (29, 7), (5, 64)]:
            assert plain(tokens.read(shard, row, step)) == plain(text.read(shard, row, step)), (shard, row, step)
    assert documents > 20
    assert list(tokens.held_out()) == list(text.held_out())
    assert bool(fraction) == bool(list(tokens.held_out()))


def test_documents_and_skipped_rows_are_counted(text_and_tokens: tuple[TextSource, Path]) -> None:
    text, directory = text_and_tokens
    index = json.loads((directory / "index.json").read_text())
    counts = {"documents": 0, "tokens": 0, "skipped": {}}
    everything = TextSource(text.corpus, text.tokenizer, 0.0)
    for shard in range(len(text.shards)):
        for _, item in everything.read(shard, 0, 1):
            if isinstance(item, Skipped):
                counts["skipped"][item.value] = counts["skipped"].get(item.value, 0) + 1
            else:
                counts["documents"] += 1
                counts["tokens"] += len(item)
    assert index["totals"] == counts
    assert counts["documents"] == sum(shard["documents"] for shard in index["shards"])
    assert counts["tokens"] == sum(
        len(np.load(file, allow_pickle=False)) for file in sorted(directory.glob("*.tokens.npy"))
    )


def test_rows_behind_the_end(text_and_tokens: tuple[TextSource, Path]) -> None:
    text, directory = text_and_tokens
    tokens = TokenSource(directory, text.tokenizer, 0.0, "fail")
    for shard in range(len(text.shards)):
        assert plain(tokens.read(shard, 100_000, 1)) == plain(text.read(shard, 100_000, 1))


def test_a_window_ends_at_large_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"{row} " + "between the stones " * (20_000 if row % 5 == 2 else 3) for row in range(40)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    corpus, _ = opened(tmp_path / "a.jsonl")
    write_tokens(corpus, tokenizer, tmp_path / "tokens")
    tokens = TokenSource(tmp_path / "tokens", tokenizer, FRACTION, "fail")
    text = TextSource(corpus, tokenizer, FRACTION)
    for step in (1, 3):
        assert plain(tokens.read(0, 1, step)) == plain(text.read(0, 1, step))


def test_a_spawned_copy_reads(text_and_tokens: tuple[TextSource, Path]) -> None:
    text, directory = text_and_tokens
    tokens = TokenSource(directory, text.tokenizer, FRACTION, "fail")
    before = plain(tokens.read(0, 0, 1))
    copy = pickle.loads(pickle.dumps(tokens))
    assert plain(copy.read(0, 0, 1)) == before
    assert b"vocab" not in pickle.dumps(tokens), "a reader needs no tokenizer"


# --- formats


def word_tokenizer(size: int) -> Tokenizer:
    """One id per word, so many that uint16 is just large enough for them, or just too small."""
    vocabulary = {f"w{index}": index for index in range(size - 1)} | {"<|endoftext|>": size - 1}
    backend = Backend(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    return Tokenizer(fast, {"name": f"words-{size}"})


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_dtype_follows_the_vocabulary(tmp_path: Path, size: int, dtype: str) -> None:
    tokenizer = word_tokenizer(size)
    write_jsonl(tmp_path / "a.jsonl", [f"w1 w{size - 2} w{size - 3}", "w5"])
    corpus, _ = opened(tmp_path / "a.jsonl")
    index = write_tokens(corpus, tokenizer, tmp_path / "tokens")
    stored = np.load(tmp_path / "tokens" / "00000.tokens.npy", mmap_mode="r", allow_pickle=False)
    assert index["dtype"] == stored.dtype.name == dtype
    assert stored.tolist() == [1, size - 2, size - 3, size - 1, 5, size - 1]
    tokens = TokenSource(tmp_path / "tokens", tokenizer, 0.0, "fail")
    assert plain(tokens.read(0, 0, 1)) == [(0, [1, size - 2, size - 3, size - 1]), (1, [5, size - 1])]


def test_documents_without_tokens_or_with_dropped_text(tmp_path: Path) -> None:
    """Whitespace belongs to no word: it is counted with the next token, of which one is larger than uint16."""
    tokenizer = word_tokenizer(10)
    write_jsonl(tmp_path / "a.jsonl", ["w1" + " " * 70_000 + "w2 w3 "])
    corpus, _ = opened(tmp_path / "a.jsonl")
    write_tokens(corpus, tokenizer, tmp_path / "tokens", share=1.0)
    tokens = TokenSource(tmp_path / "tokens", tokenizer, 1.0, "fail")
    assert list(tokens.held_out()) == [([1, 2, 3], [2, 70_002, 4])]
    assert list(tokens.read(0, 0, 1)) == []


def test_a_part_without_a_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", [None, ""])
    write_jsonl(tmp_path / "b.jsonl", ["the river"])
    corpus, _ = opened(tmp_path / "*.jsonl")
    write_tokens(corpus, tokenizer, tmp_path / "tokens")
    tokens = TokenSource(tmp_path / "tokens", tokenizer, FRACTION, "fail")
    assert list(tokens.read(0, 0, 1)) == [(0, Skipped.DOCUMENT), (1, Skipped.DOCUMENT)]
    assert list(tokens.held_out()) == list(TextSource(corpus, tokenizer, FRACTION).held_out())


def test_parts_are_groups_of_consecutive_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "a.parquet", make_documents(600), row_group=1)
    corpus, _ = opened(tmp_path / "a.parquet")
    index = write_tokens(corpus, tokenizer, tmp_path / "tokens")
    assert [shard["part"] for shard in index["shards"]] == [row // 3 for row in range(600)]
    tokens = TokenSource(tmp_path / "tokens", tokenizer, FRACTION, "fail")
    text = TextSource(corpus, tokenizer, FRACTION)
    for shard in range(600):
        assert plain(tokens.read(shard, 0, 1)) == plain(text.read(shard, 0, 1))
    assert list(tokens.held_out()) == list(text.held_out())


def test_fail_stops_at_a_bad_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["good", None])
    corpus, _ = opened(tmp_path / "a.jsonl", on_error="fail")
    with pytest.raises(MythosError, match=r"a\.jsonl.*row 1"):
        write_tokens(corpus, tokenizer, tmp_path / "tokens")
    assert not list((tmp_path / "tokens").glob("*.npy*"))
    corpus, _ = opened(tmp_path / "a.jsonl", on_error="skip")
    assert write_tokens(corpus, tokenizer, tmp_path / "tokens")["totals"]["documents"] == 1


# --- refusals


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Tokens of two files of 40 documents, a part each."""
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", make_documents(40, seed=ord(name)))
    corpus, _ = opened(tmp_path / "*.jsonl")
    write_tokens(corpus, tokenizer, tmp_path / "tokens")
    return tmp_path / "tokens"


def refused(match: str, *arguments: Any) -> None:
    with pytest.raises(MythosError, match=match):
        TokenSource(*arguments)


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    refused("no folder .*nowhere", tmp_path / "nowhere", tokenizer, 0.0, "fail")
    refused("has no index.json", tmp_path, tokenizer, 0.0, "fail")
    refused(rf"words-300 is not.*Set tokenizer.name: {folder}/tokenizer", folder, word_tokenizer(300), 0.0, "fail")
    refused("fraction: 0.5 is more than 0.4.*--validation-share 0.5", folder, tokenizer, 0.5, "fail")
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index.replace('"format": 1', '"format": 2'))
    refused("has format 2, this version reads 1", folder, tokenizer, 0.0, "fail")
    (folder / "index.json").write_text(index.replace('"validation_share": 0.4', '"validation_share": 0.5'))
    refused("index.json cannot be read: checksum differs", folder, tokenizer, 0.0, "fail")
    (folder / "index.json").write_text(index[:-30])
    refused("index.json cannot be read", folder, tokenizer, 0.0, "fail")
    (folder / "index.json").unlink()
    (folder / "plan.json").write_text(index)
    refused("is not complete.*mythos tokenize` as before", folder, tokenizer, 0.0, "skip")


def flipped(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncated(path: Path, size: int) -> None:
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("documents", lambda path: flipped(path, 400)),
        ("documents", lambda path: flipped(path, path.stat().st_size - 1)),
        ("documents", lambda path: truncated(path, path.stat().st_size - 1)),
        ("documents", lambda path: truncated(path, 0)),
        ("documents", Path.unlink),
        ("documents", lambda path: np.save(path, np.zeros(40))),
        ("documents", lambda path: np.save(path, np.array([{}] * 40), allow_pickle=True)),
        ("tokens", lambda path: truncated(path, path.stat().st_size - 1)),
        ("tokens", lambda path: truncated(path, 50)),
        ("tokens", Path.unlink),
    ],
)
def test_a_file_that_cannot_be_read(
    folder: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, kind: str, damage: Callable[[Path], None]
) -> None:
    whole = TokenSource(folder, tokenizer, FRACTION, "fail")
    first, second = plain(whole.read(0, 0, 1)), plain(whole.read(1, 0, 1))
    held_out = list(whole.held_out())
    damage(folder / f"00001.{kind}.npy")
    failing = TokenSource(folder, tokenizer, FRACTION, "fail")
    assert plain(failing.read(0, 0, 1)) == first
    message = rf"00001\.{kind}\.npy.*shard .*b\.jsonl.*Remove .*00001\.\* .*mythos tokenize"
    for _ in range(2):
        with pytest.raises(MythosError, match=message):
            plain(failing.read(1, 3, 2))
    with pytest.raises(MythosError, match=message):
        list(failing.held_out())
    skipping = TokenSource(folder, tokenizer, FRACTION, "skip")
    with caplog.at_level(logging.WARNING):
        assert plain(skipping.read(1, 3, 2)) == [(3, Skipped.SHARD)]
        assert plain(skipping.read(1, 0, 1)) == [(0, Skipped.SHARD)]
        kept = list(skipping.held_out())
    assert 0 < len(kept) < len(held_out) and all(document in held_out for document in kept)
    assert len([record for record in caplog.records if "b.jsonl" in record.message]) == 1
    assert second != [(0, Skipped.SHARD)]


def test_a_flipped_token_costs_its_document(
    folder: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    before = plain(TokenSource(folder, tokenizer, FRACTION, "fail").read(0, 0, 1))
    row = before[7][0]
    start = np.load(folder / "00000.documents.npy", mmap_mode="r")[row]["start"]
    flipped(folder / "00000.tokens.npy", 128 + 2 * int(start))
    with pytest.raises(MythosError, match=r"00000\.tokens\.npy: checksum differs.*a\.jsonl"):
        plain(TokenSource(folder, tokenizer, FRACTION, "fail").read(0, 0, 1))
    with caplog.at_level(logging.WARNING):
        skipping = TokenSource(folder, tokenizer, FRACTION, "skip")
        for _ in range(2):
            assert plain(skipping.read(0, 0, 1)) == [*before[:7], (row, Skipped.DOCUMENT), *before[8:]]
    assert len(caplog.records) == 1


def test_flipped_sizes(folder: Path, tokenizer: Tokenizer) -> None:
    source = TokenSource(folder, tokenizer, FRACTION, "fail")
    kept = list(source.held_out())
    flipped(folder / "00000.bytes.npy", 130)
    with pytest.raises(MythosError, match=r"00000\.bytes\.npy: checksum differs"):
        list(TokenSource(folder, tokenizer, FRACTION, "fail").held_out())
    assert 0 < len(list(TokenSource(folder, tokenizer, FRACTION, "skip").held_out())) < len(kept)


def test_every_byte_of_a_header_may_be_flipped(folder: Path, tokenizer: Tokenizer) -> None:
    """The result is the same documents or an error that names the file."""
    expected = plain(TokenSource(folder, tokenizer, FRACTION, "fail").read(0, 0, 1))
    for kind in ("tokens", "documents"):
        path = folder / f"00000.{kind}.npy"
        for position in range(128):
            flipped(path, position)
            try:
                assert plain(TokenSource(folder, tokenizer, FRACTION, "fail").read(0, 0, 1)) == expected
            except MythosError as error:
                assert f"00000.{kind}.npy" in str(error)
            flipped(path, position)


# --- the writer's folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_missing_parts_are_written_again(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    before = files(folder)
    assert {name.partition(".")[2] for name in before if name[0] == "0"} == {
        "tokens.npy",
        "documents.npy",
        "bytes.npy",
    }
    (folder / "00001.tokens.npy").unlink()
    kept = (folder / "00000.tokens.npy").stat().st_ino
    corpus, _ = opened(tmp_path / "*.jsonl")
    writer = TokenWriter(corpus, tokenizer, folder, DataConfig(), SHARE)
    assert writer.begin() == [1]
    refused("is not complete", folder, tokenizer, 0.0, "fail")
    assert writer.begin() == [1], "interrupted once more"
    writer.write_part(1)
    writer.finish()
    assert files(folder) == before
    assert (folder / "00000.tokens.npy").stat().st_ino == kept
    assert writer.begin() == []


def test_what_a_killed_process_leaves_is_removed(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus, config = opened(tmp_path / "*.jsonl")
    other = tmp_path / "other"
    writer = TokenWriter(corpus, tokenizer, other, config, SHARE)
    other.mkdir()
    (other / "plan.json.123.tmp").touch()
    writer.begin()
    (other / "00001.tokens.npy.123.tmp").touch()
    (other / ".tokenizer.123").mkdir()
    (other / ".tokenizer.123" / "tokenizer.json").touch()
    for part in writer.begin():
        writer.write_part(part)
    writer.finish()
    assert files(other).keys() == files(folder).keys()


def test_what_others_have_put_into_the_folder_stays(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    corpus, config = opened(tmp_path / "*.jsonl")
    other = tmp_path / "other"
    writer = TokenWriter(corpus, tokenizer, other, config, SHARE)
    writer.begin()
    for name in ("notes.tmp", "00001.tokens.npy.tmp", ".tokenizer.backup/a", "plan.json.123.tmp/a"):
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_text("a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("a")
    (other / ".tokenizer.124").symlink_to(tmp_path / "elsewhere")
    before = {path: path.lstat().st_ino for path in other.rglob("*")}
    writer.begin()
    assert {path: path.lstat().st_ino for path in other.rglob("*")} == before
    assert (tmp_path / "elsewhere" / "a").exists()


@pytest.mark.parametrize("name", ["index.json", "00000.tokens.npy"])
def test_fifos_are_never_waited_for(folder: Path, tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    os.mkfifo(tmp_path / "copy" / name)
    with pytest.raises(MythosError, match="it is not a regular file"):
        list(TokenSource(tmp_path / "copy", tokenizer, SHARE, "fail").read(0, 0, 1))


def test_a_folder_of_something_else(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus, config = opened(tmp_path / "*.jsonl")

    def begin(corpus: Corpus, tokenizer: Tokenizer, directory: Path, share: float = SHARE) -> None:
        TokenWriter(corpus, tokenizer, directory, config, share).begin()

    with pytest.raises(MythosError, match="contains something else"):
        begin(corpus, tokenizer, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(MythosError, match=r"cannot be written: .*directory"):
        begin(corpus, tokenizer, tmp_path / "file" / "tokens")
    with pytest.raises(MythosError, match="begun with another tokenizer"):
        begin(corpus, word_tokenizer(300), folder)
    with pytest.raises(MythosError, match="begun with another validation share"):
        begin(corpus, tokenizer, folder, 0.3)
    with pytest.raises(MythosError, match="begun with another corpus"):
        begin(opened(tmp_path / "a.jsonl")[0], tokenizer, folder)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """14 MB of tokens in shards that are open side by side."""
    tokenizer = word_tokenizer(2**16 + 1)
    write_jsonl(tmp_path / "a.jsonl", ["w1 w2 " * 1000] * 1700)
    corpus, _ = opened(tmp_path / "a.jsonl")
    index = write_tokens(corpus, tokenizer, tmp_path / "tokens", share=0.0)
    assert index["totals"]["tokens"] * 4 > 12e6
    source = TokenSource(tmp_path / "tokens", tokenizer, 0.0, "fail")
    reading = [source.read(shard, 0, 1) for shard in range(len(source.shards))]
    for documents_of_shard in reading:
        next(documents_of_shard)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    for documents_of_shard in reading:
        for _ in documents_of_shard:
            peak = max(peak, process.memory_info().rss)
    assert peak - before < 4e6


PICKLE_AND_ARCHIVE = [b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(40)]
HEADERS = [
    b"",
    b"\x93NUMPY",
    b"\x93NUMPY\x01\x00\xff\xff{",
    *(
        b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        for text in (
            b"{'descr': '<u2', 'fortran_order': False, 'shape': (" + b"9" * 40 + b",)}\n",
            b"{'descr': '<u2', 'fortran_order': False, 'shape': (-5,)}\n",
            b"{'descr': '|O', 'fortran_order': False, 'shape': (5,)}\n",
            b"{'descr': [('a', [])], 'fortran_order': 1, 'shape': ()}\n",
            b"(" * 5000,
            b"{'descr': 5L\n  '",
            b"\xff" * 50,
        )
    ),
]


@pytest.mark.parametrize("content", [*PICKLE_AND_ARCHIVE, *HEADERS], ids=range(12))
@pytest.mark.parametrize("kind", ["tokens", "documents", "bytes"])
def test_files_that_are_no_arrays_are_damage(kind: str, content: bytes, folder: Path, tokenizer: Tokenizer) -> None:
    (folder / f"00000.{kind}.npy").write_bytes(content)

    def read(on_error: str) -> None:
        source = TokenSource(folder, tokenizer, SHARE, on_error)
        for shard in range(len(source.shards)):
            list(source.read(shard, 0, 1))
        list(source.held_out())

    read("skip")
    with pytest.raises(MythosError, match=rf"00000\.{kind}\.npy.*on_error: skip"):
        read("fail")


def test_pipes_are_not_waited_for(folder: Path, tokenizer: Tokenizer) -> None:
    for name in ("00000.tokens.npy", "index.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(MythosError, match=name):
            source = TokenSource(folder, tokenizer, 0.0, "fail")
            for shard in range(len(source.shards)):
                list(source.read(shard, 0, 1))


@pytest.mark.parametrize("content", [b"[" * 10**5, b"\xff", b"[]", b'{"format": []}', b"\xef\xbb\xbf{}"], ids=repr)
def test_an_index_that_is_none(content: bytes, folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "index.json").write_bytes(content)
    refused(r"index\.json", folder, tokenizer, 0.0, "fail")
