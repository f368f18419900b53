"""Training steps to measure: those of the trainer itself, on made-up tokens."""

import contextlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mythos.benchmarks.timing import Memory, peak_memory, resident_bytes, tensor_bytes, tensor_peak
from mythos.checkpoints.preflight import resolve_vocabulary
from mythos.config.checking import Problems, apply_override, suggestion
from mythos.config.loading import config_from_dict, load_config, packaged_configs
from mythos.config.presets import PRESETS
from mythos.config.sections import Config, LogConfig, WandbConfig
from mythos.data.stream import Batch
from mythos.errors import MythosError
from mythos.planning.flops import forward_flops
from mythos.trainer import Trainer

DOCUMENTS = 4
"""Documents in a sequence, where they are masked."""

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
"""What docs/performance.md measures, beside the presets."""

_COMMON: dict[str, Any] = {
    "tokenizer": {"vocab_size": 384},
    "data": {"sequence_length": 256, "streams": 4},
    "train": {"steps": 1000, "global_batch": 4, "micro_batch": 4},
}


def configuration(name: str, overrides: Sequence[str] = ()) -> Config:
    """What to measure: a YAML file, a shape of :data:`SHAPES`, or a preset in steps of 4 x 256 tokens.

    Raises MythosError for a name that is none of these, and for whatever a run would refuse.
    """
    if name in SHAPES or name in PRESETS:
        data: dict[str, Any] = dict(SHAPES.get(name, {"model": {"preset": name}}))
        for section, values in _COMMON.items():
            data[section] = {**values, **data.get(section, {})}
        if name in PRESETS:
            del data["tokenizer"]
        problems = Problems(name, Config)
        for override in overrides:
            data = apply_override(data, override, problems)
        problems.raise_any()
        config = config_from_dict(data)
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


class Steps:
    """Whole optimizer steps of a run, all at its target depth and on the same tokens; call it to make one.

    The trainer is built as for a run, on data that costs nothing, in a folder that is removed by :meth:`close`.
    """

    def __init__(self, config: Config) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="mythos-benchmark-")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.trainer = Trainer(_without_surroundings(config, self.folder.name))
        except BaseException:
            self.folder.cleanup()
            raise
        self.trainer.count_targets = lambda config, step: config.tokens_per_step
        self.trainer.step = max(config.train_steps, config.schedule_steps) - 1  # curricula are over
        self.config, self.device = self.trainer.config, self.trainer.device
        plan = self.trainer.schedule.plan(self.trainer.step)
        self.loops, self.backprop = plan.loops, plan.backprop
        self.batch = made_up_batch(config)

    def __call__(self) -> None:
        """One step."""
        self.trainer.train_step(self.batch)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the run's folder."""
        self.trainer.resources.close()
        self.folder.cleanup()

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.tokens_per_step

    @property
    def flops_needed(self) -> float:
        """FLOPs of the products that a step's mathematics asks for: forward once, and twice that backward."""
        flops = forward_flops(self.config.model, self.config.data.sequence_length)
        return flops.training(self.loops, self.backprop) * self.tokens

    def held_bytes(self) -> int:
        """Bytes of the tensors that exist between steps: weights, buffers, moments."""
        model = self.trainer.model
        moments = [value for state in self.trainer.optimizer.state.values() for value in state.values()]
        tensors = [*model.parameters(), *model.buffers(), *(value for value in moments if torch.is_tensor(value))]
        return tensor_bytes(tensors)

    def peak_tensor_bytes(self) -> int:
        """Most bytes that tensors hold at any moment of a step."""
        return self.held_bytes() + tensor_peak(self)


def made_up_batch(config: Config) -> Batch:
    """Random ids for a step of one process, with equally long documents where the configuration masks them."""
    rows, length = config.train.global_batch, config.data.sequence_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(config.model.vocab_size), (rows, length + 1), generator=generator)
    documents = None
    if config.data.mask_documents:
        documents = (torch.arange(length, dtype=torch.int32) * DOCUMENTS // length).expand(rows, length).contiguous()
    return Batch(ids, documents, torch.arange(rows))


def memory_of_steps(config: Config) -> Memory:
    """What a process that trains needs; to be called in one of its own."""
    start = resident_bytes()
    with Steps(config) as steps:
        memory = peak_memory(steps.device, start, steps)
        return memory if steps.device.type == "cuda" else memory._replace(tensors=steps.peak_tensor_bytes())


def _without_surroundings(config: Config, folder: str) -> Config:
    """The configuration without what is around the steps: data of its own, trackers, folders, traces."""
    changes: dict[str, Any] = {
        "run": config.run.model_copy(update={"dir": f"{folder}/run", "resume": "never"}),
        "data": config.data.model_copy(update={"kind": "reasoning", "workers": 0}),
        "eval": config.eval.model_copy(update={"batches": 1}),
        "checkpoint": config.checkpoint.model_copy(update={"dir": None}),
        "train": config.train.model_copy(update={"profile": type(config.train.profile)()}),
        "log": LogConfig(wandb=WandbConfig(mode="disabled")),
    }
    return config.model_copy(update=changes)
