"""Every kind of corpus yields the documents written to it, from any row on, and names faults of bad input."""

import gzip
import json
import logging
import os
import re
import tracemalloc
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mythos.config.data import DataConfig, FilterConfig, ValidationConfig
from mythos.config.loading import config_from_dict
from mythos.data import formats
from mythos.data.corpus import Corpus, Skipped, is_held_out, open_corpus, open_validation
from mythos.data.formats import local_file
from mythos.errors import MythosError

from .conftest import make_documents, write_jsonl, write_parquet


def files(path: Path | str, **fields) -> Corpus:
    """The documents of a glob; those of text files are paragraphs (tests/data/test_text_files.py has the others)."""
    return opened(DataConfig(kind="files", path=str(path), **{"txt": "paragraph", **fields}))


def opened(config: DataConfig) -> Corpus:
    return open_corpus(config, config)


def everything(corpus: Corpus) -> list[str | Skipped]:
    return [document for shard in range(len(corpus.shards)) for _, document in corpus.read(shard)]


def write(kind: str, folder: Path, documents: list[str]) -> str:
    path = folder / f"documents.{kind}"
    if kind == "parquet":
        write_parquet(path, documents)
    elif kind == "txt":
        path.write_text("\n \n\n".join(documents) + "\n\n")
    elif kind == "jsonl.gz":
        write_jsonl(folder / "plain", documents)
        path.write_bytes(gzip.compress((folder / "plain").read_bytes()))
    else:
        write_jsonl(path, documents)
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "txt"])
@pytest.mark.parametrize("cut", [1, 7, 100, 10**9])
def test_reads_every_document_from_any_row(
    kind: str, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "PIECE_BYTES", cut)
    monkeypatch.setattr(formats, "PARQUET_BATCH", 4)
    documents = make_documents(35)
    corpus = files(write(kind, tmp_path, documents))
    assert [str(document).strip() for document in everything(corpus)] == documents
    for shard in range(len(corpus.shards)) if cut > 7 else [0, len(corpus.shards) // 2, len(corpus.shards) - 1]:
        whole = list(corpus.read(shard))
        assert [row for row, _ in whole] == list(range(len(whole)))
        for row in range(len(whole) + 1):
            assert list(corpus.read(shard, row)) == whole[row:]
            assert list(corpus.read(shard, row, 3)) == whole[row::3]


def test_a_parquet_file_is_a_shard_where_files_are_many(tmp_path: Path) -> None:
    documents = make_documents(100)
    for index in range(4):
        write_parquet(tmp_path / f"{index}.parquet", documents[25 * index : 25 * index + 25])
    corpus = files(tmp_path / "*.parquet", streams=1)
    assert len(corpus.shards) == 4 and everything(corpus) == documents
    for row in (0, 3, 9, 10, 11, 24, 25):
        assert [text for _, text in corpus.read(2, row)] == documents[50 + row : 75]
        assert list(corpus.read(2, row, 7)) == [(r, documents[50 + r]) for r in range(row, 25, 7)]
    assert len(files(tmp_path / "*.parquet", streams=2).shards) == 12, "row groups of 10"


@pytest.mark.parametrize(
    "text",
    [b"a\nb\n\nc", b"\n\n a \n\n\nb\n  \nc\n", b"one", b"a\r\n\r\nb\r\n", b"   x\n\n   \n y", b"a\n\n\n\n\n\nb"],
    ids=repr,
)
def test_paragraphs_do_not_depend_on_where_a_file_is_cut(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(text)
    expected = [part.strip() for part in re.split(r"\n[ \r]*(?:\n[ \r]*)+", text.decode()) if part.strip()]
    for cut in range(1, len(text) + 1):
        monkeypatch.setattr(formats, "PIECE_BYTES", cut)
        assert [str(document).strip() for document in everything(files(path))] == expected, cut


def test_parquet_shards_are_row_groups_and_jsonl_shards_are_ranges(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(formats, "PIECE_BYTES", 500)
    documents = make_documents(35)
    assert len(files(write("parquet", tmp_path, documents)).shards) == 4
    path = Path(write("jsonl", tmp_path, documents))
    assert len(files(path).shards) == -(-path.stat().st_size // 500)


def test_hub_dataset_in_a_local_folder(tmp_path: Path) -> None:
    documents = make_documents(45)
    write_parquet(tmp_path / "train-0.parquet", documents[:20])
    write_parquet(tmp_path / "train-1.parquet", documents[20:])
    config = DataConfig(kind="hub", dataset=str(tmp_path))
    corpus = opened(config)
    assert len(corpus.shards) == 5, "row groups of 10"
    assert everything(corpus) == documents
    assert opened(config).fingerprint == corpus.fingerprint
    write_parquet(tmp_path / "train-2.parquet", documents[:10])
    assert opened(config).fingerprint != corpus.fingerprint


def test_fingerprint_follows_the_content_and_not_the_folder(tmp_path: Path) -> None:
    documents = make_documents(20)
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write("parquet", tmp_path / folder, documents))
    first, moved = (files(path).fingerprint for path in paths)
    assert first == moved
    write("parquet", tmp_path / "b", documents[:-1])
    assert files(paths[1]).fingerprint != first


def test_documents_that_are_not_text_follow_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    write_jsonl(path, ["good", None, "", "  \n", 7, ["x"], "better"])
    assert everything(files(path, on_error="skip")) == ["good", *[Skipped.DOCUMENT] * 5, "better"]
    with pytest.raises(MythosError, match=r"documents\.jsonl, row 1 cannot be used: its text is null.*on_error: skip"):
        everything(files(path))
    write_jsonl(path, ["good", "", "better"])
    assert everything(files(path)) == ["good", Skipped.DOCUMENT, "better"], "an empty text is no fault"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_documents_that_are_too_long_follow_the_policy(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path, ["short", "é" * 501, "also short"])
    corpus = files(path, on_error="skip", max_document_bytes=1001)
    assert [document is Skipped.DOCUMENT for document in everything(corpus)] == [False, True, False]
    with pytest.raises(MythosError, match=r"row 1 .*1,00\d bytes, and data\.max_document_bytes is 1,001"):
        everything(files(path, max_document_bytes=1001))


FILTERED = [
    ({"int_score": {"min": 3}}, [2, 3, 5]),
    ({"int_score": {"min": 3.5, "max": 4}}, [3]),
    ({"language": {"one_of": ["en", "de"]}}, [0, 1, 2, 4, 5]),
    ({"int_score": {"min": 3}, "language": {"one_of": ["en"]}}, [2, 5]),
    ({"length": {"max": 2}}, [0, 1]),
    ({"good": {"one_of": [True]}}, [1, 5]),
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(("filters", "passing"), FILTERED, ids=str)
def test_filters(kind: str, filters: dict, passing: list[int], tmp_path: Path) -> None:
    rows = {
        "text": ["a", "ab", "abc", "abcd", "abcde", "abcdef"],
        "int_score": [1, 2, 3, 4, None, 5],
        "language": ["en", "de", "en", "fr", "de", "en"],
        "good": [False, True, None, False, False, True],
    }
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(rows), path)
    else:
        path.write_text("".join(json.dumps({name: rows[name][row] for name in rows}) + "\n" for row in range(6)))
    config = config_from_dict({"data": {"kind": "files", "path": str(path), "filters": filters}, "train": {"steps": 1}})
    expected = [text if index in passing else Skipped.FILTERED for index, text in enumerate(rows["text"])]
    corpus = opened(config.data)
    assert everything(corpus) == expected
    assert corpus.fingerprint != files(path).fingerprint, "a position is in what passes"


def test_bad_filters(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"], "language": ["en"]}), path)
    with pytest.raises(MythosError, match=r"data\.filters\.score: .* no column 'score'; it has language, text"):
        files(path, filters={"score": FilterConfig(min=1)})
    with pytest.raises(MythosError, match=r"data\.filters\.language: min and max need numbers.*'en'.*one_of"):
        everything(files(path, filters={"language": FilterConfig(min=1)}))


@pytest.mark.parametrize(
    "line", [b'{"text": "torn', b"\xff\xfe", b'{"text": "caf\xe9"}', b'{"text": "\\ud800"}'], ids=repr
)
def test_undecodable_lines(line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "better"}\n')
    with pytest.raises(MythosError, match=r"documents\.jsonl, row 1 cannot be used.*on_error: skip"):
        everything(files(path))
    corpus = files(path, on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert everything(corpus) == ["good", Skipped.DOCUMENT, "better"]
    assert "documents.jsonl, row 1" in caplog.text


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "documents.txt"
    path.write_bytes(b"good\n\ncaf\xe9\n\nbetter")
    with pytest.raises(MythosError, match=r"documents\.txt, row 1"):
        everything(files(path))
    assert everything(files(path, on_error="skip")) == ["good\n", Skipped.DOCUMENT, "better"]


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = pa.array([b"good", b"caf\xe9", b"better"], pa.binary())
    pq.write_table(pa.table({"text": texts.view(pa.string())}), path)
    with pytest.raises(MythosError, match=r"x\.parquet, row 1 cannot be used: .*utf-8"):
        everything(files(path))
    assert everything(files(path, on_error="skip")) == ["good", Skipped.DOCUMENT, "better"]


def test_truncated_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "a.parquet", make_documents(10))
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MythosError, match=r"b\.parquet cannot be read"):
        files(tmp_path / "*.parquet")
    corpus = files(tmp_path / "*.parquet", on_error="skip")
    assert everything(corpus) == make_documents(10)
    assert "b.parquet cannot be read" in caplog.text
    with pytest.raises(MythosError, match="empty"):
        files(tmp_path / "b.parquet", on_error="skip")


def test_damage_inside_a_shard_spares_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    documents = make_documents(30)
    pq.write_table(pa.table({"text": documents}), path, row_group_size=10, compression="zstd")
    start = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 60] = bytes(60)
    path.write_bytes(data)
    with pytest.raises(MythosError, match=r"a\.parquet, row group 1, from row 0 on cannot be read"):
        everything(files(path))
    corpus = files(path, on_error="skip")
    assert everything(corpus) == [*documents[:10], Skipped.SHARD, *documents[20:]]
    whole = Corpus([local_file(str(path))], on_error="skip", minimum_shards=1)
    assert len(whole.shards) == 1 and everything(whole) == everything(corpus), "the other row groups of the file"
    assert list(whole.read(0, 7, 5)) == [
        (7, documents[7]),
        (12, Skipped.SHARD),
        (22, documents[22]),
        (27, documents[27]),
    ]


def test_truncated_gzip(tmp_path: Path) -> None:
    path = Path(write("jsonl.gz", tmp_path, make_documents(2000)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MythosError, match=r"documents\.jsonl\.gz, from row \d+ on cannot be read"):
        everything(files(path))
    corpus = files(path, on_error="skip")
    *read, last = everything(corpus)
    assert 0 < len(read) < 2000 and read == make_documents(2000)[: len(read)] and last is Skipped.SHARD


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(MythosError, match=r"data\.path: .*none-\*\.parquet matches no file"):
        files(tmp_path / "none-*.parquet")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(MythosError, match=r"x\.csv has an unknown extension; allowed are \.parquet, \.jsonl"):
        files(tmp_path / "x.csv")
    for name in ("x.jsonl", "x.txt"):
        (tmp_path / name).write_text("")
        with pytest.raises(MythosError, match="the corpus is empty"):
            files(tmp_path / name)
    write_parquet(tmp_path / "x.parquet", [])
    with pytest.raises(MythosError, match="the corpus is empty"):
        files(tmp_path / "x.parquet")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_missing_text_column(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        write_parquet(path, ["a"], column="body")
    else:
        path.write_text(json.dumps({"id": 1, "body": "a"}) + "\n")
    with pytest.raises(MythosError, match=r"no column 'text'; it has body, id"):
        files(path)
    assert everything(files(path, text_column="body")) == ["a"]


def test_validation_files_are_never_trained_on(tmp_path: Path) -> None:
    for index in range(3):
        write_parquet(tmp_path / f"part-{index}.parquet", [f"document {index}"])
    config = DataConfig(
        kind="files",
        path=str(tmp_path / "*.parquet"),
        validation=ValidationConfig(path=str(tmp_path / "part-1.parquet")),
    )
    assert everything(opened(config)) == ["document 0", "document 2"]
    validation = open_validation(config)
    assert validation and everything(validation) == ["document 1"]
    assert open_validation(DataConfig(kind="files", path=str(tmp_path / "*.parquet"))) is None


def test_held_out_share() -> None:
    documents = make_documents(20_000)
    held_out = [document for document in documents if is_held_out(document, 0.05)]
    assert 0.04 < len(held_out) / len(documents) < 0.06
    assert all(is_held_out(f"\n {document} ", 0.05) for document in held_out), "copies fall on the same side"
    assert all(is_held_out(document, 0.2) for document in held_out), "a larger share keeps what was held out"
    assert not any(is_held_out(document, 0.0) for document in documents)


TEXT_TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
}


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_every_text_type_of_parquet_is_read_alike(kind: str, tmp_path: Path) -> None:
    documents = [*make_documents(30), "repeated", "repeated"]
    column = pa.array(documents)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(TEXT_TYPES[kind])
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet", row_group_size=20)
    corpus = files(tmp_path / "x.parquet")
    for row, step in ((0, 1), (3, 1), (0, 3), (2, 3), (19, 7)):
        assert list(corpus.read(0, row, step)) == list(enumerate(documents[:20]))[row::step]
        assert list(corpus.read(1, row, step)) == list(enumerate(documents[20:]))[row::step]


def test_a_large_dictionary_is_not_copied_for_every_few_rows(tmp_path: Path) -> None:
    documents = [f"{index} " + "word " * 200 for index in range(5000)]
    pq.write_table(pa.table({"text": pa.array(documents).dictionary_encode()}), tmp_path / "x.parquet")
    corpus = files(tmp_path / "x.parquet")
    before = pa.total_allocated_bytes()
    most = 0
    for step in (1, 4):
        for row, text in corpus.read(0, 0, step):
            assert text == documents[row]
            most = max(most, pa.total_allocated_bytes() - before)
    assert most < 10 * sum(map(len, documents)), "313 batches of 16 rows would hold as many copies"


@pytest.mark.skipif("MYTHOS_LARGE_TESTS" not in os.environ, reason="5 GB of memory and half a minute")
def test_a_row_group_of_more_than_2_gib_of_text(tmp_path: Path) -> None:
    """Offsets of Arrow's string type are 32 bits wide. Run it with MYTHOS_LARGE_TESTS=1."""
    line = "the loop runs again " * 50_000
    column = pa.chunked_array([pa.array([f"{chunk * 100 + row} {line}" for row in range(100)]) for chunk in range(23)])
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": column}), path, compression="zstd", use_dictionary=False)
    del column
    corpus = files(path)
    for step in (1, 400):
        rows = [(row, text.partition(" ")) for row, text in corpus.read(0, 1, step) if row % 200 == 1]
        assert rows == [(row, (str(row), " ", line)) for row in range(1, 2300, max(step, 200))]


@pytest.mark.parametrize("on_error", ["skip", "fail"])
def test_a_key_that_a_record_lacks_is_null_at_any_row(on_error: str, tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b", "score": 5}, {"text": "c", "score": 0}, {"other": 1, "text": "d"}]
    passes = {"a": Skipped.FILTERED, "b": "b", "c": Skipped.FILTERED, "d": Skipped.FILTERED}
    for turn in range(4):
        order = rows[turn:] + rows[:turn]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        corpus = files(tmp_path / "x.jsonl", on_error=on_error, filters={"score": FilterConfig(min=1)})
        assert everything(corpus) == [passes[row["text"]] for row in order]
        for index, row in enumerate(order):  # the same records as files of one line
            (tmp_path / f"{index}.json").write_text(json.dumps(row))
        corpus = files(tmp_path / "*.json", on_error=on_error, filters={"score": FilterConfig(min=1)})
        assert everything(corpus) == [passes[row["text"]] for row in order]
    with pytest.raises(MythosError, match=r"\(like the 3 other files\) has no column 'nothing'; it has other"):
        files(tmp_path / "*.json", filters={"nothing": FilterConfig(min=1)})


def test_a_record_without_the_text_follows_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"license": "x"}\n{"text": "b"}\n')
    assert everything(files(path, on_error="skip")) == [Skipped.DOCUMENT, "b"]
    with pytest.raises(MythosError, match=r"row 0 cannot be used: its text is null"):
        everything(files(path))


def test_a_file_that_lacks_a_column_beside_one_that_has_it(tmp_path: Path) -> None:
    """A parquet file without the column is an unreadable shard, whether it comes first or last."""
    for names in (("a", "b"), ("b", "a")):
        for name, column in zip(names, ("text", "body"), strict=True):
            write_parquet(tmp_path / f"{name}.parquet", ["one"], column=column)
        documents = everything(files(tmp_path / "*.parquet", on_error="skip"))
        assert sorted(map(str, documents)) == ["Skipped.SHARD", "one"]
        with pytest.raises(MythosError, match="it has no column text"):
            everything(files(tmp_path / "*.parquet"))


def test_plain_text_has_no_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three", "score": 3}')
    corpus = files(f"{tmp_path}/[ab].*", filters={"score": FilterConfig(min=1)})
    assert everything(corpus) == [Skipped.FILTERED, Skipped.FILTERED, "three"]
    with pytest.raises(MythosError, match=r"data\.filters\.score: .*a\.txt has no column 'score'"):
        files(tmp_path / "a.txt", filters={"score": FilterConfig(min=1)})


def test_where_a_column_cannot_be_found_among_many_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mythos.data.corpus.COLUMNS_BYTES", 100)
    write_jsonl(tmp_path / "x.jsonl", make_documents(20))
    with caplog.at_level(logging.WARNING):
        corpus = files(tmp_path / "x.jsonl", filters={"score": FilterConfig(min=1)})
    assert "none of the first records" in caplog.text and "'score'" in caplog.text
    assert set(everything(corpus)) == {Skipped.FILTERED}


def test_columns_of_the_same_name(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string()), ("text", pa.string()), ("id", pa.int64())])
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], schema=schema)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(MythosError, match=r"x\.parquet.* cannot be read: it has 2 columns text"):
        everything(files(tmp_path / "x.parquet"))
    assert everything(files(tmp_path / "x.parquet", on_error="skip")) == [Skipped.SHARD]
    schema = pa.schema([("text", pa.string()), ("id", pa.int64()), ("id", pa.int64())])
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([1])], schema=schema)
    pq.write_table(table, tmp_path / "x.parquet")
    assert everything(files(tmp_path / "x.parquet")) == ["a"], "nobody asks for the others"


