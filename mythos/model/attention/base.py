"""What every attention provides: the module, and what a configuration of it costs."""

from typing import ClassVar

from torch import nn

from mythos.model.config import ATTENTIONS, ModelConfig


class Attention(nn.Module):
    """Base of the classes in the registry `ATTENTIONS`.

    ``forward(x, context)`` maps (B, S, D) with an `AttentionContext` to (B, S, D), and packed positions (N, 1, D) with
    a `CachedContext` to (N, 1, D). The static methods describe the costs of a configuration before a module is built.
    """

    value_embeddings: ClassVar[bool] = False
    """Whether the constructor accepts `value_embedding=True`."""

    @staticmethod
    def rotary_width(config: ModelConfig) -> int:
        """Dimensions of a head that RoPE rotates; even."""
        raise NotImplementedError

    @staticmethod
    def entry_width(config: ModelConfig) -> int:
        """Numbers that a layer caches for one position."""
        raise NotImplementedError

    @staticmethod
    def pair_products(config: ModelConfig) -> int:
        """Multiply-adds for one pair of query and key positions, all heads together."""
        raise NotImplementedError


def attention_class(config: ModelConfig) -> type[Attention]:
    """The class that `model.attention` names."""
    return ATTENTIONS[config.attention]


def build_attention(config: ModelConfig, value_embedding: bool = False) -> Attention:
    """The attention module of a layer. Raises ValueError for a value embedding that the attention does not support."""
    attention = attention_class(config)
    if not value_embedding:
        return attention(config)
    if not attention.value_embeddings:
        raise ValueError(f"model.value_embeddings: {attention.__name__} does not support value embeddings")
    return attention(config, value_embedding=True)
