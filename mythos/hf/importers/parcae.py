"""Parcae (arXiv 2604.12946), as `SandyResearch/parcae-140m`, `-370m`, `-770m` and `-1.3b` publish it.

Read in github.com/SandyResearch/parcae, of which the copies github.com/minchoCoin/parcae at 62f3055 (model, attention,
initialisation, configurations, loader) and github.com/pebaryan/gattrlm at 3e7d967 (blocks, feed-forward, injection,
rotations) were at hand; and in github.com/0z5a/vllm-rlt, whose independent port at the model's revision 69284c1 was
compared with the checkpoint `parcae-370m` at 4392844. The package `parcae-lm` of PyPI (0.1.0) holds no code.

- config.json is the dataclass `ParcaeConfig`, with `_class_name` and without `model_type`. Weights are in
  pytorch_model.bin (or model.pt), in float32, with the rotations (`freqs_cis`) and the tied head once more.
- x = wte[ids], P blocks, RMSNorm `ln_prelude`. T times u = exp(-softplus(dt_bias) exp(A_log)) h +
  softplus(dt_bias) (e B^T) and N blocks. C h, M blocks, RMSNorm `ln_f`, the tied head. No product has a bias.
- A block is x + attention(norm_1 x), then x + mlp(norm_2 x); RMSNorm with weights and eps 1e-5. The mlp is
  proj(relu(fc x)^2 / 2).
- Queries and keys are rotated in neighbouring pairs (base 50,000) and then normalised without weights, with float32's
  epsilon. Every second layer, counted back from the last, adds 2 sigmoid(ve_gate(x[:32])) times a row of `value_embeds`
  to the values of each head.
- h_0 is truncated-normal noise of std sqrt(2 / (5 D)), drawn anew in every call, at inference too. Ours is zero there,
  and the same noise in training.

So the import folds: the embedding's scale sqrt(D) into the table and, where it is tied, out of the final norm; the half
of the mlp into proj; the order of pairs into the rows of queries and keys, and so the ratio of both epsilons, which is
exact: s q / sqrt(s^2 m + eps) = q / sqrt(m + eps / s^2). Normalising before the rotation is the same as after it.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.hf.importers.architecture import (
    Architecture,
    Made,
    Mapped,
    Read,
    Values,
    add_tables,
    checked,
    differing,
    filled,
    halves,
    option,
    rotations,
    rows_to,
    scaled,
)
from mythos.model.config import ModelConfig
from mythos.model.injection import DT_BOUNDS, LOG_A_BOUNDS

DEFAULTS = {
    "bias": False,
    "block_class_name": "TransformerPreNormBlock",
    "block_size": 4096,
    "clip_qkv": None,
    "init_strategy": "scaled",
    "injection_type": "diagonal",
    "logit_softcap": None,
    "mean_backprop_depth": 8,
    "mean_recurrence": 32,
    "mlp_class_name": "BaseMLP",
    "mup_model_scaling_factor": 1,
    "n_embd": 4096,
    "n_layers_in_coda": 1,
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 4,
    "nonlin_name": "GELU",
    "norm_class_name": "LayerNorm",
    "norm_eps": 1e-5,
    "num_attention_heads": 32,
    "prelude_norm": False,
    "qk_bias": False,
    "qk_norm": False,
    "recurrent_embedding_dimension": 1024,
    "recurrent_intermediation_embedding_dimension": 3520,
    "state_init": "like-init",
    "tie_embeddings": False,
    "vocab_size": 50254,
}
"""Of `ParcaeConfig`; what is not here is None."""

NEEDED = {
    "bias": False,
    "block_class_name": "TransformerPreNormBlock",
    "clip_qkv": None,
    # Whose embeddings and logits are not scaled, and whose initial state has the std of ours.
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


def map_parcae(values: Values) -> Mapped:
    """Our tensors as made of a Parcae's. Raises MythosError for a variant that cannot be put into ours exactly."""

    def given(name: str) -> int:
        return option(values, DEFAULTS, name)

    problems = list(differing(values, DEFAULTS, NEEDED))
    dim, heads = given("n_embd"), given("num_attention_heads")
    ffn_dim = given("intermediate_size") or 4 * dim
    same = {
        "num_key_value_heads": (heads, None),
        "recurrent_num_attention_heads": (heads, None),
        "recurrent_embedding_dimension": dim,
        "recurrent_intermediation_embedding_dimension": ffn_dim,
    }
    problems += differing(values, DEFAULTS, same)
    rope = values.get("rope_settings") or {}
    problems += differing(rope, {"use_rope": True, "rope_condense_ratio": 1}, {"use_rope": True})
    problems += differing(rope, {"rope_condense_ratio": 1}, {"rope_condense_ratio": 1})
    prelude, core, coda = (given(f"n_layers_in_{part}") for part in ("prelude", "recurrent_block", "coda"))
    tables, gates = value_layers(values)
    if tables & gates not in (tables, set()):
        layers = sorted(tables & gates)
        problems.append(f"value embeddings: got layers {layers}; allowed: every second, the last included")
    theta = float(rope.get("rope_base", ROPE_BASE))

    config = checked(
        "parcae",
        problems,
        lambda: {
            "vocab_size": given("vocab_size"),
            "dim": dim,
            "prelude_layers": prelude,
            "core_layers": core,
            "coda_layers": coda,
            "context_length": given("block_size"),
            "tie_embeddings": given("tie_embeddings"),
            "attention": "gqa",
            "n_heads": heads,
            "n_kv_heads": heads,
            "head_dim": dim // heads,
            "qk_norm": True,
            "rope_theta": theta,
            "value_embeddings": bool(tables & gates),
            "norm_eps": given("norm_eps"),
            "ffn_dim": ffn_dim,
            "dense_ffn": "relu2",
            "core_ffn": "dense",
            "loops": given("mean_recurrence"),
            "injection": "lti",
            "prelude_norm": given("prelude_norm"),
            "state_init": "zero" if given("state_init") == "zero" else "normal",
            "lora_rank": 0,
            "halting": "none",
        },
    )
    mapped = Mapped(config, config.loops)
    made, vocabulary = mapped.made, given("vocab_size")
    add_tables(mapped, "transformer.wte.weight", "transformer.ln_f.weight", 1 / sqrt(dim))
    if config.prelude_norm:
        made["prelude_norm.weight"] = Made(("transformer.ln_prelude.weight",))
    made["readout.weight"] = Made(("transformer.C.weight",))
    injection = tuple(f"transformer.adapter.{name}" for name in ("dt_bias", "A_log", "B"))
    for index, name in enumerate(("dt", "log_a", "weight")):
        made[f"recurrence.injection.{name}"] = Made(injection, lambda *parts, index=index: within_bounds(*parts)[index])
    mapped.checks["transformer.adapter.A_log"] = decays
    mapped.unused.add("freqs_cis")
    mapped.checks["freqs_cis"] = rotations("freqs_cis", theta)

    parts = [("prelude", "prelude", prelude), ("core", "core_block", core), ("coda", "coda", coda)]
    places = [(part, theirs, layer) for part, theirs, count in parts for layer in range(count)]
    for index, (part, theirs, layer) in enumerate(places):
        ours = f"recurrence.blocks.{layer}" if part == "core" else f"{part}.{layer}"
        block = f"transformer.{theirs}.{layer}"
        made |= {f"{ours}.{name}": tensor for name, tensor in of_block(config, block).items()}
        table, gate = f"value_embeds.{index}.weight", f"{block}.attn.ve_gate.weight"
        if index in tables & gates:
            made[f"value_embeddings.{part}_{layer}.weight"] = Made((table,), rows_to(vocabulary))
            made[f"{ours}.attention.value_gate.weight"] = Made((gate,))
        else:  # one without the other is there and unused
            mapped.unused |= ({table} if index in tables else set()) | ({gate} if index in gates else set())
    return mapped


