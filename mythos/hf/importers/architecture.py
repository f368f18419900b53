"""What an importer consists of: how to recognise an architecture, and how to compute our tensors from its tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mythos.config.presets import PRESETS, preset_config
from mythos.errors import MythosError
from mythos.model.config import ModelConfig, model_contradictions, padded_vocab_size

Values = Mapping[str, Any]
"""The content of a config.json."""
Read = Callable[[str], Tensor]
"""Reads a foreign tensor by name, in float32."""
Check = Callable[[Read], str | None]
"""Returns the problem as text, or None."""


def unchanged(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


@dataclass(frozen=True)
class Derived:
    """One of our tensors as a function of foreign tensors, which are passed in float32.

    `compute` must also work on the meta device, where shapes are compared before anything is read.
    """

    sources: tuple[str, ...]
    """Names of the foreign tensors."""
    compute: Callable[..., Tensor] = unchanged


@dataclass
class MappedModel:
    """A foreign model in terms of ours: the configuration, and how to compute every tensor."""

    config: ModelConfig
    mean_loops: int
    """Mean number of loops in its training."""
    tensors: dict[str, Derived] = field(default_factory=dict)
    """By our names."""
    unused: set[str] = field(default_factory=set)
    """Foreign tensors that do not influence the result."""
    checks: dict[str, Check] = field(default_factory=dict)
    """Conditions for the import to be exact, by the foreign tensor they read. Skipped if the tensor is missing."""


@dataclass(frozen=True)
class Architecture:
    """A known architecture: see `mythos.hf.importers.KNOWN`."""

    name: str
    models: str
    """Where its models are published, for error messages."""
    recognises: Callable[[Values], bool]
    """Whether a config.json is of this architecture."""
    map: Callable[[Values], MappedModel]
    """Raises MythosError for a configuration that our model cannot represent exactly."""
    tokenizer: str | None = None
    """Hub repository of the tokenizer, if it is not with the weights."""
    end_token: str | None = None
    """The end-of-document token, if the tokenizer's files do not name one."""


def option(values: Values, defaults: Values, name: str) -> Any:
    """A value of a config.json; if it is absent, the default of the architecture's own configuration class."""
    return values.get(name, defaults.get(name))


def setting_problems(values: Values, defaults: Values, required: Values) -> Iterator[str]:
    """One problem for every value that differs from the required one; a tuple lists several allowed values.

    A default that is allowed need not be in `defaults`: a name in neither `values` nor `defaults` is no problem.
    """
    for name, allowed in required.items():
        value = option(values, defaults, name)
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        if (name in values or name in defaults) and value not in choices:
            yield f"{name}: got {value!r}; allowed: {' or '.join(map(repr, choices))}"


def llama_problems(values: Values, sizes: Iterable[str]) -> Iterator[str]:
    """One problem for every missing size of a configuration like Llama's, and for layers without full attention."""
    for name in sizes:
        if not isinstance(values.get(name), int):
            yield f"{name} is missing"
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        yield "layer_types: allowed: full_attention only"


def llama_fields(values: Values, defaults: Values) -> dict[str, Any]:
    """Fields of the model section that a configuration like Llama's decides. Raises KeyError for a missing size."""
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    return {
        "vocab_size": values["vocab_size"],
        "dim": dim,
        "context_length": option(values, defaults, "max_position_embeddings"),
        "tie_embeddings": option(values, defaults, "tie_word_embeddings"),
        "attention": "gqa",
        "n_heads": heads,
        "n_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or dim // heads,
        "rope_theta": float(option(values, defaults, "rope_theta")),
        "norm_eps": float(option(values, defaults, "rms_norm_eps")),
        "ffn_dim": values["intermediate_size"],
        "core_ffn": "dense",
        "prelude_norm": False,
        "lora_rank": 0,
    }


def raven_fields(setting: Callable[[str], Any], heads: int) -> dict[str, Any]:
    """Fields of the model section that Huginn and Parcae, which come from one code base, call by the same names."""
    dim = setting("n_embd")
    return {
        "vocab_size": setting("vocab_size"),
        "dim": dim,
        "prelude_layers": setting("n_layers_in_prelude"),
        "core_layers": setting("n_layers_in_recurrent_block"),
        "coda_layers": setting("n_layers_in_coda"),
        "context_length": setting("block_size"),
        "tie_embeddings": setting("tie_embeddings"),
        "attention": "gqa",
        "n_heads": heads,
        "n_kv_heads": heads,
        "head_dim": dim // heads,
        "norm_eps": setting("norm_eps"),
        "core_ffn": "dense",
        "loops": setting("mean_recurrence"),
        "lora_rank": 0,
        "halting": "none",
    }


