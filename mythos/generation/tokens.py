"""Continue token ids with a model: batched and cached; every row has its own prompt, loops, seed and end."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mythos.generation.sampling import Sampling, uniforms
from mythos.model.cache import DecodeCache, cache_bytes_per_token
from mythos.model.config import ModelConfig
from mythos.model.halting import HaltingRule
from mythos.model.layers import autocast_dtype
from mythos.model.rdt import RecurrentDepthTransformer

End = Literal["length", "context", "stop", "callback"]
CACHE_BLOCK = 256
"""Positions by which the cache grows."""

OnToken = Callable[[int, int, int], bool | None]


@dataclass
class Continuation:
    """The tokens generated after one prompt."""

    tokens: list[int] = field(default_factory=list)
    """Ids, without the prompt and without the stop id."""
    loops: list[int] = field(default_factory=list)
    """For each token, the loops of the position that predicted it."""
    end: End = "length"
    """Why it ended: the requested number of tokens, a full context, a stop id, or the callback."""


class Generation(NamedTuple):
    """The continuations of a batch."""

    rows: list[Continuation]
    cache_bytes: int
    """Largest size of the decode cache."""


@dataclass
class _Batch:
    """The rows that are still generating. `select` removes the others from everything that has a row each."""

    model: RecurrentDepthTransformer
    cache: DecodeCache
    halting: HaltingRule | None
    compiled: bool
    vocabulary: int
    rows: list[int]
    """Indices of the rows in the prompts."""
    limits: list[int]
    """Most loops of each row."""
    uniforms: Tensor | None
    """(rows, most tokens) float64: the random numbers of each row; None if the likeliest token is taken."""
    seen: Tensor | None
    """(rows, V) bool: ids that occurred in each row; None without a repetition penalty."""

    def extend(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run ids (rows, S); returns logits (rows, V) at the last position, and the loops (rows,) that it ran."""
        extension = self.model.extend(
            ids, self.cache, mask=mask, loops=self.limits, halting=self.halting, compiled=self.compiled
        )
        return extension.logits[:, : self.vocabulary], extension.loops[:, -1]

    def select(self, indices: list[int], tokens: Tensor) -> Tensor:
        """Keep some of the rows; returns their entries of `tokens`, (rows,)."""
        self.cache.select(indices)
        self.rows = [self.rows[index] for index in indices]
        self.limits = [self.limits[index] for index in indices]
        chosen = torch.tensor(indices, device=tokens.device)
        self.uniforms = None if self.uniforms is None else self.uniforms[chosen]
        self.seen = None if self.seen is None else self.seen[chosen]
        return tokens[chosen]


@torch.no_grad()
def generate(
    model: RecurrentDepthTransformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    loops: int | Sequence[int] | None = None,
    halting: HaltingRule | None = None,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    vocabulary: int | None = None,
    prefill_chunk: int = 512,
    cache_loops: int | None = None,
    compiled: bool = False,
) -> Generation:
    """Generate up to `max_tokens` ids after each of the prompts, which may differ in length.

    Prompt and continuation together are at most `model.config.context_length` ids. A row that ends leaves the batch.
    The host waits for the device once per token, apart from the synchronisation in `model.extend`.

    Args:
        model: in eval mode. Under FSDP all ranks must make the same calls, and logits may differ in the last bit
            between ranks, so nothing that depends on logits may end a row or a loop: no `stop_ids`, no `on_token` that
            returns True, no `halting`.
        prompts: ids of each row, at least one per row.
        max_tokens: maximum number of ids generated per row.
        sampling: distribution of the next token; default `Sampling()`.
        seed: one seed per row, or the seed of row 0, in which case row n has `seed + n`. The draws of a row depend on
            its own seed and logits, not on the rest of the batch.
        loops: maximum number of loops, for all rows or one per row (default config.loops).
        halting: rule by which a position may stop earlier; see `mythos.model.halting`.
        stop_ids: ids that end a row; they are not part of its tokens.
        on_token: called with (row, id, loops) for each generated id, in order; True ends the row after it.
        vocabulary: only smaller ids are drawn (default config.vocab_size): the rest of the embedding is padding.
        prefill_chunk: positions of the prompts that are computed at once.
        cache_loops: see `mythos.model.cache.DecodeCache`.
        compiled: use torch.compile for the tokens after the prompts, if all rows run the same number of loops and no
            rule halts them; see `mythos.model.rdt.RecurrentDepthTransformer.extend`.

    Raises:
        ValueError: no prompts, an empty prompt or one longer than the context, ids outside of the vocabulary, loops
            below 1, a number of seeds or loops other than the number of rows, or logits that are not finite.
    """
    sampling = sampling or Sampling()
    vocabulary = int(model.config.vocab_size) if vocabulary is None else vocabulary
    _check(model, prompts, max_tokens, vocabulary, stop_ids, prefill_chunk)
    sampling.check_vocabulary(vocabulary)
    limits = _per_row("loops", model.config.loops if loops is None else loops, len(prompts))
    model.check_loops(sorted(limits, reverse=True), len(prompts))
    seeds = list(range(seed, seed + len(prompts))) if isinstance(seed, int) else _per_row("seed", seed, len(prompts))

    budgets = [min(max_tokens, model.config.context_length - len(prompt)) for prompt in prompts]
    continuations = [Continuation(end="length" if budget == max_tokens else "context") for budget in budgets]
    rows = [row for row, budget in enumerate(budgets) if budget > 0]
    if not rows:
        return Generation(continuations, 0)
    chosen = [prompts[row] for row in rows]
    row_limits = [limits[row] for row in rows]
    device = model.embedding.weight.device
    random_numbers = None if sampling.greedy else uniforms([seeds[row] for row in rows], max(budgets)).to(device)
    seen = _seen(chosen, vocabulary, device) if sampling.repetition_penalty != 1 else None
    cache = DecodeCache(
        model.config,
        len(rows),
        loops=max(row_limits),
        dtype=autocast_dtype(model.embedding.weight),
        device=device,
        block=CACHE_BLOCK,
        cache_loops=cache_loops,
    )
    batch = _Batch(model, cache, halting, compiled, vocabulary, rows, row_limits, random_numbers, seen)
    logits, depths = _prefill(batch, chosen, prefill_chunk)
    return _decode(batch, logits, depths, continuations, budgets, sampling, stop_ids, on_token)


