"""The numbers that are logged of a training step: losses and norms, memory, stragglers, load of the experts."""

import math
import resource
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mythos.training.depth_schedule import DepthPlan

PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by a part of the device's name, from the vendor's data sheets."""


@dataclass
class StepResult:
    """Measurements of a training step, the same on every rank. Tensors are on the device: reading one waits for it."""

    loss: Tensor
    """Mean over the step's targets, nats."""
    grad_norm: Tensor
    state_norm: Tensor
    state_delta: Tensor
    expert_load: Tensor | None
    """Tokens sent to each expert, (core layers, loops, E) int64; None for dense cores."""
    plan: DepthPlan
    lr: float

    def record(self, skipped: Tensor) -> dict[str, Any]:
        """The step's values for metrics.jsonl, and the number of `skipped` steps; one read from the device."""
        names = ("loss", "grad_norm", "state_norm", "state_delta")
        *values, skipped_steps = torch.stack([*(getattr(self, name) for name in names), skipped]).tolist()
        plan = self.plan
        return {
            # JSON has no NaN.
            **{name: value if math.isfinite(value) else None for name, value in zip(names, values, strict=True)},
            "lr": self.lr,
            "loops": sum(plan.loops) / len(plan.loops),
            "backprop_loops": plan.mean_backprop,
            "skipped_steps": int(skipped_steps),
        }


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def over_ranks(reports: list[dict[str, float]]) -> dict[str, float]:
    """Reduce every rank's report of a log window, in rank order.

    A report has `peak_memory_bytes` and `own_seconds`, the time that the rank spent on its own work: data and forward
    passes; under FSDP data only, because its forward passes wait for other ranks. The result has the largest
    `peak_memory_bytes` and, for several ranks, figures of the slowest: `straggler/rank`, its number;
    `straggler/seconds`, its own_seconds minus the median of all ranks; `straggler/over_median`, its own_seconds divided
    by that median.
    """
    reduced = {"peak_memory_bytes": max(report["peak_memory_bytes"] for report in reports)}
    if len(reports) > 1:
        own = [report["own_seconds"] for report in reports]
        slowest, median = max(own), statistics.median(own)
        reduced["straggler/seconds"] = slowest - median
        reduced["straggler/rank"] = own.index(slowest)
        if median > 0:
            reduced["straggler/over_median"] = slowest / median
    return reduced


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of bfloat16 matmuls of a known GPU; None for other devices and dtypes."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_BF16_FLOPS.items() if part in name), None)


def expert_balance(load: Tensor) -> dict[str, float]:
    """`moe/load_max_over_mean` and `moe/dead_experts` from counts (core layers, loops, E).

    The first is the largest load of any expert in any layer, over the mean load; an expert is dead if no loop of the
    step sent it a token.
    """
    by_expert = load.sum(1).double()
    return {
        "moe/load_max_over_mean": (by_expert.amax(-1) / by_expert.mean(-1)).max().item(),
        "moe/dead_experts": int((by_expert == 0).sum().item()),
    }


def loop_loads(load: Tensor | None, ranks: int = 1) -> dict[str, float]:
    """`moe/load_max_over_mean@<loop>` from the same counts, for the loops that tokens ran; empty for dense cores.

    If `ranks` share the experts, `moe/rank_load_max_over_mean@<loop>` is the same of the rank with most tokens: the
    others wait for it in every exchange. The last loop index counts all deeper loops too.
    """
    if load is None:
        return {}
    figures = {"moe/load_max_over_mean": load.double()}
    if ranks > 1:
        figures["moe/rank_load_max_over_mean"] = load.double().unflatten(-1, (ranks, -1)).sum(-1)
    return {
        f"{name}@{loop}": most
        for name, counts in figures.items()
        for loop, most in enumerate((counts.amax(-1) / counts.mean(-1)).amax(0).tolist(), start=1)
        if not math.isnan(most)  # 0 / 0 in a loop that no token ran
    }
