"""Packed token sequences from a fixed number of resumable streams."""

import hashlib
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from heapq import heapreplace
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from mythos.data.corpus import SHARDS_PER_STREAM, Skipped
from mythos.data.source import Source
from mythos.errors import MythosError

# Rows of a mixture whose sources are drawn together: the shares in each block equal the weights to within one row.
MIXTURE_BLOCK = 256


class DifferentData(MythosError):
    """A saved position belongs to other data than the configuration's."""


class Batch(NamedTuple):
    """Sequences of this rank, in ascending order of their rows in the global batch.

    Attributes:
        ids: int64 (rows, sequence_length + 1); inputs are ``ids[:, :-1]``, targets ``ids[:, 1:]``.
        document_ids: int32 (rows, sequence_length), number of each input's document, counted from 0 in each row, or
            None. An end-of-document token belongs to the document that it ends.
        rows: int64 (rows,), rows of the global batch; row g is slot g // streams of stream g % streams.
        targets: int64 (rows, sequence_length), -100 for positions without a target; None if targets are the next ids.
    """

    ids: Tensor
    document_ids: Tensor | None
    rows: Tensor
    targets: Tensor | None = None


class Position(NamedTuple):
    """Position of a document in a stream: epoch, index into that epoch's order of the parts, row in the part."""

    epoch: int
    part: int
    row: int


class Part(NamedTuple):
    """Rows ``first, first + step, ...`` of a shard."""

    shard: int
    first: int
    step: int


