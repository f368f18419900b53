"""The text of `mythos train --dry-run`: size, FLOPs, memory of a process, and collectives of a run before it starts."""

import os

import torch

from mythos.config.sections import Config
from mythos.distributed.layout import Layout, usable_bytes
from mythos.distributed.parallel import choose_dtype
from mythos.distributed.ranks import check_fit, choose_device
from mythos.errors import MythosError
from mythos.model.cache import cache_bytes_per_token
from mythos.planning.budget import mean_depths
from mythos.planning.collectives import collectives
from mythos.planning.flops import count_parameters, forward_flops
from mythos.planning.layout import choose_layout, gib, shortage
from mythos.planning.rank_state import (
    RankState,
    activations,
    compute_dtype,
    deepest_micro_batch,
    micro_batches,
    rank_state,
    working_memory,
)
from mythos.planning.speed import executed_flops

DEVICE_MEMORY = 80 * 2**30
"""Default bytes of a device."""


def plan(
    config: Config,
    ranks: int | None = None,
    machine_ranks: int = 8,
    device_memory: int = DEVICE_MEMORY,
    *,
    device: str = "",
) -> str:
    """Describe a run before it starts.

    Lists parameters, steps, FLOPs by depth and the decoding cache; then for `ranks` processes (default: WORLD_SIZE, or
    1), `machine_ranks` per machine, on devices of `device_memory` bytes, which are called `device`: the layout, the
    memory of a process, what would fit if that does not, and the collectives of a step.

    Raises MythosError if that number of processes cannot share the batches or does not suit parallel.mode, or if the
    run cannot start from train.init_from.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if ranks is None else ranks
    if ranks < 1 or machine_ranks < 1 or device_memory <= 0:
        raise MythosError(
            f"a plan for {ranks} processes, {machine_ranks} on a machine, with {device_memory / 2**30:g} GiB each: "
            "--ranks and --machine-ranks must be at least 1, --device-memory above 0"
        )
    check_fit(config, ranks)
    parameters = count_parameters(config.model)
    local = min(machine_ranks, ranks)
    layout = choose_layout(config, ranks, local, device_memory)
    state = rank_state(config, layout)
    automatic = config.model.vocab_size == "auto"
    vocabulary = ", without the vocabulary, whose size the tokenizer decides" if automatic else ""
    flops = forward_flops(config.model, config.data.sequence_length)
    depths = sorted({*config.eval.loops, round(config.depth_mean)})
    lines = [
        *(f"{'start' if number == 0 else '':15} {line}" for number, line in enumerate(_start_lines(config))),
        f"parameters      {parameters.total:,} ({parameters.active:,} active per token and loop){vocabulary}",
        f"training        {config.train_steps:,} steps of {config.tokens_per_step:,} tokens, "
        f"{config.train_steps * config.tokens_per_step:,} in all",
        *([f"schedule        over {config.schedule_steps:,} steps"] if config.optim.schedule_steps is not None else []),
        f"run directory   {config.run_dir}",
        f"FLOPs per token at {config.data.sequence_length} tokens, forward, by loops",
        *(f"{depth:16d}  {flops.forward(depth):.3e}" for depth in depths),
        _training_line(config),
        _cache_line(config),
        f"processes       {ranks:,}, {local} on a machine: {_mode(layout)} ({layout.why})",
        *_memory_lines(config, state, local, device_memory, device),
        *_collective_lines(config, state),
    ]
    return "\n".join(lines)


def device_here(config: Config) -> tuple[Config, int, str]:
    """The configuration with the device and the type of matmuls of this machine, and the device's bytes and name.

    A run on GPUs can be planned without one: then DEVICE_MEMORY is assumed.
    """
    if config.train.device == "cuda" and not torch.cuda.is_available():
        return config, DEVICE_MEMORY, "assumed, for there is no GPU"
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = choose_device(config.train.device, 0, local_size)
    dtype = str(choose_dtype(config.train.dtype, device)).removeprefix("torch.")
    config = config.with_fields("train", device=device.type, dtype=dtype)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = "this machine" if local_size == 1 else f"this machine for each of {local_size} processes"
    return config, usable_bytes(device, local_size), name


def _start_lines(config: Config) -> list[str]:
    if config.train.init_from is None:
        return []
    from mythos.checkpoints.init_from import planned_start  # imports torch.distributed.checkpoint: half a second

    return planned_start(config)


def _training_line(config: Config) -> str:
    """FLOPs per token of training, mean over the run's steps and rows."""
    checkpointing, means = config.parallel.activation_checkpointing, mean_depths(config)
    needed = forward_flops(config.model, config.data.sequence_length).training_at(means.loops, means.backprop)
    executed = executed_flops(config, means, checkpointing, config.parallel.shared > 1)
    recomputed = f", {executed:.3e} executed with what {checkpointing} checkpointing computes again"
    return (
        f"FLOPs per token of training, at {means.loops:.2f} loops and {means.backprop:.2f} with gradient in the mean: "
        f"{needed:.3e} needed{recomputed if executed > needed else ''}"
    )


