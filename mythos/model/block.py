"""The transformer block of prelude, core and coda."""

import torch
from torch import Tensor, nn

from mythos.model.attention.base import build_attention
from mythos.model.attention.context import AttentionContext
from mythos.model.attention.value_embeddings import value_embedding_layers
from mythos.model.config import LOOP_NORMS, ModelConfig, Part
from mythos.model.decoding import CachedContext
from mythos.model.layers import LoopNorm, RMSNorm, dense_feed_forward
from mythos.model.moe import MixtureOfExperts
from mythos.model.ops.grouped_experts import ExpertWeights


class Block(nn.Module):
    """Attention and feed-forward on a float32 residual stream; `model.block_norm` says where the RMSNorms are."""

    def __init__(self, config: ModelConfig, ffn: nn.Module, part: Part, layer: int) -> None:
        super().__init__()
        self.layer = layer
        """Index in its part."""
        looped = part == "core"
        self.attention_norm = input_norm(config, looped)
        self.attention = build_attention(config, (part, layer) in value_embedding_layers(config))
        self.ffn_norm = input_norm(config, looped)
        self.ffn = ffn
        self.scale = config.residual_scale if looped else 1.0
        self.norm_sums = config.block_norm == "sandwich"
        self.attention_out_norm = self.ffn_out_norm = None
        if config.block_norm != "pre":
            self.attention_out_norm = RMSNorm(config.dim, config.norm_eps, cast=False)
            self.ffn_out_norm = RMSNorm(config.dim, config.norm_eps, cast=False)

    def forward(
        self,
        x: Tensor,
        context: AttentionContext | CachedContext,
        weights: ExpertWeights | None = None,
        loop: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) -> (B, S, D), and the chosen experts (B, S, k) if the feed-forward routes.

        `loop` is the loop index of each row (B,), or of all (1,), int64; None outside of the core.
        """
        x = self.add(x, self.attention(apply_norm(self.attention_norm, x, loop), context), self.attention_out_norm)
        normed = apply_norm(self.ffn_norm, x, loop)
        routed = isinstance(self.ffn, MixtureOfExperts)
        output = self.ffn(normed, weights, loop) if routed else self.ffn(normed)
        output, experts = output if isinstance(output, tuple) else (output, None)
        return self.add(x, output, self.ffn_out_norm), experts

    def add(self, x: Tensor, output: Tensor, norm: RMSNorm | None) -> Tensor:
        """Add the output of attention or feed-forward to the residual stream, (B, S, D) float32."""
        if norm is None:
            return torch.add(x, output, alpha=self.scale)
        if self.norm_sums:
            return norm(torch.add(x, output, alpha=self.scale))
        return torch.add(x, norm(output), alpha=self.scale)

    def serve_experts(self, x: Tensor, weights: ExpertWeights | None) -> None:
        """`MixtureOfExperts.serve` of this block, which FSDP2 may have to gather first."""
        assert isinstance(self.ffn, MixtureOfExperts), "dense blocks exchange nothing"
        self.ffn.serve(x, weights)


def input_norm(config: ModelConfig, looped: bool) -> RMSNorm:
    """The norm before attention or feed-forward; `model.loop_norm` names that of `looped` blocks."""
    if not looped or (loop_norm := LOOP_NORMS[config.loop_norm]) is None:
        return RMSNorm(config.dim, config.norm_eps)
    norm: RMSNorm = loop_norm(config)
    return norm


def apply_norm(norm: RMSNorm, x: Tensor, loop: Tensor | None) -> Tensor:
    """`norm(x)`, in the pass of each row if the norm depends on it."""
    return norm(x, loop) if isinstance(norm, LoopNorm) else norm(x)


def dense_block(config: ModelConfig, part: Part, layer: int) -> Block:
    """A block with a dense feed-forward, as in prelude and coda."""
    return Block(config, dense_feed_forward(config), part, layer)
