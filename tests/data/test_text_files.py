"""Text files as one document each: parts join to the file, streams read segments in order, held-out parts are apart."""

import gzip
import json
import logging
import tracemalloc
from collections import Counter
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mythos.config.data import DataConfig, FilterConfig, MixtureSourceConfig, ValidationConfig
from mythos.config.loading import config_from_dict
from mythos.data.corpus import Corpus, Skipped, is_held_out, open_corpora, open_corpus, with_stored_documents
from mythos.data.pipeline import Data, open_data
from mythos.data.source import TextSource, open_validation_sources
from mythos.data.stream import DifferentData, TokenStreams
from mythos.data.text_files import LEAST_PART, Cuts, joined, read_parts, segments
from mythos.data.tokenizer import Tokenizer
from mythos.data.validation import validation_set
from mythos.errors import MythosError

from .conftest import make_documents, make_streams, text_source

BOOK = "\n\n".join(f"Chapter {chapter}\n\n" + "\n".join(make_documents(25, seed=chapter)) for chapter in range(40))
TEXTS = [
    BOOK,
    "one line " * 3000,
    "深" * 4000,
    "\n" * 5000,
    "a\r\n\r\nb\r\n" * 700,
    "x" * 4096,
    "short",
    " \n\t \n" * 900 + "end",
]


def corpus(path: Path | str, **fields) -> Corpus:
    config = DataConfig(kind="files", path=str(path), **fields)
    return open_corpus(config, config)


def everything(opened: Corpus) -> list[str | Skipped]:
    return [document for shard in range(len(opened.shards)) for _, document in opened.read(shard)]


def read_epoch(streams: TokenStreams, tokenizer: Tokenizer) -> list[list[str]]:
    """The documents of the first epoch of every stream."""
    read = []
    for stream in streams._local:
        [walk] = stream.walks
        ids: list[int] = []
        for position, document, _ in walk._walk(walk.tell()[0]):
            if position.epoch:
                break
            ids += document.tolist()
        assert ids[-1] == tokenizer.eos_id
        read.append(tokenizer.decode(ids[:-1]).split("<|endoftext|>"))
    return read


# --- parts


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:8]))
@pytest.mark.parametrize("part", [8, 100, 512, 10**6])
def test_parts_join_to_the_file_from_any_row_on(text: str, part: int) -> None:
    content = text.encode()
    parts = list(read_parts(BytesIO(content), 0, None, part))
    assert b"".join(data for data, _ in parts) == content
    assert len(parts) == max(1, len(content) // part)
    assert [more for _, more in parts] == [True] * (len(parts) - 1) + [False]
    for data, _ in parts:
        assert data and len(data) <= 2.5 * part
        data.decode()  # no character is cut
    for row in {0, 1, 2, len(parts) // 2, len(parts) - 1, len(parts), len(parts) + 3}:
        assert list(read_parts(BytesIO(content), row, None, part)) == parts[row:], row
        assert list(read_parts(BytesIO(content), row, row + 2, part)) == parts[row : row + 2], row


def test_parts_begin_at_paragraphs_then_lines_then_spaces() -> None:
    def begins(text: str) -> str:
        return [data.decode() for data, _ in read_parts(BytesIO(text.encode()), 0, None, 20)][1]

    filler = "." * 18
    assert begins(f"{filler} a b\nc\n\nd{filler}{filler}").startswith("d.")
    assert begins(f"{filler} a b\nc{filler}{filler}").startswith("c.")
    assert begins(f"{filler}.. a b{filler}{filler}").startswith(" a")
    assert begins("深" * 20).startswith("深")


@pytest.mark.parametrize("size", [1, 99, 100, 101, 199, 200, 12345])
def test_segments_cover_a_file_evenly(size: int) -> None:
    for segment in (100, 250, 1000, 10**6):
        ranges = segments(size, Cuts(100, segment))
        assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])] and ranges[-1][1] == size
        assert all(end % 100 == 0 for _, end in ranges[:-1])
        assert max(end - start for start, end in ranges) <= segment + 100
        assert len(ranges) >= size // (segment + 100)


