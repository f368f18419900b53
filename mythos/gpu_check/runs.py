"""Small runs for the checks: configurations, and the trainer's own steps."""

import logging
import time
from pathlib import Path
from typing import Any

import torch

from mythos.benchmarks.steps import configuration
from mythos.config.loading import config_from_dict
from mythos.config.presets import preset_config
from mythos.config.sections import Config
from mythos.data.stream import Batch
from mythos.distributed.parallel import Layout
from mythos.errors import MythosError
from mythos.gpu_check.result import Result, Setting, not_run
from mythos.planning.rank_state import activations, rank_state
from mythos.trainer import StepResult, Trainer

logger = logging.getLogger(__name__)

ALONE = Layout("single", 1, 1, "one process")
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
"""What stands for every preset on a CPU: a model that keeps the preset's layers, attention and kind of core."""


def steps_of(setting: Setting, preset: str, rows: int, *changes: str) -> Config:
    """A preset in steps of one micro-batch of `rows` sequences, as long as its context and at most 4,096 tokens.

    `changes` are overrides, `key.path=value`. On a CPU everything is tiny: TINY, and 2 sequences of 64 tokens.
    """
    published = preset_config(preset)
    length, loops = min(published.context_length, 4096), published.loops
    sizes: list[str] = []
    if not setting.cuda:
        rows, length, loops = 2, 64, TINY["loops"]
        # A part that the preset does not have it does not get.
        sizes = [f"model.{name}={size}" for name, size in TINY.items() if getattr(published, name) != 0]
        sizes.append(f"tokenizer.vocab_size={TINY['vocab_size']}")
    overrides = [
        *sizes,
        f"data.sequence_length={length}",
        f"data.streams={rows}",
        f"train.global_batch={rows}",
        f"train.micro_batch={rows}",
        f"train.device={setting.device.type}",
        f"train.dtype={'bfloat16' if setting.cuda else 'float32'}",
        f"depth.mean={loops}",
        f"depth.maximum={2 * loops}",
        "train.compile=false",
    ]
    return configuration(preset, [*overrides, *changes])


def planned_bytes(config: Config) -> tuple[int, int]:
    """What `mythos train --dry-run` plans: memory in all, and what of it is beyond weights, gradients and moments."""
    beyond = activations(config, ALONE).peak
    return rank_state(config, ALONE).total + beyond, beyond


def too_large(setting: Setting, planned: int) -> Result | None:
    """That a step does not fit on the GPU, where it does not."""
    if not setting.cuda:
        return None
    room = torch.cuda.get_device_properties(setting.device).total_memory
    if planned <= 0.95 * room:
        return None
    return not_run(f"does not fit: {planned / 2**30:.1f} GiB planned of {room / 2**30:.1f}")


def task_run(setting: Setting, folder: Path, **changes: Any) -> Config:
    """A run on sequences that are made on the way; `train__steps=4` changes a field.

    The initial state is zero, because the noise of a GPU's generator is not a CPU's. Everything else, starting weights,
    data and depths, is the same on every device.
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
        "train": {"global_batch": 32, "micro_batch": 16, "dtype": "float32", "device": setting.device.type},
        "eval": {"every": 0, "batches": 2, "loops": [1, 4], "samples": 0},
        "checkpoint": {"every": 0},
        "log": {"every": 1},
    }
    if not setting.cuda:
        values["model"] |= {name: size for name, size in TINY.items() if name not in ("vocab_size", "q_lora_rank")}
        values["train"] |= {"global_batch": 8, "micro_batch": 4}
    values["train"].setdefault("compile", False)
    for path, value in changes.items():
        *sections, field = path.split("__")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[field] = value
    return config_from_dict(values)


def next_step(trainer: Trainer) -> StepResult:
    """One step as the loop of a run takes it. Raises MythosError where there is no data."""
    batch: Batch | None
    batch, problem = trainer.read_ahead()
    if batch is None:
        raise MythosError(problem or "no data")
    result = trainer.train_step(batch)
    trainer.step += 1
    return result


def seconds_left(setting: Setting) -> float:
    """Of the stage's time."""
    return setting.deadline - time.time()
