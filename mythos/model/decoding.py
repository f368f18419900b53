"""Decoding: tokens packed without padding, their attention to the cache, and the result of a call.

A call continues each row of a cache by any number of tokens. All tokens of all rows pass through the model as packed
positions (N, 1, D), so that nothing is computed for padding or for positions that have halted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.model.attention.base import attention_class
from mythos.model.attention.value_embeddings import ValueRows
from mythos.model.cache import DecodeCache
from mythos.model.config import Part
from mythos.model.layers import rope_at


class Extension(NamedTuple):
    """The result of decoding (B, S) tokens."""

    logits: Tensor
    """float32: (B, V) of each row's last token, zeros for a row without tokens; or (B, S, V), zeros at padding."""
    loops: Tensor
    """(B, S) int64: loops that each position ran; 0 at padding."""


class PackedTokens(NamedTuple):
    """The N tokens of a call without padding: all of row 0, then all of row 1, ..."""

    ids: Tensor
    """(N,) int64."""
    places: Tensor
    """(N,) int64: index of each token in the flattened (B, S) ids."""
    rows: Tensor
    """(N,) int64: row of each token, ascending."""
    positions: Tensor
    """(N,) int64: position of each token in its row, ascending within the row."""
    limits: list[int]
    """Most loops of each token."""
    counts: list[int]
    """Number of tokens of each row."""
    lengths: list[int]
    """Positions of each row after the call."""
    single: bool
    """No row has more than one token."""
    level: bool
    """`single`, and all tokens are at the same position, that of the longest row."""


def pack_tokens(ids: Tensor, mask: Tensor | None, lengths: Sequence[int], limits: Sequence[int]) -> PackedTokens:
    """Pack ids (B, S) int64 where mask (B, S) bool is True (None = everywhere).

    `lengths` are the positions that each row has already, `limits` the most loops of each row.
    """
    rows, length = ids.shape
    if mask is None:
        counts, places_N = [length] * rows, torch.arange(rows * length, device=ids.device)
    else:
        counts, places_N = mask.sum(1).tolist(), mask.flatten().nonzero().squeeze(1)
    new_lengths = [old + count for old, count in zip(lengths, counts, strict=True)]
    row_of_each = [row for row, count in enumerate(counts) for _ in range(count)]
    position_of_each = [place for old, new in zip(lengths, new_lengths, strict=True) for place in range(old, new)]
    single = max(counts) == 1
    return PackedTokens(
        ids.flatten()[places_N],
        places_N,
        torch.tensor(row_of_each, dtype=torch.int64, device=ids.device),
        torch.tensor(position_of_each, dtype=torch.int64, device=ids.device),
        [limits[row] for row in row_of_each],
        counts,
        new_lengths,
        single,
        single and min(position_of_each) == max(new_lengths) - 1,
    )


