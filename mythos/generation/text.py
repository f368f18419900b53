"""Continue text with a model: prompts in, pieces of text out as they are complete, each with its number of loops."""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil
import torch

from mythos.checkpoints.stored_model import OpenedModel
from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError
from mythos.generation.sampling import Sampling
from mythos.generation.tokens import End, cache_bytes_needed, generate
from mythos.model.halting import HaltingRule, halting_rule, is_exclusive
from mythos.model.layers import autocast_to
from mythos.model.rdt import RecurrentDepthTransformer


class Piece(NamedTuple):
    """Text of one token, or of several tokens that form characters only together."""

    text: str
    loops: int
    """Loops of the token; of several tokens, the largest."""


BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""Name of a single-byte token in tokenizers with byte fallback (Llama 2, Mistral, Gemma)."""


class PieceStream:
    """Turns the ids of one row into complete pieces of text, which wait while they may become part of a stop string.

    The pieces together are the decoded text of prompt and row, without the text of the prompt.

    Attributes:
        pieces: the pieces returned so far.
        stopped: whether a stop string occurred; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids = list(prompt)
        self._start, self._decoded = 0, len(self.ids)
        """Ids from `_start` on are decoded together; the text of those before `_decoded` is known."""
        self.pieces: list[Piece] = []
        self.stopped = False
        self._waiting: list[Piece] = []
        self._loops = 0

    def push(self, token: int, loops: int) -> list[Piece]:
        """Add an id; returns the pieces that are now complete and cannot be part of a stop string."""
        if self._start == 0 and self._decoded == len(self.ids) and self._is_byte(token):
            # Adjacent byte tokens would be decoded together, but those of the prompt are complete characters.
            while self.ids and self._is_byte(self.ids[-1]):
                self.ids.pop()
            self._decoded = len(self.ids)
        self.ids.append(token)
        self._loops = max(self._loops, loops)
        text = "" if self._is_byte(token) else self._new_text()
        if not text or text.endswith("\ufffd"):
            return []  # the next token may complete the character that these bytes begin
        self._enqueue(text)
        waiting = "".join(piece.text for piece in self._waiting)
        stop_starts = [start for stop in self.stops if (start := waiting.find(stop)) >= 0]
        if stop_starts:
            self.stopped = True
            return self._release(min(stop_starts))
        return self._release(len(waiting) - partial_stop(waiting, self.stops))

    def finish(self) -> list[Piece]:
        """The remaining pieces: text that was waiting, and U+FFFD for bytes that form no character."""
        if self.stopped:
            return []
        rest = self._new_text()
        if rest:
            self._enqueue(rest)
        return self._release(sum(len(piece.text) for piece in self._waiting))

    def _is_byte(self, token: int) -> bool:
        name = self.tokenizer.backend.id_to_token(token)
        return name is not None and BYTE_TOKEN.fullmatch(name) is not None

    def _new_text(self) -> str:
        """Text of the ids after `_decoded`, decoded with some ids before them: alone, a token may lose its space."""
        known = self.tokenizer.decode(self.ids[self._start : self._decoded])
        return self.tokenizer.decode(self.ids[self._start :])[len(known) :]

    def _enqueue(self, text: str) -> None:
        self._waiting.append(Piece(text, self._loops))
        self._loops = 0
        self._start, self._decoded = self._decoded, len(self.ids)

    def _release(self, characters: int) -> list[Piece]:
        """Return the first waiting characters as pieces; a piece may be split."""
        released: list[Piece] = []
        while characters > 0:
            text, loops = self._waiting.pop(0)
            if len(text) > characters:
                self._waiting.insert(0, Piece(text[characters:], loops))
            released.append(Piece(text[:characters], loops))
            characters -= len(text)
        self.pieces += released
        return released


