"""Ouro (arXiv 2510.25741), as published in `ByteDance/Ouro-1.4B` and `-2.6B`.

Source: a copy of their modeling_ouro.py, github.com/Eagle4398/ouro-nixpkgs at 16df09c. Their configuration_ouro.py was
not available, so a value missing from config.json defaults to the value in the published files.

- h_0 = embed_tokens[ids]; T times all layers and RMSNorm `norm`; `lm_head` reads the last state. There is no prelude,
  no coda and no injection. No matmul has a bias.
- A layer is x + input_layernorm_2(attention(input_layernorm x)), then x + post_attention_layernorm_2(mlp(
  post_attention_layernorm x)); the mlp is down_proj(silu(gate_proj x) * up_proj x).
- Queries and keys are rotated in halves of a head (base 1,000,000) and not normalised.

Our state is theirs before `norm`. The norm is copied twice: as the norm of `injection: initial`, which every pass but
the first reads, and as the final norm. If the model is trained further, the two copies diverge. `early_exit_gate` is
left out: a run of all loops does not use it, and our gate is another function of other inputs. Positions can stop by
the rules that need no training.
"""

from math import sqrt

from mythos.hf.importers.architecture import (
    LLAMA_LAYER,
    Architecture,
    Derived,
    MappedModel,
    Values,
    add_llama_layer,
    add_tables,
    exact_config,
    identity,
    llama_fields,
    llama_problems,
    option,
    setting_problems,
)

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
}
"""Defaults of `OuroConfig`; other fields default to None, or to what REQUIRED allows."""

REQUIRED = {
    "attention_bias": (None, False),
    "early_exit_threshold": (None, 1.0),  # below 1 the gate ends loops
    "hidden_act": "silu",
    "rope_scaling": None,
    "use_sliding_window": False,
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings"),
)
OUT_NORMS = {"attention_out_norm": ("input_layernorm_2",), "ffn_out_norm": ("post_attention_layernorm_2",)}


def map_ouro(values: Values) -> MappedModel:
    """Map an Ouro model. Raises MythosError for a variant that our model cannot represent exactly."""
    problems = [*llama_problems(values, SIZES), *setting_problems(values, DEFAULTS, REQUIRED)]
    config = exact_config(
        "ouro",
        problems,
        lambda: {
            **llama_fields(values, DEFAULTS),
            "prelude_layers": 0,
            "core_layers": values["num_hidden_layers"],
            "coda_layers": 0,
            "qk_norm": False,
            "block_norm": "peri",
            "loops": option(values, DEFAULTS, "total_ut_steps"),
            "injection": "initial",
            "halting": "none",
        },
    )
    mapped = MappedModel(config, config.loops, unused={"model.early_exit_gate.weight", "model.early_exit_gate.bias"})
    tensors = mapped.tensors
    tensors["recurrence.injection.norm.weight"] = Derived(("model.norm.weight",))
    tensors["readout.weight"] = identity(config.dim)
    add_tables(mapped, "model.embed_tokens.weight", "model.norm.weight", 1 / sqrt(config.dim))
    for layer in range(config.core_layers):
        add_llama_layer(mapped, f"recurrence.blocks.{layer}", layer, LLAMA_LAYER | OUT_NORMS)
    return mapped


OURO = Architecture(
    name="ouro",
    models="ByteDance/Ouro-1.4B, -2.6B",
    recognises=lambda values: values.get("model_type") == "ouro",
    map=map_ouro,
)
