"""Configurations of the training steps to measure, by name, and the memory of a process that runs them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mythos.checkpoints.preflight import resolve_vocabulary
from mythos.config.checking import suggestion
from mythos.config.loading import config_from_dict, load_config, overridden, packaged_configs
from mythos.config.presets import PRESETS
from mythos.config.sections import Config
from mythos.errors import MythosError
from mythos.gpu_check.timed_steps import Steps
from scripts.benchmarks.timing import Memory, peak_memory, resident_bytes

_REFERENCE: dict[str, Any] = {
    "vocab_size": 8192,
    "dim": 256,
    "n_heads": 8,
    "n_kv_heads": 2,
    "head_dim": 32,
    "kv_lora_rank": 64,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "ffn_dim": 344,
    "n_experts": 16,
    "experts_per_token": 2,
    "expert_dim": 128,
    "n_shared_experts": 1,
    "shared_expert_dim": 256,
    "loops": 8,
    "lora_rank": 8,
}
_FULL_DEPTH: dict[str, Any] = {"sampling": "fixed", "backprop": 8}
_WIDE: dict[str, Any] = {
    **_REFERENCE,
    "dim": 1024,
    "n_heads": 8,
    "n_kv_heads": 8,
    "head_dim": 128,
    "attention": "gqa",
    "ffn_dim": 1368,
    "expert_dim": 512,
    "shared_expert_dim": 1024,
    "loops": 2,
}

SHAPES: dict[str, dict[str, Any]] = {
    "reference": {"model": _REFERENCE, "depth": _FULL_DEPTH},
    "reference-64": {
        "model": {**_REFERENCE, "n_experts": 64, "experts_per_token": 4, "shared_expert_dim": 512},
        "depth": _FULL_DEPTH,
    },
    "wide": {
        "model": _WIDE,
        "depth": {"sampling": "fixed", "backprop": 2},
        "data": {"sequence_length": 512, "streams": 2},
        "train": {"global_batch": 2, "micro_batch": 2, "dtype": "bfloat16"},
    },
}
"""Sizes that docs/performance.md measures, beside the presets."""

_COMMON: dict[str, Any] = {
    "tokenizer": {"vocab_size": 384},
    "data": {"sequence_length": 256, "streams": 4},
    "train": {"steps": 1000, "global_batch": 4, "micro_batch": 4},
}


def configuration(name: str, overrides: Sequence[str] = ()) -> Config:
    """Load a YAML file, a size of :data:`SHAPES`, or a preset in steps of 4 x 256 tokens.

    Raises MythosError for other names, and for values that a run would refuse.
    """
    if name in SHAPES or name in PRESETS:
        data: dict[str, Any] = dict(SHAPES.get(name, {"model": {"preset": name}}))
        for section, values in _COMMON.items():
            data[section] = {**values, **data.get(section, {})}
        if name in PRESETS:
            del data["tokenizer"]
        config = config_from_dict(overridden(data, overrides, name))
    elif name.endswith((".yaml", ".yml")) or Path(name).is_file() or name in packaged_configs():
        config = load_config(name, overrides)
    else:
        known = [*SHAPES, *PRESETS]
        raise MythosError(f"{name}: neither a YAML file nor a known size; {suggestion(name, known)}")
    config = resolve_vocabulary(config, 0)
    if config.model.vocab_size in ("auto", 0):
        raise MythosError(
            f"model.vocab_size: got auto, and the tokenizer is {config.tokenizer.name}, which is not opened here; give "
            "its size, e.g. model.vocab_size=50304"
        )
    return config


def memory_of_steps(config: Config) -> Memory:
    """Measure the memory of a training process; call it in a fresh process."""
    start = resident_bytes()
    with Steps(config) as steps:
        memory = peak_memory(steps.device, start, steps)
        return memory if steps.device.type == "cuda" else memory._replace(tensors=steps.peak_tensor_bytes())