def _decode(
    batch: _Batch,
    logits: Tensor,
    depths: Tensor,
    continuations: list[Continuation],
    budgets: Sequence[int],
    sampling: Sampling,
    stop_ids: Collection[int],
    on_token: OnToken | None,
) -> Generation:
    """Generate token by token from the logits (rows, V) of the prompts and the loops (rows,) that gave them."""
    cache_bytes = batch.cache.bytes
    for step in range(max(budgets)):
        uniform = logits.new_zeros(len(batch.rows)) if batch.uniforms is None else batch.uniforms[:, step]
        tokens = sampling.draw(logits, uniform, batch.seen)
        finite = logits.isfinite().all(-1)
        kept = []
        # One transfer to the host for all three.
        for index, (token, depth, is_finite) in enumerate(torch.stack((tokens, depths, finite), dim=1).tolist()):
            row = batch.rows[index]
            if not is_finite:
                raise ValueError("the logits are not finite: the weights are damaged, or training has diverged")
            if token in stop_ids:
                continuations[row].end = "stop"
                continue
            continuations[row].tokens.append(token)
            continuations[row].loops.append(depth)
            if on_token is not None and on_token(row, token, depth):
                continuations[row].end = "callback"
            elif step + 1 < budgets[row]:
                kept.append(index)
        if not kept:
            break
        if len(kept) < len(batch.rows):
            # At once, not when many rows have ended: with gaps in the batch every layer would gather its rows.
            tokens = batch.select(kept, tokens)
        if batch.seen is not None:
            batch.seen.scatter_(1, tokens.unsqueeze(1), True)
        logits, depths = batch.extend(tokens.unsqueeze(1))
        cache_bytes = max(cache_bytes, batch.cache.bytes)
    return Generation(continuations, cache_bytes)


def cache_bytes_needed(
    config: ModelConfig,
    rows: int,
    length: int,
    loops: int,
    dtype: torch.dtype = torch.float32,
    cache_loops: int | None = None,
) -> int:
    """Bytes of the cache in `generate` for rows of up to `length` tokens at up to `loops` loops."""
    blocks = -(-min(length, config.context_length) // CACHE_BLOCK)
    allocated = 2 * blocks - 1  # to grow by one block the cache is copied, and both copies exist for a moment
    return rows * allocated * CACHE_BLOCK * cache_bytes_per_token(config, min(loops, cache_loops or loops), dtype)


def _prefill(batch: _Batch, prompts: Sequence[Sequence[int]], chunk: int) -> tuple[Tensor, Tensor]:
    """Run the prompts in chunks and return the logits and loops of the last chunk.

    The prompts are padded on the left, so that all of them end in the last chunk.
    """
    device, longest = batch.model.embedding.weight.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    for start in range(0, longest, chunk):
        part = mask[:, start : start + chunk]
        no_padding = bool(part.all())
        result = batch.extend(ids[:, start : start + chunk].to(device), None if no_padding else part.to(device))
    return result


def _seen(prompts: Sequence[Sequence[int]], vocabulary: int, device: torch.device) -> Tensor:
    """(rows, V) bool: the ids of each prompt."""
    seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    return seen.to(device)


def _per_row(name: str, values: int | Sequence[int], rows: int) -> list[int]:
    if isinstance(values, int):
        return [values] * rows
    if len(values) != rows:
        raise ValueError(f"{name}: {len(values)} values for {rows} prompts; give one number, or one per prompt")
    return list(values)


def _check(
    model: RecurrentDepthTransformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    vocabulary: int,
    stop_ids: Collection[int],
    prefill_chunk: int,
) -> None:
    context = model.config.context_length
    if max_tokens < 0:
        raise ValueError(f"max_tokens: got {max_tokens}; allowed: 0 and above")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk: got {prefill_chunk}; allowed: at least 1")
    if not 1 <= vocabulary <= model.vocabulary:
        raise ValueError(f"vocabulary: got {vocabulary}; allowed: 1 to {model.vocabulary}, the rows of the embedding")
    if not prompts:
        raise ValueError("no prompts: give at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty: give at least one token, such as the end of a document")
        if len(prompt) > context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens: the model's context is {context} (model.context_length); "
                "shorten it"
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"prompt {row} has ids {min(prompt)} to {max(prompt)}; allowed: 0 to {vocabulary - 1}")
    for stop in stop_ids:
        if not 0 <= stop < vocabulary:
            raise ValueError(f"stop id {stop}: allowed: 0 to {vocabulary - 1}")
