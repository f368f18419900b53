"""What a model costs before it is built: parameters and FLOPs by depth."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mythos.model.config import ModelConfig, padded_vocab_size
from mythos.model.moe import MixtureOfExperts
from mythos.model.rdt import RecurrentDepthTransformer


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    active: int
    """Those a token passes through at one loop: all but the routed experts it is not sent to."""


def build_on_meta(config: ModelConfig) -> RecurrentDepthTransformer:
    """The model on the meta device, where nothing is allocated; `vocab_size: auto` is built as 128."""
    if config.vocab_size == "auto":
        config = config.model_copy(update={"vocab_size": 1})
    with torch.device("meta"):
        return RecurrentDepthTransformer(config)


def count_parameters(config: ModelConfig) -> Parameters:
    """Count on the meta device; `vocab_size: auto` counts as no vocabulary beyond 128."""
    model = build_on_meta(config)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(m.gate_up.numel() + m.down.numel() for m in model.modules() if isinstance(m, MixtureOfExperts))
    idle = routed * (config.n_experts - config.experts_per_token) // config.n_experts
    return Parameters(total, total - idle)


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs (two per multiply-add) of the matrix products in a forward pass, per token."""

    once: float
    """Embedding to loop and loop to logits."""
    loop: float
    """One pass of the core."""

    def training(self, loops: Sequence[int], backprop: int) -> float:
        """Mean FLOPs per token of a training step: every pass forward, and twice that backward where gradient flows."""
        forward = sum(loops) / len(loops)
        backward = sum(min(row, backprop) for row in loops) / len(loops)
        return 3 * self.once + self.loop * (forward + 2 * backward)


def forward_flops(config: ModelConfig, length: int) -> ForwardFlops:
    """FLOPs per token of sequences of `length` tokens, attention's causal half included."""
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
    dense = attention + 3 * dim * config.ffn_dim
    if config.core_ffn == "moe":
        routed = config.experts_per_token * config.expert_dim + config.n_shared_experts * config.shared_expert_dim
        core = attention + dim * config.n_experts + 3 * dim * routed
    else:
        core = dense
    looped = config.injection != "none"
    inject_once = {"lti": dim * dim, "linear": dim * dim, "add": 0, "none": 0}[config.injection]
    inject_loop = dim * dim if config.injection == "linear" else 0
    vocab = padded_vocab_size(config.vocab_size) if isinstance(config.vocab_size, int) else 0
    once = (config.prelude_layers + config.coda_layers) * dense + inject_once + looped * dim * dim + dim * vocab
    loop = config.core_layers * core + inject_loop + 2 * dim * config.lora_rank
    return ForwardFlops(2.0 * once, 2.0 * loop)
