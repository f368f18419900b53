"""Packed token sequences from a fixed number of resumable streams, and the validation set."""

import hashlib
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mythos.data.corpus import Corpus, is_held_out
from mythos.data.tokenizer import Tokenizer, training_documents
from mythos.errors import MythosError

logger = logging.getLogger(__name__)

# Documents a stream tokenizes at once: enough for the tokenizer's threads, little to read again after a resume.
TOKENIZE_DOCUMENTS = 8

# With shards dealt evenly to within one, this many per stream keep the streams' epochs within a quarter of each other.
BALANCED_PARTS_PER_STREAM = 4


@dataclass(frozen=True)
class Batch:
    """Sequences of this rank, in ascending order of their global row.

    Attributes:
        ids: int64 (rows, sequence_length + 1); inputs are ``ids[:, :-1]``, targets ``ids[:, 1:]``.
        document_ids: int32 (rows, sequence_length), the document of every input counted from 0 in each row, or None.
            An end-of-document token belongs to the document that it ends.
        rows: int64 (rows,), row g of the global batch: slot g // streams of stream g % streams.
    """

    ids: Tensor
    document_ids: Tensor | None
    rows: Tensor


@dataclass(frozen=True)
class ValidationSet:
    """Sequences in a fixed order, packed like training batches.

    Attributes:
        ids: int64 (n, sequence_length + 1).
        document_ids: int32 (n, sequence_length) or None, see :class:`Batch`.
        bytes: int64 (n,), exact UTF-8 bytes of each row's targets; end-of-document tokens count 0.
    """

    ids: Tensor
    document_ids: Tensor | None
    bytes: Tensor


class Position(NamedTuple):
    """A document of a stream: the epoch, the place in that epoch's order of its parts, and the row in the part."""

    epoch: int
    part: int
    row: int


class Part(NamedTuple):
    """Rows ``first, first + step, ...`` of a shard."""

    shard: int
    first: int
    step: int


def deal_parts(shards: int, streams: int, seed: int) -> list[list[Part]]:
    """Deal the shards to the streams, each row of each shard to exactly one stream.

    Shards are permuted by the seed and dealt in turn. Where they are too few for that to be even (fewer than 4 per
    stream and no multiple of the number of streams), each is first split into parts of every k-th row.

    Returns:
        the parts of every stream.
    """
    step = 1
    while shards * step % streams and shards * step < BALANCED_PARTS_PER_STREAM * streams:
        step += 1
    parts = [Part(shard, first, step) for shard in range(shards) for first in range(step)]
    order = _permutation(len(parts), f"deal/{seed}")
    return [[parts[index] for index in order[stream::streams]] for stream in range(streams)]


def _permutation(size: int, key: str) -> list[int]:
    # Sorted by hash and not by a random generator, whose sequence may change with the library's version: a run that
    # resumes after an upgrade must go on with the same order.
    return sorted(range(size), key=lambda index: hashlib.blake2b(f"{key}/{index}".encode(), digest_size=16).digest())


