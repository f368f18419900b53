"""Multi-head latent attention."""

import torch
from torch import Tensor

from mythos.model.attention.base import Attention
from mythos.model.attention.context import AttentionContext, attend
from mythos.model.config import ModelConfig
from mythos.model.decoding import CachedContext
from mythos.model.layers import Linear, RMSNorm, applied_weight, autocast_dtype, recomputed, zeros
from mythos.model.ops.recompute import recomputable


class MultiHeadLatentAttention(Attention):
    """Multi-head latent attention (arXiv 2405.04434).

    Keys and values are expanded from one normalised latent per token, and all heads share one rotated key. The latent
    and the rotated key are all that a decoder caches. QK-norm therefore acts on the query heads and the rotated key,
    never on the expanded keys, which would have to be cached for each head.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.heads, eps = config.dim, config.n_heads, config.norm_eps
        self.nope, self.rope, self.value_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent_dim = config.kv_lora_rank
        query_dim = self.heads * (self.nope + self.rope)
        self.query_down: Linear | None = None
        self.query_latent_norm: RMSNorm | None = None
        if config.q_lora_rank:
            self.query_down = Linear(dim, config.q_lora_rank)
            self.query_latent_norm = RMSNorm(config.q_lora_rank, eps)
        self.query = Linear(config.q_lora_rank or dim, query_dim)
        self.key_value_down = Linear(dim, self.latent_dim + self.rope)
        self.latent_norm = RMSNorm(self.latent_dim, eps)
        self.key_value_up = Linear(self.latent_dim, self.heads * (self.nope + self.value_dim))
        self.out = Linear(self.heads * self.value_dim, dim, zeros)
        self.query_norm = RMSNorm(self.nope + self.rope, eps) if config.qk_norm else None
        self.rope_key_norm = RMSNorm(self.rope, eps) if config.qk_norm else None

    @staticmethod
    def rotary_width(config: ModelConfig) -> int:
        """RoPE rotates a part of each query head, and the shared key."""
        return config.qk_rope_head_dim

    @staticmethod
    def entry_width(config: ModelConfig) -> int:
        """The latent and the rotated key."""
        return config.kv_lora_rank + config.qk_rope_head_dim

    @staticmethod
    def pair_products(config: ModelConfig) -> int:
        """Multiply-adds of score and weighted value for one pair of positions."""
        return config.n_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)

    def forward(self, x: Tensor, context: AttentionContext | CachedContext) -> Tensor:
        """(B, S, D) -> (B, S, D); with a cache, packed positions (N, 1, D) -> (N, 1, D)."""
        if self.query_down is not None and self.query_latent_norm is not None:
            query = recomputed(self.query, self.query_latent_norm(self.query_down(x)))
        else:
            query = self.query(x)
        query = query.unflatten(-1, (self.heads, self.nope + self.rope))  # (B, S, H, nope + rope)
        latent, rope_key = self.key_value_down(x).split_with_sizes((self.latent_dim, self.rope), dim=-1)
        rope_key = rope_key.unsqueeze(2)  # (B, S, 1, rope)
        if self.query_norm is not None and self.rope_key_norm is not None:
            query, rope_key = self.query_norm(query), self.rope_key_norm(rope_key)

        latent = self.latent_norm(latent)  # (B, S, latent)
        nope_query, rope_query = query.split_with_sizes((self.nope, self.rope), dim=-1)
        rope_query, rope_key = recomputable(context.rotate, rope_query), recomputable(context.rotate, rope_key)
        if isinstance(context, CachedContext):
            entries = context.store(torch.cat((latent, rope_key.squeeze(2)), dim=-1).squeeze(1))
            output = self.attend_latents(nope_query.squeeze(1), rope_query.squeeze(1), entries, context)
            return self.out(output.flatten(1).unsqueeze(1))

        expanded = recomputed(self.key_value_up, latent).unflatten(-1, (self.heads, self.nope + self.value_dim))
        nope_key, value = expanded.split_with_sizes((self.nope, self.value_dim), dim=-1)
        query = recomputable(_joined, nope_query, rope_query, value.dtype)
        key = recomputable(_joined, nope_key, rope_key.expand(-1, -1, self.heads, -1), value.dtype)
        return self.out(attend(query, key, value, context).flatten(-2))

    def attend_latents(self, nope_query: Tensor, rope_query: Tensor, entries: Tensor, context: CachedContext) -> Tensor:
        """Attend to cache entries in the absorbed form (arXiv 2405.04434), which never expands them.

        Queries are mapped into the latent space, where all heads share keys and values; results are mapped out of it.
        nope_query (N, H, nope), rope_query (N, H, rope), entries (R, span, latent + rope) -> (N, H, v).
        """
        dtype = autocast_dtype(nope_query)
        up = applied_weight(self.key_value_up).to(dtype).unflatten(0, (self.heads, self.nope + self.value_dim))
        key_up, value_up = up.split_with_sizes((self.nope, self.value_dim), dim=1)  # (H, nope or v, latent)
        latent_query = torch.bmm(nope_query.to(dtype).transpose(0, 1), key_up).transpose(0, 1)  # (N, H, latent)
        query = torch.cat((latent_query, rope_query.to(dtype)), dim=-1)
        shared = entries.to(dtype).unsqueeze(1)  # (R, 1, span, latent + rope)
        # Fused kernels want keys and values of one width. Use the keys as values and drop the rotary part of the
        # result.
        output = context.attend(query, shared, shared, (self.nope + self.rope) ** -0.5)[..., : self.latent_dim]
        return torch.bmm(output.transpose(0, 1), value_up.transpose(1, 2)).transpose(0, 1)


def _joined(nope: Tensor, rope: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads in `dtype` from their two parts: (..., nope) and (..., rope) -> (..., nope + rope)."""
    return torch.cat((nope.to(dtype), rope.to(dtype)), dim=-1)
