"""Parameters and FLOPs of a model, computed from its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mythos.model.attention import GATE_INPUTS, value_embedding_layers
from mythos.model.config import ModelConfig, padded_vocab_size
from mythos.model.moe import MixtureOfExperts
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
    dim, heads = config.dim, config.n_heads
    if config.attention == "mla":
        head, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        query = (dim + heads * head) * config.q_lora_rank if config.q_lora_rank else dim * heads * head
        latent = dim * (config.kv_lora_rank + config.qk_rope_head_dim)
        expand = config.kv_lora_rank * heads * (config.qk_nope_head_dim + value)
        projections = query + latent + expand + heads * value * dim
    else:
        head = value = config.head_dim
        projections = 2 * dim * head * (heads + config.n_kv_heads)
    attention = projections + heads * (head + value) * (length + 1) / 2
    dense = attention + (3 if config.dense_ffn == "swiglu" else 2) * dim * config.ffn_dim
    if config.core_ffn == "moe":
        routed = config.experts_per_token * config.expert_dim + config.n_shared_experts * config.shared_expert_dim
        core = attention + dim * config.n_experts + 3 * dim * routed
    else:
        core = dense
    looped = config.injection != "none"
    inject_once = dim * dim if config.injection in ("lti", "linear") else 0
    inject_loop = dim * dim if config.injection == "linear" else 0
    vocab = padded_vocab_size(config.vocab_size) if isinstance(config.vocab_size, int) else 0
    once = (config.prelude_layers + config.coda_layers) * dense + inject_once + looped * dim * dim + dim * vocab
    loop = config.core_layers * core + inject_loop + 2 * dim * config.lora_rank
    gated = [part for part, _ in value_embedding_layers(config)]
    gate = min(GATE_INPUTS, dim) * config.n_kv_heads
    once, loop = once + gate * (len(gated) - gated.count("core")), loop + gate * gated.count("core")
    return ForwardFlops(2.0 * once, 2.0 * loop)
