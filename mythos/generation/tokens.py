"""Continue token ids with a model: batched, cached, every row with its own prompt, loops, seed and end."""

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
    """What was generated after one prompt."""

    tokens: list[int] = field(default_factory=list)
    """Ids, without the prompt and without the stop id."""
    loops: list[int] = field(default_factory=list)
    """For each token, the loops that the position which predicted it ran."""
    end: End = "length"
    """Why it ends: so many tokens were asked for, prompt and tokens fill the context, a stop id, or the callback."""


class Generation(NamedTuple):
    """The continuations of a batch."""

    rows: list[Continuation]
    cache_bytes: int
    """Most that the decode cache took."""


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

    Prompt and continuation together are at most `model.config.context_length` ids. Rows leave the batch as they end.
    The host waits for the device once a token, beside what `model.extend` needs to know.

    Args:
        model: in eval mode. Under FSDP all ranks must call alike, and nothing that may differ in the last bit of a
            logit may end a row or a loop: no `stop_ids`, no `on_token` that returns True, no `halting`.
        prompts: ids of each row, at least one a row.
        max_tokens: most ids generated for a row.
        sampling: how tokens are drawn; default `Sampling()`.
        seed: one for each row, or the first row's, the others following it by ones. What a row draws depends on its own
            seed and logits, not on the batch that it is in.
        loops: most passes of the core, for all rows or for each (default config.loops).
        halting: rule by which a position may stop before; see `mythos.model.halting`.
        stop_ids: ids that end a row and are left out.
        on_token: called with (row, id, loops) for each generated id, in order; True ends the row after it.
        vocabulary: only ids below it are drawn (default config.vocab_size): rows that pad the embedding mean no text.
        prefill_chunk: positions of the prompts that are computed at once.
        cache_loops: see `mythos.model.cache.DecodeCache`.
        compiled: run the tokens after the prompts by torch.compile, where all rows run as many loops and nothing halts;
            see `mythos.model.rdt.RecurrentDepthTransformer.extend`.

    Raises:
        ValueError: no prompts, an empty one, one longer than the context, ids outside of the vocabulary, loops below 1,
            counts that do not fit the rows, or logits that are not finite.
    """
    config, device = model.config, model.embedding.weight.device
    sampling = sampling or Sampling()
    vocabulary = int(config.vocab_size) if vocabulary is None else vocabulary
    _check(model, prompts, max_tokens, vocabulary, stop_ids, prefill_chunk)
    sampling.check_vocabulary(vocabulary)
    rows = len(prompts)
    limits = _per_row("loops", config.loops if loops is None else loops, rows)
    model.check_loops(sorted(limits, reverse=True), rows)
    seeds = list(range(seed, seed + rows)) if isinstance(seed, int) else _per_row("seed", seed, rows)

    made = [Continuation() for _ in prompts]
    budgets = [min(max_tokens, config.context_length - len(prompt)) for prompt in prompts]
    for row, budget in zip(made, budgets, strict=True):
        row.end = "length" if budget == max_tokens else "context"
    live = [row for row in range(rows) if budgets[row] > 0]
    if not live:
        return Generation(made, 0)
    noise = None if sampling.greedy else uniforms([seeds[row] for row in live], max(budgets)).to(device)
    seen = _seen([prompts[row] for row in live], vocabulary, device) if sampling.repetition_penalty != 1 else None
    cache = DecodeCache(
        config,
        len(live),
        loops=max(limits[row] for row in live),
        dtype=autocast_dtype(model.embedding.weight),
        device=device,
        block=CACHE_BLOCK,
        cache_loops=cache_loops,
    )

    def extend(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        found = model.extend(
            ids, cache, mask=mask, loops=[limits[row] for row in live], halting=halting, compiled=compiled
        )
        return found.logits[:, :vocabulary], found.loops[:, -1]

    logits, depths = _prefill(extend, [prompts[row] for row in live], prefill_chunk, device)
    cache_bytes = cache.bytes
    for count in range(max(budgets)):
        place = logits.new_zeros(len(live), dtype=torch.float64) if noise is None else noise[:, count]
        tokens = sampling.draw(logits, place, seen)
        sound = logits.isfinite().all(-1)
        kept = []
        for index, (token, depth, finite) in enumerate(torch.stack((tokens, depths, sound), dim=1).tolist()):
            row = live[index]
            if not finite:
                raise ValueError("the logits are not finite: the weights are damaged, or training has diverged")
            if token in stop_ids:
                made[row].end = "stop"
                continue
            made[row].tokens.append(token)
            made[row].loops.append(depth)
            if on_token is not None and on_token(row, token, depth):
                made[row].end = "callback"
            elif count + 1 < budgets[row]:
                kept.append(index)
        if not kept:
            break
        if len(kept) < len(live):
            # Now, not when many have ended: a batch with gaps is gathered in every layer and loop of every token.
            cache.select(kept)
            live = [live[index] for index in kept]
            chosen = torch.tensor(kept, device=device)
            tokens = tokens[chosen]
            noise = None if noise is None else noise[chosen]
            seen = None if seen is None else seen[chosen]
        if seen is not None:
            seen.scatter_(1, tokens.unsqueeze(1), True)
        logits, depths = extend(tokens.unsqueeze(1), None)
        cache_bytes = max(cache_bytes, cache.bytes)
    return Generation(made, cache_bytes)


def cache_bytes_needed(
    config: ModelConfig,
    rows: int,
    length: int,
    loops: int,
    dtype: torch.dtype = torch.float32,
    cache_loops: int | None = None,
) -> int:
    """Bytes that `generate` takes for the cache of rows that become `length` tokens long, at up to `loops` loops."""
    blocks = -(-min(length, config.context_length) // CACHE_BLOCK)
    held = 2 * blocks - 1  # to grow by a block it is copied, and both are there
    return rows * held * CACHE_BLOCK * cache_bytes_per_token(config, min(loops, cache_loops or loops), dtype)


def _prefill(
    extend: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
    prompts: Sequence[Sequence[int]],
    chunk: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Run the prompts in pieces, padded on the left so that all end in the last one; returns its logits and loops."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    for start in range(0, longest, chunk):
        piece = mask[:, start : start + chunk]
        whole = bool(piece.all())
        found = extend(ids[:, start : start + chunk].to(device), None if whole else piece.to(device))
    return found


def _seen(prompts: Sequence[Sequence[int]], vocabulary: int, device: torch.device) -> Tensor:
    """(B, V) bool: the ids of each prompt."""
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
