"""Converts a dense pretrained transformer into a looped model: its layers become prelude, core and coda.

After "Teaching Pretrained Language Models to Think Deeper with Retrofitted Recurrence" (arXiv 2511.07384): early layers
become the prelude, later ones core and coda, and layers in between may be dropped. The paper's models concatenate state
and input into a linear adapter. Ours start from u = A * h + e, that is Delta * B = I and no norm on e, so one loop from
a zero state computes exactly the chosen layers in sequence.
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
from mythos.hf import SHARD_SIZE
from mythos.hf.card import model_card
from mythos.hf.export import Exported, check_destination, write_export
from mythos.hf.foreign import foreign_model, local_folder, read_values
from mythos.hf.importers.architecture import (
    LLAMA_LAYER,
    Architecture,
    MappedModel,
    Values,
    add_llama_layer,
    add_tables,
    constant,
    exact_config,
    identity,
    llama_fields,
    llama_problems,
    option,
    setting_problems,
)
from mythos.hf.importing import map_foreign, prepare_tokenizer, public_name, stored_foreign

DECAY = 0.1
"""Initial entries of A. So small that further loops change little at first; trained better than 0.447 in our runs."""
DECAYS = (0.001, 0.997)
"""Allowed range of the initial decay: outside, log_a would exceed its bounds."""
LOOPS = 4
"""Default mean number of loops at the end of the curriculum."""
TRAIN_FILE = "train.yaml"

DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
"""Defaults of `LlamaConfig` and similar classes; other fields default to None, or to what REQUIRED allows."""
REQUIRED = {"attention_bias": False, "hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NORMED = {"llama": False, "mistral": False, "qwen3": True}
"""Known architectures, and whether they normalise queries and keys. Otherwise they are the same."""
QK_NORMS = {"attention.query_norm": ("self_attn.q_norm",), "attention.key_norm": ("self_attn.k_norm",)}


@dataclass(frozen=True)
class Layers:
    """Layers of the dense model, counted from 0, that become prelude, core and coda."""

    prelude: Sequence[int]
    core: Sequence[int]
    coda: Sequence[int]

    def __post_init__(self) -> None:
        """Raises MythosError for an empty core, and for layers that do not ascend."""
        if not self.core:
            raise MythosError("--core: got no layers; give the layers to loop, e.g. 4-11")
        for before, after in pairwise(self.chosen):
            if after <= before:
                raise MythosError(
                    f"--prelude, --core, --coda: got layer {after} after layer {before}; each layer may occur "
                    "once, and they must ascend from prelude to core to coda"
                )

    @property
    def chosen(self) -> list[int]:
        """The layers of all three parts, ascending."""
        return [*self.prelude, *self.core, *self.coda]


@dataclass(frozen=True)
class Retrofitted:
    """The result of a retrofit."""

    exported: Exported
    architecture: str
    dropped: list[int]
    """Layers of the dense model that were not used."""


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
    """Write a looped model built from a dense model's layers as an export, with a configuration to continue training.

    The folder appears complete or not at all; weights are read tensor by tensor.

    Args:
        source: a folder, or OWNER/NAME of a hub repository.
        folder: new or empty.
        layers: the layers of each part.
        loops: mean number of loops at the end of the curriculum.
        decay: initial entries of A, 0.001 to 0.997.
        revision: commit, branch or tag of the repository.
        tokenizer: folder or repository (default: the one beside the weights).
        dtype: see `mythos.hf.export.export_model`.
        max_shard_size: see there.

    Raises:
        MythosError: the folder is not empty or cannot be written; the source cannot be read, is of an unknown
            architecture or of a variant that our model cannot represent; a layer number is too large; tensors are
            missing, left over or of another shape; or there is no matching tokenizer.
    """
    folder = check_destination(folder, dtype)
    if loops < 1:
        raise MythosError(f"--loops: got {loops}; give at least 1")
    if not DECAYS[0] <= decay <= DECAYS[1]:
        raise MythosError(f"--decay: got {decay:g}; allowed: {DECAYS[0]} to {DECAYS[1]}")
    source_folder = local_folder(source, revision)
    architecture = dense_architecture(source_folder, read_values(source_folder), layers, loops, decay)
    with foreign_model(source_folder) as foreign, TemporaryDirectory() as temporary:
        mapped = map_foreign(foreign, architecture)
        if tokenizer is None and not (source_folder / TOKENIZER_FILE).is_file():
            raise MythosError(f"{source_folder} has no {TOKENIZER_FILE}: give the model's tokenizer by --tokenizer")
        prepared = prepare_tokenizer(tokenizer or source_folder, architecture, mapped, Path(temporary) / "tokenizer")
        stored = stored_foreign(foreign, mapped, prepared, str(source))
        name = public_name(source)
        card = model_card(stored, folder.name, [])
        card += f"\n## Source\n\nRetrofitted from `{name}`: {_layer_summary(layers)}.\n"
        texts = {TRAIN_FILE: train_yaml(folder, mapped, name, layers)}
        exported = write_export(stored, folder, card, dtype, max_shard_size, texts)
    count = foreign.values["num_hidden_layers"]
    return Retrofitted(exported, architecture.name, [n for n in range(count) if n not in layers.chosen])


def dense_architecture(folder: Path, values: Values, layers: Layers, loops: int, decay: float) -> Architecture:
    """The architecture of a dense model in `folder`, with the mapping to a looped one.

    Raises MythosError for an unknown architecture.
    """
    kind = str(values.get("model_type"))
    if kind not in NORMED:
        raise MythosError(
            f"{folder} is of an architecture that is not known: model_type {kind!r}; known: {', '.join(NORMED)}"
        )
    return Architecture(kind, "", lambda _: True, lambda config: map_dense(kind, config, layers, loops, decay))


def map_dense(kind: str, values: Values, layers: Layers, loops: int, decay: float) -> MappedModel:
    """Map a dense model. Raises MythosError for a variant that our model cannot represent exactly."""
    problems = [*llama_problems(values, SIZES), *setting_problems(values, DEFAULTS, REQUIRED)]
    count = values.get("num_hidden_layers") or 0
    if layers.chosen[-1] >= count or layers.chosen[0] < 0:
        problems.append(f"it has layers 0 to {count - 1}, and {layers.chosen[-1]} was requested")
    if kind == "mistral" and values.get("sliding_window") is not None:
        problems.append(f"sliding_window: got {values['sliding_window']}; allowed: null")
    # transformers 5.0 and later write one mapping; earlier versions wrote two values.
    rope = {"rope_theta": option(values, DEFAULTS, "rope_theta")} | dict(
        values.get("rope_parameters") or values.get("rope_scaling") or {}
    )
    form = rope.get("rope_type", rope.get("type", "default"))
    if form != "default":
        problems.append(f"rope_scaling: got {form}; allowed: none, because our model has unscaled RoPE only")
    config = exact_config(
        kind,
        problems,
        lambda: {
            **llama_fields({**values, "rope_theta": rope["rope_theta"]}, DEFAULTS),
            "prelude_layers": len(layers.prelude),
            "core_layers": len(layers.core),
            "coda_layers": len(layers.coda),
            "scale_embeddings": False,
            "qk_norm": NORMED[kind],
            "loops": loops,
            "injection": "lti",
            "state_init": "zero",
        },
    )
    mapped = MappedModel(config, loops)
    tensors = mapped.tensors
    add_tables(mapped, "model.embed_tokens.weight", "model.norm.weight")
    tensors["readout.weight"] = identity(config.dim)
    tensors["recurrence.injection.dt"] = constant(config.dim, value=log(expm1(1)))  # Delta = 1
    tensors["recurrence.injection.log_a"] = constant(config.dim, value=log(-log(decay)))
    tensors["recurrence.injection.weight"] = identity(config.dim)
    names = LLAMA_LAYER | (QK_NORMS if NORMED[kind] else {})
    parts = {"prelude": layers.prelude, "recurrence.blocks": layers.core, "coda": layers.coda}
    for part, numbers in parts.items():
        for index, layer in enumerate(numbers):
            add_llama_layer(mapped, f"{part}.{index}", layer, names)
    for layer in range(count):
        mapped.unused.add(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq")  # stored by older versions
        if layer not in layers.chosen:
            mapped.unused |= {f"model.layers.{layer}.{name}.weight" for theirs in names.values() for name in theirs}
    return mapped


TRAIN = """\
# Continues training of {name}, retrofitted with loops: {summary}.
# Curriculum and optimizer follow arXiv 2511.07384 (docs/finetuning.md). Its learning rate is rescaled to the size of
# this implementation's Muon updates.
run:
  name: {run}
model: {{}}  # from train.init_from
tokenizer: {{}}  # from train.init_from
data:
  # The first phase recovers from the dropped layers. Use text like that of the pretraining, for instance
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


def train_yaml(folder: Path, mapped: MappedModel, name: str, layers: Layers) -> str:
    """The text of a configuration that continues training of a retrofitted model in `folder`."""
    loops = mapped.mean_loops
    values: dict[str, Any] = {
        "name": name,
        "summary": _layer_summary(layers),
        "run": _quoted(folder.name),
        "folder": _quoted(str(folder)),
        "length": min(1024, mapped.config.context_length),
        "loops": loops,
        "backprop": min(8, 2 * loops),
        "depths": sorted({1, 2, 4, 8, loops, 2 * loops}),
    }
    return TRAIN.format(**values)


def _quoted(text: str) -> str:
    """Any text as a YAML string."""
    return "'" + text.replace("'", "''") + "'"


def _layer_summary(layers: Layers) -> str:
    parts = {"prelude": layers.prelude, "core": layers.core, "coda": layers.coda}
    return ", ".join(f"{part} {','.join(map(str, numbers)) or 'none'}" for part, numbers in parts.items())
