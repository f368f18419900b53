"""Streams read every document once per epoch, skip no target, resume exactly, and do not depend on the world size."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mythos.config.data import FilterConfig
from mythos.data.corpus import Skipped, is_held_out
from mythos.data.source import Source
from mythos.data.stream import (
    DifferentData,
    TokenStreams,
    deal_parts,
    drawn_source,
    merge_states,
)
from mythos.data.tokenizer import Tokenizer, train_bpe
from mythos.errors import MythosError

from .conftest import make_documents, make_streams, text_source, write_jsonl, write_parquet


def documents_of_stream(rows: list[torch.Tensor], tokenizer: Tokenizer) -> list[str]:
    """Whole documents in the consumed inputs of one stream."""
    text = tokenizer.decode(torch.cat([row[:-1] for row in rows]).tolist())
    return text.split("<|endoftext|>")[:-1]


def epochs(data: TokenStreams) -> list[int]:
    return [epoch for sources in data.state_dict()["positions"].values() for epoch, *_ in sources.values()]


@pytest.mark.parametrize(("file_count", "streams"), [(1, 4), (3, 4), (7, 4), (1, 16), (3, 16), (7, 1)])
def test_an_epoch_reads_every_document_once(
    file_count: int, streams: int, parquet_folder: Callable[..., str], tokenizer: Tokenizer
) -> None:
    documents = make_documents(211)
    source = text_source(parquet_folder(documents, file_count, row_group=50), tokenizer)
    data = make_streams(source, streams=streams)
    parts = deal_parts(source.sizes, streams, seed=3)
    expected = [
        sorted(text for shard, first, step in parts[stream] for _, text in source.corpus.read(shard, first, step))
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
    assert reordered or max(map(len, parts)) <= 2, "another epoch, another order"


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("shards", "streams"), [(1, 64), (3, 64), (36, 64), (65, 64), (128, 64), (1000, 64), (5, 1)])
def test_parts_are_dealt_evenly(shards: int, streams: int, uneven: bool) -> None:
    """Evenly by size: a stream with less would begin its next epoch sooner, and repeat its documents more often."""
    sizes = [10 ** (shard % 4) * (shard + 1) if uneven else 7 for shard in range(shards)]
    dealt = deal_parts(sizes, streams, seed=0)
    rows = Counter((part.shard, row) for parts in dealt for part in parts for row in range(part.first, 500, part.step))
    assert rows == Counter((shard, row) for shard in range(shards) for row in range(500))
    shares = [sum(sizes[part.shard] / part.step for part in parts) for parts in dealt]
    assert max(shares) - min(shares) <= sum(sizes) / streams / 4 + 1e-3 * sum(sizes)
    assert min(shares) > 0
    assert dealt == deal_parts(sizes, streams, seed=0)
    assert shards == 1 or streams == 1 or dealt != deal_parts(sizes, streams, seed=1)
    if not uneven and shards in (5, 128):
        assert {part.step for parts in dealt for part in parts} == {1}, "no shard is split without need"


def test_ordered_shards_are_dealt_whole() -> None:
    dealt = deal_parts([100, 1, 1, 100], 4, seed=0, ordered=[True, False, True, False])
    parts = [part for parts in dealt for part in parts]
    assert {part.shard for part in parts if part.step > 1} == {3}
    rows = Counter((part.shard, row) for part in parts for row in range(part.first, 12, part.step))
    assert rows == Counter((shard, row) for shard in range(4) for row in range(12))


def test_packing_is_the_concatenation_of_the_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = make_documents(40)
    write_jsonl(tmp_path / "x.jsonl", documents)
    data = make_streams(text_source(tmp_path / "x.jsonl", tokenizer), streams=1, eos_id=tokenizer.eos_id)
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
    source = text_source(parquet_folder(make_documents(200), 3), tokenizer)
    options = {"streams": 8, "eos_id": tokenizer.eos_id}
    alone = make_streams(source, **options)
    ranks = [make_streams(source, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
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


def test_resume_is_exact(parquet_folder: Callable[..., str], tokenizer: Tokenizer) -> None:
    path = parquet_folder([*make_documents(90), "", "  "], 3)

    def fresh() -> TokenStreams:
        return make_streams(text_source(path, tokenizer, 0.1))

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
    assert max(epochs(whole)) >= 1, "resumed in a later epoch too"


def test_resume_at_another_world_size(parquet_folder: Callable[..., str], tokenizer: Tokenizer) -> None:
    source = text_source(parquet_folder(make_documents(90), 3), tokenizer)
    ranks = [make_streams(source, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.next_batch(5)
    states = [rank.state_dict() for rank in ranks]
    alone = make_streams(source)
    alone.next_batch(5)
    assert merge_states(states) == alone.state_dict()
    resumed = make_streams(source)
    resumed.load_state_dict(merge_states(states))
    assert torch.equal(resumed.next_batch(3).ids, alone.next_batch(3).ids)
    with pytest.raises(MythosError, match=r"no position for streams \[1, 3\]"):
        resumed.load_state_dict(states[0])


def test_a_state_of_other_data_is_refused(parquet_folder: Callable[..., str], tokenizer: Tokenizer) -> None:
    path = parquet_folder(make_documents(60), 3)
    state = make_streams(text_source(path, tokenizer)).state_dict()
    other = train_bpe(iter(make_documents(50)), 390, progress=False)
    for changed, named in (
        (make_streams(text_source(path, tokenizer), seed=4), "seed was 3, is 4"),
        (make_streams(text_source(path, tokenizer), streams=2), "streams was 4, is 2"),
        (make_streams(text_source(path, other)), f"tokenizer was {tokenizer.fingerprint}, is {other.fingerprint}"),
        (make_streams(text_source(path, tokenizer, 0.1)), r"holdout_fraction was 0.0, is 0.1"),
        (make_streams(text_source(path, tokenizer, filters={"id": FilterConfig(min=3)})), "corpus was"),
        (make_streams({"web": (text_source(path, tokenizer), 1.0)}), "sources were files, are web"),
    ):
        before = changed.state_dict()
        with pytest.raises(DifferentData, match=rf"{named}.*Restore .*on_mismatch=restart"):
            changed.load_state_dict(state)
        assert changed.state_dict() == before
    parquet_folder(make_documents(61), 3)
    with pytest.raises(DifferentData, match="corpus was"):
        make_streams(text_source(path, tokenizer)).load_state_dict(state)


def test_another_sequence_length_continues_at_the_same_token(
    parquet_folder: Callable[..., str], tokenizer: Tokenizer
) -> None:
    source = text_source(parquet_folder(make_documents(60), 3), tokenizer)
    short, long = (make_streams(source, streams=1, sequence_length=length) for length in (8, 16))
    expected = torch.cat([short.next_batch(1).ids[0, :-1] for _ in range(9)])
    long.next_batch(2)
    resumed = make_streams(source, streams=1, sequence_length=8)
    resumed.load_state_dict(long.state_dict())
    assert torch.equal(resumed.next_batch(1).ids[0, :-1], expected[32:40])


def test_held_out_documents_are_not_read(parquet_folder: Callable[..., str], tokenizer: Tokenizer) -> None:
    documents = make_documents(150)
    source = text_source(parquet_folder(documents + documents[:20], 2), tokenizer, 0.2)
    held_out = {text for text in documents if is_held_out(text, 0.2)}
    assert 10 < len(held_out) < 60
    data = make_streams(source)
    rows: list[list[torch.Tensor]] = [[] for _ in range(4)]
    while min(epochs(data)) < 1:
        batch = data.next_batch(4)
        for row, ids in zip(batch.rows.tolist(), batch.ids, strict=True):
            rows[row % 4].append(ids)
    trained = {text for stream in rows for text in documents_of_stream(stream, tokenizer)}
    assert trained == set(documents) - held_out


def test_streams_without_training_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "x.parquet", ["", None, "  "])
    with pytest.raises(MythosError, match=r"found no training document.*'skipped_documents': 6.*data\.streams"):
        make_streams(text_source(tmp_path / "x.parquet", tokenizer, on_error="skip"), streams=1).next_batch(1)
    write_parquet(tmp_path / "x.parquet", make_documents(3))
    with pytest.raises(MythosError, match="lower than the number of documents"):
        make_streams(text_source(tmp_path / "x.parquet", tokenizer), streams=8).next_batch(1)


def test_skipped_rows_are_counted_once_over_restarts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts: list[str | None] = list(make_documents(200))
    for index in range(0, 200, 7):
        texts[index] = None
    pq.write_table(pa.table({"text": texts, "id": range(200)}), tmp_path / "a.parquet", row_group_size=20)
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).dictionary_page_offset
    damaged[start : start + 60] = bytes(60)
    (tmp_path / "a.parquet").write_bytes(damaged)

    def fresh() -> TokenStreams:
        source = text_source(tmp_path / "a.parquet", tokenizer, on_error="skip", filters={"id": FilterConfig(max=189)})
        return make_streams(source, streams=1)

    whole = fresh()
    state = whole.state_dict()
    while min(epochs(whole)) < 1:
        whole.next_batch(3)
        resumed = fresh()
        resumed.load_state_dict(json.loads(json.dumps(state)))
        resumed.next_batch(3)
        state = resumed.state_dict()
        assert state == whole.state_dict()
    # Skipped in the first epoch, and in the second up to its position. Rows 20 to 39 are in the damaged row group, and
    # filters are applied before the text is checked.
    nulls = len([row for row in range(0, 190, 7) if not 20 <= row < 40])
    assert nulls <= whole.skipped["skipped_documents"] <= nulls + 3
    assert whole.skipped["skipped_shards"] == 1 and 10 <= whole.skipped["filtered_documents"] <= 20


# --- any shape of corpus, any number of ranks and workers


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=64),
    row_group=st.sampled_from([1, 3, 10, 1000]),
    world_size=st.sampled_from([1, 2, 3, 8]),
    workers=st.sampled_from([1, 2, 4]),
    per_stream=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
@example(counts=[30], row_group=1000, world_size=8, workers=4, per_stream=1, seed=0)
@example(counts=[7] * 3, row_group=3, world_size=3, workers=4, per_stream=1, seed=0)
@example(counts=[9] * 14, row_group=10, world_size=8, workers=1, per_stream=1, seed=1)
@example(counts=[5] * 64, row_group=3, world_size=2, workers=4, per_stream=2, seed=2)
def test_an_epoch_over_ranks_and_workers_reads_every_document_once(
    counts: list[int], row_group: int, world_size: int, workers: int, per_stream: int, seed: int
) -> None:
    """Each document is one token, its number, so that the ids show which documents were read."""
    assume(sum(counts))
    source = Numbered(counts, row_group)
    streams = 24 * per_stream
    workers = min(workers, streams // world_size)  # as the loader does
    seen: Counter[int] = Counter()
    none_empty = all(source.documents(parts) for parts in deal_parts(source.sizes, streams, seed))
    shared = np.zeros((3, 2 * streams, 2), dtype=np.int64)
    for rank in range(world_size):
        of_rank = make_streams(source, streams=streams, sequence_length=1, seed=seed, rank=rank, world_size=world_size)
        for worker in range(workers):
            share = of_rank.share(worker, workers)
            for stream in share._local:
                parts = stream.walks[0]._parts
                wanted = source.documents(parts)
                if not wanted:
                    continue
                seen.update(int(stream.walks[0].take(1)[0]) for _ in range(wanted))
                assert stream.walks[0].tell()[0].epoch == 1
            if none_empty:
                fresh = of_rank.share(worker, workers)
                for step in range(3):
                    ids, rows = fresh.next_ids(2)
                    shared[step, rows] = ids
    assert seen == Counter(range(sum(counts)))
    if none_empty:
        alone = make_streams(source, streams=streams, sequence_length=1, seed=seed)
        assert all(np.array_equal(of_step, alone.next_batch(2).ids.numpy()) for of_step in shared)


class Numbered:
    """A source of documents of one token, their number, in files of row groups."""

    identity: ClassVar[dict] = {}

    def __init__(self, counts: list[int], row_group: int) -> None:
        self.groups: list[range] = []
        total = 0
        for count in counts:
            self.groups += [
                range(total + start, total + min(start + row_group, count)) for start in range(0, count, row_group)
            ]
            total += count
        self.shards = [str(group) for group in self.groups]
        self.sizes = [len(group) for group in self.groups]
        self.ordered = [False] * len(self.groups)

    def read(self, shard: int, row: int, step: int) -> Iterator[tuple[int, np.ndarray | Skipped]]:
        for index in range(row, len(self.groups[shard]), step):
            yield index, np.array([self.groups[shard][index]], dtype=np.int32)

    def held_out(self) -> Iterator[tuple[list[int], list[int]]]:
        return iter(())

    def documents(self, parts: list) -> int:
        return sum(len(range(first, len(self.groups[shard]), step)) for shard, first, step in parts)


# --- mixtures


def test_weights_of_a_mixture_hold() -> None:
    for weights in ((0.7, 0.3), (5.0, 3.0, 2.0), (0.995, 0.005), (1.0, 1.0, 1.0)):
        for seed in range(5):
            drawn = Counter(drawn_source(weights, seed, row) for row in range(10_000))
            for index, weight in enumerate(weights):
                assert abs(drawn[index] / 10_000 - weight / sum(weights)) < 0.005, (weights, seed, drawn)
    first = [drawn_source((0.5, 0.5), 0, row) for row in range(1000)]
    assert first != [drawn_source((0.5, 0.5), 1, row) for row in range(1000)]
    # The sources of one stream follow no pattern: each stream's shares are near the weights too.
    for stream in range(8):
        share = np.mean([drawn_source((0.7, 0.3), 0, 8 * n + stream) for n in range(1250)])
        assert abs(share - 0.3) < 0.05


@pytest.fixture
def mixture(tmp_path: Path, tokenizer: Tokenizer) -> dict[str, tuple[Source, float]]:
    sources: dict[str, tuple[Source, float]] = {}
    for name, count, weight in (("web", 120, 0.6), ("books", 40, 0.3), ("code", 25, 0.1)):
        write_parquet(tmp_path / f"{name}.parquet", [f"{name} {text}" for text in make_documents(count)], row_group=5)
        sources[name] = (text_source(tmp_path / f"{name}.parquet", tokenizer), weight)
    return sources


def test_a_mixture_interleaves_the_streams_of_its_sources(mixture: dict[str, tuple[Source, float]]) -> None:
    """Sequence n of stream s is the next sequence of stream s of the drawn source when that is read alone."""
    data = make_streams(mixture)
    alone = [make_streams({name: source}) for name, source in mixture.items()]
    ids = torch.cat([data.next_batch(6).ids for _ in range(20)])
    apart = [torch.cat([one.next_batch(1).ids for _ in range(120)]) for one in alone]
    weights = tuple(weight for _, weight in mixture.values())
    taken = Counter()
    for row in range(480):
        source = drawn_source(weights, 3, row)
        stream = row % 4
        assert torch.equal(ids[row], apart[source][4 * taken[source, stream] + stream])
        taken[source, stream] += 1
    assert len({source for source, _ in taken}) == 3


def test_a_mixture_resumes_exactly(mixture: dict[str, tuple[Source, float]]) -> None:
    whole = make_streams(mixture)
    batches = [whole.next_batch(2).ids for _ in range(30)]
    for stop in (1, 13, 29):
        ranks = [make_streams(mixture, rank=rank, world_size=2) for rank in range(2)]
        for _ in range(stop):
            for rank in ranks:
                rank.next_batch(2)
        state = json.loads(json.dumps(merge_states([rank.state_dict() for rank in ranks])))
        resumed = make_streams(mixture)
        resumed.load_state_dict(state)
        for index in range(stop, 30):
            assert torch.equal(resumed.next_batch(2).ids, batches[index])
    # Other weights keep the positions: every source goes on where it was.
    other = make_streams({name: (source, 1.0) for name, (source, _) in mixture.items()})
    other.load_state_dict(state)
    assert other.state_dict() == state
    fewer = make_streams({name: mixture[name] for name in ("web", "books")})
    with pytest.raises(DifferentData, match="sources were web, books, code, are web, books"):
        fewer.load_state_dict(state)