@pytest.mark.parametrize(
    "column",
    [
        pa.array([3, 2**31 - 1, -(2**31)], pa.date32()),
        pa.array([0, 2**62, -(2**62)], pa.timestamp("us")),
        pa.array([0, 1, 2], pa.timestamp("s", "Nowhere/Nothing")),
    ],
    ids=["date", "timestamp", "zone"],
)
@pytest.mark.parametrize("step", [1, 2])
def test_values_that_python_cannot_hold_follow_the_policy(column: pa.Array, step: int, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c"], "when": column}), tmp_path / "x.parquet")
    assert everything(files(tmp_path / "x.parquet")) == ["a", "b", "c"], "nobody asks for the dates"
    rule = {"when": FilterConfig(one_of=["x"])}
    corpus = files(tmp_path / "x.parquet", on_error="skip", filters=rule)
    unknown = column.type == pa.timestamp("s", "Nowhere/Nothing")
    expected = [Skipped.DOCUMENT if unknown else Skipped.FILTERED, Skipped.DOCUMENT, Skipped.DOCUMENT]
    assert [document for _, document in corpus.read(0, 0, step)] == expected[::step]
    with pytest.raises(MythosError, match=r"x\.parquet, row \d cannot be used"):
        everything(files(tmp_path / "x.parquet", filters=rule))


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl", "txt"])
@pytest.mark.parametrize("line", [b"x", b'{"text": "'], ids=repr)
def test_a_line_without_an_end_takes_bounded_memory(kind: str, line: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    content = b'{"text": "a"}\n\n' + line * (150_000_000 // len(line)) + b'\n\n{"text": "b"}\n'
    path.write_bytes(gzip.compress(content, 1) if kind == "jsonl.gz" else content)
    del content
    tracemalloc.start()
    try:
        documents = everything(files(path, on_error="skip"))
        with pytest.raises(MythosError, match=r"row \d+ cannot be used: it has more than .* data\.max_document_bytes"):
            everything(files(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 110 * 2**20
    text = kind == "txt"
    first, broken, last = documents
    assert (first, last) == (('{"text": "a"}\n', '{"text": "b"}\n') if text else ("a", "b"))
    assert broken is Skipped.DOCUMENT


@pytest.mark.parametrize("size", [2**20 - 30, 2**20, 2**20 + 30, 3_000_000])
def test_lines_longer_than_a_block_are_read_whole(size: int, tmp_path: Path) -> None:
    documents = ["a" * size, "b", "c" * size]
    for kind in ("jsonl", "txt"):
        corpus = files(write(kind, tmp_path, documents))
        assert [str(document).strip() for document in everything(corpus)] == documents


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt"])
@pytest.mark.parametrize("blank", [b"", b"\n", b"\r\n"], ids=repr)
def test_byte_order_marks(kind: str, blank: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = make_documents(5)
    path = Path(write(kind, tmp_path, documents))
    opened_as: Callable = gzip.open if kind == "jsonl.gz" else open
    with opened_as(path, "rb") as file:
        content = file.read()
    with opened_as(path, "wb") as file:
        file.write(BOM_UTF8 + blank + content)
    for cut in (1, 3, 4, 5, 2**20):
        monkeypatch.setattr(formats, "PIECE_BYTES", cut)
        assert [str(document).strip() for document in everything(files(path))] == documents, cut
    for encoding in ("utf-16", "utf-32"):
        with opened_as(path, "wb") as file:
            file.write(content.decode().encode(encoding))
        with pytest.raises(MythosError, match="it begins with a byte order mark of UTF-16 or UTF-32; convert it"):
            everything(files(path))
        assert set(everything(files(path, on_error="skip"))) <= {Skipped.SHARD, Skipped.DOCUMENT}


def test_nul_bytes_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"good\n\n" + "wide".encode("utf-16-le") + b"\n\nbetter")
    assert everything(files(path, on_error="skip")) == ["good\n", Skipped.DOCUMENT, "better"]
    with pytest.raises(MythosError, match=r"row 1 cannot be used: it contains NUL bytes"):
        everything(files(path))
    write_jsonl(tmp_path / "x.jsonl", ["escaped \0 in JSON"])
    assert everything(files(tmp_path / "x.jsonl")) == ["escaped \0 in JSON"]


@pytest.mark.parametrize("name", ["web[v2]", "a*b", "what?", "[", "]x[", "[!a]"])
def test_names_that_exist_are_no_patterns(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "deeper [1]"
    folder.mkdir(parents=True)
    (tmp_path / "webv").mkdir()
    for place, text in ((folder / f"{name}.txt", "right"), (tmp_path / "webv" / "x.txt", "wrong")):
        place.write_text(text)
    for pattern in (folder / f"{name}.txt", folder / "*.txt", tmp_path / name / "*" / "*.txt", folder / "**" / "*.txt"):
        assert everything(files(pattern)) == ["right"], pattern
    assert everything(files(f"{tmp_path}/*/deeper [1]/*.txt")) == ["right"]
    validation = ValidationConfig(path=str(folder / "*"))
    held_out = DataConfig(kind="files", path=f"{tmp_path}/**/*.txt", validation=validation)
    assert everything(opened(held_out)) == ["wrong"]
    assert everything(files(folder)) == ["right"]


def test_patterns_stay_patterns(tmp_path: Path) -> None:
    for name in ("part1", "part2", "part3"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert everything(files(tmp_path / "part[12].txt")) == ["part1", "part2"]
    assert everything(files(tmp_path / "part[!12].txt")) == ["part3"]
    (tmp_path / "part[12].txt").write_text("itself")
    assert everything(files(tmp_path / "part[12].txt")) == ["itself"]
