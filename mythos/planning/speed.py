"""Time of a training step under a layout, by a model of its matmuls, memory traffic and collectives."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from mythos.config.sections import Config
from mythos.distributed.parallel import compiles
from mythos.planning.budget import DepthMeans, Gpu, mean_depths
from mythos.planning.collectives import Calls, blocks_without_results, muon_calls, step_calls
from mythos.planning.fake_step import recomputed_flops
from mythos.planning.flops import forward_flops
from mythos.planning.network import call_seconds
from mythos.planning.rank_state import RankState, deepest_micro_batch
from mythos.planning.traffic import OPTIMIZER_BYTES, StepTime, StepTraffic, step_time, step_traffic


def executed_flops(config: Config, means: DepthMeans, mode: str, divided: bool) -> float:
    """FLOPs per token of training, with what this mode of activation checkpointing computes again.

    `divided`: processes divide the shared experts. Their hidden activations are then computed again in backward passes.
    And where no gradient needs a block's results, a recomputed loop does not begin with these experts; undivided, it
    leaves out their last matmul.
    """
    model, length = config.model, config.data.sequence_length
    needed = forward_flops(model, length).training_at(means.loops, means.backprop)
    again = recomputed_flops(model, length, mode)
    loop = again.loop
    if divided:
        blocks = model.core_layers
        if config.with_fields("parallel", activation_checkpointing=mode).parallel.recomputes_loops:
            blocks -= blocks_without_results(model)
        loop += blocks * 4 * model.dim * model.n_shared_experts * model.shared_expert_dim  # gate and up
    return needed + again.once + means.backprop * loop


def time_per_token(config: Config, state: RankState, gpu: Gpu, machine_gpus: int) -> StepTime:
    """GPU seconds per token of a step under `state.layout`, Muon's collectives included."""
    rows, _ = deepest_micro_batch(config, state.layout.size)
    length, mode = config.data.sequence_length, config.parallel.activation_checkpointing
    traffic = step_traffic(config.model, length, rows, mode)
    return TimeModel(config, gpu, machine_gpus, lambda mode, rows: traffic).time(
        config, state, muon_calls(config, state.layout)
    )


class TimeModel:
    """Time of steps of one run under many layouts.

    Args:
        config: the run, whose depths and lengths all layouts share.
        gpu: the GPU of every rank.
        machine_gpus: GPUs of a machine.
        traffic: memory traffic of a micro-batch, by mode of activation checkpointing and rows.
    """

    def __init__(self, config: Config, gpu: Gpu, machine_gpus: int, traffic: Callable[[str, int], StepTraffic]) -> None:
        self.gpu, self.machine_gpus, self.traffic = gpu, machine_gpus, traffic
        self.means = mean_depths(config)
        self.executed: dict[tuple[str, bool], float] = {}
        """FLOPs per token by mode of activation checkpointing, and whether the shared experts are divided."""

    def time(self, config: Config, state: RankState, others: Iterable[Calls] = ()) -> StepTime:
        """GPU seconds per token; `others` are collectives beside those of the layout."""
        layout, mode = state.layout, config.parallel.activation_checkpointing
        way = mode, layout.shared > 1
        if way not in self.executed:
            self.executed[way] = executed_flops(config, self.means, mode, layout.shared > 1)
        compiled = compiles(config, torch.device("cuda"))
        rows, _ = deepest_micro_batch(config, layout.size)
        time = step_time(
            self.traffic(mode, rows),
            executed=self.executed[way],
            loops=self.means.loops,
            backprop=self.means.backprop,
            tokens=rows * config.data.sequence_length,
            # 4 bytes a parameter; each GPU updates its shard once per step of all GPUs.
            optimizer=OPTIMIZER_BYTES * state.parameters / 4 * layout.size / config.tokens_per_step,
            peak=self.gpu.peak,
            bandwidth=self.gpu.bandwidth,
            compiled=compiled,
            compiled_loop=compiled and layout.expert == 1,
        )
        loops, backprop = max(1, round(self.means.loops)), max(1, round(self.means.backprop))
        calls = [*step_calls(config, state, loops, backprop), *others]
        seconds = sum(call_seconds(call, layout, self.gpu, self.machine_gpus) for call in calls)
        return replace(time, communication=seconds * layout.size / config.tokens_per_step)