def value_layers(values: Values) -> tuple[set[int], set[int]]:
    """The layers, counted through, that have a table of value embeddings, and those that have a gate for one."""
    prelude, core, coda, loops, backprop = (
        option(values, DEFAULTS, name)
        for name in (
            *("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda"),
            *("mean_recurrence", "mean_backprop_depth"),
        )
    )
    layers = range(prelude + core + coda)
    # Gates count the layers of the coda as they come after all loops, and the last from the loops with gradient.
    counted = [index if index < prelude + core else index + core * (loops - 1) for index in layers]
    tables = {index for index in layers if index % 2 == (len(layers) - 1) % 2}
    return tables, {index for index in layers if counted[index] % 2 == (core * backprop - 1) % 2}


def of_block(config: ModelConfig, block: str) -> dict[str, Made]:
    """A block's tensors by their names in ours, but for what value embeddings need."""
    scale = sqrt(config.norm_eps / QK_EPS)
    return {
        "attention_norm.weight": Made((f"{block}.norm_1.weight",)),
        "attention.query.weight": Made((f"{block}.attn.c_q.weight",), halves(config.n_heads, scale)),
        "attention.key.weight": Made((f"{block}.attn.c_k.weight",), halves(config.n_heads, scale)),
        "attention.value.weight": Made((f"{block}.attn.c_v.weight",)),
        "attention.out.weight": Made((f"{block}.attn.c_proj.weight",)),
        "attention.query_norm.weight": filled(config.head_dim),
        "attention.key_norm.weight": filled(config.head_dim),
        "ffn_norm.weight": Made((f"{block}.norm_2.weight",)),
        "ffn.up.weight": Made((f"{block}.mlp.fc.weight",)),
        "ffn.down.weight": Made((f"{block}.mlp.proj.weight",), scaled(0.5)),
    }