class _Stream:
    """One endless walk over its parts: every epoch in a new order, every document once."""

    def __init__(
        self, index: int, parts: list[Part], corpus: Corpus, tokenizer: Tokenizer, seed: int, holdout_fraction: float
    ) -> None:
        self.index = index
        self._parts = parts
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._seed = seed
        self._holdout_fraction = holdout_fraction
        self.seek(Position(0, 0, 0), 0)

    def seek(self, position: Position, offset: int) -> None:
        """Continue at token ``offset`` of the document at ``position``."""
        self._documents = self._walk(position)
        self._end = position
        self._queue: deque[tuple[Position, np.ndarray]] = deque()
        self._offset = offset
        self._available = -offset

    def tell(self) -> tuple[Position, int]:
        """Position of the next token that :meth:`take` has not consumed."""
        return (self._queue[0][0] if self._queue else self._end), self._offset

    def take(self, count: int) -> np.ndarray:
        """Consume ``count`` tokens and return them together with the one that follows, int64 (count + 1,)."""
        while self._available < count + 1:
            self._tokenize_more()
        tokens = np.concatenate([ids for _, ids in self._first_documents(self._offset + count + 1)])
        tokens = tokens[self._offset : self._offset + count + 1]
        self._available -= count
        self._offset += count
        while self._offset >= len(self._queue[0][1]):
            self._offset -= len(self._queue.popleft()[1])
        return tokens

    def _first_documents(self, tokens: int) -> Iterator[tuple[Position, np.ndarray]]:
        for document in self._queue:
            if tokens <= 0:
                return
            tokens -= len(document[1])
            yield document

    def _tokenize_more(self) -> None:
        documents = [next(self._documents) for _ in range(TOKENIZE_DOCUMENTS)]
        encoded = self._tokenizer.encode_batch([text for _, text in documents])
        for (position, _), ids in zip(documents, encoded, strict=True):
            self._queue.append((position, np.array([*ids, self._tokenizer.eos_id], dtype=np.int64)))
            self._available += len(ids) + 1

    def _walk(self, start: Position) -> Iterator[tuple[Position, str]]:
        epoch, part, row = start
        found = True  # what came before the start is not known to be nothing
        while True:
            order = _permutation(len(self._parts), f"epoch/{self._seed}/{self.index}/{epoch}")
            for place in range(part, len(order)):
                shard, first, step = self._parts[order[place]]
                for text in self._corpus.read(shard, first + row * step, step):
                    if text is not None and not is_held_out(text, self._holdout_fraction):
                        found = True
                        yield Position(epoch, place, row), text
                    row += 1
                row = 0
            if not found:
                raise MythosError(
                    f"data: stream {self.index} has read all of its {len(self._parts)} parts of the corpus and found "
                    f"no training document (left out so far: {self._corpus.skipped}). Give more text, or set "
                    "data.streams lower than the number of documents, or check data.text_column and "
                    "data.validation.fraction."
                )
            epoch, part, found = epoch + 1, 0, False


class TokenStreams:
    """Endless packed sequences, the same global batches at every world size.

    ``streams`` logical streams each own a fixed share of the documents (:func:`deal_parts`) and walk it once per epoch
    of their own, so that over an epoch of all streams every training document is read exactly once. Documents end with
    the end-of-document token and are packed without padding; the last id of a sequence is the first of the stream's
    next, so every token but the stream's very first is a target exactly once. Stream i belongs to rank i % world_size.

    Args:
        corpus: where documents come from.
        tokenizer: what they are tokenized with.
        streams: number S of streams.
        sequence_length: inputs of a sequence.
        seed: seed of the order.
        mask_documents: number the documents of every sequence.
        holdout_fraction: share of documents left to validation.
        rank: this process.
        world_size: number of processes; divides ``streams``.

    Raises:
        MythosError: ``world_size`` does not divide ``streams``.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        streams: int,
        sequence_length: int,
        seed: int,
        mask_documents: bool = False,
        holdout_fraction: float,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if streams % world_size:
            raise MythosError(
                f"data.streams: {streams} is not a multiple of the {world_size} processes. Use a number of processes "
                "that divides it; changing data.streams starts another run."
            )
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.streams = streams
        self.sequence_length = sequence_length
        self.mask_documents = mask_documents
        parts = deal_parts(len(corpus.shards), streams, seed)
        self._local = [
            _Stream(index, parts[index], corpus, tokenizer, seed, holdout_fraction)
            for index in range(rank, streams, world_size)
        ]
        self._identity = {
            "corpus": corpus.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "streams": streams,
            "seed": seed,
            "holdout_fraction": holdout_fraction,
        }

    @property
    def skipped(self) -> dict[str, int]:
        """Documents and shards this process has left out, see :class:`mythos.data.corpus.Corpus`."""
        return self.corpus.skipped

    def next_batch(self, slots: int) -> Batch:
        """Consume ``slots`` sequences of every stream of this rank: slots x streams / world_size rows.

        Raises:
            MythosError: a stream without training documents, or (``on_error: fail``) one that cannot be read.
        """
        length = self.sequence_length
        taken = np.stack([stream.take(slots * length) for stream in self._local])
        ids = torch.from_numpy(taken).unfold(1, length + 1, length).transpose(0, 1).reshape(-1, length + 1)
        stream_indices = torch.tensor([stream.index for stream in self._local])
        rows = (torch.arange(slots)[:, None] * self.streams + stream_indices).flatten()
        return Batch(ids, self._document_ids(ids), rows)

    def state_dict(self) -> dict[str, Any]:
        """Position after what :meth:`next_batch` has returned, of this rank's streams; plain JSON.

        The ``positions`` of several ranks are merged by key: together they load at any world size.
        """
        positions = {}
        for stream in self._local:
            position, offset = stream.tell()
            positions[str(stream.index)] = [*position, offset]
        return {**self._identity, "positions": positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the batch that ``state`` was taken after.

        Raises:
            MythosError: the state is of another corpus, tokenizer, seed or shape, or lacks streams of this rank.
        """
        different = [key for key, value in self._identity.items() if state.get(key) != value]
        if different:
            found = "; ".join(f"{key} was {state.get(key)}, is {self._identity[key]}" for key in different)
            raise MythosError(
                f"data: the checkpoint's position is in other data ({found}). Restore what the run was started with, "
                "or start a new run (another run.dir, or run.resume: never)."
            )
        missing = [stream.index for stream in self._local if str(stream.index) not in state["positions"]]
        if missing:
            raise MythosError(
                f"data: the checkpoint has no position for streams {missing}; merge the state of every rank that saved."
            )
        for stream in self._local:
            epoch, part, row, offset = state["positions"][str(stream.index)]
            stream.seek(Position(epoch, part, row), offset)

    def _document_ids(self, ids: Tensor) -> Tensor | None:
        return _number_documents(ids, self.tokenizer.eos_id) if self.mask_documents else None


