"""The decode cache in the form that transformers expects: one column per input id, padding included."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from mythos.generation.tokens import CACHE_BLOCK
from mythos.model.cache import DecodeCache
from mythos.model.layers import autocast_dtype
from mythos.model.rdt import RecurrentDepthTransformer


class MythosCache(Cache):
    """Keys and values of every layer and loop for the ids of a batch so far.

    It starts empty; the first forward pass allocates the rows. The entries are in a `mythos.model.cache.DecodeCache`,
    which stores tokens only. transformers counts columns of a padded batch, so this class also keeps the padding mask.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.decode: DecodeCache | None = None
        self.columns = 0
        """Ids processed in every row, padding included."""
        self.mask: Tensor | None = None
        """(B, columns) bool, True at tokens; None while there was no padding."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.columns} columns)"

    def __deepcopy__(self, memo: dict[int, Any]) -> "MythosCache":
        # Not the default deep copy: the entries refer to the model, which must not be copied.
        copied = MythosCache()
        copied.columns = self.columns
        copied.mask = None if self.mask is None else self.mask.clone()
        if self.decode is not None:
            copied.decode = copy.copy(self.decode)
            copied.decode.select(range(len(self.decode.lengths)))
        return copied

    def allocated(self, model: RecurrentDepthTransformer, rows: int, loops: int) -> DecodeCache:
        """The underlying cache; allocated for `rows` rows and `loops` loops if it does not exist yet."""
        if self.decode is None:
            self.decode = DecodeCache(
                model.config,
                rows,
                loops=loops,
                dtype=autocast_dtype(model.embedding.weight),
                device=model.embedding.weight.device,
                block=CACHE_BLOCK,
            )
        return self.decode

    def advance(self, columns: int, mask: Tensor | None) -> None:
        """Count new columns; mask is (B, columns) bool, True at tokens, or None if all of them are tokens."""
        if mask is not None and self.mask is None:
            self.mask = mask.new_ones(len(mask), self.columns)
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, columns), value=True) if mask is None else torch.cat((self.mask, mask), 1)
        self.columns += columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns in the cache."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Maximum number of tokens in a row; -1 before the first forward pass."""
        return -1 if self.decode is None else self.decode.config.context_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns: -n removes n. A positive number is the length to keep, as before transformers 5.24.

        Raises ValueError for more columns than the cache has.
        """
        columns = tokens_to_remove if tokens_to_remove > 0 else self.columns + tokens_to_remove
        if not 0 <= columns <= self.columns:
            raise ValueError(f"cannot crop a cache of {self.columns} columns to {columns}")
        if self.decode is not None:
            removed = self.columns - columns
            if self.mask is None:
                self.decode.crop([length - removed for length in self.decode.lengths])
            else:
                self.mask = self.mask[:, :columns]
                self.decode.crop(self.mask.sum(1).tolist())
        self.columns = columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, (n,) int64, in this order; a row may occur more than once."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Same as `reorder_cache`, under the name that contrastive and assisted decoding call."""
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.decode is not None:
            self._select([row for row in range(len(self.decode.lengths)) for _ in range(repeats)])

    def _select(self, rows: Sequence[int]) -> None:
        if self.decode is not None and rows != list(range(len(self.decode.lengths))):
            self.decode.select(rows)
            self.mask = None if self.mask is None else self.mask[list(rows)]

    def reset(self) -> None:
        """Clear the cache. The next forward pass may have any number of rows."""
        self.decode, self.mask, self.columns = None, None, 0

    @property
    def is_croppable(self) -> bool:
        """True: cropping restores the earlier state exactly."""
        return True

    @property
    def is_initialized(self) -> bool:
        """Whether the rows are allocated."""
        return self.decode is not None

    @property
    def is_sliding(self) -> list[bool]:
        """One entry that applies to all layers."""
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        """One entry that applies to all layers."""
        return [False]
