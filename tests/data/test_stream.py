"""Streams read every document once per epoch, lose no target, resume exactly, and do not depend on the world size."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mythos.config import DataConfig
from mythos.data.corpus import Corpus, is_held_out, open_corpus
from mythos.data.stream import TokenStreams, deal_parts, validation_sequences
from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError

from .conftest import make_documents, write_jsonl, write_parquet


def files(path: str | Path, **fields) -> Corpus:
    return open_corpus(DataConfig(kind="files", path=str(path), **fields))


def make_streams(corpus: Corpus, tokenizer: Tokenizer, **changes) -> TokenStreams:
    arguments = {"streams": 4, "sequence_length": 16, "seed": 3, "holdout_fraction": 0.0}
    return TokenStreams(corpus, tokenizer, **{**arguments, **changes})


def documents_of_stream(rows: list[torch.Tensor], tokenizer: Tokenizer) -> list[str]:
    """Whole documents in the consumed inputs of one stream."""
    text = tokenizer.decode(torch.cat([row[:-1] for row in rows]).tolist())
    return text.split("<|endoftext|>")[:-1]


@pytest.mark.parametrize(("file_count", "streams"), [(1, 4), (3, 4), (7, 4), (1, 16), (3, 16), (7, 1)])
def test_an_epoch_reads_every_document_once(
    file_count: int, streams: int, parquet_folder: Callable[..., str], tokenizer: Tokenizer
) -> None:
    documents = make_documents(211)
    corpus = files(parquet_folder(documents, file_count, row_group=50))
    data = make_streams(corpus, tokenizer, streams=streams)
    parts = deal_parts(len(corpus.shards), streams, seed=3)
    expected = [
        sorted(text for shard, first, step in parts[stream] for text in corpus.read(shard, first, step))
        for stream in range(streams)
    ]
    assert sorted(text for of_stream in expected for text in of_stream) == sorted(documents)
    sizes = [len(of_stream) for of_stream in expected]
    rows: list[list[torch.Tensor]] = [[] for _ in range(streams)]
    read: list[list[str]] = [[] for _ in range(streams)]
    while any(len(read[stream]) < 2 * sizes[stream] for stream in range(streams)):
        batch = data.next_batch(8)
        for row, ids in zip(batch.rows.tolist(), batch.ids, strict=True):
            rows[row % streams].append(ids)
        read = [documents_of_stream(rows[stream], tokenizer) for stream in range(streams)]
    reordered = 0
    for stream in range(streams):
        size = sizes[stream]
        first, second = read[stream][:size], read[stream][size : 2 * size]
        assert sorted(first) == expected[stream]
        assert sorted(second) == expected[stream]
        reordered += first != second
    assert reordered > streams / 2 or max(map(len, parts)) == 1, "another epoch, another order"


@pytest.mark.parametrize(("shards", "streams"), [(1, 64), (3, 64), (36, 64), (65, 64), (128, 64), (1000, 64), (5, 1)])
def test_parts_are_dealt_evenly(shards: int, streams: int) -> None:
    dealt = deal_parts(shards, streams, seed=0)
    rows = Counter((part.shard, row) for parts in dealt for part in parts for row in range(part.first, 500, part.step))
    assert rows == Counter((shard, row) for shard in range(shards) for row in range(500))
    shares = [sum(1 / part.step for part in parts) for parts in dealt]
    assert min(shares) > 0 and max(shares) / min(shares) <= 1.25 + 1e-9
    assert dealt == deal_parts(shards, streams, seed=0)
    assert shards == 1 or dealt != deal_parts(shards, streams, seed=1)


def test_packing_is_the_concatenation_of_the_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = make_documents(40)
    write_jsonl(tmp_path / "x.jsonl", documents)
    data = make_streams(files(tmp_path / "x.jsonl"), tokenizer, streams=1, mask_documents=True)
    stream: list[int] = []
    number: list[int] = []
    for epoch in range(3):
        for index, document in enumerate(documents):
            ids = [*tokenizer.encode_batch([document])[0], tokenizer.eos_id]
            stream += ids
            number += [epoch * len(documents) + index] * len(ids)
    position = 0
    for slots in (1, 3, 2, 60, 1, 80):
        batch = data.next_batch(slots)
        assert batch.ids.dtype == torch.int64 and batch.ids.shape == (slots, 17)
        assert batch.document_ids is not None and batch.document_ids.dtype == torch.int32
        assert batch.rows.tolist() == list(range(slots))
        for ids, document_ids in zip(batch.ids.tolist(), batch.document_ids.tolist(), strict=True):
            assert ids == stream[position : position + 17]
            expected = number[position : position + 16]
            assert document_ids == [n - expected[0] for n in expected]
            position += 16
    assert position > len(stream) / 3, "went into another epoch"


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_global_batch_is_the_same_at_any_world_size(
    world_size: int, parquet_folder: Callable[..., str], tokenizer: Tokenizer
) -> None:
    corpus = files(parquet_folder(make_documents(200), 3))
    alone = make_streams(corpus, tokenizer, streams=8, mask_documents=True)
    ranks = [
        make_streams(corpus, tokenizer, streams=8, mask_documents=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for slots in (1, 4, 2):
        whole = alone.next_batch(slots)
        assert whole.rows.tolist() == list(range(8 * slots))
        shares = [rank.next_batch(slots) for rank in ranks]
        for rank, share in enumerate(shares):
            assert share.rows.tolist() == [row for row in range(8 * slots) if row % 8 % world_size == rank]
        order = torch.cat([share.rows for share in shares]).argsort()
        assert torch.equal(torch.cat([share.ids for share in shares])[order], whole.ids)
        assert whole.document_ids is not None
        assert torch.equal(torch.cat([share.document_ids for share in shares])[order], whole.document_ids)


def test_world_size_must_divide_streams(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "x.parquet", make_documents(20))
    with pytest.raises(MythosError, match=r"data\.streams: 4 is not a multiple of the 3 processes"):
        make_streams(files(tmp_path / "x.parquet"), tokenizer, world_size=3)


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_resume_is_exact(kind: str, parquet_folder: Callable[..., str], tokenizer: Tokenizer) -> None:
    path = parquet_folder([*make_documents(90), "", "  "], 3)
    fields = {"path": path} if kind == "files" else {"dataset": str(Path(path).parent)}

    def fresh(**changes) -> TokenStreams:
        return make_streams(open_corpus(DataConfig(kind=kind, **fields)), tokenizer, holdout_fraction=0.1, **changes)

    whole = fresh()
    batches = [whole.next_batch(2) for _ in range(40)]
    for stop in np.random.default_rng(0).choice(39, 6, replace=False).tolist():
        first = fresh()
        for _ in range(stop):
            first.next_batch(2)
        state = json.loads(json.dumps(first.state_dict()))
        first.next_batch(2)  # what is read after the state was taken must not matter
        second = fresh()
        second.load_state_dict(state)
        assert second.state_dict() == state
        for index in range(stop, 40):
            assert torch.equal(second.next_batch(2).ids, batches[index].ids), (stop, index)
    epochs = {position[0] for position in whole.state_dict()["positions"].values()}
    assert max(epochs) >= 1, "resumed in a later epoch too"


def test_resume_at_another_world_size(parquet_folder: Callable[..., str], tokenizer: Tokenizer) -> None:
    corpus = files(parquet_folder(make_documents(90), 3))
    ranks = [make_streams(corpus, tokenizer, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.next_batch(5)
    states = [rank.state_dict() for rank in ranks]
    merged = {**states[0], "positions": states[0]["positions"] | states[1]["positions"]}
    alone = make_streams(corpus, tokenizer)
    alone.next_batch(5)
    resumed = make_streams(corpus, tokenizer)
    resumed.load_state_dict(merged)
    assert torch.equal(resumed.next_batch(3).ids, alone.next_batch(3).ids)
    with pytest.raises(MythosError, match=r"no position for streams \[1, 3\]"):
        resumed.load_state_dict(states[0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 4}, "seed was 3, is 4"), ({"streams": 2}, "streams was 4, is 2")],
)
def test_a_state_of_other_data_is_refused(
    changes: dict, named: str, parquet_folder: Callable[..., str], tokenizer: Tokenizer
) -> None:
    path = parquet_folder(make_documents(60), 3)
    state = make_streams(files(path), tokenizer).state_dict()
    with pytest.raises(MythosError, match=named):
        make_streams(files(path), tokenizer, **changes).load_state_dict(state)
    parquet_folder(make_documents(61), 3)
    with pytest.raises(MythosError, match="corpus was"):
        make_streams(files(path), tokenizer).load_state_dict(state)


def test_another_sequence_length_continues_at_the_same_token(
    parquet_folder: Callable[..., str], tokenizer: Tokenizer
) -> None:
    corpus = files(parquet_folder(make_documents(60), 3))
    short, long = (make_streams(corpus, tokenizer, streams=1, sequence_length=length) for length in (8, 16))
    expected = torch.cat([short.next_batch(1).ids[0, :-1] for _ in range(9)])
    long.next_batch(2)
    resumed = make_streams(corpus, tokenizer, streams=1, sequence_length=8)
    resumed.load_state_dict(long.state_dict())
    assert torch.equal(resumed.next_batch(1).ids[0, :-1], expected[32:40])


def test_held_out_documents_are_only_in_validation(parquet_folder: Callable[..., str], tokenizer: Tokenizer) -> None:
    documents = make_documents(150)
    corpus = files(parquet_folder(documents + documents[:20], 2))
    held_out = {text for text in documents if is_held_out(text, 0.2)}
    assert 10 < len(held_out) < 60
    data = make_streams(corpus, tokenizer, holdout_fraction=0.2)
    rows: list[list[torch.Tensor]] = [[] for _ in range(4)]
    while min(position[0] for position in data.state_dict()["positions"].values()) < 1:
        batch = data.next_batch(4)
        for row, ids in zip(batch.rows.tolist(), batch.ids, strict=True):
            rows[row % 4].append(ids)
    trained = {text for stream in rows for text in documents_of_stream(stream, tokenizer)}
    assert trained == set(documents) - held_out
    validation = validation_sequences(
        corpus, tokenizer, sequences=10**6, sequence_length=16, holdout_fraction=0.2, mask_documents=True
    )
    validated = set(documents_of_stream(list(validation.ids), tokenizer))
    assert validated <= held_out and len(validated) >= len(held_out) - 1, "the last may be cut"


def test_validation_is_fixed_and_its_bytes_exact(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = make_documents(60)
    write_parquet(tmp_path / "x.parquet", documents, row_group=100)
    corpus = files(tmp_path / "x.parquet")

    def make(sequences: int = 7):
        return validation_sequences(
            corpus, tokenizer, sequences=sequences, sequence_length=32, holdout_fraction=None, mask_documents=True
        )

    validation, again, more = make(), make(), make(12)
    assert validation.ids.shape == (7, 33) and validation.bytes.dtype == torch.int64
    assert torch.equal(validation.ids, again.ids) and torch.equal(more.ids[:7], validation.ids)
    assert torch.equal(validation.bytes, more.bytes[:7])
    # The vocabulary is byte-level, so a token's own bytes are known; characters count where they begin, which moves
    # at most 3 bytes over a row's edge, and nothing over the whole.
    whole = make(10**6)
    targets = whole.ids[:, 1:].reshape(-1)
    text = tokenizer.decode(targets.tolist()).replace("<|endoftext|>", "")
    first_token = tokenizer.decode(whole.ids[0, :1].tolist())
    assert abs(int(whole.bytes.sum()) - len(text.encode())) <= 3
    assert documents[0].encode().startswith((first_token + text[:20]).encode())
    for ids, size in zip(whole.ids, whole.bytes.tolist(), strict=True):
        row = tokenizer.decode(ids[1:].tolist()).replace("<|endoftext|>", "")
        assert abs(size - len(row.replace("\N{REPLACEMENT CHARACTER}", "").encode())) <= 6
    assert validation.document_ids is not None
    for ids, document_ids in zip(validation.ids.tolist(), validation.document_ids.tolist(), strict=True):
        assert document_ids == [ids[:place].count(tokenizer.eos_id) for place in range(32)]


def test_too_little_validation_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "x.parquet", make_documents(3))
    corpus = files(tmp_path / "x.parquet")
    with pytest.raises(MythosError, match=r"data\.validation.*Raise data\.validation\.fraction"):
        validation_sequences(corpus, tokenizer, sequences=2, sequence_length=4096, holdout_fraction=None)


def test_streams_without_training_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "x.parquet", ["", None, "  "])
    with pytest.raises(MythosError, match=r"found no training document.*data\.streams"):
        make_streams(files(tmp_path / "x.parquet"), tokenizer).next_batch(1)
    write_parquet(tmp_path / "x.parquet", make_documents(3))
    with pytest.raises(MythosError, match="lower than the number of documents"):
        make_streams(files(tmp_path / "x.parquet"), tokenizer, streams=8).next_batch(1)


def test_skipped_is_reported(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "a.parquet", [*make_documents(20), None, ""])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 torn")
    data = make_streams(files(tmp_path / "*.parquet", on_error="skip"), tokenizer, streams=1)
    while data.state_dict()["positions"]["0"][0] == 0:
        data.next_batch(1)
    assert data.skipped["shards"] == 1
    assert data.skipped["documents"] >= 2
