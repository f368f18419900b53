"""Parameters and FLOPs of a model, computed from its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mythos.model.attention.base import attention_class
from mythos.model.attention.value_embeddings import value_embedding_layers
from mythos.model.config import FEED_FORWARDS, GATE_INPUTS, INJECTIONS, ModelConfig, loop_stages, padded_vocab_size
from mythos.model.injection import Injection
from mythos.model.lanes import StateLanes
from mythos.model.moe import MixtureOfExperts, core_class
from mythos.model.rdt import RecurrentDepthTransformer


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    active: int
    """Parameters that one token uses in one loop: all except the routed experts it is not sent to."""


def build_on_meta(config: ModelConfig) -> RecurrentDepthTransformer:
    """Build the model on the meta device, which allocates nothing; `vocab_size: auto` is built as 128."""
    if config.vocab_size == "auto":
        config = config.model_copy(update={"vocab_size": 1})
    with torch.device("meta"):
        return RecurrentDepthTransformer(config)


def count_parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of a model; `vocab_size: auto` counts as 128."""
    model = build_on_meta(config)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(m.gate_up.numel() + m.down.numel() for m in model.modules() if isinstance(m, MixtureOfExperts))
    idle = routed * (config.n_experts - config.experts_per_token) // config.n_experts
    return Parameters(total, total - idle)


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs per token of the matmuls in a forward pass, two per multiply-add."""

    once: float
    """Work outside the loop: prelude, injection of the encoded input, coda and head."""
    loop: float
    """One pass of the core."""

    def forward(self, loops: float) -> float:
        """FLOPs per token of a forward pass of `loops` loops."""
        return self.once + loops * self.loop

    def training(self, loops: Sequence[float], backprop: float) -> float:
        """Mean FLOPs per token of a training step.

        `loops` are the loops of each row. A row carries gradient through its last min(loops, `backprop`) loops.
        """
        with_gradient = [min(row, backprop) for row in loops]
        return self.training_at(sum(loops) / len(loops), sum(with_gradient) / len(loops))

    def training_at(self, mean_loops: float, mean_backprop: float) -> float:
        """FLOPs per token of training at these mean loops and mean loops with gradient.

        Every pass runs forward; a backward pass costs twice as much and runs only where gradient flows.
        """
        return 3 * self.once + self.loop * (mean_loops + 2 * mean_backprop)


def forward_flops(config: ModelConfig, length: int) -> ForwardFlops:
    """FLOPs per token in sequences of `length` tokens; of attention, the causal half is counted."""
    dim, attention_type = config.dim, attention_class(config)
    pairs = (length + 1) / 2  # keys that a query sees on average
    attention = attention_type.token_products(config) + attention_type.pair_products(config) * pairs
    dense = attention + FEED_FORWARDS[config.dense_ffn].token_products(dim, config.ffn_dim)
    core = attention + core_class(config).token_products(config)
    injection: type[Injection] | None = INJECTIONS[config.injection]
    looped = injection is not None
    inject_once, inject_loop = (0, 0) if injection is None else injection.products(config)
    vocab = padded_vocab_size(config.vocab_size) if isinstance(config.vocab_size, int) else 0
    stages = len(loop_stages(config))
    once = (config.prelude_layers + config.coda_layers) * dense + stages * inject_once
    once += looped * dim * dim + dim * vocab
    loop = config.core_layers * core + stages * (inject_loop + StateLanes.products(config) + 2 * dim * config.lora_rank)
    gated = [part for part, _ in value_embedding_layers(config)]
    gate = min(GATE_INPUTS, dim) * config.n_kv_heads
    once, loop = once + gate * (len(gated) - gated.count("core")), loop + gate * gated.count("core")
    return ForwardFlops(2.0 * once, 2.0 * loop)