def partial_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of `stops`."""
    lengths = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)


@dataclass
class TextRow:
    """One prompt and its continuation."""

    prompt: str
    limit: int
    """Maximum number of loops of its tokens."""
    pieces: list[Piece] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    """Loops of every token, including the tokens of a stop string."""
    end: End = "length"

    @property
    def text(self) -> str:
        """The continuation."""
        return "".join(piece.text for piece in self.pieces)


@dataclass
class TextGeneration:
    """The generated text, with times and memory."""

    rows: list[TextRow]
    prompt_tokens: int
    first_seconds: float
    """Time to the first token, spent on the prompts."""
    seconds: float
    cache_bytes: int
    halting: bool = False
    """Whether tokens could stop before their last loop."""
    untrained: int = 0
    """Generated tokens at positions beyond the sequences of training."""
    sequence_length: int | None = None
    """Tokens of a sequence in training; None if it is not known."""

    @property
    def tokens(self) -> int:
        """Number of generated tokens over all rows."""
        return sum(len(row.loops) for row in self.rows)

    @property
    def loops(self) -> Counter[int]:
        """Number of tokens by loops."""
        return Counter(loops for row in self.rows for loops in row.loops)

    @property
    def mean_loops(self) -> float:
        """Mean loops of a token; 0 without tokens."""
        return sum(depth * count for depth, count in self.loops.items()) / max(1, self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second over all rows.

        The prompts' time is left out if any row has more than one token.
        """
        later = self.tokens - sum(bool(row.loops) for row in self.rows)
        count, seconds = (later, self.seconds - self.first_seconds) if later else (self.tokens, self.seconds)
        return count / max(seconds, 1e-9)

    def summary(self) -> str:
        """Speed and ends; loops and memory; tokens beyond the sequences of training, if there are any."""
        lines = [
            f"{self.tokens} tokens at {self.tokens_per_second:.1f} tokens/s, after {self.prompt_tokens} prompt tokens "
            f"in {self.first_seconds:.2f} s; {self.ending()}",
            f"{self.loops_summary()}; cache {in_mib(self.cache_bytes)}",
        ]
        return "\n".join(lines + [self.beyond_training()] * (self.untrained > 0))

    def beyond_training(self) -> str:
        """How many tokens lie beyond the sequences of training."""
        return (
            f"{self.untrained} of the {self.tokens} tokens lie beyond {self.sequence_length}, the length of the "
            "training sequences: the model has not learned to use such long contexts"
        )

    def ending(self) -> str:
        """Why the rows ended."""
        ends = Counter(ENDS[row.end] for row in self.rows)
        return "ended: " + ", ".join(f"{count} x {end}" if len(self.rows) > 1 else end for end, count in ends.items())

    def loops_summary(self) -> str:
        """The mean loops of a token and, with a halting rule, what it saved."""
        most = sum(row.limit * len(row.loops) for row in self.rows) / max(1, self.tokens)
        saved = f" of {most:.3g} ({1 - self.mean_loops / most:.0%} saved)" if self.halting and most else ""
        return f"{self.mean_loops:.2f} loops per token on average{saved}"


ENDS: dict[End, str] = {
    "length": "the requested number of tokens",
    "context": "the model's context is full",
    "stop": "end of document",
    "callback": "stop string",
}


def in_mib(size: int) -> str:
    """Bytes as text in KiB, MiB or GiB."""
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


class Depth(NamedTuple):
    """Maximum number of loops of each row, and the rule that may stop it earlier."""

    limits: list[int]
    rule: HaltingRule | None


def choose_depth(
    opened: OpenedModel, loops: Sequence[int] | None, rule: str | None = None, threshold: float | None = None
) -> Depth:
    """The maximum number of loops of each row, and the halting rule.

    With `loops` None (auto) the maximum is the training mean, and `rule` or the model's own rule may stop earlier.
    Explicit loops run in full, unless a rule or a threshold is passed or the model was trained for a rule that
    computes its output (act).

    Raises MythosError for a rule that is unknown or that the model does not support, or a threshold out of range.
    """
    try:
        halts = loops is None or rule is not None or threshold is not None or is_exclusive(opened.model.config.halting)
        chosen = halting_rule(opened.model, rule, threshold) if halts else None
    except ValueError as error:
        raise MythosError(str(error)) from error
    return Depth([opened.mean_loops] if loops is None else list(loops), chosen)


