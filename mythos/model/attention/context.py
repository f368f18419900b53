"""Causal softmax attention over whole sequences: rotary tables, document masks, and the call of the kernel."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mythos.model.attention.base import attention_class
from mythos.model.attention.value_embeddings import ValueRows
from mythos.model.config import ModelConfig, Part
from mythos.model.layers import apply_rope, rope_table, without_autocast
from mythos.model.ops import device_choice
from mythos.model.ops.causal_attention import causal_attention

BLOCK = 128
"""Positions in a side of flex attention's blocks: its default."""


@dataclass(frozen=True)
class AttentionContext:
    """Tables and mask that all attention layers of a forward pass share; `layer` adds what belongs to one of them."""

    cos: Tensor
    """(S, rotary width / 2) float32, the same for all rows; or (B, S, rotary width / 2) if rows contain documents."""
    sin: Tensor
    """Shape as `cos`."""
    mask: Tensor | BlockMask | None
    """None = causal. Otherwise (B, 1, S, S) bool, True where a query may look; on a GPU the same as a block mask."""
    values: ValueRows | None = None
    """Rows of the value embeddings of all layers; None in a model without."""
    value: Tensor | None = None
    """This layer's rows of `values`, (B, S, KV, K); None if the layer has no value embedding."""

    def layer(self, part: Part, layer: int) -> "AttentionContext":
        """The context of one layer."""
        return self if self.values is None else replace(self, value=self.values.get((part, layer)))

    def rotate(self, heads: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Apply RoPE to queries or keys (B, S, H, K); the result is in `dtype` (default: theirs)."""
        return apply_rope(heads, self.cos, self.sin, dtype)

    def first_rows(self, rows: int) -> "AttentionContext":
        """The context of the leading `rows` sequences."""
        values = None if self.values is None else {layer: value[:rows] for layer, value in self.values.items()}
        if self.mask is None or rows == self.mask.shape[0]:
            return self if values is None else replace(self, values=values)
        mask = self.mask[:rows]
        if isinstance(mask, BlockMask) and isinstance(self.mask, BlockMask):
            # Slicing drops mask_mod, since row indices may have changed. Those of a prefix have not.
            mask.mask_mod = self.mask.mask_mod
        return AttentionContext(self.cos[:rows], self.sin[:rows], mask, values)


def attention_context(
    config: ModelConfig, length: int, device: torch.device, document_ids: Tensor | None
) -> AttentionContext:
    """Tables and mask for sequences of `length` tokens.

    document_ids is (B, S) int or None; a document is a run of equal ids. With documents, positions count from 0 in each
    one and a query sees earlier positions of its own document only, so that the result for a document does not depend
    on its place in a row.
    """
    cos, sin = rope_table(length, attention_class(config).rotary_width(config), config.rope_theta, device)
    if document_ids is None:
        return AttentionContext(cos, sin, None)
    starts_BS = document_starts(document_ids)
    position_S = torch.arange(length, device=device)
    cos, sin = cos[position_S - starts_BS], sin[position_S - starts_BS]
    if device_choice.masks_documents_by_blocks(device):
        return AttentionContext(cos, sin, document_block_mask(starts_BS))
    visible_BSS = (position_S[:, None] >= position_S) & (position_S >= starts_BS[..., None])
    return AttentionContext(cos, sin, visible_BSS.unsqueeze(1))


def document_starts(document_ids: Tensor) -> Tensor:
    """Position at which the document of each position begins: (B, S) int, runs of equal ids -> (B, S) int64."""
    begins_BS = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    return (begins_BS * torch.arange(begins_BS.shape[1], device=begins_BS.device)).cummax(dim=1).values


def document_block_mask(starts: Tensor) -> BlockMask:
    """Block mask for causal flex attention within documents; blocks without a visible pair are skipped.

    starts is (B, S) int64, the result of `document_starts`.
    """
    # varlen_attn would skip other documents too, but takes neither float32 nor values narrower than keys (mla).
    # create_block_mask would evaluate all B x S x S pairs, at 10 bytes each (1.3 GB for 8 x 4,096). Starts never
    # decrease along a row, so the first and the last query of a block determine what the whole block sees.
    length = starts.shape[1]
    # Pad with `length`, so that an incomplete block of queries never counts as fully visible.
    padded = F.pad(starts, (0, -length % BLOCK), value=length)
    first, last = padded[:, ::BLOCK, None], padded[:, BLOCK - 1 :: BLOCK, None]  # (B, blocks, 1)
    block = torch.arange(first.shape[1], device=starts.device)
    partly_visible = (block[:, None] >= block) & (block >= first // BLOCK)  # (B, query blocks, key blocks)
    fully_visible = (block[:, None] > block) & (block * BLOCK >= last)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (key >= starts[row, query])

    return BlockMask.from_kv_blocks(
        *_counts_and_indices(partly_visible & ~fully_visible),
        *_counts_and_indices(fully_visible),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _counts_and_indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, K) bool -> number of True key blocks, (B, 1, Q) int32, and their indices, first in (B, 1, Q, K) int32."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
    """Causal softmax attention, by the kernel that `device_choice` selects.

    query (B, S, H, K), key (B, S, KV, K), value (B, S, KV, v) with KV dividing H -> (B, S, H, v).
    """
    heads, value_width, width = query.shape[2], value.shape[-1], query.shape[-1]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H, S, K)
    if isinstance(context.mask, BlockMask):
        flex = device_choice.flex(query.device)
        output = flex(query, key, value, block_mask=context.mask, enable_gqa=heads != key.shape[1])
        return output.transpose(1, 2)
    if context.mask is None and device_choice.causal_by_products(query.device, query.dtype, query.shape[2]):
        with without_autocast(query):
            return causal_attention(query, key, value, width**-0.5).transpose(1, 2)
    if not device_choice.takes_widths(query.device, query.dtype, width, value_width):
        # Pad to equal widths: otherwise torch runs the kernel that stores all S x S scores. Zeros change no result.
        if value_width < width:
            value = F.pad(value, (0, width - value_width))
        elif value_width > width:
            query, key = F.pad(query, (0, value_width - width)), F.pad(key, (0, value_width - width))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=context.mask,
        is_causal=context.mask is None,
        scale=width**-0.5,
        enable_gqa=heads != key.shape[1],
    )
    return output[..., :value_width].transpose(1, 2)
