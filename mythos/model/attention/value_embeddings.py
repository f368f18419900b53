"""Value embeddings: learned rows of each token that layers add to its values (arXiv 2410.17897)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.model.config import ModelConfig, Part
from mythos.model.layers import Initializer, truncated_normal

ValueRows = Mapping[tuple[Part, int], Tensor]
"""The rows of each layer that has a value embedding, (B, S, KV, K), by part and index of the layer."""


class ValueEmbeddings(nn.Module):
    """A table (V, KV K) for each layer that has a value embedding."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.heads = config.n_kv_heads
        self.layers = value_embedding_layers(config)
        for part, layer in self.layers:
            self.add_module(f"{part}_{layer}", ValueTable(vocabulary, config.n_kv_heads * config.head_dim))

    def forward(self, ids: Tensor) -> ValueRows:
        """(B, S) int64 -> the rows of each layer, (B, S, KV, K) float32."""
        tables = {place: self.get_submodule("{}_{}".format(*place)) for place in self.layers}
        return {place: table(ids).unflatten(-1, (self.heads, -1)) for place, table in tables.items()}


class ValueTable(nn.Module):
    """Rows of a (V, n) table; entries start with the standard deviation of the values that they are added to."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.initializers: dict[str, Initializer] = {"weight": truncated_normal(1)}

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, n) float32. Each pass of the loop casts them: so their gradients add up in float32."""
        return F.embedding(ids, self.weight).float()


def value_embedding_layers(config: ModelConfig) -> list[tuple[Part, int]]:
    """The layers that have a value embedding: every second one, counted back from the last."""
    counts: dict[Part, int] = {
        "prelude": config.prelude_layers,
        "core": config.core_layers,
        "coda": config.coda_layers,
    }
    layers = [(part, layer) for part, count in counts.items() for layer in range(count)]
    return layers[::-1][::2] if config.value_embeddings else []