def generate_text(
    opened: OpenedModel,
    prompts: Sequence[str | list[int] | None],
    max_tokens: int,
    depth: Depth,
    *,
    sampling: Sampling,
    seed: int = 0,
    stops: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    on_piece: Callable[[int, Piece], None] = lambda row, piece: None,
    **options: Any,
) -> TextGeneration:
    """Continue every prompt in one batch, calling `on_piece(row, piece)` as text is complete.

    A prompt is text, its ids, or None for a new document. `depth.limits` has one number for all rows, or one per row.
    One prompt with several limits is continued at each of them with the same seed; otherwise row n has the seed
    `seed + n`. A row ends at the end of the document, before any of `stops`, after `max_tokens`, or when the context is
    full. Matmuls are in `dtype`; `options` are passed to `mythos.generation.tokens.generate`.

    Raises MythosError for a model without tokenizer, an empty prompt or stop string, a prompt longer than the context,
    numbers out of range, and a cache larger than the free memory.
    """
    tokenizer, model = opened.require_tokenizer(), opened.model
    if "" in stops:
        raise MythosError("a stop string is empty: give at least one character")
    seeds = [seed + row for row in range(len(prompts))]
    if len(prompts) == 1:
        prompts, seeds = list(prompts) * len(depth.limits), seeds * len(depth.limits)
    check_counts(len(depth.limits), len(prompts))
    limits = depth.limits * len(prompts) if len(depth.limits) == 1 else depth.limits
    ids = [_encode(tokenizer, prompt, model.config.context_length) for prompt in prompts]
    _check_room(model, len(ids), max(map(len, ids)) + max_tokens, max(limits), dtype, options.get("cache_loops"))
    streams = [PieceStream(tokenizer, row, stops) for row in ids]
    rows = [
        TextRow(prompt if isinstance(prompt, str) else "", limit, stream.pieces)
        for prompt, limit, stream in zip(prompts, limits, streams, strict=True)
    ]
    start = time.perf_counter()
    first_seconds: float | None = None

    def on_token(row: int, token: int, loops: int) -> bool:
        nonlocal first_seconds
        if first_seconds is None:
            first_seconds = time.perf_counter() - start
        rows[row].loops.append(loops)
        for piece in streams[row].push(token, loops):
            on_piece(row, piece)
        return streams[row].stopped

    try:
        with autocast_to(dtype, model.embedding.weight.device):
            continuations, cache_bytes = generate(
                model,
                ids,
                max_tokens,
                sampling=sampling,
                seed=seeds,
                loops=limits,
                halting=depth.rule,
                stop_ids=(tokenizer.eos_id,),
                on_token=on_token,
                vocabulary=tokenizer.size,
                **options,
            )
    except ValueError as error:
        raise MythosError(str(error)) from error
    seconds = time.perf_counter() - start
    for index, (row, stream) in enumerate(zip(rows, streams, strict=True)):
        row.end = continuations[index].end
        for piece in stream.finish():
            on_piece(index, piece)
    halting = depth.rule is not None or is_exclusive(model.config.halting)
    first_seconds = seconds if first_seconds is None else first_seconds
    untrained, length = 0, opened.sequence_length
    if length is not None:
        room = [max(0, length - len(prompt)) for prompt in ids]
        untrained = sum(max(0, len(row.loops) - left) for row, left in zip(rows, room, strict=True))
    prompt_tokens = sum(map(len, ids))
    return TextGeneration(rows, prompt_tokens, first_seconds, seconds, cache_bytes, halting, untrained, length)


def check_counts(limits: int, prompts: int) -> None:
    """Raise MythosError unless there is one prompt, one loop count, or one loop count per prompt."""
    if limits != 1 and prompts not in (1, limits):
        raise MythosError(f"{limits} loop counts for {prompts} prompts: give one, or one per prompt")


def available_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _check_room(
    model: RecurrentDepthTransformer, rows: int, length: int, loops: int, dtype: torch.dtype, cache_loops: int | None
) -> None:
    if min(rows, length, loops, 1 if cache_loops is None else cache_loops) < 1:
        return  # `generate` raises the error
    length = min(length, model.config.context_length)
    needed = cache_bytes_needed(model.config, rows, length, loops, dtype, cache_loops)
    free = available_memory(model.embedding.weight.device)
    if needed > free:
        kept = "" if cache_loops is None else f", of which the last {cache_loops} are kept"
        raise MythosError(
            f"the cache would take up to {in_mib(needed)} for {rows} x {length} tokens at {loops} loops{kept}, and "
            f"{in_mib(free)} of memory are free: give fewer --loops, or keep fewer of them (--cache-loops)"
        )


def _encode(tokenizer: Tokenizer, prompt: str | list[int] | None, context: int) -> list[int]:
    if prompt is None:
        return [tokenizer.eos_id]
    if isinstance(prompt, list):
        return prompt
    ids = tokenizer.encode_batch([prompt])[0]
    if not ids:
        raise MythosError("a prompt is empty: give some text, or no prompt at all to start a new document")
    if len(ids) > context:
        raise MythosError(
            f"the prompt {prompt[:30]!r}... has {len(ids)} tokens, and the model's context is {context}: shorten it"
        )
    return ids