def _mode(layout: Layout) -> str:
    copies = f"hsdp, {layout.replicate} x {layout.shard}" if layout.mode == "hsdp" else layout.mode
    experts = f", experts over {layout.expert}" if layout.expert > 1 else ""
    return copies + experts + (f", shared experts over {layout.shared}" if layout.shared > 1 else "")


def _cache_line(config: Config) -> str:
    dtype, loops = compute_dtype(config), round(config.depth_mean)
    size = cache_bytes_per_token(config.model, loops, dtype)
    unit = str(dtype).removeprefix("torch.")
    return f"cache bytes per token in {unit}: {size:,} ({size / 2**10:,.2f} KiB) at {loops} loop{'s' * (loops != 1)}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{('es' if what.endswith('s') else 's') * (number != 1)}"


def _memory_lines(config: Config, state: RankState, machine_ranks: int, device_memory: int, device: str) -> list[str]:
    layout, dtype = state.layout, str(compute_dtype(config)).removeprefix("torch.")
    working, step = working_memory(config, state), activations(config, layout)
    rows, loops = deepest_micro_batch(config, layout.size)
    total = state.total + working.total + step.peak
    in_all = f"in all, of {device_memory / 2**30:.4g}" + (f" ({device})" if device else "")
    sizes = {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimizer state": state.optimizer,
        f"weights in {dtype}: the largest unit and what stays gathered": working.gathered,
        "whole gradients kept between micro-batches": working.accumulated,
        "buffers of collectives, and gradients before they are reduced": working.in_transit,
        f"activations that {_count(loops, 'pass')} of {_count(rows, 'row')} keep": step.kept,
        "activations of the rest, at their peak: head, casts, gradients on their way": step.peak - step.kept,
        in_all: total,
    }
    mode = config.parallel.activation_checkpointing
    lines = [f"memory of rank 0 at activation_checkpointing={mode}, GiB"]
    lines += [f"{gib(size):>16}  {what}" for what, size in sizes.items() if size or what == in_all]
    return lines if total <= device_memory else [*lines, shortage(config, layout.size, machine_ranks, device_memory)]


def _collective_lines(config: Config, state: RankState) -> list[str]:
    layout, loops = state.layout, round(config.depth_mean)
    if layout.size == 1:
        return []
    times = micro_batches(config, layout.size)
    title = f"collectives of an optimizer step of {times} micro-batch{'es' * (times > 1)}"
    lines = [title + (f" at {loops} loops" if layout.sharded else "") + ", and GiB that they gather or reduce"]
    for wrap in ("loop", "block") if layout.sharded else (None,):
        configured = wrap in (None, config.parallel.wrap)
        changed = config if configured else config.with_fields("parallel", wrap=wrap)
        changed_state = state if configured else rank_state(changed, layout)
        exchanges = collectives(changed, changed_state, loops, config.depth_backprop)
        parts = [f"{e.count} {kind}{'s' * (e.count != 1)} ({gib(e.bytes)})" for kind, e in exchanges.items() if e.count]
        name = layout.mode if wrap is None else f"wrap={wrap}"
        lines.append(f"  {name:14}{', '.join(parts)}{'  <- configured' if configured and wrap else ''}")
    return lines
