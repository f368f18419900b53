"""Numbers of parameters of a model by formulas of its configuration, without torch, whose import takes seconds."""

from dataclasses import dataclass

from mythos.model.config import CORES, GATE_INPUTS, ModelConfig, padded_vocab_size, registered_parts


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    active: int
    """Parameters that one token uses in one loop: all except the routed experts it is not sent to."""


def parameters_by_formula(config: ModelConfig) -> Parameters | None:
    """Count like `mythos.planning.flops.count_parameters`; `vocab_size: auto` counts as 128.

    None if a registered part has no formula; then the model must be built to be counted.
    """
    counts = []
    for registry, name in registered_parts(config):
        formula = registry.entries[name].parameters
        count = None if formula is None else formula(config)
        if count is None:
            return None
        counts.append(count)
    core, router, loop_norm, dense, attention, injection, halting = counts
    dim, looped = config.dim, config.injection != "none"
    vocab = padded_vocab_size(config.vocab_size) if isinstance(config.vocab_size, int) else padded_vocab_size(1)
    norms = dim * (2 if config.block_norm == "pre" else 4)
    layers = config.prelude_layers + config.core_layers + config.coda_layers
    total = vocab * dim * (1 if config.tie_embeddings else 2)
    total += layers * (attention + norms)
    total += (config.prelude_layers + config.coda_layers) * dense
    total += config.core_layers * (core + router + loop_norm)
    total += injection + halting
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
    idle = config.core_layers * CORES.entries[config.core_ffn].idle_parameters(config)
    return Parameters(total, total - idle)
