"""Configurations of small runs for the checks, and one step of a run."""

from pathlib import Path
from typing import Any

from mythos.checkpoints.preflight import resolve_vocabulary
from mythos.config.loading import config_from_dict
from mythos.config.presets import preset_config
from mythos.config.sections import Config
from mythos.distributed.layout import Layout, usable_bytes
from mythos.errors import MythosError
from mythos.gpu_check.result import Result, Setting, not_run
from mythos.planning.rank_state import activations, rank_state
from mythos.trainer import StepResult, Trainer

SINGLE = Layout("single", 1, 1, "one process")
TINY: dict[str, int] = {
    "vocab_size": 384,
    "dim": 64,
    "n_heads": 2,
    "n_kv_heads": 2,
    "head_dim": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "ffn_dim": 128,
    "n_experts": 4,
    "experts_per_token": 2,
    "expert_dim": 32,
    "shared_expert_dim": 32,
    "loops": 3,
    "lora_rank": 2,
    "context_length": 256,
}
"""Sizes that every preset gets on a CPU; it keeps its layers, its attention and its kind of core."""


def steps_of(setting: Setting, preset: str, rows: int, **changes: Any) -> Config:
    """Configure a preset in steps of one micro-batch of `rows` sequences, of its context or at most 4,096 tokens.

    `changes` are fields with `__` for the dot, such as `train__compile=True`. On a CPU the model has the sizes of TINY
    and a step 2 sequences of 64 tokens.
    """
    published = preset_config(preset)
    length, loops = min(published.context_length, 4096), published.loops
    model: dict[str, Any] = {"preset": preset}
    if not setting.cuda:
        rows, length, loops = 2, 64, TINY["loops"]
        # Skip the sizes of parts that the preset does not have.
        model |= {name: size for name, size in TINY.items() if getattr(published, name) != 0}
    values: dict[str, Any] = {
        "model": model,
        "tokenizer": {} if setting.cuda else {"vocab_size": TINY["vocab_size"]},
        "data": {"sequence_length": length, "streams": rows},
        "depth": {"mean": loops, "maximum": 2 * loops},
        "train": {
            "steps": 1000,
            "global_batch": rows,
            "micro_batch": rows,
            "device": setting.device.type,
            "dtype": "bfloat16" if setting.cuda else "float32",
            "compile": False,
        },
    }
    return resolve_vocabulary(_config(values, changes), 0)


def task_run(setting: Setting, folder: Path, **changes: Any) -> Config:
    """Configure a run on the task `permutations`, whose sequences are generated; `changes` as in `steps_of`.

    The initial state is zero, because a GPU's random generator draws other noise than a CPU's. Everything else
    (starting weights, data and depths) is the same on every device.
    """
    values: dict[str, Any] = {
        "run": {"name": "gpu-check", "dir": str(folder)},
        "model": {"preset": "mythos_nano", "state_init": "zero", "context_length": 64, "loops": 4},
        "data": {
            "kind": "reasoning",
            "task": {"name": "permutations", "ask": "steps"},
            "streams": 4,
            "sequence_length": 16,
            "workers": 0,
        },
        "depth": {"mean": 4, "backprop": 2},
        "optim": {"warmup": 0.0, "lr": 1e-3},
        "train": {
            "global_batch": 32 if setting.cuda else 8,
            "micro_batch": 16 if setting.cuda else 4,
            "dtype": "float32",
            "device": setting.device.type,
            "compile": False,
        },
        "eval": {"every": 0, "batches": 2, "loops": [1, 4], "samples": 0},
        "checkpoint": {"every": 0},
        "log": {"every": 1},
    }
    if not setting.cuda:
        values["model"] |= {name: size for name, size in TINY.items() if name not in ("vocab_size", "q_lora_rank")}
    return _config(values, changes)


def _config(values: dict[str, Any], changes: dict[str, Any]) -> Config:
    for path, value in changes.items():
        *sections, field = path.split("__")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[field] = value
    return config_from_dict(values)


def planned_bytes(config: Config) -> tuple[int, int]:
    """Memory that `mythos train --dry-run` plans: in total, and its part beyond weights, gradients and moments."""
    beyond = activations(config, SINGLE).peak
    return rank_state(config, SINGLE).total + beyond, beyond


def too_large(setting: Setting, planned: int) -> Result | None:
    """The result of a check whose step of `planned` bytes does not fit on the GPU; None if it fits."""
    if not setting.cuda:
        return None
    memory = usable_bytes(setting.device, 1)
    if planned <= 0.95 * memory:
        return None
    return not_run(f"does not fit: {planned / 2**30:.1f} GiB planned of {memory / 2**30:.1f}")


def next_step(trainer: Trainer) -> StepResult:
    """Read a batch and train on it, as a run does. Raises MythosError if there is no data."""
    batch, problem = trainer.read_ahead()
    if batch is None:
        raise MythosError(problem or "no data")
    result = trainer.train_step(batch)
    trainer.step += 1
    return result
