"""Numbers of parameters of a model by formulas of its configuration, without torch, whose import takes seconds."""

from collections.abc import Callable
from dataclasses import dataclass

from mythos.model.config import GATE_INPUTS, GATE_WIDTH, ModelConfig, padded_vocab_size


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    active: int
    """Parameters that one token uses in one loop: all except the routed experts it is not sent to."""


def parameters_by_formula(config: ModelConfig) -> Parameters | None:
    """Count like `mythos.planning.flops.count_parameters`; `vocab_size: auto` counts as 128.

    None if a registered part is not one of those below; then the model must be built to be counted.
    """
    parts = (
        ATTENTIONS.get(config.attention),
        FEED_FORWARDS.get(config.dense_ffn),
        CORES.get(config.core_ffn),
        INJECTIONS.get(config.injection),
        HALTING.get(config.halting),
    )
    if None in parts:
        return None
    dim, looped = config.dim, config.injection != "none"
    vocab = padded_vocab_size(config.vocab_size) if isinstance(config.vocab_size, int) else padded_vocab_size(1)
    norms = dim * (2 if config.block_norm == "pre" else 4)
    layers = config.prelude_layers + config.core_layers + config.coda_layers
    total = vocab * dim * (1 if config.tie_embeddings else 2)
    total += layers * (ATTENTIONS[config.attention](config) + norms)
    total += (config.prelude_layers + config.coda_layers) * FEED_FORWARDS[config.dense_ffn](config)
    total += config.core_layers * CORES[config.core_ffn](config)
    total += INJECTIONS[config.injection](config) + HALTING[config.halting](config)
    total += dim  # the norm before the head
    total += looped * (dim * dim + dim * (config.prelude_norm + config.readout_norm))
    total += config.loop_embedding * dim
    if config.lanes > 1:  # a norm, and two gates for each lane
        total += dim + 2 * config.lanes * (config.lanes * dim + 1)
    if config.lora_rank:
        total += dim + 2 * dim * config.lora_rank + config.loops * config.lora_rank
    if config.value_embeddings:  # in every second layer, counted back from the last
        table, gate = vocab * config.head_dim, min(GATE_INPUTS, dim)
        total += (layers + 1) // 2 * config.n_kv_heads * (table + gate)
    idle = config.n_experts - config.experts_per_token if config.core_ffn == "moe" else 0
    return Parameters(total, total - config.core_layers * idle * 3 * dim * config.expert_dim)


def _grouped_query(c: ModelConfig) -> int:
    projections = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)
    return projections + c.qk_norm * 2 * c.head_dim + c.qk_bias * (c.n_heads + c.n_kv_heads) * c.head_dim


def _latent(c: ModelConfig) -> int:
    query_width = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    query = c.dim * query_width
    if c.q_lora_rank:  # down, norm, up
        query = c.dim * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * query_width
    latent = c.dim * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    expand = c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    norms = c.qk_norm * (c.qk_nope_head_dim + 2 * c.qk_rope_head_dim)
    return query + latent + expand + c.n_heads * c.v_head_dim * c.dim + norms


def _mixture(c: ModelConfig) -> int:
    hidden = c.n_experts * c.expert_dim + c.n_shared_experts * c.shared_expert_dim
    return c.dim * c.n_experts + 3 * c.dim * hidden


Formula = Callable[[ModelConfig], int]
ATTENTIONS: dict[str, Formula] = {"gqa": _grouped_query, "mla": _latent}
FEED_FORWARDS: dict[str, Formula] = {
    "swiglu": lambda c: 3 * c.dim * c.ffn_dim,
    "relu2": lambda c: 2 * c.dim * c.ffn_dim,
}
CORES: dict[str, Formula] = {"moe": _mixture, "dense": lambda c: FEED_FORWARDS[c.dense_ffn](c)}
INJECTIONS: dict[str, Formula] = {
    "lti": lambda c: c.dim * c.dim + 2 * c.lanes * c.dim,
    "linear": lambda c: 2 * c.dim * c.dim,
    "add": lambda c: 0,
    "initial": lambda c: c.dim,
    "none": lambda c: 0,
}
HALTING: dict[str, Formula] = {
    "none": lambda c: 0,
    "convergence": lambda c: 0,
    "second_difference": lambda c: 0,
    "gate": lambda c: GATE_WIDTH * (c.dim + 3) + 1,
    "act": lambda c: c.dim + 1,
}