def within_bounds(dt: Tensor, log_a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dt, log_a and B of the same injection, the first two within the bounds that ours keeps.

    Decay and injection depend on Delta exp(log_a) and Delta B only, Delta = softplus(dt): what is out of bounds is
    moved from one factor to the other.
    """
    delta = F.softplus(dt.double())
    rate = delta * log_a.double().exp()
    lowest, highest = F.softplus(torch.tensor(DT_BOUNDS, dtype=torch.float64, device=dt.device))
    new_delta = (rate / log_a.double().clamp(*LOG_A_BOUNDS).exp()).clamp(lowest, highest)
    new_dt = new_delta + torch.log(-torch.expm1(-new_delta))
    new_log_a = (rate / new_delta).log().clamp(*LOG_A_BOUNDS)
    inside = (dt == dt.clamp(*DT_BOUNDS)) & (log_a == log_a.clamp(*LOG_A_BOUNDS))
    moved = (delta / new_delta).where(~inside, 1).float()
    new_dt, new_log_a = torch.where(inside, dt, new_dt.float()), torch.where(inside, log_a, new_log_a.float())
    return new_dt, new_log_a, weight * moved.unsqueeze(1)


def decays(read: Read) -> str | None:
    """Check that no dimension keeps more of its state than ours can; one that keeps less than 1e-19 keeps nothing."""
    dt, log_a = read("transformer.adapter.dt_bias").double(), read("transformer.adapter.A_log").double()
    kept = torch.exp(-F.softplus(dt) * log_a.exp())
    slowest = F.softplus(torch.tensor(DT_BOUNDS[0], dtype=torch.float64)) * torch.tensor(LOG_A_BOUNDS[0]).double().exp()
    if kept.max() <= torch.exp(-slowest):
        return None
    return f"transformer.adapter keeps {kept.max():.8f} of a state; allowed: at most {torch.exp(-slowest):.8f}"


PARCAE = Architecture(
    name="parcae",
    models="SandyResearch/parcae-140m, -370m, -770m, -1.3b",
    recognises=lambda values: values.get("_class_name") == "ParcaeConfig",
    map=map_parcae,
    tokenizer="SandyResearch/parcae-tokenizer",
    end_token="<|eos|>",
)
