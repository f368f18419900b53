"""Causal attention by batched matmuls, for CPUs on which torch's fused kernel is slower (see `device_choice`).

Each block of queries is multiplied with the keys up to its last position only, so that no scores above the diagonal
blocks are computed, and the scores of a few blocks exist at a time. The backward pass recomputes the probabilities:
nothing but the inputs is saved.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mythos.torch_internals import softmax_backward

PIECE_BYTES = 2**20
"""Most memory of the scores that exist at once, but at least one block's: they stay in a core's caches."""


# Custom operators, so that tracing a step does not enter the loop.
@torch.library.custom_op("mythos::causal_attention", mutates_args=())
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale query key^T) value, where no query sees a later key.

    query (B, H, S, K), key (B, KV, S, K), value (B, KV, S, v) with KV dividing H -> (B, H, S, v), laid out in memory as
    (B, S, H, v). For bfloat16 inputs scores and probabilities are rounded to bfloat16, and all sums are float32.
    """
    queries, keys, values = _by_key_head(query, key), _by_key_head(key, key), _by_key_head(value, key)
    output = queries.new_empty(*queries.shape[:2], value.shape[-1])
    for heads, rows, visible, mask in _pieces(queries, keys):
        probabilities = _probabilities(queries[heads, rows], keys[heads, visible], mask, scale)
        output[heads, rows] = probabilities @ values[heads, visible]
    return _by_head(output, query).transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op("mythos::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    queries, keys, values = _by_key_head(query, key), _by_key_head(key, key), _by_key_head(value, key)
    grad_output, grad_queries = _by_key_head(grad_out, key), torch.empty_like(queries)
    sum_dtype = torch.promote_types(query.dtype, torch.float32)  # sums over blocks of queries
    grad_keys, grad_values = torch.zeros_like(keys, dtype=sum_dtype), torch.zeros_like(values, dtype=sum_dtype)
    for heads, rows, visible, mask in _pieces(queries, keys):
        probabilities = _probabilities(queries[heads, rows], keys[heads, visible], mask, scale)
        grad_values[heads, visible] += probabilities.mT @ grad_output[heads, rows]
        grad_probabilities = grad_output[heads, rows] @ values[heads, visible].mT
        grad_scores = softmax_backward(grad_probabilities, probabilities)
        grad_queries[heads, rows] = grad_scores @ keys[heads, visible]
        grad_keys[heads, visible] += grad_scores.mT @ queries[heads, rows]
    grad_key, grad_value = grad_keys.mul_(scale).to(key.dtype), grad_values.to(value.dtype)
    return _by_head(grad_queries.mul_(scale), query), _by_head(grad_key, key), _by_head(grad_value, value)


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    rows, heads, length, _ = query.shape
    return query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)


@causal_attention_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *causal_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


causal_attention.register_autograd(_backward, setup_context=_save_inputs)


def _pieces(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Slices of heads, of a block of their queries, and of the keys that these see; and the mask, -inf where unseen.

    With G queries for each key, queries are (n, S G, K) and keys (n, S, K). The mask is (T G, end) for a block of T
    positions whose last one sees `end` keys.
    """
    length = keys.shape[1]
    group = queries.shape[1] // length
    # Larger blocks run in faster matmuls but compute more scores above the diagonal.
    block = 64 if length <= 256 else 128
    heads_at_once = max(1, PIECE_BYTES // (block * group * length * queries.element_size()))
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = queries.new_full((end - start, end), float("-inf")).triu_(start + 1).repeat_interleave(group, dim=0)
        for first in range(0, len(keys), heads_at_once):
            yield slice(first, first + heads_at_once), slice(start * group, end * group), slice(end), mask


def _probabilities(queries: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale queries keys^T + mask): (n, T G, K), (n, end, K) and (T G, end) -> (n, T G, end)."""
    return torch.baddbmm(mask, queries, keys.mT, alpha=scale).softmax(-1)


def _by_key_head(x: Tensor, key: Tensor) -> Tensor:
    """(B, H, S, K) -> (B KV, S G, K), where the G queries of a position that share a key are adjacent."""
    rows, heads = key.shape[:2]
    return x.unflatten(1, (heads, -1)).transpose(2, 3).reshape(rows * heads, -1, x.shape[-1])


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """(B KV, S G, K) -> (B, H, S, K), contiguous; the first three sizes are those of `like`."""
    rows, heads, length, _ = like.shape
    group = x.shape[1] // length
    # With a single key head a reshape would return a view, which compiled code does not expect: hence contiguous.
    return x.view(rows, heads // group, length, group, -1).transpose(2, 3).reshape(rows, heads, length, -1).contiguous()
