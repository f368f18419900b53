"""Huginn (arXiv 2502.05171), as published in `tomg-group-umd/huginn-0125`.

Sources: github.com/seal-rg/recurrent-pretraining at 0d9ed97 (recpre/raven_modeling_minimal.py), and
github.com/0z5a/vllm-rlt, whose port contains the values of the published configuration.

- x = 72.66 wte[ids], P blocks; T times u = adapter([h, x]) and N blocks; RMSNorm `ln_f`, M blocks, the same `ln_f`
  again, the tied head. No matmul has a bias.
- A block is norm_2(x + attention(norm_1 x)), then norm_4(x + mlp(norm_3 x)); the mlp is proj(silu(a) * b),
  [a, b] = fc x.
- Queries and keys get a bias (`qk_bias`) and are rotated in neighbouring pairs (base 50,000); they are not normalised.
- h_0 is truncated-normal noise of std 72.66 sqrt(2 / (5 D)), at inference too. Ours is zero at inference, and noise of
  std sqrt(2 / (5 D)) in training.

The norm before the coda becomes `readout_norm`, and the readout is the identity. If the model is trained further, the
two copies of `ln_f` diverge.
"""

from math import sqrt

from torch import Tensor

from mythos.hf.importers.architecture import (
    Architecture,
    Derived,
    MappedModel,
    Values,
    add_tables,
    check_rotations,
    exact_config,
    identity,
    option,
    pairs_to_halves,
    raven_fields,
    setting_problems,
)
from mythos.model.config import ModelConfig

DEFAULTS = {
    "block_size": 4096,
    "intermediate_size": 17920,
    "mean_recurrence": 32,
    "n_embd": 5280,
    "n_heads": 55,
    "n_layers_in_coda": 2,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "norm_eps": 1e-6,
    "qk_bias": True,
    "rope_base": 50_000,
    "tie_embeddings": True,
    "vocab_size": 65536,
}
"""Defaults of `RavenConfig`; other fields default to None, or to what REQUIRED allows."""

REQUIRED = {
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


def map_huginn(values: Values) -> MappedModel:
    """Map a Huginn model. Raises MythosError for a variant that our model cannot represent exactly."""

    def setting(name: str) -> int:
        return option(values, DEFAULTS, name)

    dim, heads = setting("n_embd"), setting("n_heads")
    problems = list(setting_problems(values, DEFAULTS, {**REQUIRED, "num_key_value_heads": (heads, None)}))
    config = exact_config(
        "huginn",
        problems,
        lambda: {
            **raven_fields(setting, heads),
            "qk_norm": False,
            "qk_bias": setting("qk_bias"),
            "rope_theta": float(setting("rope_base")),
            "block_norm": "sandwich",
            "ffn_dim": setting("intermediate_size"),
            "injection": "linear",
            "prelude_norm": False,
            "readout_norm": True,
        },
    )
    mapped = MappedModel(config, config.loops)
    tensors = mapped.tensors
    # Our embedding multiplies its rows by sqrt(D).
    scale = (values.get("init_values") or {}).get("embed_scale", sqrt(dim)) / sqrt(dim)
    add_tables(mapped, "transformer.wte.weight", "transformer.ln_f.weight", scale)
    tensors["readout_norm.weight"] = Derived(("transformer.ln_f.weight",))
    tensors["readout.weight"] = identity(dim)
    adapter = ("transformer.adapter.weight",)  # (D, 2 D): reads [h, x]
    tensors["recurrence.injection.state.weight"] = Derived(adapter, lambda weight: weight[:, :dim])
    tensors["recurrence.injection.input.weight"] = Derived(adapter, lambda weight: weight[:, dim:])
    mapped.unused.add("freqs_cis")
    mapped.checks["freqs_cis"] = check_rotations("freqs_cis", config.rope_theta)

    for ours, theirs, count in (
        ("prelude", "prelude", config.prelude_layers),
        ("recurrence.blocks", "core_block", config.core_layers),
        ("coda", "coda", config.coda_layers),
    ):
        for layer in range(count):
            block = block_tensors(config, f"transformer.{theirs}.{layer}")
            tensors |= {f"{ours}.{layer}.{name}": tensor for name, tensor in block.items()}
    return mapped


def block_tensors(config: ModelConfig, block: str) -> dict[str, Derived]:
    """The tensors of a block by our names; `block` is the prefix of the foreign names."""
    fused, bias, reorder = f"{block}.attn.Wqkv.weight", f"{block}.attn.qk_bias", pairs_to_halves(config.n_heads)
    parts = {
        "attention_norm.weight": Derived((f"{block}.norm_1.weight",)),
        "attention.query.weight": Derived((fused,), lambda weight: reorder(weight.chunk(3)[0])),
        "attention.key.weight": Derived((fused,), lambda weight: reorder(weight.chunk(3)[1])),
        "attention.value.weight": Derived((fused,), lambda weight: weight.chunk(3)[2]),
        "attention.out.weight": Derived((f"{block}.attn.proj.weight",)),
        "attention_out_norm.weight": Derived((f"{block}.norm_2.weight",)),
        "ffn_norm.weight": Derived((f"{block}.norm_3.weight",)),
        "ffn.gate_up.weight": Derived((f"{block}.mlp.fc.weight",)),
        "ffn.down.weight": Derived((f"{block}.mlp.proj.weight",)),
        "ffn_out_norm.weight": Derived((f"{block}.norm_4.weight",)),
    }

    def bias_of(index: int, both: Tensor) -> Tensor:
        return reorder(both[index].flatten())

    if config.qk_bias:
        parts["attention.query_bias"] = Derived((bias,), lambda both: bias_of(0, both))
        parts["attention.key_bias"] = Derived((bias,), lambda both: bias_of(1, both))
    return parts


HUGINN = Architecture(
    name="huginn",
    models="tomg-group-umd/huginn-0125",
    recognises=lambda values: values.get("model_type") == "huginn_raven",
    map=map_huginn,
)