def test_joined_rows() -> None:
    rows = [(0, False, [1], [9]), (1, True, [2], [8]), (2, True, [3], [7]), (4, True, [4], [6]), (5, False, [5], [5])]
    assert list(joined(rows)) == [([1], [9]), ([2, 3], [8, 7]), ([4, 5], [6, 5])]


# --- documents


def test_a_file_is_a_document(tmp_path: Path) -> None:
    for name, text in (("a", "One.\n\nTwo.\n"), ("b", "\n\nThree"), ("c", " \n"), ("d", "")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert everything(corpus(tmp_path / "*.txt")) == ["One.\n\nTwo.\n", "\n\nThree", Skipped.DOCUMENT]
    assert everything(corpus(tmp_path / "[ab].txt", txt="paragraph")) == ["One.\n", "Two.\n", "Three"]
    assert everything(corpus(tmp_path / "[ab].txt", txt="line")) == ["One.", "Two.", "Three"]


def test_line_documents_have_no_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo \nthree")
    for cut in range(1, 20):
        monkeypatch.setattr("mythos.data.formats.PIECE_BYTES", cut)
        assert everything(corpus(tmp_path / "a.txt", txt="line")) == ["one", "two ", "three"]


@pytest.mark.parametrize("streams", [1, 4, 64])
def test_streams_read_contiguous_segments_of_a_book(streams: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    read = read_epoch(
        make_streams(text_source(tmp_path / "book.txt", tokenizer, streams=streams), streams=streams), tokenizer
    )
    texts = [text for documents in read for text in documents]
    assert all(text in BOOK for text in texts)
    assert "".join(sorted(texts, key=BOOK.index)) == BOOK
    sizes = [sum(map(len, documents)) for documents in read]
    assert max(sizes) - min(sizes) <= len(BOOK) / streams / 4 + 3 * LEAST_PART
    assert len(texts) <= 9 * streams
    if streams == 4:
        assert min(map(len, texts)) > len(BOOK) / 40, "segments, not parts"


def test_short_files_are_whole_in_one_stream(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["\n\n".join(make_documents(3, seed=file)) for file in range(100)]
    for file, text in enumerate(texts):
        (tmp_path / f"{file}.txt").write_text(text)
    read = read_epoch(make_streams(text_source(tmp_path, tokenizer, streams=4)), tokenizer)
    assert Counter(text for documents in read for text in documents) == Counter(texts)


def test_held_out_parts_are_apart_from_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    source = text_source(tmp_path / "book.txt", tokenizer, 0.1, streams=4)
    held_out = [tokenizer.decode(ids) for ids, _ in source.held_out()]
    assert all(sum(sizes) == len(tokenizer.decode(ids).encode()) for ids, sizes in source.held_out())
    trained = [text for documents in read_epoch(make_streams(source), tokenizer) for text in documents if text]
    assert all(text in BOOK for text in [*trained, *held_out]), "nothing is joined over a gap"
    assert "".join(sorted([*trained, *held_out], key=BOOK.index)) == BOOK
    assert 0.04 < sum(map(len, held_out)) / len(BOOK) < 0.2
    assert any(is_held_out(text, 0.1) for text in held_out)


def test_one_short_book_has_validation_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A share of one per cent of a book of 1 MB."""
    (tmp_path / "book.txt").write_text("\n\n".join(make_documents(6000)))
    source = text_source(tmp_path / "book.txt", tokenizer, 0.01)
    rows = validation_set({"x": (source, 1.0)}, sequences=4, sequence_length=128, eos_id=tokenizer.eos_id)
    assert len(rows.ids) == 4


def test_validation_files_stay_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    config = DataConfig(kind="files", path="x", validation=ValidationConfig(path=str(tmp_path / "book.txt")))
    source = open_validation_sources(config, {}, tokenizer)["validation"][0]
    [(ids, sizes)] = source.held_out()
    assert tokenizer.decode(ids) == BOOK and sum(sizes) == len(BOOK.encode())


def test_a_resumed_stream_continues_exactly(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    (tmp_path / "other.txt").write_text("\n\n".join(make_documents(100, seed=77)))

    def opened() -> TokenStreams:
        return make_streams(text_source(tmp_path, tokenizer, 0.1, streams=4), streams=4)

    whole = opened()
    states, batches = [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(whole.state_dict())))
        batches.append(whole.next_batch(5).ids)
    for step in range(0, 58, 3):
        resumed = opened()
        resumed.load_state_dict(states[step])
        for later in range(step, step + 2):
            assert np.array_equal(resumed.next_batch(5).ids, batches[later]), step


def test_packed_and_remote_files_give_the_same(tmp_path: Path) -> None:
    content = BOOK.encode()
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    memory = fsspec.filesystem("memory")
    memory.pipe("/library/a.txt", content)
    memory.pipe("/library/deeper/b.txt.gz", (tmp_path / "b.txt.gz").read_bytes())
    memory.pipe("/library/cover.png", b"?")
    for txt in ("file", "paragraph", "line"):
        plain = everything(corpus(tmp_path / "a.txt", txt=txt))
        assert list(map(str, everything(corpus("memory://library/a.txt", txt=txt)))) == list(map(str, plain))
        packed = corpus(tmp_path / "b.txt.gz", txt=txt)
        assert "".join(everything(packed)) == "".join(plain) or txt != "file"
        assert txt == "file" or everything(packed) == plain
        assert everything(corpus("memory://library", txt=txt)) == everything(corpus(tmp_path, txt=txt))
        for row in (0, 1, 7):
            assert list(packed.read(0, row, 3)) == list(packed.read(0))[row::3]


def test_a_truncated_packed_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(BOOK.encode())[:-500])
    with pytest.raises(MythosError, match=r"a\.txt\.gz, from row \d+ on cannot be read"):
        everything(corpus(tmp_path / "a.txt.gz"))
    *read, last = everything(corpus(tmp_path / "a.txt.gz", on_error="skip"))
    assert last is Skipped.SHARD and read and BOOK.startswith("".join(map(str, read)))


def test_bytes_that_are_no_text_cost_their_part(tmp_path: Path) -> None:
    content = bytearray(BOOK.encode())
    content[len(content) // 2] = 0xFF
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(MythosError, match=r"a\.txt, .*row \d+ cannot be used: .*on_error: skip"):
        everything(corpus(tmp_path / "a.txt"))
    kept = everything(corpus(tmp_path / "a.txt", on_error="skip"))
    assert kept.count(Skipped.DOCUMENT) == 1
    assert sum(len(text) for text in kept if isinstance(text, str)) > len(BOOK) - 3 * 512
    (tmp_path / "a.txt").write_bytes(BOOK.encode("utf-16"))
    with pytest.raises(MythosError, match="byte order mark of UTF-16"):
        everything(corpus(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + BOOK.encode())
    assert "".join(map(str, everything(corpus(tmp_path / "a.txt")))) == BOOK


@pytest.mark.parametrize("line", [b"text " * 20 + b"\n", b"x"])
def test_a_long_file_takes_little_memory(line: bytes, tmp_path: Path) -> None:
    with (tmp_path / "long.txt").open("wb") as file:
        for _ in range(60):
            file.write(line * (2**20 // len(line)))
    tracemalloc.start()
    try:
        opened = corpus(tmp_path / "long.txt", streams=2, max_document_bytes=10_000)
        size = sum(len(str(text)) for shard in range(len(opened.shards)) for _, text in opened.read(shard))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == (tmp_path / "long.txt").stat().st_size
    assert peak < 2 * 2**20
    last = len(opened.shards) - 1
    rows = list(opened.read(last))
    assert list(opened.read(last, len(rows) - 1)) == rows[-1:]


# --- runs of version 0.1


def test_paragraphs_are_the_documents_of_version_0_1(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    opened = corpus(tmp_path / "a.txt", txt="paragraph")
    assert opened.fingerprint == "4dce83e3648f53750b9f73781efa0f7e", "as version 0.1 computed it"
    assert len({corpus(tmp_path / "a.txt", txt=txt).fingerprint for txt in ("file", "paragraph", "line")}) == 3
    before = make_streams(TextSource(opened, tokenizer, 0.0)).state_dict()
    with pytest.raises(DifferentData, match="corpus was 4dce83e3648f53750b9f73781efa0f7e"):
        make_streams(text_source(tmp_path / "a.txt", tokenizer)).load_state_dict(before)


def test_a_run_of_version_0_1_keeps_its_documents() -> None:
    def resumed(saved: dict, **fields) -> DataConfig:
        return with_stored_documents(DataConfig(**fields), saved)

    old = DataConfig(kind="files", path="a").model_dump(mode="json", exclude={"txt"})
    assert resumed(old, kind="files", path="a").txt == "paragraph"
    assert resumed(old, kind="files", path="a", txt="file").txt == "file", "asked for"
    assert resumed(old | {"txt": "line"}, kind="files", path="a").txt == "file"
    assert resumed({}, kind="files", path="a").txt == "file"
    assert resumed(old | {"kind": "embedded"}).txt == "file"
    mixture = {"kind": "mixture", "sources": {"x": MixtureSourceConfig(kind="files", path="a")}}
    stored = {"kind": "mixture", "sources": {"x": {"kind": "files", "path": "a", "text_column": "text"}}}
    assert resumed(stored, **mixture).sources["x"].txt == "paragraph"

    for data, expected in (
        ({"kind": "files", "path": "a"}, "paragraph"),
        ({"kind": "files", "path": "a", "txt": "line"}, "line"),
        ({"validation": {"path": "a.txt"}}, "paragraph"),
        ({}, "file"),
    ):
        assert config_from_dict({"data": data}, to_train=False).data.txt == expected


def test_data_of_a_continued_run_is_opened_as_before(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text(BOOK)
    tokenizer.save(tmp_path / "tokenizer")
    config = config_from_dict(
        {
            "data": {"kind": "files", "path": str(tmp_path / "a.txt")},
            "tokenizer": {"name": str(tmp_path / "tokenizer")},
            "train": {"steps": 1},
        }
    )
    stored = config.data.model_dump(mode="json", exclude={"txt"})
    for saved, expected in (({}, "file"), (stored, "paragraph")):
        data = open_data(config, None, saved)
        assert isinstance(data, Data) and data.config.txt == expected
        source = data.sources["corpus"][0]
        assert source.identity["corpus"] == corpus(tmp_path / "a.txt", txt=expected).fingerprint


# --- folders and refusals


def test_a_folder_means_its_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.txt", "deeper/a.txt", ".git/c.txt", ".hidden.txt"):
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_text(name)
    with caplog.at_level(logging.WARNING):
        assert everything(corpus(tmp_path / "books")) == ["b.txt", "deeper/a.txt"]
    assert not caplog.records
    (tmp_path / "books" / "cover.png").write_bytes(b"?")
    with caplog.at_level(logging.WARNING):
        assert everything(corpus(f"{tmp_path}/books/")) == ["b.txt", "deeper/a.txt"]
    assert "reading 2 files, leaving out 1 with other extensions (first: " in caplog.text
    config = DataConfig(
        kind="files", path=str(tmp_path / "books"), validation=ValidationConfig(path=str(tmp_path / "books" / "deeper"))
    )
    assert everything(open_corpora(config)["corpus"]) == ["b.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "cover.png").write_bytes(b"?")
    with pytest.raises(MythosError, match=r"data\.path: the folder .*empty contains no file to read \(1 with other"):
        corpus(tmp_path / "empty")


def test_length_is_unknown_for_files_read_in_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo, longer")
    rule = {"length": FilterConfig(min=5)}
    with pytest.raises(MythosError, match=r"data\.filters\.length: .*a\.txt is one document and read in parts"):
        corpus(tmp_path / "a.txt", filters=rule)
    assert everything(corpus(tmp_path / "a.txt", txt="paragraph", filters=rule)) == [Skipped.FILTERED, "two, longer"]
