"""A dense pretrained transformer as a looped model: some of its layers become prelude, core and coda.

After "Teaching Pretrained Language Models to Think Deeper with Retrofitted Recurrence" (arXiv 2511.07384): early layers
make the prelude, later ones core and coda, and layers between may be left out. Its models concatenate state and input
into a linear adapter; ours start from u = A * h + e, which is Delta * B = I and no norm on e, so that at one loop from
a zero state the looped model computes what its layers compute one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import expm1, log
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mythos.config.inherited import TOKENIZER_FILE
from mythos.errors import MythosError
from mythos.hf.card import model_card
from mythos.hf.export import SHARD_SIZE, Exported, check_destination, write_export
from mythos.hf.foreign import foreign_model, located, read_values
from mythos.hf.importers.architecture import (
    LLAMA_LAYER,
    Architecture,
    Mapped,
    Values,
    add_llama_layer,
    add_tables,
    checked,
    differing,
    filled,
    identity,
    option,
    unlike_llama,
)
from mythos.hf.importing import map_foreign, prepare_tokenizer, stored_foreign

DECAY = 0.1
"""Entries of A at the start: so small that more loops change little, which trained on better than 0.447."""
DECAYS = (0.001, 0.997)
"""What it may be, for log_a to be within its bounds."""
LOOPS = 4
TRAIN_FILE = "train.yaml"

DEFAULTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
"""Of `LlamaConfig` and those like it; what is not here is None."""
NEEDED = {"attention_bias": False, "hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NORMED = {"llama": False, "mistral": False, "qwen3": True}
"""Whether queries and keys are normalised, by the architectures that are known, which are else alike."""
QK_NORMS = {"attention.query_norm": ("self_attn.q_norm",), "attention.key_norm": ("self_attn.k_norm",)}


@dataclass(frozen=True)
class Layers:
    """Which layers of the dense model, counted from 0, become what."""

    prelude: Sequence[int]
    core: Sequence[int]
    coda: Sequence[int]

    def __post_init__(self) -> None:
        """Raises MythosError for an empty core, and for layers that do not ascend."""
        if not self.core:
            raise MythosError("--core: got no layers; give those that are to be looped, e.g. 4-11")
        for before, after in pairwise(self.chosen):
            if after <= before:
                raise MythosError(
                    f"--prelude, --core, --coda: got layer {after} after layer {before}; each layer may be taken once, "
                    "and they must ascend from prelude to core to coda"
                )

    @property
    def chosen(self) -> list[int]:
        """All of them, in their order."""
        return [*self.prelude, *self.core, *self.coda]


@dataclass(frozen=True)
class Retrofitted:
    """What was made."""

    exported: Exported
    architecture: str
    dropped: list[int]
    """Layers that were left out."""


def retrofit(
    source: str | Path,
    folder: str | Path,
    layers: Layers,
    *,
    loops: int = LOOPS,
    decay: float = DECAY,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    max_shard_size: int | str = SHARD_SIZE,
) -> Retrofitted:
    """Write a looped model made of a dense one's layers as an export, with a configuration that trains it on.

    The folder is written whole or not at all; weights are read tensor by tensor.

    Args:
        source: a folder, or OWNER/NAME of a repository of the hub.
        folder: new or empty.
        layers: what becomes of which layer.
        loops: mean of training that the curriculum ends at.
        decay: entries of A at the start, 0.001 to 0.997.
        revision: commit, branch or tag of the repository.
        tokenizer: folder or repository (default: what lies with the weights).
        dtype: see `mythos.hf.export.export_model`.
        max_shard_size: see there.

    Raises:
        MythosError: the folder has something in it or cannot be written; the source cannot be read, is of an
            architecture that is not known or of a variant that ours has no equal of; it has not so many layers; tensors
            are missing, left over or of other shapes; or there is no tokenizer that fits.
    """
    folder = check_destination(folder, dtype)
    if loops < 1:
        raise MythosError(f"--loops: got {loops}; give at least 1")
    if not DECAYS[0] <= decay <= DECAYS[1]:
        raise MythosError(f"--decay: got {decay:g}; allowed: {DECAYS[0]} to {DECAYS[1]}")
    place = located(source, revision)
    architecture = dense_architecture(place, read_values(place), layers, loops, decay)
    with foreign_model(place) as foreign, TemporaryDirectory() as aside:
        mapped = map_foreign(foreign, architecture)
        if tokenizer is None and not (place / TOKENIZER_FILE).is_file():
            raise MythosError(f"{place} has no {TOKENIZER_FILE}: give the model's tokenizer by --tokenizer")
        prepared = prepare_tokenizer(tokenizer or place, architecture, mapped, Path(aside) / "tokenizer")
        with stored_foreign(foreign, mapped, prepared, str(source)) as stored:
            name = str(source if place != Path(source) else place.name)
            card = model_card(stored, folder.name, []) + f"\n## Source\n\nRetrofitted from `{name}`: {_told(layers)}.\n"
            texts = {TRAIN_FILE: train_yaml(folder, mapped, name, layers)}
            exported = write_export(stored, folder, card, dtype, max_shard_size, texts)
    count = foreign.values["num_hidden_layers"]
    return Retrofitted(exported, architecture.name, [n for n in range(count) if n not in layers.chosen])


def dense_architecture(place: Path, values: Values, layers: Layers, loops: int, decay: float) -> Architecture:
    """How a dense model's tensors become those of a looped one.

    Raises MythosError for an architecture that is not known.
    """
    kind = str(values.get("model_type"))
    if kind not in NORMED:
        raise MythosError(
            f"{place} is of an architecture that is not known: model_type {kind!r}; known: {', '.join(NORMED)}"
        )
    return Architecture(kind, "", lambda _: True, lambda given: map_dense(kind, given, layers, loops, decay))


def map_dense(kind: str, values: Values, layers: Layers, loops: int, decay: float) -> Mapped:
    """Our tensors as made of a dense model's. Raises MythosError for a variant that cannot be put into ours exactly."""
    problems = [*unlike_llama(values, SIZES), *differing(values, DEFAULTS, NEEDED)]
    count = values.get("num_hidden_layers") or 0
    if layers.chosen[-1] >= count or layers.chosen[0] < 0:
        problems.append(f"it has layers 0 to {count - 1}, and {layers.chosen[-1]} was asked for")
    if kind == "mistral" and values.get("sliding_window") is not None:
        problems.append(f"sliding_window: got {values['sliding_window']}; allowed: null")
    # transformers writes one mapping since 5.0, and wrote two values before.
    rope = {"rope_theta": option(values, DEFAULTS, "rope_theta")} | dict(
        values.get("rope_parameters") or values.get("rope_scaling") or {}
    )
    form = rope.get("rope_type", rope.get("type", "default"))
    if form != "default":
        problems.append(f"rope_scaling: got {form}; allowed: none, for ours rotates by the plain frequencies")
    dim, heads, vocabulary = (values.get(name, 1) for name in ("hidden_size", "num_attention_heads", "vocab_size"))
    config = checked(
        kind,
        problems,
        lambda: {
            "vocab_size": vocabulary,
            "dim": dim,
            "prelude_layers": len(layers.prelude),
            "core_layers": len(layers.core),
            "coda_layers": len(layers.coda),
            "context_length": option(values, DEFAULTS, "max_position_embeddings"),
            "tie_embeddings": option(values, DEFAULTS, "tie_word_embeddings"),
            "scale_embeddings": False,
            "attention": "gqa",
            "n_heads": heads,
            "n_kv_heads": values.get("num_key_value_heads") or heads,
            "head_dim": values.get("head_dim") or dim // heads,
            "qk_norm": NORMED[kind],
            "rope_theta": float(rope["rope_theta"]),
            "norm_eps": float(option(values, DEFAULTS, "rms_norm_eps")),
            "ffn_dim": values["intermediate_size"],
            "core_ffn": "dense",
            "loops": loops,
            "injection": "lti",
            "prelude_norm": False,
            "state_init": "zero",
            "lora_rank": 0,
        },
    )
    mapped = Mapped(config, loops)
    made = mapped.made
    add_tables(mapped, "model.embed_tokens.weight", "model.norm.weight")
    made["readout.weight"] = identity(dim)
    made["recurrence.injection.dt"] = filled(dim, value=log(expm1(1)))  # Delta = 1
    made["recurrence.injection.log_a"] = filled(dim, value=log(-log(decay)))
    made["recurrence.injection.weight"] = identity(dim)
    names = LLAMA_LAYER | (QK_NORMS if NORMED[kind] else {})
    parts = {"prelude": layers.prelude, "recurrence.blocks": layers.core, "coda": layers.coda}
    for part, numbers in parts.items():
        for place, layer in enumerate(numbers):
            add_llama_layer(mapped, f"{part}.{place}", layer, names)
    for layer in range(count):
        mapped.unused.add(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq")  # earlier versions stored it
        if layer not in layers.chosen:
            mapped.unused |= {f"model.layers.{layer}.{name}.weight" for of in names.values() for name in of}
    return mapped


TRAIN = """\
# Trains {name} on, retrofitted with loops: {told}.
# The curriculum and the optimizer are those of arXiv 2511.07384 (docs/finetuning.md). Its learning rate is scaled to
# what updates of Muon measure here.
run:
  name: {run}
model: {{}}  # that of train.init_from
tokenizer: {{}}  # likewise
data:
  # The first phase heals what was left out: take text like that of the pretraining, for instance
  #   kind: hub
  #   dataset: HuggingFaceFW/fineweb-edu
  #   subset: sample-10BT
  kind: embedded
  streams: 8
  sequence_length: {length}
depth:
  mean: {loops}
  backprop: {backprop}
  curriculum: {{shape: 1-sqrt, over: 0.75, start: 1}}
optim:
  name: muon
  lr: 1.0e-4
  weight_decay: 1.0e-4
  schedule: wsd
  warmup: 0.005
  decay: 0.6
  min_lr: 0.001
train:
  init_from: {folder}
  steps: 25000
  global_batch: 64
  micro_batch: 8
eval:
  loops: {depths}
"""


def train_yaml(folder: Path, mapped: Mapped, name: str, layers: Layers) -> str:
    """A configuration that trains a retrofitted model in `folder` on."""
    loops = mapped.mean_loops
    told: dict[str, Any] = {
        "name": name,
        "told": _told(layers),
        "run": _quoted(folder.name),
        "folder": _quoted(str(folder)),
        "length": min(1024, mapped.config.context_length),
        "loops": loops,
        "backprop": min(8, 2 * loops),
        "depths": sorted({1, 2, 4, 8, loops, 2 * loops}),
    }
    return TRAIN.format(**told)


def _quoted(text: str) -> str:
    """Text as YAML, whatever is in it."""
    return "'" + text.replace("'", "''") + "'"


def _told(layers: Layers) -> str:
    parts = {"prelude": layers.prelude, "core": layers.core, "coda": layers.coda}
    return ", ".join(f"{part} {_numbers(numbers)}" for part, numbers in parts.items())


def _numbers(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers)) or "none"
