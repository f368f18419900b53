"""Turns a built model into one that trains on the devices at hand: activation checkpointing, then compilation."""

import os

import torch

from mythos.config import Config
from mythos.errors import MythosError
from mythos.model.rdt import RecurrentDepthTransformer


def check_single_process() -> None:
    """Refuse several processes: each would train alone and write over the others.

    Raises MythosError under torchrun with more than one process.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise MythosError(
            f"started as one of {processes} processes, but this version trains in one: run train.py without torchrun"
        )


def choose_device(name: str) -> torch.device:
    """The device that `train.device` names. Raises MythosError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise MythosError("train.device is cuda, but torch finds no CUDA GPU: set train.device=auto or cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast type that `train.dtype` names; auto is bfloat16 only where the hardware multiplies it natively.

    Elsewhere it is emulated: on an AVX2 core a bfloat16 product ran 50 times slower than a float32 one.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def prepare_model(config: Config, model: RecurrentDepthTransformer) -> RecurrentDepthTransformer:
    """Apply parallel.activation_checkpointing and train.compile, in that order; returns the model."""
    model.recurrence.checkpoint_loops = config.parallel.activation_checkpointing == "loop"
    if config.train.compile:
        for block in (*model.prelude, *model.recurrence.blocks, *model.coda):
            block.compile()
    return model
