"""Huginn (arXiv 2502.05171), as `tomg-group-umd/huginn-0125` publishes it.

Read in github.com/seal-rg/recurrent-pretraining at 0d9ed97 (recpre/raven_modeling_minimal.py), and in
github.com/0z5a/vllm-rlt, whose port gives the values of the published configuration.

- x = 72.66 wte[ids], P blocks; T times u = adapter([h, x]) and N blocks; RMSNorm `ln_f`, M blocks, the same `ln_f`
  again, the tied head. No product has a bias.
- A block is norm_2(x + attention(norm_1 x)), then norm_4(x + mlp(norm_3 x)); the mlp is proj(silu(a) * b),
  [a, b] = fc x.
- Queries and keys get a bias (`qk_bias`) and are rotated in neighbouring pairs (base 50,000); they are not normalised.
- h_0 is truncated-normal noise of std 72.66 sqrt(2 / (5 D)), at inference too; ours is zero there, and noise of std
  sqrt(2 / (5 D)) in training.

The norm before the coda becomes `readout_norm`, and the readout the identity. In training on, the two copies of `ln_f`
part.
"""

from math import sqrt

from torch import Tensor

from mythos.hf.importers.architecture import (
    Architecture,
    Made,
    Mapped,
    Values,
    add_tables,
    checked,
    differing,
    halves,
    identity,
    option,
    rotations,
)
from mythos.model.config import ModelConfig

DEFAULTS = {
    "bias": False,
    "block_class_name": "SandwichBlock",
    "block_size": 4096,
    "injection_type": "linear",
    "intermediate_size": 17920,
    "mean_recurrence": 32,
    "mlp_class_name": "GatedMLP",
    "n_embd": 5280,
    "n_heads": 55,
    "n_layers_in_coda": 2,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "norm_eps": 1e-6,
    "qk_bias": True,
    "rope_base": 50_000,
    "state_init": "like-init",
    "test_time_noise": 0,
    "tie_embeddings": True,
    "vocab_size": 65536,
}
"""Of `RavenConfig`; what is not here is None."""

NEEDED = {
    "bias": False,
    "block_class_name": "SandwichBlock",
    "injection_type": "linear",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "norm_class_name": ("RMSNorm_llama", "RMSNorm"),
    "rope_scaling": None,
    "state_init": "like-init",
    "test_time_noise": 0,
}


def map_huginn(values: Values) -> Mapped:
    """Our tensors as made of a Huginn's. Raises MythosError for a variant that cannot be put into ours exactly."""

    def given(name: str) -> int:
        return option(values, DEFAULTS, name)

    dim, heads, vocabulary = given("n_embd"), given("n_heads"), given("vocab_size")
    problems = list(differing(values, DEFAULTS, {**NEEDED, "num_key_value_heads": (heads, None)}))
    config = checked(
        "huginn",
        problems,
        lambda: {
            "vocab_size": vocabulary,
            "dim": dim,
            "prelude_layers": given("n_layers_in_prelude"),
            "core_layers": given("n_layers_in_recurrent_block"),
            "coda_layers": given("n_layers_in_coda"),
            "context_length": given("block_size"),
            "tie_embeddings": given("tie_embeddings"),
            "attention": "gqa",
            "n_heads": heads,
            "n_kv_heads": heads,
            "head_dim": dim // heads,
            "qk_norm": False,
            "qk_bias": given("qk_bias"),
            "rope_theta": float(given("rope_base")),
            "norm_eps": given("norm_eps"),
            "block_norm": "sandwich",
            "ffn_dim": given("intermediate_size"),
            "core_ffn": "dense",
            "loops": given("mean_recurrence"),
            "injection": "linear",
            "prelude_norm": False,
            "readout_norm": True,
            "lora_rank": 0,
            "halting": "none",
        },
    )
    mapped = Mapped(config, config.loops)
    made, scale = mapped.made, (values.get("init_values") or {}).get("embed_scale", sqrt(dim)) / sqrt(dim)
    add_tables(mapped, "transformer.wte.weight", "transformer.ln_f.weight", scale)
    made["readout_norm.weight"] = Made(("transformer.ln_f.weight",))
    made["readout.weight"] = identity(dim)
    made["recurrence.injection.state.weight"] = Made(("transformer.adapter.weight",), lambda weight: weight[:, :dim])
    made["recurrence.injection.input.weight"] = Made(("transformer.adapter.weight",), lambda weight: weight[:, dim:])
    mapped.unused.add("freqs_cis")
    mapped.checks["freqs_cis"] = rotations("freqs_cis", config.rope_theta)

    for ours, theirs, count in (
        ("prelude", "prelude", config.prelude_layers),
        ("recurrence.blocks", "core_block", config.core_layers),
        ("coda", "coda", config.coda_layers),
    ):
        for layer in range(count):
            block = of_block(config, f"transformer.{theirs}.{layer}")
            made |= {f"{ours}.{layer}.{name}": tensor for name, tensor in block.items()}
    return mapped


def of_block(config: ModelConfig, block: str) -> dict[str, Made]:
    """A block's tensors by their names in ours."""
    fused, bias, reorder = f"{block}.attn.Wqkv.weight", f"{block}.attn.qk_bias", halves(config.n_heads)
    parts = {
        "attention_norm.weight": Made((f"{block}.norm_1.weight",)),
        "attention.query.weight": Made((fused,), lambda weight: reorder(weight.chunk(3)[0])),
        "attention.key.weight": Made((fused,), lambda weight: reorder(weight.chunk(3)[1])),
        "attention.value.weight": Made((fused,), lambda weight: weight.chunk(3)[2]),
        "attention.out.weight": Made((f"{block}.attn.proj.weight",)),
        "attention_out_norm.weight": Made((f"{block}.norm_2.weight",)),
        "ffn_norm.weight": Made((f"{block}.norm_3.weight",)),
        "ffn.gate_up.weight": Made((f"{block}.mlp.fc.weight",)),
        "ffn.down.weight": Made((f"{block}.mlp.proj.weight",)),
        "ffn_out_norm.weight": Made((f"{block}.norm_4.weight",)),
    }

    def of_bias(index: int, both: Tensor) -> Tensor:
        return reorder(both[index].flatten())

    if config.qk_bias:
        parts["attention.query_bias"] = Made((bias,), lambda both: of_bias(0, both))
        parts["attention.key_bias"] = Made((bias,), lambda both: of_bias(1, both))
    return parts


HUGINN = Architecture(
    name="huginn",
    models="tomg-group-umd/huginn-0125",
    recognises=lambda values: values.get("model_type") == "huginn_raven",
    map=map_huginn,
)
