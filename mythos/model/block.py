"""The transformer block of prelude, core and coda."""

from torch import Tensor, nn

from mythos.model.attention.base import build_attention
from mythos.model.attention.context import AttentionContext
from mythos.model.attention.value_embeddings import value_embedding_layers
from mythos.model.config import ModelConfig, Part
from mythos.model.decoding import CachedContext
from mythos.model.layers import RMSNorm, dense_feed_forward
from mythos.model.ops.grouped_experts import ExpertWeights


class Block(nn.Module):
    """Attention and feed-forward on a float32 residual stream; `model.block_norm` says where the RMSNorms are."""

    def __init__(self, config: ModelConfig, ffn: nn.Module, part: Part, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config, (part, layer) in value_embedding_layers(config))
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = ffn
        self.norm_sums = config.block_norm == "sandwich"
        self.attention_out_norm = self.ffn_out_norm = None
        if config.block_norm != "pre":
            self.attention_out_norm = RMSNorm(config.dim, config.norm_eps, cast=False)
            self.ffn_out_norm = RMSNorm(config.dim, config.norm_eps, cast=False)

    def forward(
        self, x: Tensor, context: AttentionContext | CachedContext, weights: ExpertWeights | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) -> (B, S, D), and the chosen experts (B, S, k) if the feed-forward routes."""
        x = self.add(x, self.attention(self.attention_norm(x), context), self.attention_out_norm)
        normed = self.ffn_norm(x)
        output = self.ffn(normed) if weights is None else self.ffn(normed, weights)
        output, experts = output if isinstance(output, tuple) else (output, None)
        return self.add(x, output, self.ffn_out_norm), experts

    def add(self, x: Tensor, output: Tensor, norm: RMSNorm | None) -> Tensor:
        """Add the output of attention or feed-forward to the residual stream, (B, S, D) float32."""
        if norm is None:
            return x + output
        return norm(x + output) if self.norm_sums else x + norm(output)

    def serve_experts(self, x: Tensor, weights: ExpertWeights | None) -> None:
        """Run this rank's experts for the tokens of other ranks only; x (B, 1, D) gives width, type and device."""
        self.ffn(x[:0], weights)


def dense_block(config: ModelConfig, part: Part, layer: int) -> Block:
    """A block with a dense feed-forward, as in prelude and coda."""
    return Block(config, dense_feed_forward(config), part, layer)
