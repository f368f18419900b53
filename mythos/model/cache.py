"""What decoding keeps of positions: an entry for every prelude and coda layer, and for every core layer and loop."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.model.config import ModelConfig
from mythos.model.layers import rope_at

if TYPE_CHECKING:
    from mythos.model.rdt import RecurrentDepthTransformer

Part = Literal["prelude", "core", "coda"]
ValueRows = Mapping[tuple[Part, int], Tensor]
"""Rows of value embeddings by layer; see `mythos.model.attention.ValueEmbeddings`."""


def entry_width(config: ModelConfig) -> int:
    """Numbers a layer keeps of a position: mla = latent and the one rotated key, gqa = its keys and values."""
    if config.attention == "mla":
        return config.kv_lora_rank + config.qk_rope_head_dim
    return 2 * config.n_kv_heads * config.head_dim


def cache_slots(config: ModelConfig, loops: int) -> int:
    """Entries kept of a position."""
    return config.prelude_layers + config.coda_layers + config.core_layers * loops


def cache_bytes_per_token(config: ModelConfig, loops: int, dtype: torch.dtype) -> int:
    """Bytes that a position takes in a cache of `loops` loops."""
    return cache_slots(config, loops) * entry_width(config) * dtype.itemsize


class DecodeCache:
    """Keys and values of the positions that each row of a batch holds.

    A position's entries lie at its own place, whatever padding its row came with. A position that stopped at loop t
    serves its entry of loop t to all deeper loops: it is copied there when the position stops, so that reading is one
    contiguous slice, and a deeper call than any before extends every position in the same way.

    Args:
        config: the model's.
        rows: sequences of the batch.
        loops: loops that are kept; grows with a deeper call.
        device: where the entries are kept.
        dtype: what they are kept in.
        block: positions by which the cache grows.
        cache_loops: keep the entries of so many loops only, loop t in slot t modulo this number: a position then serves
            its newest entry of that slot instead of loop t's (after Huginn, arXiv 2502.05171). None = all. With fewer
            than are run, results depend on how a prompt is cut: tokens of one call still see each other in loop t.

    Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        *,
        loops: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        block: int = 256,
        cache_loops: int | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("loops", loops), ("block", block), ("cache_loops", cache_loops)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}; allowed: at least 1")
        self.config = config
        self.lengths = [0] * rows
        self.block = block
        self.cache_loops = cache_loops
        self.loops = min(loops, cache_loops or loops)
        self.entries: Tensor | None = torch.empty(
            cache_slots(config, self.loops), rows, 0, entry_width(config), dtype=dtype, device=device
        )
        """(slots, rows, capacity, width): prelude, coda, then the core's layers of loop 0, of loop 1, ..."""
        self._owner: RecurrentDepthTransformer | None = None

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self.entries is None else self.entries.nbytes

    @property
    def held(self) -> Tensor:
        """The entries. Raises ValueError if the cache was reset."""
        if self.entries is None:
            raise ValueError("this cache was reset, and what it held is gone: make a new DecodeCache")
        return self.entries

    def admit(self, model: "RecurrentDepthTransformer", rows: int) -> None:
        """Let a model use the cache, which holds positions of one model only.

        Raises ValueError if it holds another's, was made for another configuration or number of rows, or was reset.
        """
        _ = self.held
        if self.config != model.config or (any(self.lengths) and self._owner is not model):
            raise ValueError(
                "this cache holds the keys and values of another model: make a new DecodeCache for this one"
            )
        if rows != len(self.lengths):
            raise ValueError(f"{rows} rows of ids for a cache of {len(self.lengths)} rows")
        self._owner = model

    def reserve(self, length: int, loops: int) -> None:
        """Make room for `length` positions a row and `loops` loops."""
        entries = self.held
        slots, rows, capacity, width = entries.shape
        deepest = min(loops, self.cache_loops or loops)
        more_slots = max(0, deepest - self.loops) * self.config.core_layers
        if length > capacity or more_slots:
            capacity = max(capacity, -(-length // self.block) * self.block)
            grown = entries.new_zeros(slots + more_slots, rows, capacity, width)
            grown[:slots, :, : entries.shape[2]] = entries
            if more_slots:
                layers = self.config.core_layers
                last = grown[slots - layers : slots]
                grown[slots:] = last.repeat(deepest - self.loops, 1, 1, 1)
                self.loops = deepest
            self.entries = grown

    def slot(self, part: Part, layer: int, loop: int) -> int:
        """Where a layer's entries are kept."""
        config = self.config
        if part == "prelude":
            return layer
        if part == "coda":
            return config.prelude_layers + layer
        return config.prelude_layers + config.coda_layers + loop % self.loops * config.core_layers + layer

    def freeze(self, rows: Tensor, positions: Tensor, loop: int) -> None:
        """Let positions (n,) of rows (n,) that stopped after loop index `loop` serve their entries to deeper loops."""
        if loop + 1 < self.loops:
            layers, first = self.config.core_layers, self.slot("core", 0, loop)
            last = self.held[first : first + layers, rows, positions]
            self.write(first + layers, rows, positions, last.repeat(self.loops - loop - 1, 1, 1))

    def write(self, slot: int, rows: Tensor, positions: Tensor, entries: Tensor) -> None:
        """Put entries (slots, n, width) into the slots from `slot` on, at positions (n,) of rows (n,)."""
        # Through no view: in a compiled graph a change of one becomes a copy of all the entries.
        slots = torch.arange(slot, slot + len(entries), device=rows.device).unsqueeze(1)
        self.held.index_put_((slots, rows, positions), entries.to(self.held.dtype))

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Keep the first positions of every row: so many of all, or of each.

        Raises ValueError for lengths that a row does not have.
        """
        wanted = [lengths] * len(self.lengths) if isinstance(lengths, int) else list(lengths)
        if len(wanted) != len(self.lengths) or any(
            not 0 <= new <= old for new, old in zip(wanted, self.lengths, strict=False)
        ):
            raise ValueError(f"cannot crop rows of {self.lengths} positions to {wanted}")
        self.lengths = wanted

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; one may be kept more than once (beams).

        Raises ValueError for rows that the cache does not have, or for none.
        """
        if not rows or min(rows) < 0 or max(rows) >= len(self.lengths):
            raise ValueError(f"cannot select rows {list(rows)} of a cache of {len(self.lengths)} rows")
        self.entries = self.held[:, list(rows)]
        self.lengths = [self.lengths[row] for row in rows]

    def reset(self) -> None:
        """Free the memory. The cache cannot be used any more."""
        self.entries = None
        self.lengths = [0] * len(self.lengths)


class Groups(NamedTuple):
    """How packed positions are laid out for attention: R rows with positions, Q of them at most."""

    rows: Tensor | None
    """(R,) which rows of the cache; None = all, in order."""
    place: Tensor | None
    """(N,) place of each position among the R x Q; None where every row has one."""
    size: int
    """Q."""
    mask: Tensor | None
    """(R, 1, Q, span) bool, True where a query may look; None = everywhere, or causal."""
    causal: bool
    """Whether queries and keys are the same positions."""


def group(rows: Tensor, positions: Tensor, cache_rows: int, span: int, *, single: bool, level: bool) -> Groups:
    """Group packed positions (N,), sorted by row, which see the places up to their own among `span`.

    `single` tells that no two are of one row, so that nobody has to wait for the device to know, and `level` that each
    is the last place as well.
    """
    if not single:
        present, counts = torch.unique_consecutive(rows, return_counts=True)
    if single or len(present) == len(rows):
        mask = None if level else torch.arange(span, device=rows.device) <= positions.view(-1, 1, 1, 1)
        return Groups(None if len(rows) == cache_rows else rows, None, 1, mask, False)
    here, size = len(present), int(counts.max())
    starts = counts.cumsum(0) - counts
    order = torch.arange(len(rows), device=rows.device) - starts.repeat_interleave(counts, output_size=len(rows))
    place = torch.arange(here, device=rows.device).repeat_interleave(counts, output_size=len(rows)) * size + order
    causal = size == span and len(rows) == here * size
    mask = None
    if not causal:
        # A query that stands for nothing sees the first place: one that sees none would be NaN.
        last = positions.new_zeros(here * size).index_copy(0, place, positions)
        mask = torch.arange(span, device=rows.device) <= last.view(here, 1, size, 1)
    return Groups(None if here == cache_rows else present, place, size, mask, causal)


class CachedContext(NamedTuple):
    """What the attention layers of a decoding call share: N packed positions, of any number of each row.

    Packed positions pass through the model as (N, 1, D): nothing is computed for padding or for positions that halted.
    """

    cache: DecodeCache
    rows: Tensor
    """(N,) int64 row of each position, ascending."""
    positions: Tensor
    """(N,) int64, ascending in each row."""
    span: int
    """Places that any query may see."""
    level: bool
    """Whether there is at most one position of each row, and each is the last of the places."""
    cos: Tensor
    """(N, 1, 1, rotated dims) float32: cosines, twice."""
    sin: Tensor
    """(N, 1, 1, rotated dims) float32: sines, negative and positive."""
    groups: Groups
    values: ValueRows | None
    """Rows of the value embeddings, (N, 1, KV, d) for each layer that has one; None in a model without."""
    loop: int = 0
    slot: int = 0
    value: Tensor | None = None
    """The rows of this layer."""

    @classmethod
    def make(
        cls, cache: DecodeCache, rows: Tensor, positions: Tensor, span: int, single: bool, level: bool
    ) -> "CachedContext":
        """Tables and mask for the positions."""
        config = cache.config
        rotated = config.qk_rope_head_dim if config.attention == "mla" else config.head_dim
        cos, sin = rope_at(positions.view(-1, 1, 1), rotated, config.rope_theta)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        groups = group(rows, positions, len(cache.lengths), span, single=single, level=level)
        return cls(cache, rows, positions, span, level, cos, sin, groups, None)

    def keep(self, chosen: Tensor) -> "CachedContext":
        """The context of some of the positions, (n,) indices in ascending order."""
        rows, positions = self.rows[chosen], self.positions[chosen]
        single = self.groups.place is None
        groups = group(rows, positions, len(self.cache.lengths), self.span, single=single, level=self.level)
        kept = self._replace(rows=rows, positions=positions, cos=self.cos[chosen], sin=self.sin[chosen], groups=groups)
        if self.values is None:
            return kept
        return kept._replace(values={layer: value[chosen] for layer, value in self.values.items()})

    def at_loop(self, loop: int) -> "CachedContext":
        """The context of the core's blocks in a pass."""
        return self._replace(loop=loop)

    def layer(self, part: Part, layer: int) -> "CachedContext":
        """The context of one layer."""
        value = None if self.values is None else self.values.get((part, layer))
        return self._replace(slot=self.cache.slot(part, layer, self.loop), value=value)

    def rotate(self, heads: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Queries or keys (N, 1, heads, d) at their positions, in `dtype`."""
        # As `apply_rope`, in three operations: the halves change places, and one of them its sign.
        return torch.addcmul(heads * self.cos, heads.roll(heads.shape[-1] // 2, -1), self.sin).to(dtype)

    def store(self, entry: Tensor) -> Tensor:
        """Keep the layer's entries of these positions, (N, width), and return all that their rows see.

        Returns (R, span, width).
        """
        self.cache.write(self.slot, self.rows, self.positions, entry.unsqueeze(0))
        seen = self.cache.held[self.slot, :, : self.span]
        return seen if self.groups.rows is None else seen[self.groups.rows]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Softmax attention of the packed queries.

        query (N, H, d), key (R, KV, span, d), value (R, KV, span, v) with KV dividing H -> (N, H, v).
        """
        groups, heads, kv_heads = self.groups, query.shape[1], key.shape[1]
        key, value = key.to(query.dtype), value.to(query.dtype)
        if groups.place is None:
            # One query a row: the heads that share a key stand as its queries, up to ten times faster.
            query = query.view(len(query), kv_heads, -1, query.shape[-1])
            return F.scaled_dot_product_attention(query, key, value, attn_mask=groups.mask, scale=scale).flatten(1, 2)
        # Heads of its own for every query: with enable_gqa and a mask, or heads wider than 256, CUDA has no kernel but
        # the one that keeps all scores. A single head is not copied.
        if kv_heads == 1:
            key, value = key.expand(-1, heads, -1, -1), value.expand(-1, heads, -1, -1)
        elif kv_heads != heads:
            key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        padded = query.new_zeros(len(key) * groups.size, *query.shape[1:]).index_copy(0, groups.place, query)
        output = F.scaled_dot_product_attention(
            padded.unflatten(0, (len(key), -1)).transpose(1, 2),
            key,
            value,
            attn_mask=groups.mask,
            is_causal=groups.causal,
            scale=scale,
        )
        return output.transpose(1, 2).flatten(0, 1)[groups.place]
