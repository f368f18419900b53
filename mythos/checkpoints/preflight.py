"""Checks before a run: its directory, memory, and whether a checkpoint can be continued with its configuration."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from mythos.checkpoints.config_changes import Change, consequences, former_file
from mythos.config.sections import Config
from mythos.distributed.layout import usable_bytes
from mythos.errors import MythosError
from mythos.model.config import HALTING_RULES, ModelConfig, padded_vocab_size
from mythos.model.halting import trained_module


def prepare_directory(run_dir: Path) -> None:
    """Create the run directory. Raises MythosError if it cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{platform.node()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MythosError(f"run directory {run_dir} cannot be written ({error}): choose another run.dir") from error


def resolve_vocabulary(config: Config, tokenizer_size: int) -> Config:
    """The configuration with `model.vocab_size: auto` replaced by the tokenizer's padded size."""
    if config.model.vocab_size != "auto":
        return config
    if config.tokenizer.name == "bpe":
        # BPE on a small corpus may produce fewer tokens than tokenizer.vocab_size. config.yaml of the run has both
        # sizes; when it is reloaded, the model's must be large enough for the tokenizer's.
        tokenizer_size = max(tokenizer_size, padded_vocab_size(config.tokenizer.vocab_size))
    return config.with_fields("model", vocab_size=tokenizer_size)


def check_memory(parameters: int, shards: int, device: torch.device) -> None:
    """Refuse a model whose weights and gradients alone, in float32, exceed the device's memory.

    Otherwise the allocator would fail, or the system would kill the process without a message. `shards` is the number
    of processes that share one copy. Raises MythosError with both sizes.
    """
    needed = 8 * parameters // shards  # 4 bytes each for weight and gradient
    available = usable_bytes(device, 1)
    if needed > available:
        raise MythosError(
            f"model: {parameters:,} parameters take {needed / 2**30:,.1f} GiB for weights and gradients a process, "
            f"and the device has {available / 2**30:,.1f} GiB. Take a smaller model, or parallel.mode fsdp and more "
            "processes; --dry-run prints the memory that a run needs"
        )


FREE_MODEL_FIELDS = {
    *("preset", "context_length", "loops", "router_bias_rate", "router_loop_start", "state_init", "ponder_weight"),
}
"""Fields of the model that may change between a checkpoint and the run that continues it.

None of them changes the function that the weights compute at a given number of loops. (Some parameters have a row per
loop; their shapes are checked with all other shapes.)"""


def check_continued(
    config: Config, saved: dict[str, Any], changes: list[Change], step: int, path: Path | str | None
) -> str | None:
    """Check that a run can continue a checkpoint; return a warning that names every difference, or None without any.

    `saved` is the checkpoint's configuration as plain values, `changes` the differences from it. Raises MythosError for
    another model or optimizer, and for any difference if run.on_change is fail.
    """
    check_same_model(config, saved["model"], path)
    if config.optim.name != saved["optim"]["name"]:
        raise MythosError(
            f"checkpoint {path} is of another optimizer, whose state this one cannot use:\n"
            f"  optim.name: {saved['optim']['name']!r} in the checkpoint, {config.optim.name!r} here\n"
            "Restore this value to continue it, or give this run another run.name."
        )
    meaning = consequences(config, saved, step, changes)
    if not changes:
        return "\n".join(meaning) or None
    text = "\n".join([*(f"  {change}" for change in changes), *meaning])
    if config.run.on_change == "fail":
        raise MythosError(
            f"run.on_change is fail, and the configuration differs from that of checkpoint {path}:\n{text}\n"
            "Restore these values, or set run.on_change=warn to continue with them."
        )
    return (
        f"the configuration differs from that of checkpoint {path}, which stays in the run directory as "
        f"{former_file(step)}:\n{text}"
    )


def model_differences(saved: dict[str, Any], config: ModelConfig, free: set[str], where: str) -> str:
    """Lines that name the fields, except `free` ones, in which a saved model configuration differs; "" without any.

    `where` says where the saved values are, for people: "in the checkpoint".
    """
    here = config.model_dump(mode="json")
    differing = [name for name in here if name not in free and here[name] != saved[name]]
    return "\n".join(f"  model.{name}: {saved[name]!r} {where}, {here[name]!r} here" for name in differing)


def check_same_model(config: Config, saved: dict[str, Any], path: Path | str | None) -> None:
    """Refuse to continue with another model than the checkpoint's. Raises MythosError naming every differing field."""
    # Fields that the version of the checkpoint did not know had their defaults.
    saved = {name: field.default for name, field in ModelConfig.model_fields.items()} | saved
    # Halting rules without parameters may be exchanged as well.
    former = saved["halting"]
    same_module = former in HALTING_RULES.names and trained_module(config.model.halting) is trained_module(former)
    free = FREE_MODEL_FIELDS | ({"halting"} if same_module else set())
    if differences := model_differences(saved, config.model, free, "in the checkpoint"):
        raise MythosError(
            f"checkpoint {path} is of another model:\n{differences}\n"
            "Restore these values to continue it, or give this run another run.name."
        )
