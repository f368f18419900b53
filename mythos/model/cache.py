"""Keys and values of decoded positions: one entry for each prelude and coda layer, and each core layer and loop."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mythos.model.attention.base import attention_class
from mythos.model.config import ModelConfig, Part


def cache_slots(config: ModelConfig, loops: int) -> int:
    """Entries that a cache of `loops` loops stores for one position."""
    return config.prelude_layers + config.coda_layers + config.core_layers * loops


def cache_bytes_per_token(config: ModelConfig, loops: int, dtype: torch.dtype) -> int:
    """Bytes that one position takes in a cache of `loops` loops."""
    return cache_slots(config, loops) * attention_class(config).entry_width(config) * dtype.itemsize


class DecodeCache:
    """Keys and values of the positions of each row of a batch.

    An entry is stored at its position in the row, whatever padding the row came with. When a position stops at loop t,
    its entry of loop t is copied to all deeper loops. So the entries of a loop are one contiguous slice, and a later
    call that runs deeper than any before continues every position in the same way.

    Args:
        config: the model's configuration.
        rows: sequences in the batch.
        loops: loops to store; grows with a deeper call.
        device: device of the entries.
        dtype: type of the entries.
        block: positions by which the cache grows.
        cache_loops: store the entries of this many loops only, loop t in slot t modulo this number. Loop t then reads
            the newest entry of its slot (after Huginn, arXiv 2502.05171). None = store all. If fewer are stored than
            are run, results depend on how a prompt is split: tokens of one call still see each other's entries of loop
            t.

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
        width = attention_class(config).entry_width(config)
        self.entries = torch.empty(cache_slots(config, self.loops), rows, 0, width, dtype=dtype, device=device)
        """(slots, rows, capacity, entry width): prelude, coda, the core's layers of loop 0, those of loop 1, ..."""
        self._owner: object = None
        """The model whose entries these are."""

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return self.entries.nbytes

    def admit(self, model: object, config: ModelConfig, rows: int) -> None:
        """Check that `model` may continue these rows: a cache has entries of one model only.

        Raises ValueError if the cache has entries of another model, or was made for another configuration or number of
        rows.
        """
        if self.config != config or (any(self.lengths) and self._owner is not model):
            raise ValueError(
                "this cache holds the keys and values of another model: make a new DecodeCache for this one"
            )
        if rows != len(self.lengths):
            raise ValueError(f"{rows} rows of ids for a cache of {len(self.lengths)} rows")
        self._owner = model

    def reserve(self, length: int, loops: int) -> None:
        """Allocate room for `length` positions in each row and `loops` loops."""
        entries = self.entries
        slots, rows, capacity, width = entries.shape
        deepest = min(loops, self.cache_loops or loops)
        more_slots = max(0, deepest - self.loops) * self.config.core_layers
        if length <= capacity and not more_slots:
            return
        capacity = max(capacity, -(-length // self.block) * self.block)
        grown = entries.new_zeros(slots + more_slots, rows, capacity, width)
        grown[:slots, :, : entries.shape[2]] = entries
        if more_slots:
            # Positions decoded so far stopped before the new loops: their last entries serve there.
            layers = self.config.core_layers
            grown[slots:] = grown[slots - layers : slots].repeat(deepest - self.loops, 1, 1, 1)
            self.loops = deepest
        self.entries = grown

    def slot(self, part: Part, layer: int, loop: int) -> int:
        """Index of a layer's entries in the first dimension of `entries`."""
        config = self.config
        if part == "prelude":
            return layer
        if part == "coda":
            return config.prelude_layers + layer
        return config.prelude_layers + config.coda_layers + loop % self.loops * config.core_layers + layer

    def freeze(self, rows: Tensor, positions: Tensor, loop: int, layers: range) -> None:
        """Copy entries of a loop to all deeper loops, for positions (n,) in rows (n,) that stopped there.

        Copied are those of the core's `layers` (all, or one) at loop index `loop`.
        """
        if loop + 1 < self.loops:
            first, all_layers = self.slot("core", layers.start, loop), self.config.core_layers
            last = self.entries[first : first + len(layers), rows, positions]
            step = 1 if len(layers) == all_layers else all_layers
            self.write(first + all_layers, rows, positions, last.repeat(self.loops - loop - 1, 1, 1), step)

    def write(self, slot: int, rows: Tensor, positions: Tensor, entries: Tensor, step: int = 1) -> None:
        """Write entries (slots, n, width) to every `step`-th slot from `slot` on, at positions (n,) of rows (n,)."""
        # Not through a view: a compiled graph would copy the whole cache to update one.
        slots = torch.arange(slot, slot + step * len(entries), step, device=rows.device).unsqueeze(1)
        self.entries.index_put_((slots, rows, positions), entries.to(self.entries.dtype))

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Shorten every row to its first `lengths` positions: one number for all rows, or one per row.

        Raises ValueError for lengths that a row does not have.
        """
        new_lengths = [lengths] * len(self.lengths) if isinstance(lengths, int) else list(lengths)
        if len(new_lengths) != len(self.lengths) or any(
            not 0 <= new <= old for new, old in zip(new_lengths, self.lengths, strict=False)
        ):
            raise ValueError(f"cannot crop rows of {self.lengths} positions to {new_lengths}")
        self.lengths = new_lengths

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be repeated (beam search).

        Raises ValueError for rows that the cache does not have, or for an empty selection.
        """
        if not rows or min(rows) < 0 or max(rows) >= len(self.lengths):
            raise ValueError(f"cannot select rows {list(rows)} of a cache of {len(self.lengths)} rows")
        self.entries = self.entries[:, list(rows)]
        self.lengths = [self.lengths[row] for row in rows]
