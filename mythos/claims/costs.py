"""What a claim costs before it runs: tokens, FLOPs, time on a CPU core, GPU hours."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mythos.claims.definition import Claim, PlannedRun
from mythos.config.sections import Config
from mythos.planning.budget import GPUS, mean_depths, sized
from mythos.planning.flops import forward_flops

CPU_FLOPS = {64: 1.8e10, 128: 4.5e10}
"""FLOP/s of training at nano size by the model's width: a dense core, float32, one thread of a Zen 5 core beside other
work. Width 64: batches of 512 tokens (11 CPU seconds for 150 steps of 1.2 GFLOP); width 128: batches of 1,500 (11 for
80 steps of 7.1 GFLOP). Small operations take most of the time, not matmuls."""
CPU_SECONDS = 3.0
"""CPU seconds of a nano run beside its training steps: opening, validation, plots; measured there."""
LAUNCH_SECONDS = 0.003, 0.002
"""Least seconds of a step on a GPU, for launching kernels, whatever its size: of the optimizer and the host, and of
a block in one loop, forward and backward (some 200 kernels of 10 microseconds). Assumed, not measured."""
GPU = "H100"
GPUS_OF_SIZE = {"nano": 1, "small": 1, "full": 8}


@dataclass(frozen=True)
class Cost:
    """Sums over runs."""

    tokens: int
    flops: float
    cpu_seconds: float
    """On one CPU core, at nano size."""


def cost_of(runs: list[PlannedRun]) -> Cost:
    """What planned runs cost together."""
    tokens = sum(run.config.train_steps * run.config.tokens_per_step for run in runs)
    flops = [run_flops(run.config) for run in runs]
    seconds = [cost / cpu_flops(run.config.model.dim) for cost, run in zip(flops, runs, strict=True)]
    return Cost(tokens, sum(flops), sum(seconds) + len(runs) * CPU_SECONDS)


def cpu_flops(width: int) -> float:
    """FLOP/s of training on one CPU core, of the nearest measured width below."""
    return CPU_FLOPS[max((measured for measured in CPU_FLOPS if measured <= width), default=min(CPU_FLOPS))]


def cpu_seconds(claim: Claim) -> float:
    """CPU seconds of all runs of a claim, from those of seed 0: other seeds have one value of the tuning grid each."""
    first = cost_of(claim.runs(1, Path("unused"), None)).cpu_seconds
    values = math.prod(map(len, claim.tune.values()))
    return first * (1 + (claim.at_size.seeds - 1) / values)


def run_flops(config: Config) -> float:
    """FLOPs of the matmuls of a run's training, at the mean depths of its schedule."""
    key = config.model_copy(update={"run": Config().run})
    return _run_flops(key.model_dump_json())


@cache
def _run_flops(text: str) -> float:
    config = sized(Config.model_validate_json(text, strict=False))
    means = mean_depths(config)
    flops = forward_flops(config.model, config.data.sequence_length)
    return flops.training_at(means.loops, means.backprop) * config.train_steps * config.tokens_per_step


def gpu_hours(config: Config, gpus: int) -> float:
    """GPU hours of a run on `gpus` H100, from the model of a step that `mythos estimate` uses.

    A step takes at least :data:`LAUNCH_SECONDS`, which is what small models need.
    """
    from mythos.planning.layout import choose_layout
    from mythos.planning.rank_state import rank_state
    from mythos.planning.speed import time_per_token

    config, gpu = sized(config), GPUS[GPU]
    state = rank_state(config, choose_layout(config, gpus, min(8, gpus), gpu.memory))
    time = time_per_token(config, state, gpu, min(8, gpus))
    model, (of_step, of_block) = config.model, LAUNCH_SECONDS
    blocks = model.prelude_layers + model.coda_layers + model.core_layers * mean_depths(config).loops
    least = gpus * (of_step + of_block * blocks)
    # `total` is the time of one GPU for one token.
    return config.train_steps * max(config.tokens_per_step * time.total, least) / 3600
