"""Time of training on GPUs: FLOPs that are executed, and a model of a step's memory traffic."""

import torch

from mythos.config.sections import Config
from mythos.distributed.parallel import compiles
from mythos.planning.budget import Gpu, mean_depths
from mythos.planning.fake_step import recomputed_flops
from mythos.planning.flops import forward_flops
from mythos.planning.rank_state import RankState
from mythos.planning.traffic import OPTIMIZER_BYTES, StepTime, step_time, step_traffic


def executed_flops(config: Config) -> float:
    """FLOPs per token of training, with what activation checkpointing recomputes."""
    model, length, means = config.model, config.data.sequence_length, mean_depths(config)
    needed = forward_flops(model, length).training_at(means.loops, means.backprop)
    return needed + means.backprop * recomputed_flops(model, length, config.parallel.activation_checkpointing)


def step_time_per_token(config: Config, gpu: Gpu, gpus: int, state: RankState, executed: float) -> StepTime:
    """Estimate the seconds per token of a step from a model of its memory traffic; `executed` is FLOPs per token."""
    length, micro_batch, means = config.data.sequence_length, config.train.micro_batch, mean_depths(config)
    rows = max(1, config.train.global_batch // gpus)
    rows = rows if micro_batch == "auto" else min(rows, micro_batch)
    return step_time(
        step_traffic(config.model, length, rows, config.parallel.activation_checkpointing),
        executed=executed,
        loops=means.loops,
        backprop=means.backprop,
        tokens=rows * length,
        # 4 bytes a parameter; each GPU updates its shard once per step of all GPUs.
        optimizer=OPTIMIZER_BYTES * state.parameters / 4 * gpus / config.tokens_per_step,
        peak=gpu.peak,
        bandwidth=gpu.bandwidth,
        compiled=compiles(config, torch.device("cuda")),
    )