def exact_config(name: str, problems: list[str], fields: Callable[[], dict[str, Any]]) -> ModelConfig:
    """The model section with these fields, unless there are problems already or the section refuses them.

    Its preset is set to the one that it equals, if there is one.

    Raises MythosError listing all problems.
    """
    config = None
    if not problems:
        try:
            config = ModelConfig(**fields())
            preset = next((name for name in PRESETS if preset_config(name, preset=config.preset) == config), None)
            config = config.model_copy(update={"preset": preset or config.preset})
            problems = [f"{', '.join(names)}: {message}" for names, message in model_contradictions(config)]
        except (ValueError, TypeError, KeyError) as error:
            problems = [" ".join(str(error).split())]
    if config is None or problems:
        raise MythosError(f"this {name} model cannot be imported exactly: " + "; ".join(problems))
    return config


# --- shared by several architectures

LLAMA_LAYER = {
    "attention_norm": ("input_layernorm",),
    "attention.query": ("self_attn.q_proj",),
    "attention.key": ("self_attn.k_proj",),
    "attention.value": ("self_attn.v_proj",),
    "attention.out": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": ("mlp.down_proj",),
}
"""Tensors of our block, and the tensors of a Llama layer that they concatenate. Both rotate the halves of a head."""


def add_llama_layer(mapped: MappedModel, block: str, layer: int, names: Mapping[str, tuple[str, ...]]) -> None:
    """Add our block as computed from a foreign layer; `names` is LLAMA_LAYER, possibly with further tensors."""
    for ours, theirs in names.items():
        sources = tuple(f"model.layers.{layer}.{name}.weight" for name in theirs)
        mapped.tensors[f"{block}.{ours}.weight"] = Derived(sources, lambda *weights: torch.cat(weights))


def add_tables(mapped: MappedModel, table: str, norm: str, scale: float = 1.0) -> None:
    """Add embedding, final norm and head, given the names of the foreign embedding and norm; the head is `lm_head`.

    The embedding is multiplied by `scale`. If it is also the head, the final norm is divided by `scale`, so that the
    logits stay the same.
    """
    tensors, vocab_size = mapped.tensors, int(mapped.config.vocab_size)
    tensors["embedding.weight"] = Derived((table,), resized_table(vocab_size, scale))
    if mapped.config.tie_embeddings:
        tensors["norm.weight"] = Derived((norm,), scaled(1 / scale))
        mapped.unused.add("lm_head.weight")
        mapped.checks["lm_head.weight"] = check_tied("lm_head.weight", table)
    else:
        tensors["norm.weight"] = Derived((norm,))
        tensors["head.weight"] = Derived(("lm_head.weight",), resized_table(vocab_size))


# --- tensor functions for `Derived.compute`


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    """Multiply by a number."""
    return lambda tensor: tensor * factor


def resized_table(vocab_size: int, factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Cut a table (V, n) to `vocab_size` rows, pad it with zeros to our padded size, and multiply it by a number."""
    rows = padded_vocab_size(vocab_size)

    def compute(table: Tensor) -> Tensor:
        return torch.nn.functional.pad(table[:vocab_size], (0, 0, 0, rows - vocab_size)) * factor

    return compute


def pairs_to_halves(heads: int, factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Reorder query or key rows (H K, ...) from RoPE on neighbouring pairs to RoPE on the halves of a head."""

    def compute(weight: Tensor) -> Tensor:
        pairs = weight.unflatten(0, (heads, -1, 2))  # (H, K / 2, 2, ...)
        return pairs.transpose(1, 2).reshape(weight.shape) * factor

    return compute


def constant(*shape: int, value: float = 1.0) -> Derived:
    """A tensor without a foreign counterpart, filled with one value."""
    return Derived((), lambda: torch.full(shape, value))


def identity(dim: int) -> Derived:
    """The identity matrix (D, D)."""
    return Derived((), lambda: torch.eye(dim))


# --- checks of foreign tensors


def check_rotations(name: str, theta: float) -> Check:
    """Check that a stored table (1, S, 1, K / 2, 2) of cosines and sines is RoPE of base `theta`, as we compute it."""

    def check(read: Read) -> str | None:
        table = read(name)[0, :, 0]
        frequency = theta ** (-torch.arange(table.shape[1], dtype=torch.float64) / table.shape[1])
        angle = torch.arange(len(table)).double().unsqueeze(1) * frequency
        expected = torch.stack((angle.cos(), angle.sin()), dim=-1)
        # Their angles are float32 products, and the table may have been rounded to bfloat16, hence the tolerance.
        if (table.double() - expected).abs().max() < 0.01:
            return None
        return f"{name} is not the table of rotations of base {theta:g}"

    return check


def check_tied(head: str, table: str) -> Check:
    """Check that a head which is stored in addition to the embedding equals it."""

    def check(read: Read) -> str | None:
        return None if torch.equal(read(head), read(table)) else f"{head} should equal {table}, and does not"

    return check
