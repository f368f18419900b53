"""Causal attention by batched matrix products, for CPUs on which torch's fused kernel is slower (see `kernels`).

A block of queries meets all keys up to its last one, so scores above the diagonal's blocks are never made, and those of
few blocks exist at a time. The backward pass makes the probabilities again: nothing but the inputs is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mythos.torch_internals import softmax_backward

PIECE_BYTES = 2**20
"""Most memory of the scores that exist at once, so that a core's caches hold them; at least those of one block."""


# Operators to torch, so that what traces a step need not look into the loop.
@torch.library.custom_op("mythos::causal_attention", mutates_args=())
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale query key^T) value, where no query sees a later key.

    query (B, H, S, d), key (B, KV, S, d), value (B, KV, S, v) with KV dividing H -> (B, H, S, v), which lies in memory
    as (B, S, H, v). Of bfloat16 inputs the scores and probabilities are rounded to bfloat16, all sums are float32.
    """
    queries, keys, values = _by_key_head(query, key), _by_key_head(key, key), _by_key_head(value, key)
    output = queries.new_empty(*queries.shape[:2], value.shape[-1])
    for heads, rows, seen, unseen in _pieces(queries, keys):
        probabilities = _probabilities(queries[heads, rows], keys[heads, seen], unseen, scale)
        output[heads, rows] = probabilities @ values[heads, seen]
    return _by_head(output, query).transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op("mythos::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    queries, keys, values = _by_key_head(query, key), _by_key_head(key, key), _by_key_head(value, key)
    of_output, of_queries = _by_key_head(grad_out, key), torch.empty_like(queries)
    summed = torch.promote_types(query.dtype, torch.float32)  # over blocks of queries
    of_keys, of_values = torch.zeros_like(keys, dtype=summed), torch.zeros_like(values, dtype=summed)
    for heads, rows, seen, unseen in _pieces(queries, keys):
        probabilities = _probabilities(queries[heads, rows], keys[heads, seen], unseen, scale)
        of_values[heads, seen] += probabilities.mT @ of_output[heads, rows]
        of_probabilities = of_output[heads, rows] @ values[heads, seen].mT
        of_scores = softmax_backward(of_probabilities, probabilities)
        of_queries[heads, rows] = of_scores @ keys[heads, seen]
        of_keys[heads, seen] += of_scores.mT @ queries[heads, rows]
    of_key, of_value = of_keys.mul_(scale).to(key.dtype), of_values.to(value.dtype)
    return _by_head(of_queries.mul_(scale), query), _by_head(of_key, key), _by_head(of_value, value)


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    rows, heads, length, _ = query.shape
    return query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)


@causal_attention_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *causal_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


causal_attention.register_autograd(_backward, setup_context=_keep_inputs)


def _pieces(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Some heads, a block of their queries, the keys up to the last that these see, and -inf where one is unseen.

    queries are (n, S G, d), keys (n, S, d), and what is unseen (T G, end) for a block of T G queries and end keys.
    """
    length = keys.shape[1]
    group = queries.shape[1] // length
    block = 64 if length <= 256 else 128  # of more, more is computed above the diagonal, by products that run faster
    together = max(1, PIECE_BYTES // (block * group * length * queries.element_size()))
    for start in range(0, length, block):
        end = min(start + block, length)
        unseen = queries.new_full((end - start, end), float("-inf")).triu_(start + 1).repeat_interleave(group, dim=0)
        for first in range(0, len(keys), together):
            yield slice(first, first + together), slice(start * group, end * group), slice(end), unseen


def _probabilities(queries: Tensor, keys: Tensor, unseen: Tensor, scale: float) -> Tensor:
    """softmax(scale queries keys^T + unseen): (n, T G, d), (n, end, d) and (T G, end) -> (n, T G, end)."""
    return torch.baddbmm(unseen, queries, keys.mT, alpha=scale).softmax(-1)


def _by_key_head(x: Tensor, key: Tensor) -> Tensor:
    """(B, H, S, d) -> (B KV, S G, d), where the G queries of a position that share a key lie side by side."""
    rows, heads = key.shape[:2]
    return x.unflatten(1, (heads, -1)).transpose(2, 3).reshape(rows * heads, -1, x.shape[-1])


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """(B KV, S G, d) -> (B, H, S, d), the first three as in `like`; contiguous."""
    rows, heads, length, _ = like.shape
    group = x.shape[1] // length
    # Of a single key head a reshape would be a view, which compiled code does not expect.
    return x.view(rows, heads // group, length, group, -1).transpose(2, 3).reshape(rows, heads, length, -1).contiguous()
