"""Every kind of corpus yields what was written, from any row, and names what is wrong with bad input."""

import gzip
import json
import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mythos.config import config_from_dict
from mythos.data import formats
from mythos.data.config import DataConfig, FilterConfig, ValidationConfig
from mythos.data.corpus import Corpus, Skipped, is_held_out, open_corpus, open_validation
from mythos.data.formats import local_file
from mythos.errors import MythosError

from .conftest import make_documents, write_jsonl, write_parquet


def files(path: Path | str, **fields) -> Corpus:
    return opened(DataConfig(kind="files", path=str(path), **fields))


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
