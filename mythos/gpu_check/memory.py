"""The planned memory of a step against what the allocator counts."""

from collections.abc import Iterator

import torch

from mythos.config.presets import preset_config
from mythos.gpu_check.catalog import MEMORY_RATIO
from mythos.gpu_check.result import Result, Setting, judged
from mythos.gpu_check.runs import planned_bytes, steps_of, too_large
from mythos.gpu_check.timed_steps import Steps

ROWS = {"mythos_small": 8, "mythos_1b": 1, "looped_370m": 4}


def planned(setting: Setting, *, preset: str, mode: str) -> Iterator[Result]:
    """Measure a step whose rows all have the depth that the plan assumes."""
    loops = preset_config(preset).loops if setting.cuda else 3
    config = steps_of(
        setting,
        preset,
        ROWS[preset],
        depth__sampling="fixed",
        depth__maximum=loops,
        parallel__activation_checkpointing=mode,
    )
    total, beyond = planned_bytes(config)
    if refused := too_large(setting, total):
        yield refused
        return
    base = torch.cuda.memory_allocated() if setting.cuda else 0
    with Steps(config) as steps:
        steps()
        steps()
        if setting.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            steps()
            torch.cuda.synchronize()
            measured = torch.cuda.max_memory_allocated() - base
        else:
            measured = steps.peak_tensor_bytes()
        gradients = sum(p.nbytes for p in steps.trainer.model.parameters())
        state = steps.held_bytes() + gradients
    low, high = MEMORY_RATIO
    ratio, activations = total / measured, beyond / max(1, measured - state)
    unit, size = ("GiB", 2**30) if setting.cuda else ("MiB", 2**20)
    yield judged(
        low <= ratio <= high,
        f"{ratio:.3f}: {total / size:.2f} {unit} planned, {measured / size:.2f} allocated; beyond weights, gradients "
        f"and moments {activations:.3f}",
    )