def _number_documents(ids: Tensor, eos_id: int) -> Tensor:
    """Count, for every input, the ends of documents before it: int32 (rows, L) from ids (rows, L + 1)."""
    ends = (ids[:, :-1] == eos_id).int()
    return (ends.cumsum(1) - ends).int()


def validation_sequences(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    sequences: int,
    sequence_length: int,
    holdout_fraction: float | None,
    mask_documents: bool = False,
) -> ValidationSet:
    """Pack the first validation documents, in an order fixed by the corpus alone.

    Args:
        corpus: the training corpus, whose held-out documents are taken, or a corpus of validation documents.
        tokenizer: the run's tokenizer.
        sequences: how many sequences to return; fewer if there is no more text.
        sequence_length: inputs of a sequence.
        holdout_fraction: share held out of the training corpus; None takes all of a validation corpus.
        mask_documents: number the documents of every sequence.

    Raises:
        MythosError: not enough text for one sequence.
    """
    wanted = sequences * sequence_length + 1
    ids: list[int] = []
    sizes: list[int] = []
    # Quick on local files; a small share of a large hub dataset takes a while to find.
    documents = tqdm(training_documents(corpus, 0.0), desc="reading validation documents", unit="doc", delay=3)
    for text in documents:
        if holdout_fraction is not None and not is_held_out(text, holdout_fraction):
            continue
        document, document_bytes = tokenizer.encode_with_bytes(text)
        ids += [*document, tokenizer.eos_id]
        sizes += [*document_bytes, 0]
        if len(ids) >= wanted:
            break
    count = min(sequences, (len(ids) - 1) // sequence_length)
    if count < 1:
        raise MythosError(
            f"data.validation: {len(ids)} tokens of validation text do not fill one sequence of {sequence_length}. "
            "Raise data.validation.fraction, give files in data.validation.path, or lower data.sequence_length."
        )
    if count < sequences:
        logger.warning("data.validation: text for %d of %d sequences; using these", count, sequences)
    rows = torch.tensor(ids[: count * sequence_length + 1]).unfold(0, sequence_length + 1, sequence_length)
    targets = torch.tensor(sizes[1 : count * sequence_length + 1]).view(count, sequence_length)
    documents = _number_documents(rows, tokenizer.eos_id) if mask_documents else None
    return ValidationSet(rows.contiguous(), documents, targets.sum(1))
