"""Parcae (arXiv 2604.12946), as published in `SandyResearch/parcae-140m`, `-370m`, `-770m` and `-1.3b`.

Sources: github.com/SandyResearch/parcae, through the copies github.com/minchoCoin/parcae at 62f3055 (model, attention,
initialisation, configurations, loader) and github.com/pebaryan/gattrlm at 3e7d967 (blocks, feed-forward, injection,
rotations); and github.com/0z5a/vllm-rlt, an independent port at the model's revision 69284c1, which was compared with
the checkpoint `parcae-370m` at 4392844. The package `parcae-lm` on PyPI (0.1.0) contains no code.

- config.json is the dataclass `ParcaeConfig`, with `_class_name` and without `model_type`. Weights are in
  pytorch_model.bin (or model.pt), in float32, including the rotations (`freqs_cis`) and a second copy of the tied head.
- x = wte[ids], P blocks, RMSNorm `ln_prelude`. T times u = exp(-softplus(dt_bias) exp(A_log)) h +
  softplus(dt_bias) (e B^T) and N blocks. C h, M blocks, RMSNorm `ln_f`, the tied head. No matmul has a bias.
- A block is x + attention(norm_1 x), then x + mlp(norm_2 x); RMSNorm with weights and eps 1e-5. The mlp is
  proj(relu(fc x)^2 / 2).
- Queries and keys are rotated in neighbouring pairs (base 50,000) and then normalised without weights, with float32's
  epsilon. Every second layer, counted back from the last, adds 2 sigmoid(ve_gate(x[:32])) times a row of `value_embeds`
  to the values of each head.
- h_0 is truncated-normal noise of std sqrt(2 / (5 D)), drawn anew in every call, at inference too. Ours is zero at
  inference, and the same noise in training.

The import folds these differences into the weights:

- the embedding's scale sqrt(D) into the table, and out of the final norm if the table is tied to the head;
- the factor 1/2 of the mlp into proj;
- the pair order into the rows of queries and keys, together with the ratio of the two epsilons. That is exact:
  s q / sqrt(s^2 m + eps) = q / sqrt(m + eps / s^2). Normalising before the rotation equals normalising after it.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.hf.importers.architecture import (
    Architecture,
    Derived,
    MappedModel,
    Read,
    Values,
    add_tables,
    check_rotations,
    constant,
    exact_config,
    option,
    pairs_to_halves,
    raven_fields,
    resized_table,
    scaled,
    setting_problems,
)
from mythos.model.config import ModelConfig
from mythos.model.injection import DT_BOUNDS, LOG_A_BOUNDS

DEFAULTS = {
    "block_size": 4096,
    "mean_backprop_depth": 8,
    "mean_recurrence": 32,
    "n_embd": 4096,
    "n_layers_in_coda": 1,
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 4,
    "nonlin_name": "GELU",
    "norm_class_name": "LayerNorm",
    "norm_eps": 1e-5,
    "num_attention_heads": 32,
    "prelude_norm": False,
    "qk_norm": False,
    "recurrent_embedding_dimension": 1024,
    "recurrent_intermediation_embedding_dimension": 3520,
    "state_init": "like-init",
    "tie_embeddings": False,
    "vocab_size": 50254,
}
"""Defaults of `ParcaeConfig`; other fields default to None, or to what REQUIRED allows."""

REQUIRED = {
    "bias": False,
    "block_class_name": "TransformerPreNormBlock",
    "clip_qkv": None,
    # These do not scale embeddings or logits, and their initial state has the same std as ours.
    "init_strategy": ("scaled-zero", "scaled", "scaled-geiping", "scaled-stuck", "small"),
    "injection_type": "diagonal",
    "logit_softcap": None,
    "mlp_class_name": "BaseMLP",
    "mup_model_scaling_factor": 1,
    "nonlin_name": "ReLU2",
    "norm_class_name": ("RMSNorm", "RMSNorm_llama"),
    "qk_bias": False,
    "qk_norm": True,
    "state_init": ("like-init", "zero"),
}
ROPE_BASE = 50_000
QK_EPS = torch.finfo(torch.float32).eps


def map_parcae(values: Values) -> MappedModel:
    """Map a Parcae model. Raises MythosError for a variant that our model cannot represent exactly."""
    config = parcae_config(values)
    mapped = MappedModel(config, config.loops)
    tensors, vocab_size = mapped.tensors, int(config.vocab_size)
    add_tables(mapped, "transformer.wte.weight", "transformer.ln_f.weight", 1 / sqrt(config.dim))
    if config.prelude_norm:
        tensors["prelude_norm.weight"] = Derived(("transformer.ln_prelude.weight",))
    tensors["readout.weight"] = Derived(("transformer.C.weight",))
    injection = tuple(f"transformer.adapter.{name}" for name in ("dt_bias", "A_log", "B"))
    for index, name in enumerate(("dt", "log_a", "weight")):
        tensors[f"recurrence.injection.{name}"] = Derived(
            injection, lambda *parts, index=index: within_bounds(*parts)[index]
        )
    mapped.checks["transformer.adapter.A_log"] = check_decays
    mapped.unused.add("freqs_cis")
    mapped.checks["freqs_cis"] = check_rotations("freqs_cis", config.rope_theta)

    tables, gates = value_embedding_layers(values)
    parts = [
        ("prelude", "prelude", config.prelude_layers),
        ("core", "core_block", config.core_layers),
        ("coda", "coda", config.coda_layers),
    ]
    layers = [(part, theirs, layer) for part, theirs, count in parts for layer in range(count)]
    for index, (part, theirs, layer) in enumerate(layers):
        ours = f"recurrence.blocks.{layer}" if part == "core" else f"{part}.{layer}"
        block = f"transformer.{theirs}.{layer}"
        tensors |= {f"{ours}.{name}": tensor for name, tensor in block_tensors(config, block).items()}
        table, gate = f"value_embeds.{index}.weight", f"{block}.attn.ve_gate.weight"
        if index in tables & gates:
            tensors[f"value_embeddings.{part}_{layer}.weight"] = Derived((table,), resized_table(vocab_size))
            tensors[f"{ours}.attention.value_gate.weight"] = Derived((gate,))
        else:  # a table without a gate, or a gate without a table, is stored but not used
            mapped.unused |= ({table} if index in tables else set()) | ({gate} if index in gates else set())
    return mapped


def parcae_config(values: Values) -> ModelConfig:
    """The model section of a Parcae configuration. Raises MythosError listing what our model cannot represent."""

    def setting(name: str) -> int:
        return option(values, DEFAULTS, name)

    dim, heads = setting("n_embd"), setting("num_attention_heads")
    ffn_dim = setting("intermediate_size") or 4 * dim
    same_as_rest = {
        "num_key_value_heads": (heads, None),
        "recurrent_num_attention_heads": (heads, None),
        "recurrent_embedding_dimension": dim,
        "recurrent_intermediation_embedding_dimension": ffn_dim,
    }
    problems = list(setting_problems(values, DEFAULTS, REQUIRED | same_as_rest))
    rope = values.get("rope_settings") or {}
    problems += setting_problems(rope, {}, {"use_rope": True, "rope_condense_ratio": 1})
    tables, gates = value_embedding_layers(values)
    if tables & gates not in (tables, set()):
        layers = sorted(tables & gates)
        problems.append(f"value embeddings: got layers {layers}; allowed: every second, the last included")
    return exact_config(
        "parcae",
        problems,
        lambda: {
            **raven_fields(setting, heads),
            "qk_norm": True,
            "rope_theta": float(rope.get("rope_base", ROPE_BASE)),
            "value_embeddings": bool(tables & gates),
            "ffn_dim": ffn_dim,
            "dense_ffn": "relu2",
            "injection": "lti",
            "prelude_norm": setting("prelude_norm"),
            "state_init": "zero" if setting("state_init") == "zero" else "normal",
        },
    )


def value_embedding_layers(values: Values) -> tuple[set[int], set[int]]:
    """The layers with a table of value embeddings, and those with a gate for one; layers are counted from 0 throughout.

    Parcae computes the two sets by different rules, so they may differ.
    """
    prelude, core, coda, loops, backprop = (
        option(values, DEFAULTS, name)
        for name in (
            *("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda"),
            *("mean_recurrence", "mean_backprop_depth"),
        )
    )
    layers = range(prelude + core + coda)
    tables = {index for index in layers if index % 2 == (len(layers) - 1) % 2}
    # The rule for gates numbers coda layers after all loops, and takes the last layer from the loops with gradient.
    numbers = [index if index < prelude + core else index + core * (loops - 1) for index in layers]
    return tables, {index for index in layers if numbers[index] % 2 == (core * backprop - 1) % 2}


def block_tensors(config: ModelConfig, block: str) -> dict[str, Derived]:
    """The tensors of a block by our names, without value embeddings; `block` is the prefix of the foreign names."""
    scale = sqrt(config.norm_eps / QK_EPS)
    return {
        "attention_norm.weight": Derived((f"{block}.norm_1.weight",)),
        "attention.query.weight": Derived((f"{block}.attn.c_q.weight",), pairs_to_halves(config.n_heads, scale)),
        "attention.key.weight": Derived((f"{block}.attn.c_k.weight",), pairs_to_halves(config.n_heads, scale)),
        "attention.value.weight": Derived((f"{block}.attn.c_v.weight",)),
        "attention.out.weight": Derived((f"{block}.attn.c_proj.weight",)),
        "attention.query_norm.weight": constant(config.head_dim),
        "attention.key_norm.weight": constant(config.head_dim),
        "ffn_norm.weight": Derived((f"{block}.norm_2.weight",)),
        "ffn.up.weight": Derived((f"{block}.mlp.fc.weight",)),
        "ffn.down.weight": Derived((f"{block}.mlp.proj.weight",), scaled(0.5)),
    }


def within_bounds(dt: Tensor, log_a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dt (D,), log_a (D,) and B (D, D) of the same injection, with dt and log_a within our model's bounds.

    With Delta = softplus(dt), decay and injection depend on Delta exp(log_a) and Delta B only. A factor that is out of
    bounds is clamped, and the other factors compensate.
    """
    delta = F.softplus(dt.double())
    rate = delta * log_a.double().exp()
    lowest, highest = F.softplus(torch.tensor(DT_BOUNDS, dtype=torch.float64, device=dt.device))
    new_delta = (rate / log_a.double().clamp(*LOG_A_BOUNDS).exp()).clamp(lowest, highest)
    new_dt = new_delta + torch.log(-torch.expm1(-new_delta))  # inverse of softplus
    new_log_a = (rate / new_delta).log().clamp(*LOG_A_BOUNDS)
    inside = (dt == dt.clamp(*DT_BOUNDS)) & (log_a == log_a.clamp(*LOG_A_BOUNDS))
    compensation = (delta / new_delta).where(~inside, 1).float()
    new_dt, new_log_a = torch.where(inside, dt, new_dt.float()), torch.where(inside, log_a, new_log_a.float())
    return new_dt, new_log_a, weight * compensation.unsqueeze(1)


def check_decays(read: Read) -> str | None:
    """Check that no dimension decays more slowly than our bounds allow.

    A decay below the bounds needs no check: it keeps less than 1e-19 of a state.
    """
    dt, log_a = read("transformer.adapter.dt_bias").double(), read("transformer.adapter.A_log").double()
    decay = torch.exp(-F.softplus(dt) * log_a.exp())
    slowest = F.softplus(torch.tensor(DT_BOUNDS[0], dtype=torch.float64)) * torch.tensor(LOG_A_BOUNDS[0]).double().exp()
    if decay.max() <= torch.exp(-slowest):
        return None
    return f"transformer.adapter keeps {decay.max():.8f} of a state; allowed: at most {torch.exp(-slowest):.8f}"


PARCAE = Architecture(
    name="parcae",
    models="SandyResearch/parcae-140m, -370m, -770m, -1.3b",
    recognises=lambda values: values.get("_class_name") == "ParcaeConfig",
    map=map_parcae,
    tokenizer="SandyResearch/parcae-tokenizer",
    end_token="<|eos|>",
)
