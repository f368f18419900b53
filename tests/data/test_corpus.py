"""Every kind of corpus yields what was written, from any row, and names what is wrong with bad input."""

import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mythos.config import DataConfig, ValidationConfig
from mythos.data import corpus as corpus_module
from mythos.data.corpus import Corpus, is_held_out, open_corpus, open_validation
from mythos.errors import MythosError

from .conftest import make_documents, write_jsonl, write_parquet


def files(path: Path | str, **fields) -> Corpus:
    return open_corpus(DataConfig(kind="files", path=str(path), **fields))


def everything(corpus: Corpus) -> list[str | None]:
    return [document for shard in range(len(corpus.shards)) for document in corpus.read(shard, 0)]


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
@pytest.mark.parametrize("cut", [1, 100, 10**9])
def test_reads_every_document_from_any_row(
    kind: str, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "JSONL_SHARD_BYTES", cut)
    documents = make_documents(35)
    corpus = files(write(kind, tmp_path, documents))
    assert [document.strip() for document in everything(corpus)] == documents
    for shard in range(len(corpus.shards)):
        whole = list(corpus.read(shard, 0))
        for row in range(len(whole) + 1):
            assert list(corpus.read(shard, row)) == whole[row:]
            assert list(corpus.read(shard, row, 3)) == whole[row::3]


def test_parquet_shards_are_row_groups_and_jsonl_shards_are_ranges(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(corpus_module, "JSONL_SHARD_BYTES", 500)
    documents = make_documents(35)
    assert len(files(write("parquet", tmp_path, documents)).shards) == 4
    path = Path(write("jsonl", tmp_path, documents))
    assert len(files(path).shards) == -(-path.stat().st_size // 500)


def test_hub_dataset(tmp_path: Path) -> None:
    documents = make_documents(45)
    write_parquet(tmp_path / "train-0.parquet", documents[:20])
    write_parquet(tmp_path / "train-1.parquet", documents[20:])
    config = DataConfig(kind="hub", dataset=str(tmp_path))
    corpus = open_corpus(config)
    assert len(corpus.shards) == 5, "row groups of 10"
    assert everything(corpus) == documents
    assert list(corpus.read(1, 3)) == documents[13:20]
    assert list(corpus.read(3, 1, 4)) == documents[31:40:4]
    assert open_corpus(config).fingerprint == corpus.fingerprint
    write_parquet(tmp_path / "train-2.parquet", documents[:10])
    assert open_corpus(config).fingerprint != corpus.fingerprint


def test_hub_errors(tmp_path: Path) -> None:
    with pytest.raises(MythosError, match=r"nobody/nothing.*network"):
        open_corpus(DataConfig(kind="hub", dataset="nobody/nothing"))
    write_parquet(tmp_path / "train.parquet", make_documents(3), column="body")
    with pytest.raises(MythosError, match=r"no column 'text'; it has body, id"):
        open_corpus(DataConfig(kind="hub", dataset=str(tmp_path)))
    with pytest.raises(MythosError, match=r"split test"):
        open_corpus(DataConfig(kind="hub", dataset=str(tmp_path), split="test"))


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


def test_documents_that_are_not_text_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    write_jsonl(path, ["good", None, "", "  \n", 7, ["x"], "better"])
    corpus = files(path)
    assert everything(corpus) == ["good", None, None, None, None, None, "better"]
    assert corpus.skipped == {"documents": 5, "shards": 0}


@pytest.mark.parametrize(
    "line", [b'{"text": "torn', b"\xff\xfe", b'{"text": "caf\xe9"}', b'{"text": "\\ud800"}'], ids=repr
)
def test_undecodable_lines(line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "better"}\n')
    with pytest.raises(MythosError, match=r"documents\.jsonl, row 1 cannot be decoded.*on_error: skip"):
        everything(files(path))
    corpus = files(path, on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert everything(corpus) == ["good", None, "better"]
    assert corpus.skipped == {"documents": 1, "shards": 0}
    assert "documents.jsonl, row 1" in caplog.text


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "documents.txt"
    path.write_bytes(b"good\n\ncaf\xe9\n\nbetter")
    with pytest.raises(MythosError, match=r"documents\.txt, row 1"):
        everything(files(path))
    assert everything(files(path, on_error="skip")) == ["good\n", None, "better"]


def test_truncated_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "a.parquet", make_documents(10))
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MythosError, match=r"b\.parquet cannot be read"):
        files(tmp_path / "*.parquet")
    corpus = files(tmp_path / "*.parquet", on_error="skip")
    assert everything(corpus) == make_documents(10)
    assert corpus.skipped == {"documents": 0, "shards": 1}
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
    with pytest.raises(MythosError, match=r"a\.parquet, row group 1 cannot be read"):
        everything(files(path))
    corpus = files(path, on_error="skip")
    assert everything(corpus) == documents[:10] + documents[20:]
    assert everything(corpus) and corpus.skipped["shards"] == 1, "counted once, however often it is tried"


def test_truncated_gzip(tmp_path: Path) -> None:
    path = Path(write("jsonl.gz", tmp_path, make_documents(2000)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MythosError, match=r"documents\.jsonl\.gz cannot be read"):
        everything(files(path))
    corpus = files(path, on_error="skip")
    read = everything(corpus)
    assert 0 < len(read) < 2000 and read == make_documents(2000)[: len(read)]
    assert corpus.skipped["shards"] == 1


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
    assert everything(open_corpus(config)) == ["document 0", "document 2"]
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