def deal_parts(
    sizes: Sequence[int], streams: int, seed: int, ordered: Sequence[bool] | None = None
) -> list[list[Part]]:
    """Deal the shards to the streams, each row of each shard to exactly one stream.

    Greedy: the parts go, largest first (equal ones in an order drawn by the seed), to the stream with the least data.
    If whole shards would leave two streams more than a quarter of the fair share apart, so that the epochs of one would
    be that much longer, large shards are split into parts of every k-th row, with the smallest k that suffices.

    Args:
        sizes: size of every shard, in bytes or any other unit.
        streams: number of streams.
        seed: seed of the order.
        ordered: for each shard, whether it must not be split; None if all may be.

    Returns:
        the parts of every stream.
    """
    # Integers (sizes in thousandths), so that the result is the same on every machine.
    sizes = [1000 * max(size, 1) for size in sizes]
    total = sum(sizes)
    for parts_per_stream in range(1, SHARDS_PER_STREAM + 1):
        # Split every shard so that its parts have at most the fair share / parts_per_stream.
        steps = [-(-size * parts_per_stream * streams // total) for size in sizes]
        if ordered is not None:
            steps = [1 if whole else step for step, whole in zip(steps, ordered, strict=True)]
        parts = [
            (-size // step, Part(shard, first, step))
            for shard, (size, step) in enumerate(zip(sizes, steps, strict=True))
            for first in range(step)
        ]
        shuffled = [parts[index] for index in permutation(len(parts), f"deal/{seed}")]
        dealt: list[list[Part]] = [[] for _ in range(streams)]
        heap = [(0, stream) for stream in range(streams)]  # (size dealt so far, stream)
        for negative_size, part in sorted(shuffled, key=lambda sized: sized[0]):
            load, stream = heap[0]
            dealt[stream].append(part)
            heapreplace(heap, (load - negative_size, stream))
        loads = [load for load, _ in heap]
        if max(loads) - min(loads) <= total // (SHARDS_PER_STREAM * streams):
            break
    return dealt


def permutation(size: int, key: str) -> list[int]:
    """A permutation of 0..size-1 that depends on the key alone.

    It sorts by hash: a library's random generator may change with its version, and a run that resumes after an upgrade
    must continue in the same order.
    """
    return sorted(range(size), key=lambda index: _hash(f"{key}/{index}"))


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def drawn_source(weights: tuple[float, ...], seed: int, row: int) -> int:
    """Index of the source from which a row of a mixture is taken: a function of the arguments alone.

    ``row`` counts global rows since the start of the run: sequence n of stream s is row n * streams + s. Rows are drawn
    in blocks of 256 by stratified sampling with one random offset, so that the shares in each block equal the weights
    to within one row, and exactly in expectation.
    """
    block, place = divmod(row, MIXTURE_BLOCK)
    strata, offset = _mixture_block(seed, block)
    total = sum(weights)
    bounds = list(accumulate(weight / total for weight in weights))
    return min(bisect_right(bounds, (strata[place] + offset) / MIXTURE_BLOCK), len(weights) - 1)


@lru_cache(maxsize=64)
def _mixture_block(seed: int, block: int) -> tuple[list[int], float]:
    key = f"mixture/{seed}/{block}"
    return permutation(MIXTURE_BLOCK, key), int.from_bytes(_hash(key)[:6], "big") / 2**48


class Walk:
    """An endless reader of a stream's parts of one source: every document once per epoch, each epoch in a new order."""

    def __init__(self, name: str, index: int, parts: list[Part], source: Source, seed: int) -> None:
        self.name = name
        self._index = index
        self._parts = parts
        self._source = source
        self._seed = seed
        self.seek(Position(0, 0, 0), 0, Counter())

    def seek(self, position: Position, offset: int, skipped: Mapping[str, int]) -> None:
        """Continue at token ``offset`` of the document at ``position``; ``skipped`` counts rows skipped before it."""
        self._start = position
        self._offset = offset
        self._available = -offset
        self._skipped = Counter(skipped)
        self._queue: deque[tuple[Position, np.ndarray, dict[str, int]]] = deque()
        # Created at the first `take`: generators cannot be pickled, and walks are sent to worker processes.
        self._documents: Iterator[tuple[Position, np.ndarray, dict[str, int]]] | None = None

    def tell(self) -> tuple[Position, int, dict[str, int]]:
        """Position and offset of the next token to consume, and counts of the rows skipped before it, by kind."""
        position, _, skipped = self._queue[0] if self._queue else (self._start, None, dict(self._skipped))
        return position, self._offset, skipped

    def take(self, count: int) -> np.ndarray:
        """Consume ``count`` tokens; return them and the token after them, int32 (count + 1,)."""
        if self._documents is None:
            self._documents = self._walk(self._start)
        while self._available < count + 1:
            document = next(self._documents)
            self._queue.append(document)
            self._available += len(document[1])
        # The queue has hardly more: it gets documents only until they are enough.
        tokens = np.concatenate([ids for _, ids, _ in self._queue])[self._offset : self._offset + count + 1]
        self._available -= count
        self._offset += count
        while self._offset >= len(self._queue[0][1]):
            self._offset -= len(self._queue.popleft()[1])
        return tokens

    def _walk(self, start: Position) -> Iterator[tuple[Position, np.ndarray, dict[str, int]]]:
        epoch, part, row = start
        # Whether this epoch has had a document. A resumed epoch may have had some before the start, so finding none in
        # the rest of it is no error.
        any_document = True
        while True:
            order = permutation(len(self._parts), f"epoch/{self._seed}/{self._index}/{epoch}")
            for place in range(part, len(order)):
                shard, first, step = self._parts[order[place]]
                for index, document in self._source.read(shard, first + row * step, step):
                    if isinstance(document, Skipped):
                        self._skipped[document.value] += 1
                        continue
                    any_document = True
                    yield Position(epoch, place, (index - first) // step), document, dict(self._skipped)
                row = 0
            if not any_document:
                raise MythosError(
                    f"data: stream {self._index} has read all of its {len(self._parts)} parts of {self.name} and found "
                    f"no training document (skipped so far: {dict(self._skipped)}). Give more text, or set "
                    "data.streams lower than the number of documents, or check data.text_column, data.filters and "
                    "data.validation.fraction."
                )
            epoch, part, any_document = epoch + 1, 0, False


class _Stream:
    """One stream: a walk over every source, and the number of sequences taken, which selects a mixture's source."""

    def __init__(self, index: int, walks: list[Walk]) -> None:
        self.index = index
        self.walks = walks
        self.sequences = 0

    def copy(self) -> "_Stream":
        """An independent stream at the same position."""
        stream = _Stream(self.index, [copy(walk) for walk in self.walks])
        stream.sequences = self.sequences
        for walk in stream.walks:
            walk.seek(*walk.tell())  # with queue and counters of its own
        return stream


class Streams:
    """Endless sequences in a fixed number of logical streams; the global batches are the same at every world size.

    Stream i belongs to rank i % world_size. A rank's streams are dealt to its worker processes in turn. A sequence has
    `sequence_length` inputs; `seed` is that of the order, or of the sequences.
    """

    def __init__(self, streams: int, sequence_length: int, seed: int, rank: int, world_size: int) -> None:
        self.streams = streams
        self.sequence_length = sequence_length
        self.seed = seed
        self.world_size = world_size
        self.indices = np.arange(rank, streams, world_size)

    def next_ids(self, slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Consume ``slots`` sequences of each of these streams: int32 (rows, ...), and int64 rows (rows,)."""
        raise NotImplementedError

    def as_batch(self, ids: Tensor, rows: Tensor) -> Batch:
        """A batch of int64 ids of :meth:`next_ids` in order of their rows."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Position after the last :meth:`next_batch`; plain JSON that :func:`merge_states` joins."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the batch after which ``state`` was saved. Raises MythosError for other data."""
        raise NotImplementedError

    def share(self, worker: int, workers: int) -> Self:
        """The streams of one of this rank's worker processes, at the same position."""
        share = copy(self)
        share.indices = self.indices[worker::workers]
        return share

    def next_batch(self, slots: int) -> Batch:
        """Consume ``slots`` sequences of each of these streams. Raises MythosError as :meth:`next_ids`."""
        return self.batch(*self.next_ids(slots))

    def batch(self, ids: np.ndarray, rows: np.ndarray) -> Batch:
        """Turn results of :meth:`next_ids`, of these streams or of all their shares, into a batch ordered by row."""
        order = np.argsort(rows, kind="stable")
        return self.as_batch(torch.from_numpy(ids[order].astype(np.int64)), torch.from_numpy(rows[order]))

    def global_rows(self, slots: int) -> np.ndarray:
        """Rows of the global batch that ``slots`` sequences of each of these streams fill, int64 (rows,)."""
        return (np.arange(slots)[:, None] * self.streams + self.indices).reshape(-1)

    def check_streams(self, state: dict[str, Any]) -> None:
        """Raise MythosError if a saved state lacks some of these streams."""
        missing = [stream for stream in self.indices.tolist() if str(stream) not in state["sequences"]]
        if missing:
            raise MythosError(
                f"data: the checkpoint has no position for streams {missing}; merge the state of every rank that saved."
            )


class TokenStreams(Streams):
    """Packed sequences of the documents of one source, or of a weighted mixture of several.

    Each stream owns a fixed share of every source's documents (:func:`deal_parts`) and reads it once per epoch of its
    own, so that in an epoch of all streams every training document is read exactly once. Documents end with the
    end-of-document token and are packed without padding. The last id of a sequence is also the first of the stream's
    next sequence from that source, so every token but the very first is a target exactly once. With several sources,
    each sequence comes from one (:func:`drawn_source`).

    Args:
        sources: sources and their weights by name.
        eos_id: end-of-document token, needed to number the documents of every sequence; None = no document ids.

    The others are those of :class:`Streams`.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[Source, float]],
        *,
        streams: int,
        sequence_length: int,
        seed: int,
        eos_id: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(streams, sequence_length, seed, rank, world_size)
        self.sources = dict(sources)
        self.eos_id = eos_id
        self._weights = tuple(weight for _, weight in self.sources.values())
        indices = self.indices.tolist()
        walks: dict[int, list[Walk]] = {index: [] for index in indices}
        for name, (source, _) in self.sources.items():
            parts = deal_parts(source.sizes, streams, seed, source.ordered)
            for index in indices:
                walks[index].append(Walk(name, index, parts[index], source, seed))
        self._local = [_Stream(index, walks[index]) for index in indices]
        self.identity = {
            "streams": streams,
            "seed": seed,
            "sources": {name: source.identity for name, (source, _) in self.sources.items()},
        }

    def share(self, worker: int, workers: int) -> "TokenStreams":
        """The streams of one of this rank's worker processes, at the same position."""
        share = super().share(worker, workers)
        share._local = [stream.copy() for stream in self._local[worker::workers]]
        return share

    def next_ids(self, slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Consume ``slots`` sequences of each of these streams: int32 ids (rows, L + 1), and int64 rows (rows,).

        Raises MythosError if a stream has no training documents, or (``on_error: fail``) cannot be read.
        """
        sequences = np.stack([self._next_sequences(stream, slots) for stream in self._local], axis=1)
        return sequences.reshape(-1, self.sequence_length + 1), self.global_rows(slots)

    def as_batch(self, ids: Tensor, rows: Tensor) -> Batch:
        """Ids (rows, L + 1) as a batch."""
        return Batch(ids, None if self.eos_id is None else number_documents(ids, self.eos_id), rows)

    def _next_sequences(self, stream: _Stream, slots: int) -> np.ndarray:
        """The stream's next sequences, int32 (slots, L + 1)."""
        length, numbers = self.sequence_length, range(stream.sequences, stream.sequences + slots)
        stream.sequences += slots
        if len(self._weights) == 1:
            tokens = stream.walks[0].take(slots * length)
            return tokens[np.arange(slots)[:, None] * length + np.arange(length + 1)]
        rows = (number * self.streams + stream.index for number in numbers)
        return np.stack([stream.walks[drawn_source(self._weights, self.seed, row)].take(length) for row in rows])

    @property
    def skipped(self) -> dict[str, int]:
        """Rows that these streams have skipped since the start of the run, by kind of :class:`Skipped`."""
        return count_skipped(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Position of these streams after the last :meth:`next_batch`; plain JSON.

        By stream: ``sequences`` consumed; by source ``positions`` [epoch, part, row, tokens of that row consumed] and
        numbers of rows ``skipped``. :func:`merge_states` joins the states of all ranks into one that loads at any world
        size.
        """
        state: dict[str, Any] = {"sequences": {}, "positions": {}, "skipped": {}}
        for stream in self._local:
            key = str(stream.index)
            by_source = {walk.name: walk.tell() for walk in stream.walks}
            state["sequences"][key] = stream.sequences
            state["positions"][key] = {name: [*position, offset] for name, (position, offset, _) in by_source.items()}
            state["skipped"][key] = {name: skipped for name, (_, _, skipped) in by_source.items()}
        return {**self.identity, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the batch after which ``state`` was saved. The weights of a mixture may have changed.

        Raises:
            DifferentData: the state belongs to other sources, another tokenizer, seed or number of streams.
            MythosError: it lacks some of these streams.
        """
        different = list(_differences(state, self.identity))
        if different:
            raise DifferentData(
                f"data: the checkpoint's position is in other data: {'; '.join(different)}. Restore what the run was "
                "started with, or start a new run (another run.name), or set data.on_mismatch=restart to go on from "
                "the same weights and read the data from its beginning."
            )
        self.check_streams(state)
        for stream in self._local:
            key = str(stream.index)
            stream.sequences = state["sequences"][key]
            for walk in stream.walks:
                epoch, part, row, offset = state["positions"][key][walk.name]
                walk.seek(Position(epoch, part, row), offset, state["skipped"][key][walk.name])


def _differences(saved: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    for key in ("streams", "seed"):
        if saved.get(key) != here[key]:
            yield f"{key} was {saved.get(key)}, is {here[key]}"
    before, now = saved.get("sources", {}), here["sources"]
    if before.keys() != now.keys():
        yield f"sources were {', '.join(before) or 'none'}, are {', '.join(now)}"
        return
    for name, identity in now.items():
        of_source = f" of {name}" if len(now) > 1 else ""
        for key, value in identity.items():
            if before[name].get(key) != value:
                yield f"{key}{of_source} was {before[name].get(key)}, is {value}"


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the states of ranks or workers, each with its own streams."""
    merged = dict(states[0])
    for key in ("sequences", "positions", "skipped"):
        merged[key] = {stream: value for state in states for stream, value in state[key].items()}
    return merged


def count_skipped(state: dict[str, Any]) -> dict[str, int]:
    """Rows skipped since the start of the run by all streams of a state, by kind of :class:`Skipped`."""
    total: Counter[str] = Counter()
    for by_source in state["skipped"].values():
        for counts in by_source.values():
            total.update(counts)
    return dict(total)


def number_documents(ids: Tensor, eos_id: int) -> Tensor:
    """Number of documents that end before each input: int32 (rows, L) from ids (rows, L + 1)."""
    ends = (ids[:, :-1] == eos_id).int()
    return (ends.cumsum(1) - ends).int()
