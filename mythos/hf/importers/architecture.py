"""How published looped models are told apart and put into ours: what an importer of an architecture is made of."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mythos.config.presets import PRESETS, preset_config
from mythos.errors import MythosError
from mythos.model.config import ModelConfig, model_contradictions, padded_vocab_size

Values = Mapping[str, Any]
"""What a config.json says."""
Read = Callable[[str], Tensor]
"""Gives a foreign tensor by its name, in float32."""
Check = Callable[[Read], str | None]
"""Tells what is wrong, or None."""


def unchanged(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


@dataclass(frozen=True)
class Made:
    """How one of our tensors is made: of which foreign ones, given in float32, and by what.

    `make` must also work on the meta device, where shapes are compared before anything is read.
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor] = unchanged


@dataclass
class Mapped:
    """Every tensor of a model as another architecture has it."""

    config: ModelConfig
    mean_loops: int
    """Loops that it was trained with on average."""
    made: dict[str, Made] = field(default_factory=dict)
    """By our names."""
    unused: set[str] = field(default_factory=set)
    """Foreign tensors that no result depends on."""
    checks: dict[str, Check] = field(default_factory=dict)
    """What must hold of a foreign tensor, where it is there, for the import to be exact."""


@dataclass(frozen=True)
class Architecture:
    """An architecture that is known: see `mythos.hf.importers.KNOWN`."""

    name: str
    models: str
    """Where its models are published, for people."""
    recognises: Callable[[Values], bool]
    """Whether a config.json is of this architecture."""
    map: Callable[[Values], Mapped]
    """Raises MythosError where a configuration asks for what our model does not have."""
    tokenizer: str | None = None
    """Repository of the tokenizer, where it is not with the weights."""
    end_token: str | None = None
    """What ends a document, where the tokenizer's files do not say."""


def option(values: Values, defaults: Values, name: str) -> Any:
    """A value of a config.json; what is absent has the default of the architecture's own class."""
    return values.get(name, defaults.get(name))


def differing(values: Values, defaults: Values, needed: Values) -> Iterator[str]:
    """A problem for every value that is not what our model needs; a tuple lists several that are as good."""
    for name, allowed in needed.items():
        given = option(values, defaults, name)
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        if given not in choices:
            yield f"{name}: got {given!r}; allowed: {' or '.join(map(repr, choices))}"


def unlike_llama(values: Values, sizes: Iterable[str]) -> Iterator[str]:
    """A problem for every size that a configuration like Llama's lacks, and for layers that do not see all before."""
    for name in sizes:
        if not isinstance(values.get(name), int):
            yield f"{name} is missing"
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        yield "layer_types: allowed: full_attention only"


def checked(name: str, problems: list[str], fields: Callable[[], dict[str, Any]]) -> ModelConfig:
    """The model section of these fields, if there are no problems with what was given, or with them.

    It has the name of the preset that it equals, if there is one.

    Raises MythosError telling all of them.
    """
    config = None
    if not problems:
        try:
            config = ModelConfig(**fields())
            preset = next((name for name in PRESETS if preset_config(name, preset=config.preset) == config), None)
            config = config.model_copy(update={"preset": preset or config.preset})
            problems = [f"{', '.join(names)}: {told}" for names, told in model_contradictions(config)]
        except (ValueError, TypeError, KeyError) as error:
            problems = [" ".join(str(error).split())]
    if config is None or problems:
        raise MythosError(f"this {name} model cannot be imported exactly: " + "; ".join(problems))
    return config


# --- what several architectures share

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
"""The tensors of a block, and the ones of a layer of Llama's that they are made of; both rotate halves of a head."""


def add_llama_layer(mapped: Mapped, block: str, layer: int, names: Mapping[str, tuple[str, ...]]) -> None:
    """Add a block of ours, made of a layer of theirs; `names` is LLAMA_LAYER, or more than it."""
    for ours, theirs in names.items():
        parts = tuple(f"model.layers.{layer}.{name}.weight" for name in theirs)
        mapped.made[f"{block}.{ours}.weight"] = Made(parts, lambda *weights: torch.cat(weights))


def add_tables(mapped: Mapped, table: str, norm: str, scale: float = 1.0) -> None:
    """Add embedding, final norm and head, of the names of their embedding and norm; their head is `lm_head`.

    Where the embedding is the head too, `scale`, which the embedding is multiplied by, is taken from the norm.
    """
    config = mapped.config
    mapped.made["embedding.weight"] = Made((table,), rows_to(config.vocab_size, scale))
    if config.tie_embeddings:
        mapped.made["norm.weight"] = Made((norm,), scaled(1 / scale))
        mapped.unused.add("lm_head.weight")
        mapped.checks["lm_head.weight"] = tied("lm_head.weight", table)
    else:
        mapped.made["norm.weight"] = Made((norm,))
        mapped.made["head.weight"] = Made(("lm_head.weight",), rows_to(config.vocab_size))


# --- what is done to tensors


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    """Multiply by a number."""
    return lambda tensor: tensor * factor


def rows_to(vocab_size: int, factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    """A table (V, n) with as many rows as ours has, times a number: rows that mean no token are zeros, or cut off."""
    rows = padded_vocab_size(vocab_size)

    def make(table: Tensor) -> Tensor:
        return torch.nn.functional.pad(table[:vocab_size], (0, 0, 0, rows - vocab_size)) * factor

    return make


def halves(heads: int, factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Rows (H d, ...) of queries or keys whose neighbours are rotated together, so that halves of a head are."""

    def make(weight: Tensor) -> Tensor:
        pairs = weight.unflatten(0, (heads, -1, 2))
        return pairs.transpose(1, 2).reshape(weight.shape) * factor

    return make


def filled(*shape: int, value: float = 1.0) -> Made:
    """A tensor that the other architecture has no counterpart of."""
    return Made((), lambda: torch.full(shape, value))


def identity(dim: int) -> Made:
    """A product that changes nothing."""
    return Made((), lambda: torch.eye(dim))


def rotations(name: str, theta: float) -> Check:
    """Check a stored table (1, S, 1, d / 2, 2) of cosines and sines, of which ours is computed."""

    def check(read: Read) -> str | None:
        table = read(name)[0, :, 0]
        frequency = theta ** (-torch.arange(table.shape[1], dtype=torch.float64) / table.shape[1])
        angle = torch.arange(len(table)).double().unsqueeze(1) * frequency
        expected = torch.stack((angle.cos(), angle.sin()), dim=-1)
        # Their angles are float32 products, or even rounded to bfloat16 once made.
        if (table.double() - expected).abs().max() < 0.01:
            return None
        return f"{name} is not the table of rotations of base {theta:g}"

    return check


def tied(head: str, table: str) -> Check:
    """Check that a head that is stored once more is the embedding."""

    def check(read: Read) -> str | None:
        return None if torch.equal(read(head), read(table)) else f"{head} should be {table}, and is not"

    return check
