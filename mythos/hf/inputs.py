"""The inputs of a forward pass of `MythosForCausalLM`: checks, token masks and document ids."""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from mythos.hf.cache import MythosCache
from mythos.model.halting import HaltingRule

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""transformers' name of the cache: `cache` from 5.24 on, `past_key_values` before."""

DOCUMENTS_BY_POSITION = "position_ids that start again at 0 separate the documents of a packed row"
UNSUPPORTED_ARGUMENTS = {
    "inputs_embeds": "the decode cache and value embeddings are indexed by token ids; give input_ids",
    "output_attentions": "its attention kernels never form the weights; leave it out",
    "output_router_logits": "its routers are balanced by a bias and have no loss of their own; leave it out",
    "cu_seq_lens_q": DOCUMENTS_BY_POSITION,
    "seq_idx": DOCUMENTS_BY_POSITION,
}
"""Arguments of transformers' models that would change the result, and why this model refuses them."""

IGNORED_SILENTLY = frozenset({"tokenizer", "assistant_tokenizer", "skip_logits", "is_causal"})
"""Arguments that transformers passes to every model and that no model reads (`is_causal` except False)."""


@dataclass(frozen=True)
class ForwardInputs:
    """The checked inputs of one forward pass."""

    ids: Tensor
    """(B, S) int64."""
    mask: Tensor | None
    """(B, S) bool, True at tokens; None if there is no padding."""
    documents: Tensor | None
    """(B, S) int64 document ids; None if each row is one document."""
    cache: MythosCache | None
    """The cache to continue; None if the pass runs without one."""
    loops: int
    rule: HaltingRule | None
    states: list[Tensor] | None
    """Receives the hidden states that `output_hidden_states` asks for; None if it does not."""


def check_arguments(kwargs: dict[str, Any], config: PreTrainedConfig) -> list[str]:
    """Raise ValueError for arguments whose effect the caller would miss; returns the names of those to ignore."""
    for name, reason in UNSUPPORTED_ARGUMENTS.items():
        value = kwargs.get(name)
        if value is None and name.startswith("output_"):
            value = getattr(config, name, None)
        if value is not None and value is not False:
            raise ValueError(f"{name}: a mythos model does not offer it: {reason}")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal: got False; a mythos model is causal: leave it out")
    known = {"shift_labels", "ignore_index", *IGNORED_SILENTLY, *UNSUPPORTED_ARGUMENTS}
    return sorted(name for name, value in kwargs.items() if value is not None and name not in known)


def check_ids(ids: Tensor | None, context_length: int) -> Tensor:
    """The ids, (B, S) int64. Raises ValueError if they are missing, empty or longer than the context."""
    if ids is None or ids.ndim != 2 or ids.shape[1] == 0:
        received = "none" if ids is None else f"ids of shape {tuple(ids.shape)}"
        raise ValueError(f"input_ids: got {received}; allowed: (rows, tokens), at least one token")
    if ids.shape[1] > context_length:
        raise ValueError(
            f"an input of {ids.shape[1]} tokens: the model's context is {context_length} (context_length); shorten it, "
            f"in a tokenizer by truncation=True, max_length={context_length}"
        )
    return ids


def token_mask(ids: Tensor, mask: Tensor | None, cached_columns: int) -> Tensor | None:
    """Which of the ids are tokens, (B, S) bool; None without a mask.

    Raises ValueError for an attention mask of another shape than (B, cached columns + S).
    """
    if mask is None:
        return None
    rows, length = ids.shape
    if mask.shape != (rows, cached_columns + length):
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}; allowed: {(rows, cached_columns + length)}, a column for "
            + (f"every id, the {cached_columns} of the cache included" if cached_columns else "every id")
        )
    return mask[:, cached_columns:].bool()


def document_ids(
    positions: Tensor | None, ids: Tensor, mask: Tensor | None, cache: MythosCache | None, *, decoding: bool
) -> Tensor | None:
    """The document of each id, (B, S) int64, from position_ids; None if each row is one document.

    Without mask and cache, a position that does not follow the one before it starts a document. Raises ValueError for
    positions other than those the tokens have anyway, in all other cases.
    """
    if positions is None:
        return None
    if positions.ndim != 2 or positions.shape[1] != ids.shape[1] or positions.shape[0] not in (1, len(ids)):
        raise ValueError(f"position_ids: got shape {tuple(positions.shape)}; allowed: {tuple(ids.shape)}")
    tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    # (B, S): constant over the tokens of a row that is one document.
    offset = positions - (tokens.cumsum(1) - 1)
    if decoding:
        lengths = [0] * len(ids) if cache is None or cache.decode is None else cache.decode.lengths
        start = torch.tensor(lengths, device=ids.device).unsqueeze(1)
    elif mask is None:
        documents = F.pad((offset.diff(dim=1) != 0).cumsum(1), (1, 0)).expand(len(ids), -1)
        return documents if bool(documents.any()) else None
    else:
        start = offset.gather(1, tokens.byte().argmax(1, keepdim=True).expand(len(offset), 1))
    if bool(((offset != start) & tokens).any()):
        raise ValueError(
            "position_ids: a mythos model counts the tokens of each row, from 0 if it caches them, and these are other "
            "positions; leave position_ids out, or leave the attention_mask out of rows that hold several documents"
        )
    return None


def kept_positions(values: Tensor, mask: Tensor | None, which: int | Tensor) -> Tensor:
    """(B, S, X) at the chosen positions: see `logits_to_keep` of `MythosForCausalLM.forward`."""
    if isinstance(which, Tensor):
        return values[:, which]
    if which == 1 and mask is not None and values.shape[1] > 1:
        last_column = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return values.gather(1, last_column.view(-1, 1, 1).expand(-1, 1, values.shape[2]))
    return values[:, -which:]  # all positions if `which` is 0