def scatter_rows(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Spread values (n, ...) over `count` places, at ascending indices (n,), with zeros elsewhere: (count, ...)."""
    if len(values) == count:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, places, values)


class QueryLayout(NamedTuple):
    """How packed queries are arranged for attention: R rows of the cache with at most Q queries each."""

    rows: Tensor | None
    """(R,) indices of the cache's rows; None = all rows, in order."""
    places: Tensor | None
    """(N,) index of each query among the R x Q; None if every row has one query."""
    size: int
    """Q."""
    mask: Tensor | None
    """(R, 1, Q, span) bool, True where a query may look; None = everywhere, or causal."""
    causal: bool
    """Queries and keys are the same positions."""


def arrange_queries(
    rows: Tensor, positions: Tensor, cache_rows: int, span: int, *, single: bool, level: bool
) -> QueryLayout:
    """Arrange packed queries (N,), sorted by row, that see the positions up to their own among `span`.

    `single` and `level` are those of `PackedTokens`. `single` saves waiting for the device to count tokens.
    """
    if not single:
        present, counts = torch.unique_consecutive(rows, return_counts=True)
    if single or len(present) == len(rows):
        mask = None if level else torch.arange(span, device=rows.device) <= positions.view(-1, 1, 1, 1)
        return QueryLayout(None if len(rows) == cache_rows else rows, None, 1, mask, False)
    row_count, size = len(present), int(counts.max())
    starts = counts.cumsum(0) - counts
    index_in_row = torch.arange(len(rows), device=rows.device) - starts.repeat_interleave(counts, output_size=len(rows))
    row_index = torch.arange(row_count, device=rows.device).repeat_interleave(counts, output_size=len(rows))
    places = row_index * size + index_in_row
    causal = size == span and len(rows) == row_count * size
    mask = None
    if not causal:
        # Padding queries see position 0: softmax over no key at all would be NaN.
        last_seen = positions.new_zeros(row_count * size).index_copy(0, places, positions)
        mask = torch.arange(span, device=rows.device) <= last_seen.view(row_count, 1, size, 1)
    return QueryLayout(None if row_count == cache_rows else present, places, size, mask, causal)


class CachedContext(NamedTuple):
    """What the attention layers of a decoding call share: tables, and the layout of N packed positions."""

    cache: DecodeCache
    rows: Tensor
    """(N,) int64 row of each position, ascending."""
    positions: Tensor
    """(N,) int64, ascending within a row."""
    span: int
    """Length of the longest row: positions that a query may see."""
    level: bool
    """There is at most one position of each row, and it is the last of the span."""
    cos: Tensor
    """(N, 1, 1, rotary width) float32: the cosines, twice."""
    sin: Tensor
    """(N, 1, 1, rotary width) float32: the negative sines, then the sines."""
    layout: QueryLayout
    values: ValueRows | None
    """Rows of the value embeddings, (N, 1, KV, K) for each layer that has one; None in a model without."""
    loop: int = 0
    slot: int = 0
    """Index of this layer's entries in the cache."""
    value: Tensor | None = None
    """This layer's rows of `values`."""

    @classmethod
    def make(
        cls, cache: DecodeCache, rows: Tensor, positions: Tensor, span: int, single: bool, level: bool
    ) -> "CachedContext":
        """Compute tables and layout; `single` and `level` as in `PackedTokens`."""
        config = cache.config
        width = attention_class(config).rotary_width(config)
        cos, sin = rope_at(positions.view(-1, 1, 1), width, config.rope_theta)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        layout = arrange_queries(rows, positions, len(cache.lengths), span, single=single, level=level)
        return cls(cache, rows, positions, span, level, cos, sin, layout, None)

    def keep(self, chosen: Tensor) -> "CachedContext":
        """The context of a subset of the positions, (n,) ascending indices."""
        rows, positions = self.rows[chosen], self.positions[chosen]
        single = self.layout.places is None
        layout = arrange_queries(rows, positions, len(self.cache.lengths), self.span, single=single, level=self.level)
        kept = self._replace(rows=rows, positions=positions, cos=self.cos[chosen], sin=self.sin[chosen], layout=layout)
        if self.values is None:
            return kept
        return kept._replace(values={layer: value[chosen] for layer, value in self.values.items()})

    def at_loop(self, loop: int) -> "CachedContext":
        """The context of the core's blocks in pass `loop`."""
        return self._replace(loop=loop)

    def layer(self, part: Part, layer: int) -> "CachedContext":
        """The context of one layer."""
        value = None if self.values is None else self.values.get((part, layer))
        return self._replace(slot=self.cache.slot(part, layer, self.loop), value=value)

    def rotate(self, heads: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Apply RoPE to queries or keys (N, 1, H, K); the result is in `dtype`."""
        # Equal to `apply_rope`, in fewer operations: `roll` swaps the halves, and `sin` carries the sign.
        return torch.addcmul(heads * self.cos, heads.roll(heads.shape[-1] // 2, -1), self.sin).to(dtype)

    def store(self, entry: Tensor) -> Tensor:
        """Write this layer's entries (N, width) to the cache; return the entries of their rows, (R, span, width)."""
        self.cache.write(self.slot, self.rows, self.positions, entry.unsqueeze(0))
        entries = self.cache.entries[self.slot, :, : self.span]
        return entries if self.layout.rows is None else entries[self.layout.rows]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Softmax attention of the packed queries.

        query (N, H, K), key (R, KV, span, K), value (R, KV, span, v) with KV dividing H -> (N, H, v).
        """
        layout, heads, kv_heads = self.layout, query.shape[1], key.shape[1]
        key, value = key.to(query.dtype), value.to(query.dtype)
        if layout.places is None:
            # One query a row. Pass the heads that share a key as that key's queries: up to ten times as fast.
            query = query.view(len(query), kv_heads, -1, query.shape[-1])
            return F.scaled_dot_product_attention(query, key, value, attn_mask=layout.mask, scale=scale).flatten(1, 2)
        # Repeat keys and values for every query head. With enable_gqa and a mask, or with heads wider than 256, CUDA
        # has only the kernel that stores all scores. A single key head is expanded without a copy.
        if kv_heads == 1:
            key, value = key.expand(-1, heads, -1, -1), value.expand(-1, heads, -1, -1)
        elif kv_heads != heads:
            key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        padded = query.new_zeros(len(key) * layout.size, *query.shape[1:]).index_copy(0, layout.places, query)
        output = F.scaled_dot_product_attention(
            padded.unflatten(0, (len(key), -1)).transpose(1, 2),  # (R, H, Q, K)
            key,
            value,
            attn_mask=layout.mask,
            is_causal=layout.causal,
            scale=scale,
        )
        return output.transpose(1, 2).flatten(0, 1)[layout.places]
