"""Grouped-query attention."""

import torch
from torch import Tensor, nn

from mythos.model.attention.base import Attention
from mythos.model.attention.context import AttentionContext, attend
from mythos.model.config import GATE_INPUTS, ModelConfig
from mythos.model.decoding import CachedContext
from mythos.model.layers import Initializer, Linear, RMSNorm, zeros
from mythos.model.ops.recompute import recomputable


class GroupedQueryAttention(Attention):
    """Grouped-query attention (arXiv 2305.13245) with RoPE, optional QK-norm, QK-bias and value embedding.

    With a value embedding the values are v + 2 sigmoid(W x_{:32}) * row of the token, with one gate for each head.
    """

    value_embeddings = True

    def __init__(self, config: ModelConfig, value_embedding: bool = False) -> None:
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
        self.initializers: dict[str, Initializer] = {}
        if config.qk_bias:
            self.query_bias = nn.Parameter(torch.empty(self.heads * self.head_dim))
            self.key_bias = nn.Parameter(torch.empty(self.kv_heads * self.head_dim))
            self.initializers = {"query_bias": zeros, "key_bias": zeros}
        # In bfloat16, as FSDP2 gathers matrices, gradients of all loops would be summed in bfloat16.
        self.float32: tuple[str, ...] = tuple(self.initializers)
        self.value_gate = Linear(min(GATE_INPUTS, dim), self.kv_heads, zeros) if value_embedding else None

    @staticmethod
    def rotary_width(config: ModelConfig) -> int:
        """RoPE rotates whole heads."""
        return config.head_dim

    @staticmethod
    def entry_width(config: ModelConfig) -> int:
        """Keys and values of all key-value heads."""
        return 2 * config.n_kv_heads * config.head_dim

    @staticmethod
    def pair_products(config: ModelConfig) -> int:
        """Multiply-adds of score and weighted value for one pair of positions."""
        return 2 * config.n_heads * config.head_dim

    def forward(self, x: Tensor, context: AttentionContext | CachedContext) -> Tensor:
        """(B, S, D) -> (B, S, D); with a cache, packed positions (N, 1, D) -> (N, 1, D)."""
        query_BSD, key_BSD = self.query(x), self.key(x)
        if self.query_bias is not None and self.key_bias is not None:
            query_BSD = query_BSD + self.query_bias.to(query_BSD.dtype)
            key_BSD = key_BSD + self.key_bias.to(key_BSD.dtype)
        query_BSHK = query_BSD.unflatten(-1, (self.heads, self.head_dim))
        key_BSHK = key_BSD.unflatten(-1, (self.kv_heads, self.head_dim))
        value_BSHK = self.value(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.value_gate is not None:
            assert context.value is not None, "this layer has a value embedding"
            gate_BSH = 2 * self.value_gate(x[..., :GATE_INPUTS]).sigmoid()
            value_BSHK = value_BSHK + gate_BSH.unsqueeze(-1) * context.value.to(value_BSHK.dtype)
        if self.query_norm is not None and self.key_norm is not None:
            query_BSHK, key_BSHK = self.query_norm(query_BSHK), self.key_norm(key_BSHK)
        query_BSHK = recomputable(context.rotate, query_BSHK, value_BSHK.dtype)
        key_BSHK = recomputable(context.rotate, key_BSHK, value_BSHK.dtype)
        if not isinstance(context, CachedContext):
            return self.out(attend(query_BSHK, key_BSHK, value_BSHK, context).flatten(-2))
        entries = context.store(torch.stack((key_BSHK, value_BSHK), dim=2).flatten(1))  # (R, span, 2 KV K)
        key, value = entries.unflatten(-1, (2, self.kv_heads, -1)).transpose(1, 3).unbind(2)  # (R, KV, span, K)
        output = context.attend(query_BSHK.squeeze(1), key, value, self.head_dim**-0.5)
        return self.out(output.flatten(1).unsqueeze(1))
