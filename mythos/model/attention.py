"""Causal attention over packed sequences: grouped-query and multi-head latent."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from mythos.model.cache import CachedContext, Part, ValueRows
from mythos.model.config import ModelConfig
from mythos.model.layers import (
    Initializer,
    Linear,
    RMSNorm,
    applied_weight,
    apply_rope,
    autocast_dtype,
    recomputed,
    rope_table,
    truncated_normal,
    without_autocast,
    zeros,
)
from mythos.model.ops import device_choice
from mythos.model.ops.causal_attention import causal_attention
from mythos.model.ops.recompute import recomputable

BLOCK = 128
"""Positions in a side of flex attention's blocks."""
GATE_INPUTS = 32
"""Leading dimensions of a layer's input that the gate of its value embedding reads."""


@dataclass(frozen=True)
class AttentionContext:
    """What every attention layer of a step shares; made once per step, not per layer or loop."""

    cos: Tensor
    """(S, rotated dims / 2) float32, the same for all rows, or (B, S, rotated dims / 2) where rows hold documents."""
    sin: Tensor
    """Like `cos`."""
    mask: Tensor | BlockMask | None
    """None = causal; (B, 1, S, S) bool, True where a query may look; or the same as a block mask on a GPU."""
    values: ValueRows | None = None
    """Rows of the value embeddings, (B, S, KV, d) for each layer that has one; None in a model without."""
    value: Tensor | None = None
    """Those of the layer that this is the context of."""

    def layer(self, part: Part, layer: int) -> "AttentionContext":
        """The context of one layer."""
        return self if self.values is None else replace(self, value=self.values.get((part, layer)))

    def rotate(self, heads: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Queries or keys (B, S, heads, d) at their positions, in `dtype` (default: theirs)."""
        return apply_rope(heads, self.cos, self.sin, dtype)

    def first_rows(self, rows: int) -> "AttentionContext":
        """The context of the leading `rows` sequences."""
        values = None if self.values is None else {layer: value[:rows] for layer, value in self.values.items()}
        if self.mask is None or rows == self.mask.shape[0]:
            return self if values is None else replace(self, values=values)
        mask = self.mask[:rows]
        if isinstance(mask, BlockMask) and isinstance(self.mask, BlockMask):
            mask.mask_mod = self.mask.mask_mod  # slicing drops it, for its row indices may no longer fit; a prefix's do
        return AttentionContext(self.cos[:rows], self.sin[:rows], mask, values)


def rotated_dim(config: ModelConfig) -> int:
    """Dimensions of a head that carry positions."""
    return config.qk_rope_head_dim if config.attention == "mla" else config.head_dim


def attention_context(
    config: ModelConfig, length: int, device: torch.device, document_ids: Tensor | None
) -> AttentionContext:
    """Tables and mask for sequences of `length` tokens.

    document_ids is (B, S) int or None; a document is a run of equal ids. Where they are given, positions count from 0
    in each document and a query sees earlier positions of its own document only: nothing a document computes depends
    on where in a row it lies.
    """
    cos, sin = rope_table(length, rotated_dim(config), config.rope_theta, device)
    if document_ids is None:
        return AttentionContext(cos, sin, None)
    starts = document_starts(document_ids)
    position = torch.arange(length, device=device)
    cos, sin = cos[position - starts], sin[position - starts]
    if device_choice.blocks_of_documents(device):
        return AttentionContext(cos, sin, document_block_mask(starts))
    visible = (position[:, None] >= position) & (position >= starts[..., None])
    return AttentionContext(cos, sin, visible.unsqueeze(1))


def document_starts(document_ids: Tensor) -> Tensor:
    """Where the document of each position begins: (B, S) int, runs of equal ids -> (B, S) int64."""
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    return (begins * torch.arange(begins.shape[1], device=begins.device)).cummax(dim=1).values


def document_block_mask(starts: Tensor) -> BlockMask:
    """Causal, document-wise block mask for flex attention, which skips the blocks that are wholly masked.

    starts is (B, S) int64, as `document_starts` gives them.
    """
    # varlen_attn would skip other documents too, but takes neither float32 nor values narrower than keys (mla).
    # create_block_mask tries all B x S x S pairs, at 10 bytes each (1.3 GB for 8 x 4,096); but starts never decrease
    # along a row, so the first and the last query of a block tell all that the block sees.
    length = starts.shape[1]
    padded = F.pad(starts, (0, -length % BLOCK), value=length)  # an incomplete block of queries sees none in full
    first, last = padded[:, ::BLOCK, None], padded[:, BLOCK - 1 :: BLOCK, None]
    block = torch.arange(first.shape[1], device=starts.device)
    seen = (block[:, None] >= block) & (block >= first // BLOCK)
    full = (block[:, None] > block) & (block * BLOCK >= last)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (key >= starts[row, query])

    return BlockMask.from_kv_blocks(
        *listed(seen & ~full), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, K) bool -> how many key blocks each query block has, (B, 1, Q), and which, foremost in (B, 1, Q, K)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
    """Causal softmax attention by the kernel that `kernels` chooses.

    query (B, S, H, d), key (B, S, KV, d), value (B, S, KV, v) with KV dividing H -> (B, S, H, v).
    """
    heads, value_dim, dim = query.shape[2], value.shape[-1], query.shape[-1]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if isinstance(context.mask, BlockMask):
        flex = device_choice.flex(query.device)
        output = flex(query, key, value, block_mask=context.mask, enable_gqa=heads != key.shape[1])
        return output.transpose(1, 2)
    if context.mask is None and device_choice.causal_by_products(query.device, query.dtype, query.shape[2]):
        with without_autocast(query):
            return causal_attention(query, key, value, dim**-0.5).transpose(1, 2)
    if not device_choice.takes_widths(query.device, query.dtype, dim, value_dim):
        # Else the kernel that keeps all S x S scores would run; zeros change neither scores nor outputs.
        if value_dim < dim:
            value = F.pad(value, (0, dim - value_dim))
        elif value_dim > dim:
            query, key = F.pad(query, (0, value_dim - dim)), F.pad(key, (0, value_dim - dim))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=context.mask,
        is_causal=context.mask is None,
        scale=dim**-0.5,
        enable_gqa=heads != key.shape[1],
    )
    return output[..., :value_dim].transpose(1, 2)


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with RoPE, optional QK-norm, QK-bias and value embedding.

    With a value embedding the values are v + 2 sigmoid(W x_{:32}) * row of the token, one gate a head.
    """

    def __init__(self, config: ModelConfig, value_embedding: bool) -> None:
        super().__init__()
        dim, self.head_dim = config.dim, config.head_dim
        self.heads, self.kv_heads = config.n_heads, config.n_kv_heads
        self.query = Linear(dim, self.heads * self.head_dim)
        self.key = Linear(dim, self.kv_heads * self.head_dim)
        self.value = Linear(dim, self.kv_heads * self.head_dim)
        self.out = Linear(self.heads * self.head_dim, dim, zeros)
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.query_bias = self.key_bias = None
        if config.qk_bias:
            self.query_bias = nn.Parameter(torch.empty(self.heads * self.head_dim))
            self.key_bias = nn.Parameter(torch.empty(self.kv_heads * self.head_dim))
            self.initializers = {"query_bias": zeros, "key_bias": zeros}
        self.value_gate = Linear(min(GATE_INPUTS, dim), self.kv_heads, zeros) if value_embedding else None

    def forward(self, x: Tensor, context: AttentionContext | CachedContext) -> Tensor:
        """(B, S, D) -> (B, S, D); with a cache, packed positions (N, 1, D) -> (N, 1, D)."""
        query, key = self.query(x), self.key(x)
        if self.query_bias is not None and self.key_bias is not None:
            query, key = query + self.query_bias.to(query.dtype), key + self.key_bias.to(key.dtype)
        query = query.unflatten(-1, (self.heads, self.head_dim))
        key = key.unflatten(-1, (self.kv_heads, self.head_dim))
        value = self.value(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.value_gate is not None:
            gate = 2 * self.value_gate(x[..., :GATE_INPUTS]).sigmoid()
            value = value + gate.unsqueeze(-1) * context.value
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = recomputable(context.rotate, query, value.dtype)
        key = recomputable(context.rotate, key, value.dtype)
        if isinstance(context, CachedContext):
            seen = context.store(torch.stack((key, value), dim=2).flatten(1)).unflatten(-1, (2, self.kv_heads, -1))
            key, value = seen.transpose(1, 3).unbind(2)
            return self.out(context.attend(query.squeeze(1), key, value, self.head_dim**-0.5).flatten(1).unsqueeze(1))
        return self.out(attend(query, key, value, context).flatten(-2))


class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434).

    Keys and values are expanded from one normalised latent per token; one rotated key is shared by all heads. QK-norm
    acts on the query heads and on the shared rotated key, never on the expanded keys: those would have to be cached per
    head, where the latent and the rotated key are all that a decoder needs.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.heads, eps = config.dim, config.n_heads, config.norm_eps
        self.nope, self.rope, self.value_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent_dim = config.kv_lora_rank
        query_dim = self.heads * (self.nope + self.rope)
        if config.q_lora_rank:
            self.query_down = Linear(dim, config.q_lora_rank)
            self.query_latent_norm = RMSNorm(config.q_lora_rank, eps)
            self.query = Linear(config.q_lora_rank, query_dim)
        else:
            self.query_down = self.query_latent_norm = None
            self.query = Linear(dim, query_dim)
        self.key_value_down = Linear(dim, self.latent_dim + self.rope)
        self.latent_norm = RMSNorm(self.latent_dim, eps)
        self.key_value_up = Linear(self.latent_dim, self.heads * (self.nope + self.value_dim))
        self.out = Linear(self.heads * self.value_dim, dim, zeros)
        self.query_norm = RMSNorm(self.nope + self.rope, eps) if config.qk_norm else None
        self.rope_key_norm = RMSNorm(self.rope, eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: AttentionContext | CachedContext) -> Tensor:
        """(B, S, D) -> (B, S, D); with a cache, packed positions (N, 1, D) -> (N, 1, D)."""
        if self.query_down is not None and self.query_latent_norm is not None:
            query = recomputed(self.query, self.query_latent_norm(self.query_down(x)))
        else:
            query = self.query(x)
        query = query.unflatten(-1, (self.heads, self.nope + self.rope))
        latent, rope_key = self.key_value_down(x).split_with_sizes((self.latent_dim, self.rope), dim=-1)
        rope_key = rope_key.unsqueeze(2)
        if self.query_norm is not None and self.rope_key_norm is not None:
            query, rope_key = self.query_norm(query), self.rope_key_norm(rope_key)

        latent = self.latent_norm(latent)
        nope_query, rope_query = query.split_with_sizes((self.nope, self.rope), dim=-1)
        rope_query, rope_key = recomputable(context.rotate, rope_query), recomputable(context.rotate, rope_key)
        if isinstance(context, CachedContext):
            seen = context.store(torch.cat((latent, rope_key.squeeze(2)), dim=-1).squeeze(1))
            output = self.attend_latents(nope_query.squeeze(1), rope_query.squeeze(1), seen, context)
            return self.out(output.flatten(1).unsqueeze(1))

        expanded = recomputed(self.key_value_up, latent).unflatten(-1, (self.heads, self.nope + self.value_dim))
        nope_key, value = expanded.split_with_sizes((self.nope, self.value_dim), dim=-1)
        query = recomputable(joined, nope_query, rope_query, value.dtype)
        key = recomputable(joined, nope_key, rope_key.expand(-1, -1, self.heads, -1), value.dtype)
        return self.out(attend(query, key, value, context).flatten(-2))

    def attend_latents(self, nope_query: Tensor, rope_query: Tensor, seen: Tensor, context: CachedContext) -> Tensor:
        """Attention over what the cache holds, (R, span, latent + rope) -> (N, H, v).

        Absorbed: queries are taken into the latent space, where all heads share keys and values, and results out of it,
        so that the cache is never expanded (arXiv 2405.04434). The queries are (N, H, nope) and (N, H, rope).
        """
        dtype = autocast_dtype(nope_query)
        up = applied_weight(self.key_value_up).to(dtype)
        up = up.unflatten(0, (self.heads, self.nope + self.value_dim))
        key_up, value_up = up.split_with_sizes((self.nope, self.value_dim), dim=1)
        latent_query = torch.bmm(nope_query.to(dtype).transpose(0, 1), key_up).transpose(0, 1)
        query = torch.cat((latent_query, rope_query.to(dtype)), dim=-1)
        shared = seen.to(dtype).unsqueeze(1)
        # Keys are the values too: fused kernels want both as wide, and the rotated key's part of the result is dropped.
        output = context.attend(query, shared, shared, (self.nope + self.rope) ** -0.5)[..., : self.latent_dim]
        return torch.bmm(output.transpose(0, 1), value_up.transpose(1, 2)).transpose(0, 1)


def joined(nope: Tensor, rope: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads of `dtype` from their two parts, (..., nope) and (..., rope) -> (..., nope + rope)."""
    return torch.cat((nope.to(dtype), rope.to(dtype)), dim=-1)


class ValueEmbeddings(nn.Module):
    """Tables (V, KV d) of what layers add to the values of each token, by `part_layer`."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.heads = config.n_kv_heads
        self.layers = value_embedding_layers(config)
        for part, layer in self.layers:
            self.add_module(f"{part}_{layer}", ValueTable(vocabulary, config.n_kv_heads * config.head_dim))

    def forward(self, ids: Tensor) -> ValueRows:
        """(B, S) int64 -> the rows for each layer, (B, S, KV, d) in the autocast type."""
        tables = {place: self.get_submodule("{}_{}".format(*place)) for place in self.layers}
        return {place: table(ids).unflatten(-1, (self.heads, -1)) for place, table in tables.items()}


class ValueTable(nn.Module):
    """Rows of a (V, n) table, whose entries start as large as those of values."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.initializers: dict[str, Initializer] = {"weight": truncated_normal(1)}

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, n), in the autocast type."""
        return F.embedding(ids, self.weight).to(autocast_dtype(self.weight))


def value_embedding_layers(config: ModelConfig) -> list[tuple[Part, int]]:
    """The layers that have a value embedding: every second, counted back from the last."""
    counts: dict[Part, int] = {
        "prelude": config.prelude_layers,
        "core": config.core_layers,
        "coda": config.coda_layers,
    }
    layers = [(part, layer) for part, count in counts.items() for layer in range(count)]
    return layers[::-1][::2] if config.value_embeddings else []


def build_attention(config: ModelConfig, value_embedding: bool = False) -> nn.Module:
    """The attention module that `config.attention` names, for a layer with a value embedding or without."""
    if config.attention == "mla":
        return MultiHeadLatentAttention(config)
    return GroupedQueryAttention(config, value_embedding)
